"""Runs a command inside a memory and read limit, and says what it really used: how an edge device is stood in for.

Control groups do it, version 1 or 2, whichever the host has. Without permission `unavailable()` says so; nothing here pretends.
What was read is taken from the block device's own counters, so that a limit that changes nothing shows. The page cache counts
against the memory limit.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class LimitedRun:
    """What a command did inside its limits.

    Attributes:
        returncode, stdout, stderr: of the command; negative returncode: killed by that signal.
        wall_s: seconds from start to end.
        peak_bytes: the group's largest memory use, page cache included; None without a group.
        device_read_bytes: read from the block device meanwhile, by any process; None if it has no counters.
    """

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    peak_bytes: int | None
    device_read_bytes: int | None


@dataclass(frozen=True)
class _Group:
    """A control group of our own: the folders to enter and the files that hold its figures."""

    folders: tuple[Path, ...]
    peak: Path

    def peak_bytes(self) -> int | None:
        try:
            return int(self.peak.read_text())
        except (OSError, ValueError):
            return None


def unavailable() -> str | None:
    """Why no limit can be set here, or None if one can."""
    try:
        with _group(None, None, None):
            return None
    except OSError as error:
        return f"no control group can be made ({error.filename or _ROOT}: {error.strerror or error}); run as root, or delegate one"


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


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Drops the files' clean pages from the page cache, so that the next run starts cold."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def run_limited(
    command: Sequence[str],
    *,
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    files: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> LimitedRun:
    """Run a command, cold, inside limits.

    Args:
        command: program and arguments.
        memory_bytes: limit on its memory, page cache included; None: none.
        read_bytes_per_s: limit on reads from the disk that holds `files[0]`.
        files: model files; dropped from the page cache first.
        environment: variables to add.
        timeout_s: kill it after this long; the returncode is then -9.

    Raises:
        OSError: a limit was asked for and cannot be set.
    """
    device = device_of(files[0]) if files else None
    drop_page_cache(files)
    limited = memory_bytes is not None or read_bytes_per_s is not None
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_group(memory_bytes, read_bytes_per_s, device)) if limited else None
        before, start = device_read_bytes(device), time.monotonic()
        out, err = stack.enter_context(tempfile.TemporaryFile()), stack.enter_context(tempfile.TemporaryFile())
        # the shell enters the group before it becomes the command, so that nothing of the command is outside
        enter = "".join(f"echo $$ > '{folder}/cgroup.procs' && " for folder in (group.folders if group else ()))
        process = subprocess.Popen(
            ["/bin/sh", "-c", enter + 'exec "$@"', "sh", *command],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            returncode = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            returncode = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall_s, after = time.monotonic() - start, device_read_bytes(device)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
        return LimitedRun(
            returncode, texts[0], texts[1], wall_s, group.peak_bytes() if group else None,
            after - before if before is not None and after is not None else None,
        )  # fmt: skip


@contextlib.contextmanager
def _group(memory_bytes: int | None, read_bytes_per_s: int | None, device: str | None) -> Iterator[_Group]:
    name = f"spac-{os.getpid()}-{time.monotonic_ns()}"
    version_2 = (_ROOT / "cgroup.controllers").exists()
    folders = [_ROOT / name] if version_2 else [_ROOT / "memory" / name]
    if read_bytes_per_s is not None and not version_2:
        folders.append(_ROOT / "blkio" / name)
    try:
        for folder in folders:
            folder.mkdir()
        if version_2:
            (_ROOT / "cgroup.subtree_control").write_text("+memory +io")
        if memory_bytes is not None:
            (folders[0] / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(memory_bytes))
        if read_bytes_per_s is not None:
            if device is None:
                raise OSError(0, "the model is not on a disk whose reads can be limited", str(folders[-1]))
            if version_2:
                (folders[0] / "io.max").write_text(f"{device} rbps={read_bytes_per_s}")
            else:
                (folders[1] / "blkio.throttle.read_bps_device").write_text(f"{device} {read_bytes_per_s}")
        yield _Group(tuple(folders), folders[0] / ("memory.peak" if version_2 else "memory.max_usage_in_bytes"))
    finally:
        for folder in folders:
            with contextlib.suppress(OSError):
                (folder / "memory.force_empty").write_text("0")
            for _ in range(50):  # a group that was just left may be busy for a moment
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)
