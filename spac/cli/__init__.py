"""The command line: `spac run`, `chat`, `inspect`, `plan`, `tune`, `doctor`, `trace`, `simulate`, `bench`.

Exit codes: 0, 1 (one line on stderr says why), 2 (usage), 130 (interrupted). stdout carries the answer only.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import typer

import spac
from spac.cli import bench, chat, doctor, inspect, plan, run, simulate, trace, tune
from spac.errors import SpacError

app = typer.Typer(
    name="spac",
    help="Run mixture-of-experts language models that are larger than memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)
app.command("trace")(trace.trace)
app.command("simulate")(simulate.simulate)
app.command("bench")(bench.bench)

# typer's copy of click or click itself, whichever this typer has
_ClickException: Any = typer.BadParameter.__mro__[2]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(spac.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
) -> None:
    """Run mixture-of-experts language models that are larger than memory."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit the process."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("spac").setLevel(logging.INFO)
    else:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort of llama.cpp would start a debugger
    _prepare_streams()
    try:
        code = app(args=arguments, prog_name="spac", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _ClickException as e:
        if not e.format_message():  # no arguments: help was shown
            return 2
        command = getattr(getattr(e, "ctx", None), "command_path", "spac")
        print(f"spac: {e.format_message().strip()} (see `{command} --help`)", file=sys.stderr)
        return 2
    except SpacError as e:
        if debug:
            raise
        print(f"spac: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader left
        _leave_stdout()
        return 1
    except (MemoryError, ImportError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        print("spac: out of memory; lower --ctx or --memory", file=sys.stderr)
        return 1
    except OSError as e:
        if debug:
            raise
        print(f"spac: {e}", file=sys.stderr)
        _leave_stdout()
        return 1


def _prepare_streams() -> None:
    """Streams that are closed go nowhere, and what an encoding has no place for is replaced."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for good
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave_stdout() -> None:
    """What is left for stdout goes there, or nowhere: Python would complain of it when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(e: BaseException) -> bool:
    """Where address space is short (ulimit -v), a library cannot be mapped or a thread not be started."""
    return (
        isinstance(e, MemoryError)
        or "failed to map segment" in str(e)
        or "can't start new thread" in str(e)
        or (e.__context__ is not None and _is_out_of_memory(e.__context__))
    )
