"""`spac bench`: contenders side by side, in the limits of an edge device."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spac.cli import options as opt
from spac.cli.terminal import note
from spac.errors import OptionError, SpacError

if TYPE_CHECKING:
    from spac.bench.contender import Contender
    from spac.bench.profile import Profile
    from spac.bench.record import Record
    from spac.bench.runner import Bench
    from spac.bench.suite import Row

RATE_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}

Many = list[str]


def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A GGUF file.", show_default=False)] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Rows from a data file: see --list.", show_default=False)] = None,
    rows: Annotated[str, typer.Option(metavar="TEXT", help="Of the suite, only rows whose name holds this.", show_default=False)] = "",
    profile: Annotated[str | None, typer.Option(metavar="NAME", help="The device to stand in for: see --list.", show_default=False)] = None,
    memory: Annotated[
        Many | None, typer.Option(metavar="SIZES", help="Memory limits: 25%,50% (of the model), 2G, none.", show_default=False)
    ] = None,
    read: Annotated[Many | None, typer.Option(metavar="RATES", help="Read limits by second: 500M,none.", show_default=False)] = None,
    contender: Annotated[
        Many | None,
        typer.Option(
            metavar="SPEC",
            help="Such as stock:mmap,repack=off, spac:store=buffered, bigmoe; repeat it. Else the suite's, or stock, spac, all peers.",
            show_default=False,
        ),
    ] = None,
    also: Annotated[Many | None, typer.Option(metavar="SPEC", help="A contender beside those; repeat it.", show_default=False)] = None,
    peer: Annotated[
        Many | None, typer.Option(metavar="NAME=PATH", help="A built peer: bigmoe, ik_llama, llama-pr25294.", show_default=False)
    ] = None,
    peer_args: Annotated[
        Many | None, typer.Option(metavar="NAME=ARGS", help="More arguments for a peer, in one string.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines with `prompt`; else those that come with spac.", show_default=False)
    ] = None,
    kind: Annotated[Many | None, typer.Option(metavar="KINDS", help="Only prompts of these kinds.", show_default=False)] = None,
    prompts_per_run: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts that one run reads, one after another.")] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Cut or repeat prompts to this length; 0: as they are.", show_default=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Generate so many after the first.", show_default=False)] = None,
    ctx: Annotated[int | None, typer.Option(min=1, metavar="TOKENS", help="Length of the context.", show_default=False)] = None,
    ubatch: Annotated[int | None, typer.Option(min=1, metavar="TOKENS", help="Of all contenders.", show_default=False)] = None,
    threads: opt.Threads = 0,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each contender in each row, in turn.")] = 3,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop a run after this long; it counts as far as it came.")
    ] = 900,
    pause: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait before each run: a board cools, memory of the run before is given back.")
    ] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results go, in a folder of their own.")] = Path("build/bench"),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of that folder; else suite or profile, and the time.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the folder of that name: complete runs are kept.")] = False,
    loadgen: Annotated[bool, typer.Option("--loadgen", help="Let MLPerf's LoadGen drive stock and spac, and compare clocks.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only make the tables and plots of these results again.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show profiles, suites and contenders.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Measure contenders side by side, cold, in the limits of an edge device."""
    if list_:
        show_list()
        return 0
    if report is not None:
        print(write_report(report))
        return 0
    if model is None:
        raise typer.BadParameter("no model: give a GGUF file, or --list, or --report DIR")
    if suite is not None and (profile or memory or read):
        raise typer.BadParameter("a suite has its own limits: give it alone, or --profile, --memory and --read")
    from spac.bench import loadgen as loadgens
    from spac.bench import profile as profiles
    from spac.bench import prompt as prompt_files
    from spac.bench import runner
    from spac.gguf.check import check_model

    parts = tuple(Path(part).resolve() for part in check_model(model).parts)
    device = profiles.load(profile or "native") if suite is None else None
    lengths = {"prompt_tokens": 0 if prompts and prompt_tokens is None else prompt_tokens, "tokens": tokens, "ctx": ctx, "ubatch": ubatch}
    chosen = choose_rows(suite, rows, device, _split(memory), [_rate(text) for text in _split(read)], lengths)
    peers = {key: Path(value).resolve() for key, value in _pairs(peer, "--peer").items()}
    arguments = {key: shlex.split(value) for key, value in _pairs(peer_args, "--peer-args").items()}
    own_prompts = prompts is not None or kind or all(row.prompt_tokens == 0 for row in chosen)
    if loadgen and not loadgens.available():
        raise SpacError("LoadGen is not installed: pip install mlcommons-loadgen, or spac[bench]")
    label = name or f"{suite or profile or 'native'}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / label / "runs").exists() and not resume:
        raise OptionError(f"{out / label}: there are results already; give --resume, or another --name")
    options = runner.Options(
        parts=parts,
        rows=tuple((row, contenders_of(row, contender, also, peers, arguments, from_suite=suite is not None)) for row in chosen),
        prompts=tuple(prompt_files.load(_split(kind), prompts)) if own_prompts else (),
        prompts_per_run=prompts_per_run,
        repeats=repeats,
        threads=threads,
        folder=out / label,
        timeout_s=timeout,
        pause_s=pause,
        profile=device,
        resume=resume,
        loadgen=loadgen,
        command=shlex.join(["spac", *sys.argv[1:]]),
        short=runner.short_names([Path(model), parts[0], out, out.resolve(), *peers.values(), *([prompts] if prompts else [])]),
    )
    return measure(runner.Bench(options), options.folder)


def measure(benchmark: Bench, folder: Path) -> int:
    """Run it, and show the tables of whatever it left; returns the exit code."""
    code = 0
    try:
        benchmark.run()
    except KeyboardInterrupt:
        note(f"bench: interrupted; what was done is in {folder}, go on with --resume --name {folder.name}")
        code = 130
    if (folder / "runs").exists():
        print(write_report(folder))
        note(f"bench: {folder}")
    return code


def choose_rows(
    suite: str | None, only: str, device: Profile | None, memories: Many, reads: Many, lengths: dict[str, int | None]
) -> list[Row]:
    """The rows to run: those of a suite, or a device's, with the lengths that were given instead of theirs.

    Raises:
        OptionError: there are none, or a limit has no meaning.
    """
    from spac.bench import suite as suites

    if device is None:
        assert suite is not None
        found = [row for row in suites.load(suite) if only in row.name]
        if not found:
            raise OptionError(f"suite {suite!r} has no row whose name holds {only!r}")
    else:
        found = suites.of_profile(device, memories, reads, suites.Row(name=""))
    given: dict[str, Any] = {key: value for key, value in lengths.items() if value is not None}
    return [dataclasses.replace(row, **given) for row in found]


def contenders_of(
    row: Row, given: Many | None, also: Many | None, peers: dict[str, Path], arguments: dict[str, list[str]], *, from_suite: bool
) -> tuple[Contender, ...]:
    """A row's contenders: those that were given, else the suite's, else stock, spac and all peers; and `also`. Peers that a suite names
    but that nobody gave a path of are left out.

    Raises:
        OptionError, SpacError: one does not exist, or is not what it should be.
    """
    from spac.bench.contender import Spec, make
    from spac.bench.peers import PEERS

    for name in (*peers, *arguments):
        if name not in PEERS:
            raise OptionError(f"peer {name!r} does not exist: use {', '.join(PEERS)}")
    specs = given or [*row.contenders]
    if not given and not from_suite:
        specs += [name for name in PEERS if name in peers] + ["bigmoe:predict"] * ("bigmoe" in peers)
    asked = [*(given or []), *(also or [])]
    found = []
    for text in dict.fromkeys([*specs, *asked]):
        made = make(text, peers, arguments)
        if made is None and text in asked:
            raise OptionError(f"contender {text!r}: give its binary with --peer {Spec.parse(text).engine}=PATH")
        if made is not None:
            found.append(made)
    if not found:
        raise OptionError(f"row {row.name!r} has no contenders")
    return tuple(found)


def write_report(folder: Path) -> str:
    """Make the tables and plots of a folder's records; returns the tables.

    Raises:
        OptionError: there are no records.
        SpacError: a file cannot be written.
    """
    from spac.bench import plots, report
    from spac.bench.record import read_folder, write_whole

    found = read_folder(folder)
    text = report.markdown(found)
    try:
        write_whole(folder / "table.md", text.encode())
        if plots.available():
            plots.draw([r for r in found if shown(r)], folder)
        else:
            note("bench: no plots: matplotlib is not installed (pip install matplotlib, or spac[bench]); the tables are written")
    except OSError as e:
        raise SpacError(f"{folder}: cannot be written: {e.strerror or e}") from None
    return text


def shown(record: Record) -> bool:
    """Whether a record has anything to plot."""
    return "skipped" not in record


def show_list() -> None:
    """Profiles, suites, contenders."""
    from spac.bench import profile as profiles
    from spac.bench import suite as suites
    from spac.bench.peers import PEERS

    print("profiles (--profile)")
    for name in profiles.names():
        print(f"  {name:<24}{profiles.load(name).title}")
    print("suites (--suite)")
    for name in suites.names():
        found = suites.load(name)
        print(f"  {name:<24}{len(found)} rows: {', '.join(row.name for row in found[:3])}{', ...' if len(found) > 3 else ''}")
    print("contenders (--contender)")
    print("  stock:mmap|direct|mlock|none[,repack=off]")
    print("  spac[:ARGUMENT=VALUE,...]       any argument of spac.Llama, such as store=buffered, paging=on, io_threads=2, repack=off")
    print(f"  {', '.join(PEERS)}    with --peer NAME=PATH; bigmoe:predict, bigmoe:cache=MIB")


def _split(texts: Many | None) -> Many:
    return [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]


def _pairs(texts: Many | None, option: str) -> dict[str, str]:
    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} {text!r}: write NAME=VALUE")
        found[name] = value
    return found


def _rate(text: str) -> str:
    """Bytes by second, as a number, from "500M" (in 1000s, as disks are sold), or "none".

    Raises:
        OptionError: the text has no meaning.
    """
    if text.lower() == "none":
        return "none"
    plain = text.upper().removesuffix("/S").removesuffix("B")
    unit = RATE_UNITS.get(plain[-1:], 1)
    try:
        value = int(float(plain[:-1] if unit > 1 else plain) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise OptionError(f"read limit {text!r} is not a rate: write '500M' (bytes a second) or 'none'")
    return str(value)
