"""Sizes as users write them, and what the machine and its control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from spac.errors import OptionError
from spac.host import memory
from spac.host.memory import GIB, KIB, MIB


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4G", 4 * GIB), ("512MiB", 512 * MIB), ("1.5 gb", 3 * GIB // 2), ("700K", 700 * KIB), ("1048576", MIB), (12345, 12345), (" 2T ", 2048 * GIB)],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert memory.parse_memory(text) == n_bytes


def test_auto_is_no_number() -> None:
    assert memory.parse_memory("auto") is None
    assert memory.parse_memory("AUTO") is None


def test_percent_is_of_the_machine() -> None:
    assert memory.parse_memory("50%") == int(memory.total_bytes() * 0.5)


@pytest.mark.parametrize("text", ["", "4X", "G", "-1G", "1e9", "four", "0", "0G", "101%", "9999999T", "4 G B", 0, -5, True, 1.5, None])
def test_nonsense_is_refused(text: object) -> None:
    with pytest.raises(OptionError, match="memory"):
        memory.parse_memory(text)  # type: ignore[arg-type]


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    """cgroup v2: limits on the way up to the mount; "max" is none; cache that can be dropped is not used."""
    write(tmp_path / "a", memory__max=2 * GIB, memory__current=GIB, memory__stat=f"anon 1\ninactive_file {GIB // 4}")
    write(tmp_path / "a" / "b", memory__max="max", memory__current=GIB // 2, memory__stat="inactive_file 0")
    write(tmp_path, proc="0::/a/b")
    limits = memory.cgroup_limits(tmp_path, tmp_path / "proc")
    assert limits == [memory.CgroupMemory(2 * GIB, GIB - GIB // 4)]


def test_version_1_groups(tmp_path: Path) -> None:
    write(tmp_path / "memory" / "x", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB // 2, memory__stat="total_inactive_file 0")
    write(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    write(tmp_path, proc="5:cpu:/y\n4:memory:/x")
    assert memory.cgroup_limits(tmp_path, tmp_path / "proc") == [memory.CgroupMemory(GIB, GIB // 2)]


def test_available_is_what_the_group_leaves(tmp_path: Path) -> None:
    """A group with little left bounds `auto`, whatever the machine has; our own memory is ours already."""
    own = memory.resident_bytes()
    write(tmp_path / "g", memory__max=own + 300 * MIB, memory__current=own + 100 * MIB, memory__stat="inactive_file 0")
    write(tmp_path, proc="0::/g")
    assert abs(memory.available_bytes(tmp_path, tmp_path / "proc") - (own + 200 * MIB)) < 16 * MIB


def test_sizes_for_people() -> None:
    assert memory.format_bytes(512) == "512 B"
    assert memory.format_bytes(1 << 20) == "1 MiB"
    assert memory.format_bytes(int(1.86 * GIB)) == "1.86 GiB"
    assert memory.format_bytes(int(999.9 * (1 << 20))) == "0.976 GiB"
    assert memory.format_bytes(1100 * GIB) == "1100 GiB"
    assert memory.format_bytes(int(1.861 * GIB), up=True) == "1.87 GiB"
    assert memory.format_bytes((1 << 20) + 1, up=True) == "1.01 MiB"
    assert memory.format_bytes(300 << 20, up=True) == "300 MiB"
