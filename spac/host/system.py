"""The machine as the kernel shows it, read below one root: `/`, or a recorded tree. Whatever is missing or damaged reads as nothing.

Names of board and processor, and which file system holds a path, are here because more than one part of spac asks for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 20  # of any file read


@dataclass(frozen=True)
class System:
    """Files below `root`; paths are absolute, as the machine itself has them. Nothing raises."""

    root: Path = Path("/")

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str:
        """What a file holds, without the spaces and zeros around it; "" if it cannot be read."""
        try:
            with self._at(path).open("rb") as file:
                return file.read(MAX_BYTES).decode(errors="replace").strip(" \t\r\n\0")
        except (OSError, ValueError):
            return ""

    def number(self, path: str) -> int | None:
        """A file that holds one whole number."""
        return whole(self.text(path))

    def glob(self, pattern: str) -> list[str]:
        """Paths that match, in order."""
        try:
            return sorted("/" + str(path.relative_to(self.root)) for path in self.root.glob(pattern.lstrip("/")))
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        """Is anything there?"""
        try:
            return self._at(path).exists()
        except (OSError, ValueError):
            return False

    def resolve(self, path: str) -> str | None:
        """The path with all links followed; None if it leads nowhere, or out of the root."""
        try:
            root, found = os.path.realpath(self.root), os.path.realpath(self._at(path), strict=True)
        except (OSError, ValueError):
            return None
        return "/" + os.path.relpath(found, root) if Path(found).is_relative_to(root) else None

    def command(self, *words: str) -> str:
        """What a program prints; of a recorded tree what it printed, from a file `commands/WORDS`. "" if there is none."""
        if self.root != Path("/"):
            return self.text("commands/" + " ".join(words))
        if shutil.which(words[0]) is None:
            return ""
        try:
            found = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return found.stdout[:MAX_BYTES].decode(errors="replace").strip()


def whole(text: str) -> int | None:
    """A whole number below 2^63, or None."""
    text = text.strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


# -- names --


def board_model(system: System) -> str:
    """What the device tree calls the board, else what a PC's firmware says; "" if nobody does."""
    if name := system.text("/proc/device-tree/model"):
        return name.split("\0")[0]
    names = [system.text(f"/sys/class/dmi/id/{key}") for key in ("sys_vendor", "product_name")]
    return " ".join(name for name in names if name)


# CPU part numbers of Arm's own cores that boards have: `MIDR_EL1` in the kernel's arch/arm64/include/asm/cputype.h
_ARM_CORES: Final = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE",
    0xD49: "Neoverse-N2", 0xD4F: "Neoverse-V2",
}  # fmt: skip


def cpu_model(system: System) -> str:
    """The processor's name from /proc/cpuinfo; "" if it has none."""
    text = system.text("/proc/cpuinfo")
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return match[1].strip()
    parts = dict.fromkeys(int(part, 16) for part in re.findall(r"^CPU part\s*:\s*0x([0-9a-fA-F]{1,8})$", text, re.MULTILINE))
    return ", ".join(_ARM_CORES.get(part, f"Arm part {part:#x}") for part in parts)


# -- mounts --


@dataclass(frozen=True)
class Mount:
    """What holds a path.

    Attributes:
        kind: of file system.
        source: a device or a server, as it was mounted.
        device: major:minor of the block device; of file systems that have none of their own, 0:N.
        options: of the mount and of the file system.
    """

    kind: str
    source: str
    device: str
    options: tuple[str, ...]


def mount_of(path: str, system: System) -> Mount | None:
    """The mount that holds an absolute path: proc_pid_mountinfo(5)."""
    found, longest = None, -1
    for line in system.text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        own, theirs = before.split(), after.split()
        if len(own) < 6 or len(theirs) < 2:
            continue
        point = unescape(own[4])
        if len(point) >= longest and (path == point or path.startswith(point.rstrip("/") + "/")):
            options = tuple(",".join([own[5], *theirs[2:]]).split(","))
            found, longest = Mount(theirs[0], unescape(theirs[1]), own[2], options), len(point)
    return found


def unescape(text: str) -> str:
    """Spaces and the like, which the kernel writes as three octal digits."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), text)
