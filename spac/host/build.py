"""What the native libraries were built for, compared with this machine before one of them is loaded.

A library for another processor cannot be loaded, and the loader's words for it mislead; one that uses instructions which the CPU
lacks ends in SIGILL. CMake writes `build.json` beside the libraries (cmake/build-info.cmake).
"""

from __future__ import annotations

import ctypes
import json
import platform
import struct
from pathlib import Path
from typing import Any, Final

from spac.errors import LibraryError

# Linux' arch/arm64/include/uapi/asm/hwcap.h: bits of AT_HWCAP, and of AT_HWCAP2 from 64 on
ARM_BITS: Final = {
    "atomics": 8, "asimdhp": 10, "asimdrdm": 12, "asimddp": 20, "sve": 22,
    "sve2": 64 + 1, "i8mm": 64 + 13, "bf16": 64 + 14,
}  # fmt: skip
AT_HWCAP: Final = 16
AT_HWCAP2: Final = 26


def arm_features(auxv: bytes) -> frozenset[str] | None:
    """Names, as in /proc/cpuinfo, of the features in a process's auxiliary vector (/proc/self/auxv); None if it does not tell."""
    values = dict(struct.iter_unpack("QQ", auxv[: len(auxv) // 16 * 16]))
    if AT_HWCAP not in values:
        return None
    bits = values.get(AT_HWCAP, 0) | values.get(AT_HWCAP2, 0) << 64
    return frozenset(name for name, bit in ARM_BITS.items() if bits >> bit & 1)


def x86_features(cpuinfo: str) -> frozenset[str] | None:
    """The flags of the first processor in /proc/cpuinfo; None if there are none."""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split()) or None


def cpu_features() -> frozenset[str] | None:
    """Features of this machine's CPU; None where the system does not tell.

    An emulator shows the host's /proc/cpuinfo, but its own CPU in the auxiliary vector; x86 has no such bits there.
    """
    try:
        if platform.machine() == "aarch64":
            return arm_features(Path("/proc/self/auxv").read_bytes())
        return x86_features(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return None


def check(folder: Path) -> None:
    """Compare the build in a folder with this machine.

    Raises:
        LibraryError: it is for another processor, may use instructions that this CPU does not have, or cannot be loaded.
    """
    build = folder / "build.json"
    if build.is_file():  # else it was not installed by our CMake: the loader decides
        _compare(folder, json.loads(build.read_text()))
    try:
        ctypes.CDLL(str(folder / "libllama.so"))
    except OSError as e:
        raise LibraryError(f"the libraries in {folder} cannot be loaded: {e}") from e


def _compare(folder: Path, build: dict[str, Any]) -> None:
    name, processor, machine = build["name"], build["processor"], platform.machine()
    if processor != machine:
        raise LibraryError(
            f"the libraries in {folder} are for {processor}, this machine is {machine}:"
            f" install the wheel for {machine}, or run `make build` here"
        )
    features = cpu_features()
    missing = [feature for feature in build["needs"] if features is not None and feature not in features]
    if missing:
        other = 'take the build "portable" or "armv8"' if machine == "aarch64" else "run `make build` on this machine"
        raise LibraryError(f'the libraries in {folder} (build "{name}") need what this CPU lacks: {", ".join(missing)}; {other}')
