"""Runs the rows: contenders in turn (A B A B ...), each cold, in its limits, each run leaving a record at once."""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from spac.bench import record as records
from spac.bench.contender import Command, Contender, Task
from spac.bench.profile import Profile
from spac.bench.prompt import Prompt, of_length
from spac.bench.suite import Row
from spac.errors import SpacError
from spac.host import limits as cgroups
from spac.host.board import Meter
from spac.host.cores import allowed_cores
from spac.host.limits import LimitedRun, Limits, RunInterrupted
from spac.llama import Llama

# What rows with a fixed length read: cut or repeated to so many tokens.
FIXED: Final = Prompt(
    "fixed",
    "open",
    "NAME\n       open, openat, creat - open and possibly create a file\n\nDESCRIPTION\n       The open() system call opens the "
    "file specified by pathname.  If the specified file does not exist, it may optionally be created by open().\n",
)


@dataclass(frozen=True)
class Options:
    """What a benchmark is made of.

    Attributes:
        parts: the model's files.
        rows: with, for each, its contenders.
        prompts: to choose from; empty: the fixed text.
        prompts_per_run: how many one run reads.
        folder: for the records.
        threads: 0: one for each core that a row leaves.
        timeout_s: of a run; what it has done by then counts.
        pause_s: before each run.
        resume: keep complete records that are there already, and do the rest.
        loadgen: let LoadGen drive the engines that can be driven.
        short: see `record.write`.
    """

    parts: tuple[Path, ...]
    rows: tuple[tuple[Row, tuple[Contender, ...]], ...]
    prompts: tuple[Prompt, ...]
    prompts_per_run: int
    repeats: int
    threads: int
    folder: Path
    timeout_s: float
    pause_s: float = 0
    profile: Profile | None = None
    resume: bool = False
    loadgen: bool = False
    command: str = ""
    short: dict[str, str] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the records so far are on the disk."""


class Bench:
    """One benchmark.

    Raises (from `run`):
        Interrupted: Ctrl-C; what had been done is kept, and marked.
        SpacError: a record cannot be written.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model_bytes = sum(path.stat().st_size for path in options.parts)
        self._constant = {
            "format": records.FORMAT, "model": records.model_facts(options.parts), "machine": records.machine(),
            "versions": records.versions(), "commit": records.commit(), "bench_command": options.command,
            "profile": dataclasses.asdict(options.profile) if options.profile else None,
        }  # fmt: skip
        self._measure = cgroups.unavailable() is None
        self._number = 0
        self._total = options.repeats * sum(len(contenders) for _, contenders in options.rows)
        self._done = self._earlier() if options.resume else {}

    def _earlier(self) -> dict[tuple[str, str, int], bool]:
        try:
            found = records.read_folder(self.options.folder)
        except SpacError:
            return {}
        return {(r["row"]["name"], r["contender"], r["repeat"]): r["complete"] or "skipped" in r for r in found}

    def run(self) -> None:
        """All rows."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, the group and the child go too
        try:
            self._rows()
        finally:
            signal.signal(signal.SIGTERM, before)

    def _rows(self) -> None:
        for row, contenders in self.options.rows:
            asked = row.limits(self.model_bytes)
            missing = cgroups.unenforceable(asked, self.options.parts)
            for name, reason in missing.items():
                note(f"{row.name}: {name} is NOT limited: {reason}")
            for repeat in range(self.options.repeats):
                task = self._task(row, asked, repeat)
                for contender in contenders:
                    self._number += 1
                    if self._done.get((row.name, contender.name, repeat)):
                        continue
                    self._one(task, contender, repeat, missing)

    def _task(self, row: Row, asked: Limits, repeat: int) -> Task:
        options, n = self.options, self.options.prompts_per_run
        chosen = tuple(options.prompts[(repeat * n + i) % len(options.prompts)] for i in range(n)) if options.prompts else (FIXED,)
        if row.prompt_tokens:  # peers take a text, so all are given the same one
            chosen = tuple(of_length(prompt, row.prompt_tokens, self._n_tokens) for prompt in chosen)
        threads = options.threads or asked.cores or allowed_cores()
        return Task(options.parts[0], self.model_bytes, row, asked, threads, chosen)

    @functools.cached_property
    def _vocabulary(self) -> Llama:
        return Llama(str(self.options.parts[0]), vocab_only=True, paging="off", verbose=False)

    def _n_tokens(self, text: str) -> int:
        return len(self._vocabulary.tokenize(text.encode()))

    # -- one run --

    def _one(self, task: Task, contender: Contender, repeat: int, missing: dict[str, str]) -> None:
        path = self.options.folder / "runs" / records.file_name(self._number, task.row.name, contender.name, repeat)
        record: dict[str, Any] = {
            **self._constant, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "row": dataclasses.asdict(task.row), "contender": contender.name,
            "repeat": repeat, "threads": task.threads, "limits": dataclasses.asdict(task.limits), "not_enforced": missing,
            "repacked": contender.repacked, "sha256": {name: records.digest(files) for name, files in contender.files().items()},
            "load_average": os.getloadavg()[0], "complete": False, "prompts": [],
        }  # fmt: skip
        label = f"[{self._number}/{self._total}] {task.row.name}: {contender.name}"
        reason = contender.skip(task)
        if reason is not None:
            self._save(path, {**record, "skipped": reason})
            note(f"{label}: left out: {reason}")
            return
        enforced = task.limits.only(*(name for name in task.limits.names() if name not in missing))
        self._save(path, record)  # what a bench that is killed leaves: marked incomplete
        try:
            time.sleep(self.options.pause_s)
            record["tuning"] = contender.prepare(task, lambda command: self._tuning(command, enforced))
            if self.options.loadgen:
                task = dataclasses.replace(task, loadgen_folder=str(path.with_suffix("").resolve()))
            self._measured(contender, task, enforced, record)
        except KeyboardInterrupt as e:
            if isinstance(e, RunInterrupted) and "commands" not in record:
                record["error"] = "interrupted while tuning"  # what it left belongs to no run
            self._save(path, {**record, "complete": False, "interrupted": True})
            raise Interrupted from None
        self._save(path, record)
        note(f"{label}: {outcome(record)}")

    def _measured(self, contender: Contender, task: Task, enforced: Limits, record: dict[str, Any]) -> None:
        """Run all commands of a contender, and put what they say into the record, also of one that is interrupted."""
        commands = contender.commands(task)
        record["commands"] = [command.arguments for command in commands]
        record["environment"] = commands[0].environment
        record["present_s"] = self._make_memory_present(enforced)
        meter = Meter()
        meter.start()
        complete = True
        try:
            for command in commands:
                run, interrupted = None, False
                try:
                    run = self._limited(command, enforced, meter)
                except RunInterrupted as e:
                    run, interrupted = e.run, True
                figures = contender.figures(run, command)
                complete = complete and figures["complete"] and not interrupted
                merge(record, run, figures)
                if interrupted:
                    raise KeyboardInterrupt
        finally:
            record["complete"] = complete
            record["board"] = meter.result()
            record["warnings"] = warnings(record)

    def _tuning(self, command: Command, enforced: Limits) -> LimitedRun:
        self._make_memory_present(enforced)
        return self._limited(command, enforced, None)

    def _make_memory_present(self, enforced: Limits) -> float:
        return cgroups.make_memory_present(enforced.memory_bytes or self.model_bytes)

    def _limited(self, command: Command, enforced: Limits, meter: Meter | None) -> LimitedRun:
        with tempfile.TemporaryDirectory() as folder:  # some peers leave a log where they run
            return self._run(command, enforced, meter, Path(folder))

    def _run(self, command: Command, enforced: Limits, meter: Meter | None, folder: Path) -> LimitedRun:
        return cgroups.run_limited(
            command.arguments,
            memory_bytes=enforced.memory_bytes,
            read_bytes_per_s=enforced.read_bytes_per_s,
            read_iops=enforced.read_iops,
            cores=enforced.cores,
            cpu_share=enforced.cpu_share,
            measure=self._measure,
            files=self.options.parts,
            environment=command.environment,
            folder=folder,
            timeout_s=self.options.timeout_s,
            on_sample=meter.sample if meter else None,
        )

    def _save(self, path: Path, record: dict[str, Any]) -> None:
        records.write(path, record, self.options.short)


def merge(record: dict[str, Any], run: LimitedRun, figures: dict[str, Any]) -> None:
    """Add one process's figures to a record: sums of what is used up, the largest of peaks."""
    prompts = [*record["prompts"], *figures.pop("prompts")]
    record.update(figures)
    record["prompts"] = prompts
    for name in ("wall_s", "device_read_bytes", "cpu_s", "major_faults"):
        value = getattr(run, name)
        record[name] = value if record.get(name) is None or value is None else record[name] + value
    for name in ("peak_bytes", "page_cache_bytes", "cached_before_bytes"):
        value = getattr(run, name)
        record[name] = value if record.get(name) is None else max(record[name], value or 0)
    for name in ("oom_killed", "timed_out"):
        record[name] = record.get(name, False) or getattr(run, name)
    record["returncode"] = run.returncode
    if run.returncode != 0:
        record.setdefault("error", reason_of(run))
        record["stderr_tail"] = run.stderr[-2000:]


def reason_of(run: LimitedRun) -> str:
    """Why a process ended as it did, in a line."""
    if run.timed_out:
        return f"stopped after {run.wall_s:.0f} s"
    if run.oom_killed:
        return "killed at the memory limit"
    if run.returncode < 0:
        return f"killed by signal {-run.returncode}"
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {run.returncode}"


def warnings(record: dict[str, Any]) -> list[str]:
    """What makes a record doubtful."""
    found = []
    own, device = record.get("expert", {}).get("bytes_read"), record.get("device_read_bytes")
    if own and device is not None and not record["row"]["warm"] and device < 0.95 * own:
        found.append(f"the disk counted {device} bytes, the pager {own}: reads came from a cache")
    process = record.get("process_read_bytes")
    if process and device is not None and device > 1.1 * process + 100e6:
        found.append(f"others read {(device - process) / 1e9:.2f} GB from the disk meanwhile: not quiet")
    if record.get("locked_bytes", record["model"]["bytes"]) < 0.85 * record["model"]["bytes"]:
        reason = "`ulimit -l` is low, or weights are repacked, which llama.cpp does not lock"
        found.append(f"only {record['locked_bytes']} bytes are locked: {reason}")
    if (record.get("cached_before_bytes") or 0) > 0.01 * record["model"]["bytes"]:
        found.append(f"{record['cached_before_bytes']} bytes of the model were still cached at the start: not cold")
    peak, limit = record.get("peak_bytes"), record["limits"]["memory_bytes"]
    if peak and limit and peak > limit * 1.001 + mmap.PAGESIZE and "memory_bytes" not in record["not_enforced"]:
        found.append(f"the peak of {peak} bytes exceeds the limit")
    return found


def outcome(record: dict[str, Any]) -> str:
    """A run's result for the person who waits."""
    speed, first = records.decode_tokens_per_s(record), next((p["ttft_s"] for p in record["prompts"] if p.get("ttft_s")), None)
    shown = f"{speed:.2f} tokens/s" if speed else f"first token after {first:.2f} s" if first else "no token"
    if "loadgen" in record:
        shown = f"LoadGen's and our own median latency differ by {record['loadgen']['p50_difference']:.2%}"
    problem = record.get("error") or ("" if record["complete"] else "incomplete")
    return shown + (f" ({problem})" if problem else "") + "".join(f" [{w}]" for w in record.get("warnings", []))


def note(text: str) -> None:
    """A line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def short_names(paths: Sequence[Path]) -> dict[str, str]:
    """What stands for this machine's paths in records: the project's own are relative, others only named."""
    found = {f"{records.ROOT}{os.sep}": "", str(records.ROOT): "."}
    for path in paths:
        if path.is_absolute() and not path.is_relative_to(records.ROOT):
            found[str(path)] = f"PATH/{path.name}"
    return found
