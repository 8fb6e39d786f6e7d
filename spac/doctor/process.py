"""Limits of this process (getrlimit(2)) and versions of what it is made of."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from typing import Final

import spac
from spac.doctor.finding import Finding, Level
from spac.host.memory import format_bytes
from spac.host.system import System

LIBRARIES: Final = ("llama-cpp-python", "gguf", "numpy", "psutil", "PuLP", "highspy", "typer", "rich")
FEW_FILES: Final = 256


def check(system: System) -> Iterator[Finding]:
    """Soft limits: proc_pid_limits(5)."""
    found = {}
    for name, soft in re.findall(r"^Max (.+?)\s{2,}(\w+)\s", system.text("/proc/self/limits") + "\n", re.MULTILINE):
        found[name] = int(soft) if re.fullmatch(r"\d{1,20}", soft) else None
    if "open files" not in found:
        yield Finding("process", "limits", Level.note, "/proc/self/limits does not say")
        return
    space, files, locked = found.get("address space"), found["open files"], found.get("locked memory")
    if space is not None:
        advice = "`ulimit -v unlimited`: addresses for all experts are reserved, twice; --memory bounds what is used"
        yield Finding("process", "address space", Level.warning, f"limited to {format_bytes(space)}", advice, {"bytes": space})
    if files is not None and files < FEW_FILES:
        yield Finding(
            "process", "open files", Level.note, f"at most {files}", "`ulimit -n 1024`: a split model keeps each part open", {"n": files}
        )
    text = f"{'any number of' if files is None else files} open files; locked memory"
    text += " without limit" if locked is None else f" at most {format_bytes(locked)}"
    yield Finding("process", "limits", Level.ok, text + " (spac locks none)", "", {"open_files": files, "locked_bytes": locked})


def check_versions() -> Iterator[Finding]:
    """What is installed, and whether the native library is there and fits."""
    versions = {"Python": platform.python_version(), "libc": " ".join(platform.libc_ver()), "spac": spac.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("software", "versions", Level.ok, ", ".join(f"{name} {version}" for name, version in versions.items()), "", versions)
    wanted = _pinned("llama-cpp-python")
    if wanted and versions.get("llama-cpp-python") != wanted:
        text = f"llama-cpp-python {versions.get('llama-cpp-python', 'is missing')}, {wanted} is needed"
        yield Finding("software", "llama-cpp-python", Level.warning, text, f"pip install llama-cpp-python=={wanted}, or `make build`")


def _pinned(name: str) -> str | None:
    try:
        needs = importlib.metadata.requires("spac") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((match[1] for need in needs if (match := re.match(rf"{re.escape(name)}\s*==\s*([\w.]+)", need))), None)
