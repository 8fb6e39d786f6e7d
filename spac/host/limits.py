"""Runs a command inside limits of memory, reads and processors, and says what it really used: how an edge device is stood in for.

Control groups do it, version 1 or 2, whichever the host has. Without permission `unavailable()` and `unenforceable()` say so;
nothing here pretends. What was read is taken from the block device's own counters, so that a limit that changes nothing shows.
The page cache counts against the memory limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import spac
from spac.host.memory import available_bytes, drop_file_cache

_ROOT = Path("/sys/fs/cgroup")
_SECTOR_BYTES = 512
_PERIOD_US = 100_000  # of the processor quota; the kernel's default
SAMPLE_S = 0.5
_STEP_BYTES = 1 << 28


@dataclass(frozen=True)
class Limits:
    """What a command may take; None: no limit.

    Attributes:
        memory_bytes: memory, page cache included.
        read_bytes_per_s, read_iops: reads from one disk. The kernel splits long reads, and each part counts.
        cores: run on so many of the processors that this process may use.
        cpu_share: share of each of these that it may use, 0.0 to 1.0.
    """

    memory_bytes: int | None = None
    read_bytes_per_s: int | None = None
    read_iops: int | None = None
    cores: int | None = None
    cpu_share: float | None = None

    def only(self, *names: str) -> Limits:
        """These limits, without those that are not named."""
        return Limits(**{name: value for name, value in dataclasses.asdict(self).items() if name in names})

    def names(self) -> list[str]:
        """Names of the limits that are set."""
        return [name for name, value in dataclasses.asdict(self).items() if value is not None]


@dataclass(frozen=True)
class LimitedRun:
    """What a command did inside its limits.

    Attributes:
        returncode, stdout, stderr: of the command; negative returncode: killed by that signal.
        wall_s: seconds from start to end.
        peak_bytes: the group's largest memory use, page cache included; None without a group.
        device_read_bytes: read from the block device meanwhile, by any process; None if it has no counters.
        page_cache_bytes: the group's largest page cache, sampled every `SAMPLE_S`; None without a group.
        cached_before_bytes: what of the files was still in memory at the start, although it was dropped.
        cpu_s: processor seconds of the command and what it waited for.
        major_faults: page faults that had to read.
        oom_killed: the kernel killed it at the memory limit.
        timed_out: it was killed after `timeout_s`.
    """

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    peak_bytes: int | None
    device_read_bytes: int | None
    page_cache_bytes: int | None = None
    cached_before_bytes: int = 0
    cpu_s: float = 0.0
    major_faults: int = 0
    oom_killed: bool = False
    timed_out: bool = False


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C came while a command ran; it was killed, `run` is what it left."""

    def __init__(self, run: LimitedRun) -> None:
        super().__init__()
        self.run = run


# -- the disk and its cache --


def device_of(path: Path) -> str | None:
    """major:minor of the whole disk that holds a file, or None if it lies on none (tmpfs, network)."""
    number = path.resolve().stat().st_dev
    sysfs = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not sysfs.exists():
        return None
    if (sysfs / "partition").exists():
        sysfs = sysfs.parent
    return (sysfs / "dev").read_text().strip()


def device_read_bytes(device: str | None) -> int | None:
    """Bytes read from a disk since it appeared: the third field of its `stat` counts sectors of 512."""
    if device is None:
        return None
    return int(Path(f"/sys/dev/block/{device}/stat").read_text().split()[2]) * _SECTOR_BYTES


def cached_bytes(paths: Sequence[Path]) -> int:
    """What of these files is in the page cache, in whole pages (mincore(2)); 0 where that cannot be told."""
    libc, total = ctypes.CDLL(None), 0
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    for path in paths:
        size = path.stat().st_size
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        fd = os.open(path, os.O_RDONLY)
        try:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if address in (None, ctypes.c_void_p(-1).value):
            continue
        if libc.mincore(address, size, pages) == 0:
            total += len(pages.raw.translate(None, bytes(range(0, 256, 2)))) * mmap.PAGESIZE  # bit 0: in memory
        libc.munmap(address, size)
    return total


# -- control groups --


def unavailable() -> str | None:
    """Why no limit can be set here, or None if one can."""
    try:
        with _group(Limits(), None):
            return None
    except OSError as error:
        return _reason(error)


def unenforceable(limits: Limits, files: Sequence[Path] = ()) -> dict[str, str]:
    """Those of the limits that cannot be set here, by name, and why."""
    device = device_of(files[0]) if files else None
    reasons: dict[str, str] = {}
    for name in limits.names():
        # a share is of the cores
        names = ("cores", "cpu_share") if name == "cpu_share" else (name,)
        try:
            with _group(limits.only(*names), device):
                pass
        except OSError as error:
            reasons[name] = _reason(error)
    return reasons


def _reason(error: OSError) -> str:
    return f"no control group can be made ({error.filename or _ROOT}: {error.strerror or error}); run as root, or delegate one"


@dataclass(frozen=True)
class _Group:
    """A control group of our own: the folders to enter (one with version 2), and its figures."""

    folders: tuple[Path, ...]
    version_2: bool

    def _read(self, name: str) -> str:
        try:
            return (self.folders[0] / name).read_text()
        except OSError:
            return ""

    def _field(self, file: str, *keys: str) -> int | None:
        fields = dict(line.split(maxsplit=1) for line in self._read(file).splitlines() if " " in line)
        return next((int(fields[key]) for key in keys if key in fields), None)

    def peak_bytes(self) -> int | None:
        text = self._read("memory.peak" if self.version_2 else "memory.max_usage_in_bytes")
        return int(text) if text.strip().isdigit() else None

    def used_bytes(self) -> int | None:
        text = self._read("memory.current" if self.version_2 else "memory.usage_in_bytes")
        return int(text) if text.strip().isdigit() else None

    def page_cache_bytes(self) -> int | None:
        return self._field("memory.stat", *(["file"] if self.version_2 else ["total_cache", "cache"]))

    def oom_kills(self) -> int:
        return self._field("memory.events" if self.version_2 else "memory.oom_control", "oom_kill") or 0


def _settings(limits: Limits, device: str | None, version_2: bool) -> list[tuple[str, str, str]]:
    """(controller, file, value) for each limit, in the order in which they must be written."""
    found: list[tuple[str, str, str]] = []
    if limits.memory_bytes is not None:
        found.append(("memory", "memory.max" if version_2 else "memory.limit_in_bytes", str(limits.memory_bytes)))
    reads = {"rbps": limits.read_bytes_per_s, "riops": limits.read_iops}
    if any(value is not None for value in reads.values()):
        if device is None:
            raise OSError(0, "the model is not on a disk whose reads can be limited")
        if version_2:
            found.append(("io", "io.max", " ".join([device, *(f"{key}={value}" for key, value in reads.items() if value is not None)])))
        else:
            files = {"rbps": "blkio.throttle.read_bps_device", "riops": "blkio.throttle.read_iops_device"}
            found += [("blkio", files[key], f"{device} {value}") for key, value in reads.items() if value is not None]
    allowed = sorted(os.sched_getaffinity(0))
    used = allowed[: limits.cores] if limits.cores is not None else allowed
    if limits.cores is not None:
        if not version_2:
            found.append(("cpuset", "cpuset.mems", (_ROOT / "cpuset" / "cpuset.mems").read_text().strip()))
        found.append(("cpuset", "cpuset.cpus", ",".join(map(str, used))))
    if limits.cpu_share is not None:
        quota = max(1000, int(_PERIOD_US * limits.cpu_share * len(used)))  # the kernel takes no less than a millisecond
        if version_2:
            found.append(("cpu", "cpu.max", f"{quota} {_PERIOD_US}"))
        else:
            found += [("cpu", "cpu.cfs_period_us", str(_PERIOD_US)), ("cpu", "cpu.cfs_quota_us", str(quota))]
    return found


def _forbid_swap(folder: Path, memory_bytes: int, version_2: bool) -> None:
    """What leaves for swap does not count as memory; a limit that can be left is none. Absent where the kernel counts no swap."""
    path = folder / ("memory.swap.max" if version_2 else "memory.memsw.limit_in_bytes")
    if path.exists():
        path.write_text("0" if version_2 else str(memory_bytes))


@contextlib.contextmanager
def _group(limits: Limits, device: str | None) -> Iterator[_Group]:
    """A group with these limits, removed afterwards. It always counts memory."""
    name = f"spac-{os.getpid()}-{time.monotonic_ns()}"
    version_2 = (_ROOT / "cgroup.controllers").exists()
    settings = _settings(limits, device, version_2)
    controllers = list(dict.fromkeys(["memory", *(controller for controller, _, _ in settings)]))
    folder = {controller: _ROOT / name if version_2 else _ROOT / controller / name for controller in controllers}
    folders = tuple(dict.fromkeys(folder.values()))
    try:
        for path in folders:
            path.mkdir()
        if version_2:
            (_ROOT / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))
        for controller, file, value in settings:
            (folder[controller] / file).write_text(value)
        if limits.memory_bytes is not None:
            _forbid_swap(folder["memory"], limits.memory_bytes, version_2)
        yield _Group(folders, version_2)
    finally:
        for path in folders:
            with contextlib.suppress(OSError):
                (path / "memory.force_empty").write_text("0")
            for _ in range(50):  # a group that was just left may be busy for a moment
                try:
                    path.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)


# -- the machine's memory --


def make_memory_present(n_bytes: int) -> float:
    """Use so much memory once and free it, so that its next use costs what it does where memory is a machine's own.

    A virtual machine that reports free pages to its host (Linux' `page_reporting`) gets them back one fault at a time, which can take
    longer than reading a disk. At most half of what is available is used.

    Returns:
        How long it took, in seconds.
    """
    start = time.perf_counter()
    length = min(n_bytes, available_bytes() // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, length, _STEP_BYTES):  # Ctrl-C is heard between two steps
                end = min(at + _STEP_BYTES, length)
                memory[at : end : mmap.PAGESIZE] = bytes((end - at) // mmap.PAGESIZE)
    return time.perf_counter() - start


# -- running --


def run_limited(
    command: Sequence[str],
    *,
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    read_iops: int | None = None,
    cores: int | None = None,
    cpu_share: float | None = None,
    measure: bool = False,
    files: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float | None = None,
    on_sample: Callable[[], None] | None = None,
) -> LimitedRun:
    """Run a command, cold, inside limits.

    Args:
        command: program and arguments.
        memory_bytes, read_bytes_per_s, read_iops, cores, cpu_share: see `Limits`. Reads are those from the disk that holds `files[0]`.
        measure: make a group even if nothing is limited, for its figures.
        files: model files; dropped from the page cache first.
        environment: variables to add.
        folder: where it runs; None: where we are.
        timeout_s: kill it after this long; the returncode is then -9.
        on_sample: called every `SAMPLE_S` while it runs.

    Raises:
        OSError: a limit was asked for and cannot be set.
        RunInterrupted: Ctrl-C; the command was killed.
    """
    limits = Limits(memory_bytes, read_bytes_per_s, read_iops, cores, cpu_share)
    device = device_of(files[0]) if files else None
    drop_file_cache(*map(str, files))
    cached = cached_bytes(files)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_group(limits, device)) if limits.names() or measure else None
        watch = _Watch(group, on_sample)
        out, err = stack.enter_context(tempfile.TemporaryFile()), stack.enter_context(tempfile.TemporaryFile())
        before, start, usage = device_read_bytes(device), time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        inherited = {name: value for name, value in os.environ.items() if name not in spac.variables_set}
        # the shell enters the group before it becomes the command, so that nothing of the command is outside
        enter = "".join(f"echo $$ > '{folder}/cgroup.procs' && " for folder in (group.folders if group else ()))
        process = subprocess.Popen(
            ["/bin/sh", "-c", enter + 'exec "$@"', "sh", *command],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**inherited, **(environment or {})}, cwd=folder,
        )  # fmt: skip
        interrupted = timed_out = False
        try:
            timed_out = watch.wait(process, timeout_s)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        wall_s, after, usage_after = time.monotonic() - start, device_read_bytes(device), resource.getrusage(resource.RUSAGE_CHILDREN)
        run = LimitedRun(
            returncode=process.returncode, stdout=_text(out), stderr=_text(err), wall_s=wall_s,
            peak_bytes=(group.peak_bytes() or watch.peak_bytes) if group else None,
            device_read_bytes=after - before if before is not None and after is not None else None,
            page_cache_bytes=watch.page_cache_bytes,
            cached_before_bytes=cached,
            cpu_s=usage_after.ru_utime + usage_after.ru_stime - usage.ru_utime - usage.ru_stime,
            major_faults=usage_after.ru_majflt - usage.ru_majflt,
            oom_killed=group.oom_kills() > 0 if group else False,
            timed_out=timed_out,
        )  # fmt: skip
    if interrupted:
        raise RunInterrupted(run)
    return run


class _Watch:
    """Waits for a process and looks at its group meanwhile."""

    def __init__(self, group: _Group | None, on_sample: Callable[[], None] | None) -> None:
        self._group = group
        self._on_sample = on_sample
        self.page_cache_bytes: int | None = None
        self.peak_bytes: int | None = None

    def wait(self, process: subprocess.Popen[bytes], timeout_s: float | None) -> bool:
        """Whether it took longer than `timeout_s`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = SAMPLE_S if end is None else min(SAMPLE_S, end - time.monotonic())
            try:
                process.wait(max(left, 0))
                return False
            except subprocess.TimeoutExpired:
                if end is not None and time.monotonic() >= end:
                    return True
            self._sample()

    def _sample(self) -> None:
        if self._group is not None:
            self.page_cache_bytes = _largest(self.page_cache_bytes, self._group.page_cache_bytes())
            self.peak_bytes = _largest(self.peak_bytes, self._group.used_bytes())
        if self._on_sample is not None:
            self._on_sample()


def _largest(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")
