"""What old kernels, containers and file systems refuse costs speed, never the answer; and pages need not be 4 KiB.

The native side of each refusal, alone, is in spac/native/fallback_test.cpp; here the whole program meets them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spac.host import board, memory
from tests import refusing

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(model_path: Path) -> Run:
    """`spac run --json` with a few of the experts in memory, where system calls are refused or pages pretended to be larger."""

    def call(*options: str, refused: str = "", page_bytes: int = 0) -> dict[str, Any]:
        environment = os.environ | ({"SPAC_PAGE_BYTES": str(page_bytes)} if page_bytes else {})
        prefix = [sys.executable, refusing.__file__, refused] if refused else []
        command = [sys.executable, "-m", "spac", "run", str(model_path), "-p", "The open() system call", "-n", "12", "--temp", "0", "--json"]
        memory_ = ["--ctx", "256", "--paging", "on", "--memory", "100M", "--learned", "off", "--draft", "off"]
        result = subprocess.run([*prefix, *command, *memory_, *options], capture_output=True, text=True, env=environment, check=False)
        if refused and result.returncode == refusing.NOT_HERE:
            pytest.skip("there is no seccomp here")
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        assert found["expert"]["bytes_read"] > found["expert"]["budget_bytes"]  # it paged
        return found

    return call


@pytest.fixture(scope="module")
def expected(run: Run) -> list[int]:
    """Tokens where nothing is refused."""
    tokens: list[int] = run()["token_ids"]
    assert len(tokens) == 12
    return tokens


def test_everything_refused_at_once(run: Run, expected: list[int]) -> None:
    """Linux before 5.14 in a strict container: no statx, O_DIRECT, populating, huge pages, affinity, io_uring, priorities."""
    found = run(refused=",".join(refusing.CALLS))
    assert found["expert"]["store"] == "buffered"
    assert found["token_ids"] == expected


@pytest.mark.parametrize(("name", "store"), [("statx", "direct"), ("O_DIRECT", "buffered"), ("affinity", "direct")])
def test_one_refusal(run: Run, expected: list[int], name: str, store: str) -> None:
    found = run(refused=name)
    assert found["token_ids"] == expected
    if run()["expert"]["store"] == "direct":
        assert found["expert"]["store"] == store


def test_a_mapping_without_populate(run: Run) -> None:
    """The mmap store computes with the file's layout, so its tokens are compared with its own."""
    assert run("--store", "mmap", refused="populate")["token_ids"] == run("--store", "mmap")["token_ids"]


@pytest.mark.parametrize("page_bytes", [16 << 10, 64 << 10])
def test_larger_pages(run: Run, expected: list[int], page_bytes: int) -> None:
    """An expert's tensor of 36 KiB begins and ends within pages; the budget is paid in whole ones, and so is the floor."""
    found = run(page_bytes=page_bytes)
    assert found["token_ids"] == expected
    assert found["expert"]["floor_bytes"] % page_bytes == 0
    assert found["expert"]["peak_bytes"] % page_bytes == 0
    assert found["expert"]["peak_bytes"] <= found["expert"]["budget_bytes"]


@pytest.mark.parametrize("text", ["4096", "1024", "0", "-1", "20000", "16384x", "x", ""])
def test_what_is_no_larger_page_is_ignored(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SPAC_PAGE_BYTES", text)
    assert memory.page_bytes() == max(os.sysconf("SC_PAGE_SIZE"), 4096 if text == "4096" else 0)


def test_what_is_refused_is_really_refused() -> None:
    """The tests above would prove nothing if the filter let calls through."""
    code = "import os; os.open('/proc/self/exe', os.O_RDONLY); os.open('/proc/self/exe', os.O_RDONLY | os.O_DIRECT)"
    result = subprocess.run([sys.executable, refusing.__file__, "O_DIRECT", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode == refusing.NOT_HERE:
        pytest.skip("there is no seccomp here")
    assert "[Errno 22]" in result.stderr


def test_no_pressure_no_groups_no_sensors(tmp_path: Path) -> None:
    """A kernel without PSI and control groups, a board without sensors."""
    assert board.pressure_s(tmp_path) == {}
    assert (board.temperature_c(tmp_path), board.clock_mhz(tmp_path), board.power_w(tmp_path), board.energy_uj(tmp_path)) == (None, None, None, {})
    assert memory.cgroup_limits(tmp_path, tmp_path / "cgroup") == []
    assert memory.available_bytes(tmp_path, tmp_path / "cgroup") > memory.MIB


@pytest.mark.parametrize("text", ["", "garbage", "0:", "::", "0::/a/b\nx\n", "\0", "4:memory:/x:y"])
def test_damaged_groups(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("x")
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("?")
    (tmp_path / "memory.stat").write_text("inactive_file many\n a\nfile 1\n")
    (tmp_path / "cgroup").write_text(text)
    assert memory.cgroup_limits(tmp_path, tmp_path / "cgroup") in ([], [memory.CgroupMemory(5_000_000, 0)])
