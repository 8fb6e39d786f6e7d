"""Libraries that do not suit the machine are refused in one line before they are loaded; the ABI works from C."""

from __future__ import annotations

import json
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import spac
from spac.errors import LibraryError
from spac.host import build

ROOT = Path(__file__).resolve().parents[2]
# AT_HWCAP (16) and AT_HWCAP2 (26) as the kernel shows them on these boards, other entries around them
PI_4 = struct.pack("8Q", 6, 4096, 16, 0x887, 26, 0, 0, 0)  # fp asimd evtstrm crc32 cpuid; no crypto
PI_5 = struct.pack("8Q", 6, 16384, 16, 0x119FFF, 26, 0x10, 0, 0)  # and aes ... atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp


def folder_of(tmp_path: Path, **changes: object) -> Path:
    """A folder with our libraries and a changed build.json."""
    assert spac.library_folder is not None
    for library in spac.library_folder.glob("*.so"):
        (tmp_path / library.name).symlink_to(library)
    record = json.loads((spac.library_folder / "build.json").read_text())
    (tmp_path / "build.json").write_text(json.dumps(record | changes))
    return tmp_path


def command_line(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "spac", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def test_this_build_is_for_this_machine() -> None:
    assert spac.library_folder is not None
    record = json.loads((spac.library_folder / "build.json").read_text())
    assert record["processor"] == platform.machine()
    assert set(record["needs"]) <= (build.cpu_features() or set())
    build.check(spac.library_folder)


def test_features_of_a_raspberry_pi_4_and_5() -> None:
    assert build.arm_features(PI_4) == set()
    assert build.arm_features(PI_5) == {"atomics", "asimdhp", "asimdrdm", "asimddp"}
    assert build.arm_features(struct.pack("2Q", 6, 4096)) is None
    assert build.x86_features("processor : 0\nflags : sse4_2 avx\n") == {"sse4_2", "avx"}
    assert build.x86_features("processor : 0\nBogoMIPS : 108.00\n") is None
    assert build.arm_features(struct.pack("4Q", 16, 0, 26, 1 << 13 | 1 << 1)) == {"i8mm", "sve2"}


def test_a_build_for_a_pi_5_on_a_pi_4_says_which_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, name="pi5", processor="aarch64", needs=["atomics", "asimddp"])
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(build, "cpu_features", lambda: build.arm_features(PI_5))
    build.check(folder)
    monkeypatch.setattr(build, "cpu_features", lambda: build.arm_features(PI_4))
    with pytest.raises(LibraryError, match=r'\(build "pi5"\) need what this CPU lacks: atomics, asimddp; take the build "portable" or "armv8"$'):
        build.check(folder)
    monkeypatch.setattr(build, "cpu_features", lambda: None)  # a system that does not tell
    build.check(folder)


def test_a_feature_that_no_cpu_has_is_one_line_not_a_crash(model_path: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, needs=["teleport"])
    result = command_line(folder, "run", model_path, "-p", "x")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"spac: the libraries in .* need what this CPU lacks: teleport; .*\n", result.stderr)
    assert command_line(folder, "--version").returncode == 0  # what needs no library still works


def test_libraries_for_another_processor_are_one_line(model_path: Path, tmp_path: Path) -> None:
    result = command_line(folder_of(tmp_path, processor="riscv64"), "run", model_path, "-p", "x")
    assert result.returncode == 1
    assert re.fullmatch(rf"spac: the libraries in .* are for riscv64, this machine is {platform.machine()}: .*\n", result.stderr)


def test_a_library_that_is_missing_or_broken_is_one_line(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = command_line(tmp_path / "empty", "run", model_path, "-p", "x")
    assert (result.returncode, result.stderr) == (1, f"spac: {spac.NO_LIBRARY}\n")
    folder = folder_of(tmp_path)
    (folder / "libllama.so").unlink()
    (folder / "libllama.so").write_bytes(b"not a library, but longer than the header of one " * 4)
    result = command_line(folder, "run", model_path, "-p", "x")
    assert result.returncode == 1
    assert re.fullmatch(r"spac: the libraries in .* cannot be loaded: .*libllama\.so: invalid ELF header\n", result.stderr)


def test_the_abi_from_c(tmp_path: Path) -> None:
    """The example that the archives carry, compiled as its first lines say, with its warnings as errors."""
    native, libraries, program = ROOT / "spac" / "native", spac.library_folder, tmp_path / "example"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{native / 'include'}", f"-L{libraries}", "-lspac", f"-Wl,-rpath,{libraries}"]
    subprocess.run(["cc", native / "example.c", *flags, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    hits = {line[:14].strip(): float(line[14:].split()[0]) for line in lines[1:5]}
    assert hits.keys() == {"spac", "LRU", "LFU", "best possible"}
    assert hits["best possible"] == max(hits.values())
    assert lines[5] == "an error reads: no paged model has id 1 (closed?)"


@pytest.mark.parametrize(("name", "reason"), [("armv7", "armv7: spac needs a 64-bit system"), ("pi6", "there is no build 'pi6'")])
def test_a_cross_build_that_does_not_exist_is_one_line(name: str, reason: str) -> None:
    result = subprocess.run([ROOT / "scripts" / "cross", name], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"cross: {re.escape(reason)}.*; builds: armv8, pi5, orin, portable\n", result.stderr)
