"""What the kernel gives: pages, control groups, pressure, and how it counts memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from spac.doctor.finding import Finding, Level
from spac.host.board import pressure_s
from spac.host.memory import KIB, cgroup_limits, format_bytes
from spac.host.system import System, whole
from spac.stats import StoresProbe


def check(system: System, probe: StoresProbe | None) -> Iterator[Finding]:
    """Kernel features. Without a probe (a recorded tree, no libspac) what the version says."""
    release = system.text("/proc/sys/kernel/osrelease")
    yield Finding("kernel", "version", Level.ok, f"Linux {release}" if release else "Linux, version not shown", "", {"release": release})
    yield _pages(system, probe)
    yield _populating(release, probe)
    yield from _huge_pages(system)
    yield from _groups(system)
    if pressure_s(system.root):
        yield Finding("kernel", "pressure", Level.ok, "pressure (PSI) is counted")
    else:
        advice = "psi=1 on the kernel's command line adds it: experts give memory back sooner, and `spac bench` records it"
        yield Finding("kernel", "pressure", Level.note, "pressure (PSI) is not counted", advice)


def _pages(system: System, probe: StoresProbe | None) -> Finding:
    match = re.search(r"^KernelPageSize:\s*(\d{1,9}) kB", system.text("/proc/self/smaps"), re.MULTILINE)
    page = int(match[1]) * KIB if match else probe.page_bytes if probe else 0
    if not page:
        return Finding("kernel", "pages", Level.note, "their size is not shown")
    text = f"{format_bytes(page)} each" + (": each tensor of an expert takes whole ones" if page > 4 * KIB else "")
    return Finding("kernel", "pages", Level.ok, text, "", {"page_bytes": page})


def _populating(release: str, probe: StoresProbe | None) -> Finding:
    populates = probe.populates if probe else _at_least(release, 5, 14)
    text = (
        "a mapping is read in at once (MADV_POPULATE_READ)"
        if populates
        else "a mapping is read in page by page: MADV_POPULATE_READ is missing"
    )
    advice = "" if populates else "Linux 5.14 has it; matters for --store mmap only"
    return Finding("kernel", "populating", Level.ok if populates else Level.note, text, advice, {"populates": populates})


def _huge_pages(system: System) -> Iterator[Finding]:
    text = system.text("/sys/kernel/mm/transparent_hugepage/enabled")
    size = system.number("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if "[never]" in text:
        advice = (
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`: fewer page faults where an expert is larger than one"
        )
        yield Finding("kernel", "huge pages", Level.note, "off", advice)
    elif text and size and size > 0:
        yield Finding("kernel", "huge pages", Level.ok, f"of {format_bytes(size)}, for experts that are larger", "", {"bytes": size})


def _groups(system: System) -> Iterator[Finding]:
    folder = "/sys/fs/cgroup"
    controllers = system.text(f"{folder}/cgroup.controllers").split()
    version = 2 if system.exists(f"{folder}/cgroup.controllers") else 1 if system.glob(f"{folder}/*/cgroup.procs") else 0
    facts: dict[str, Any] = {"version": version}
    limits = cgroup_limits(system.root / "sys/fs/cgroup", system.root / "proc/self/cgroup")
    if limits:
        tightest = min(limits, key=lambda group: group.limit_bytes - group.used_bytes)
        facts |= {"limit_bytes": tightest.limit_bytes, "used_bytes": tightest.used_bytes}
        text = f"version {version}, limits this shell to {format_bytes(tightest.limit_bytes)} ({format_bytes(tightest.used_bytes)} used)"
        yield Finding("kernel", "control groups", Level.note, text, "--memory auto keeps below that", facts)
    elif version == 0:
        yield Finding("kernel", "control groups", Level.note, "none here", "only `spac bench` needs them", facts)
    elif version == 2 and "memory" not in controllers:
        advice = "cgroup_enable=memory in /boot/firmware/cmdline.txt (Raspberry Pi) turns it on; only `spac bench` and other limits need it"
        yield Finding("kernel", "control groups", Level.note, "version 2, without memory", advice, facts)
    else:
        yield Finding("kernel", "control groups", Level.ok, f"version {version}, no memory limit", "", facts)
    own = re.search(r"^0::(/.*)$", system.text("/proc/self/cgroup"), re.MULTILINE)
    quota = re.match(r"(\d{1,15}) (\d{1,15})$", system.text(f"{folder}{own[1] if own else ''}/cpu.max"))
    if quota and int(quota[2]) > 0:
        cores = int(quota[1]) / int(quota[2])
        yield Finding(
            "kernel", "processor quota", Level.note, f"{cores:.2g} processors' worth of time", "give --threads no more", {"cores": cores}
        )


def _at_least(release: str, major: int, minor: int) -> bool:
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    return match is not None and (int(match[1]), int(match[2])) >= (major, minor)


def check_memory(system: System) -> Iterator[Finding]:
    """How much there is, and whether reserving address space is counted as using it."""
    fields = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB$", system.text("/proc/meminfo"), re.MULTILINE))
    total, available = (int(fields.get(key, 0)) * KIB for key in ("MemTotal", "MemAvailable"))
    facts = {"total_bytes": total, "available_bytes": available}
    if not total:
        yield Finding("memory", "memory", Level.note, "/proc/meminfo does not say", "give --memory")
    else:
        level = Level.note if available < total // 2 else Level.ok
        advice = (
            "end what is not needed; without a desktop: `sudo systemctl set-default multi-user.target` and a restart"
            if level == Level.note
            else ""
        )
        yield Finding("memory", "memory", level, f"{format_bytes(available)} of {format_bytes(total)} available", advice, facts)
    if whole(system.text("/proc/sys/vm/overcommit_memory")) == 2:
        advice = "`sudo sysctl vm.overcommit_memory=0`: slots for all experts are reserved, only a budget of them is ever filled"
        yield Finding("memory", "overcommit", Level.warning, "vm.overcommit_memory is 2: address space counts as memory", advice)
