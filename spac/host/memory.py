"""Amounts of memory: reading what a user wrote, finding what the machine leaves, measuring what this process takes.

Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from spac.errors import BudgetError, OptionError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

GROUP_HEADROOM_BYTES: Final = 4 * MIB  # what must stay free of a control group's limit
NO_LIMIT: Final = 1 << 60  # cgroup v1 writes a huge number for none

_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE: Final = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<unit>[KMGT]?)(I?B)?|(?P<percent>%))", re.IGNORECASE)


def parse_memory(value: str | int, of_bytes: int | None = None) -> int | None:
    """Bytes meant by "4G", "512MiB", "1.5 GB", "50%" or a number; None for "auto".

    K, M, G and T count in 1024s, with or without "B" or "iB".

    Args:
        of_bytes: of what a percentage is; None: of the machine's memory.

    Raises:
        OptionError: the value has no meaning, or is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise OptionError(f"memory must be a size such as '4G', or 'auto', not {value!r}")
    if isinstance(value, int):
        if value <= 0:
            raise OptionError(f"memory must be more than 0 bytes, not {value}")
        return value
    text = value.strip()
    if text.lower() == "auto":
        return None
    match = _SIZE.fullmatch(text)
    if not match:
        raise OptionError(f"memory {value!r} is not a size: write '4G', '512M', '50%' or 'auto'")
    number = float(match["number"])
    if match["percent"]:
        if number > 100:
            raise OptionError(f"memory {value!r} is more than the machine has")
        scale = (total_bytes() if of_bytes is None else of_bytes) / 100
    else:
        scale = _UNITS[match["unit"].upper()]
    n_bytes = int(number * scale) if number < 1e12 else sys.maxsize + 1
    if not 0 < n_bytes <= sys.maxsize:
        raise OptionError(f"memory {value!r} is out of range")
    return n_bytes


def format_bytes(n: int, *, up: bool = False) -> str:
    """Three significant digits for people: "1.86 GiB", "512 MiB". `up`: never less than it is, as what is needed."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5 or unit == "GiB":
            break
        size /= 1024
    if unit == "B":
        return f"{n} B"
    if up and size > 0:
        step = 10.0 ** max(0, 2 - math.floor(math.log10(size)))
        size = math.ceil(size * step) / step
    return f"{size:.3g} {unit}" if abs(size) < 999.5 else f"{size:.0f} {unit}"


# -- what the machine leaves --


@dataclass(frozen=True)
class CgroupMemory:
    """The tightest memory cgroup that this process is in, or one above it. Bytes.

    `used_bytes` leaves out page cache that the kernel can drop at once.
    """

    limit_bytes: int
    used_bytes: int


def available_bytes(cgroup_root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")) -> int:
    """What this process can take in all, its present memory included: the least that the machine and its cgroups leave."""
    import psutil

    own = resident_bytes()
    available = int(psutil.virtual_memory().available) + own
    for group in cgroup_limits(cgroup_root, proc):
        available = min(available, group.limit_bytes - max(0, group.used_bytes - own))
    return max(available, 0)


def auto_limit_bytes() -> int:
    """`memory="auto"`: what is available less headroom for others (a twentieth; at least 256 MiB where there is plenty)."""
    available = available_bytes()
    return available - max(available // 20, min(256 * MIB, available // 8))


def total_bytes() -> int:
    """The machine's memory, or the tightest cgroup limit if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(group.limit_bytes for group in cgroup_limits())])


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")) -> list[CgroupMemory]:
    """All memory limits above this process, of cgroup v1 or v2; unlimited ones are left out."""
    found: list[CgroupMemory] = []
    for folder in cgroup_folders(root, proc):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((n for n in limits if n is not None), default=NO_LIMIT)
        if limit < NO_LIMIT:
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            found.append(CgroupMemory(limit, max(used - _reclaimable(folder), 0)))
    return found


def cgroup_folders(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Of the memory control groups that this process is in, v1 or v2, those above them included."""
    try:
        lines = proc.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + [""] * 3)[:3]
        if not path:
            continue
        mounts = [root, root / "unified"] if controllers == "" else [root / "memory"] if "memory" in controllers.split(",") else []
        for mount in mounts:
            folder = mount / path.lstrip("/")
            if not folder.is_dir():
                folder = mount  # in a container the mount may begin at our own group
            yield folder
            while folder != mount and mount in folder.parents:
                folder = folder.parent
                yield folder


def headrooms() -> dict[Path, int]:
    """Where to look for what memory is left, and how many bytes must stay free there: the machine, and our control groups.

    A group may be ours alone, and filled up to its limit by intention: little stays free there. `auto_limit_bytes` leaves more.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups = {folder: GROUP_HEADROOM_BYTES for folder in cgroup_folders() if (folder / "memory.stat").exists()}
    return {Path("/proc"): min(max(machine // 64, 32 * MIB), 256 * MIB), **groups}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(folder: Path) -> int:
    try:
        text = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return 0
    fields: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE))
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


# -- what this process takes --

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def page_bytes() -> int:
    """The unit of expert budgets, as libspac has it: the kernel's page, or the larger one that SPAC_PAGE_BYTES pretends (store.h)."""
    text = os.environ.get("SPAC_PAGE_BYTES", "")
    wanted = int(text) if text.isascii() and text.isdigit() else 0
    return wanted if wanted > _PAGE and wanted & (wanted - 1) == 0 else _PAGE


def resident_bytes() -> int:
    """Resident memory of this process now, mapped files included."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read after every decode
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that this process had resident at a time."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
    except OSError:
        pass
    import resource

    scale = 1 if sys.platform == "darwin" else KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def check_address_space(need_bytes: int) -> None:
    """llama.cpp aborts where an allocation fails, so ask before: is so much more address space allowed (`ulimit -v`)?

    Raises:
        BudgetError: it is not.
    """
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    except OSError:
        used = 0
    if used + need_bytes > limit:
        raise BudgetError(
            f"the address space of this process is limited to {format_bytes(limit)} (ulimit -v), about"
            f" {format_bytes(used + need_bytes)} are needed; raise that limit, --memory bounds real memory"
        )


def drop_file_cache(*paths: str) -> None:
    """Ask the kernel to drop clean, unmapped cache of these files: in a memory cgroup it counts as ours."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass
        finally:
            os.close(fd)


def drop_own_file_cache() -> None:
    """The same for what this process itself was loaded from: compiled modules, and libraries past their mapped pages."""
    paths = {str(cached) for module in list(sys.modules.values()) if (cached := getattr(module, "__cached__", None))}
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        maps = []
    paths |= {fields[5] for line in maps if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith("/")}
    drop_file_cache(*sorted(paths))


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        return libc
    except (OSError, AttributeError):  # not glibc
        return None


def tame_malloc() -> None:
    """Let glibc give freed memory back: few arenas, and fixed thresholds for mapping and trimming.

    By default the thresholds grow up to 64 MiB with what is freed, and each thread gets an arena; both would come out of
    the experts' budget.
    """
    libc = _libc()
    if libc is not None:
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_mmap_threshold, 256 * KIB)
        libc.mallopt(m_trim_threshold, 256 * KIB)
        libc.mallopt(m_arena_max, 2)


def trim_malloc() -> None:
    """Give back what malloc keeps but nobody uses."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
