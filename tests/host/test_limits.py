"""Limits are written where the kernel reads them, in both versions of control groups; what cannot be limited is named."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

import spac
from spac.host import limits
from spac.host.limits import Limits, run_limited
from spac.host.memory import drop_file_cache, resident_bytes

ALL = Limits(memory_bytes=1 << 30, read_bytes_per_s=90_000_000, read_iops=5000, cores=1, cpu_share=0.4)
FIRST = str(min(os.sched_getaffinity(0)))

Tree = Callable[[bool], Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A folder that looks like the hierarchy of one version; its files are ordinary ones."""

    def make(version_2: bool) -> Path:
        root = tmp_path / "cgroup"
        root.mkdir()
        if version_2:
            (root / "cgroup.controllers").write_text("cpuset cpu io memory\n")
        else:
            for controller in ("memory", "blkio", "cpu", "cpuset"):
                (root / controller).mkdir()
            (root / "cpuset" / "cpuset.mems").write_text("0\n")
        monkeypatch.setattr(limits, "_ROOT", root)
        monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # the kernel's files go with the folder
        return root

    return make


def contents(folders: tuple[Path, ...]) -> dict[str, str]:
    return {path.name: path.read_text() for folder in folders for path in folder.iterdir()}


def test_version_1(tree: Tree) -> None:
    root = tree(False)
    with limits._group(ALL, "8:0") as group:
        assert contents(group.folders) == {
            "memory.limit_in_bytes": str(1 << 30),
            "blkio.throttle.read_bps_device": "8:0 90000000",
            "blkio.throttle.read_iops_device": "8:0 5000",
            "cpuset.mems": "0",
            "cpuset.cpus": FIRST,
            "cpu.cfs_period_us": "100000",
            "cpu.cfs_quota_us": "40000",
        }
        memory = group.folders[0]
        (memory / "memory.max_usage_in_bytes").write_text("123\n")
        (memory / "memory.stat").write_text("cache 5\nrss 6\ntotal_cache 7\n")
        (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        assert (group.peak_bytes(), group.page_cache_bytes(), group.oom_kills()) == (123, 7, 2)
    assert [path for folder in root.iterdir() for path in folder.iterdir()] == [root / "cpuset" / "cpuset.mems"]


def test_version_2(tree: Tree) -> None:
    root = tree(True)
    with limits._group(ALL, "8:0") as group:
        assert len(group.folders) == 1
        assert contents(group.folders) == {
            "memory.max": str(1 << 30),
            "io.max": "8:0 rbps=90000000 riops=5000",
            "cpuset.cpus": FIRST,
            "cpu.max": "40000 100000",
        }
        assert set((root / "cgroup.subtree_control").read_text().split()) == {"+memory", "+io", "+cpuset", "+cpu"}
        folder = group.folders[0]
        (folder / "memory.peak").write_text("456\n")
        (folder / "memory.stat").write_text("anon 1\nfile 8\n")
        (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        assert (group.peak_bytes(), group.page_cache_bytes(), group.oom_kills()) == (456, 8, 1)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("version_2", "file", "expected"), [(False, "memory.memsw.limit_in_bytes", "5000000"), (True, "memory.swap.max", "0")]
)
def test_swap_is_no_way_out(tree: Tree, monkeypatch: pytest.MonkeyPatch, version_2: bool, file: str, expected: str) -> None:
    """Where the kernel counts swap, a group with a memory limit gets none."""
    tree(version_2)
    make_folder = Path.mkdir

    def with_swap(folder: Path) -> None:
        make_folder(folder)
        (folder / file).write_text("max")

    monkeypatch.setattr(Path, "mkdir", with_swap)
    for limits_, then in ((Limits(memory_bytes=5_000_000), expected), (Limits(), "max")):
        with limits._group(limits_, None) as group:
            assert (group.folders[0] / file).read_text() == then


@pytest.mark.parametrize("version_2", [False, True])
def test_the_command_runs_inside(tree: Tree, version_2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process number is in every group before it runs, and the groups are gone afterwards, also when it failed."""
    tree(version_2)
    entered: list[str] = []
    monkeypatch.setattr(Path, "rmdir", lambda folder: (entered.append((folder / "cgroup.procs").read_text()), shutil.rmtree(folder)))
    run = run_limited([sys.executable, "-c", "import os; print(os.getpid()); raise SystemExit(3)"], memory_bytes=1 << 30, cores=1, cpu_share=1.0)
    assert run.returncode == 3
    assert entered == [run.stdout] * (1 if version_2 else 3)
    assert run.cpu_s > 0


def test_what_cannot_be_limited_is_named(tree: Tree) -> None:
    root = tree(False)
    shutil.rmtree(root / "cpuset")
    shutil.rmtree(root / "cpu")
    assert limits.unavailable() is None
    reasons = limits.unenforceable(ALL)
    assert set(reasons) == {"read_bytes_per_s", "read_iops", "cores", "cpu_share"}
    assert "not on a disk" in reasons["read_iops"]
    assert "cpuset" in reasons["cores"]


def test_without_groups_nothing_pretends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_ROOT", tmp_path / "none")
    assert "no control group can be made" in (limits.unavailable() or "")
    assert set(limits.unenforceable(Limits(memory_bytes=1 << 30))) == {"memory_bytes"}
    with pytest.raises(OSError):
        run_limited(["true"], memory_bytes=1 << 30)
    assert run_limited(["true"]).peak_bytes is None


def test_ctrl_c_leaves_what_was_printed(tmp_path: Path) -> None:
    """We are interrupted once the command has printed; it is killed, and what it had printed is kept."""
    printed = tmp_path / "printed"

    def interrupt() -> None:
        if printed.exists():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(limits.RunInterrupted) as caught:
        run_limited(["/bin/sh", "-c", f"echo before; touch '{printed}'; exec sleep 60"], on_sample=interrupt)
    assert caught.value.run.stdout == "before\n"
    assert caught.value.run.returncode == -9


def test_a_command_that_takes_too_long() -> None:
    run = run_limited(["/bin/sh", "-c", "echo before; exec sleep 60"], timeout_s=2)
    assert (run.timed_out, run.returncode, run.stdout) == (True, -9, "before\n")


def test_dropping_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    os.sync()
    if limits.device_of(path) is None:
        pytest.skip("the temporary folder is not on a disk")
    assert limits.cached_bytes([path]) == 1 << 20
    drop_file_cache(str(path))
    assert limits.cached_bytes([path]) < 1 << 20


def test_memory_is_used_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It faults its pages in, keeps none of them, and takes no more than half of what there is."""
    lengths: list[int] = []

    class Map(mmap.mmap):
        def __new__(cls, fd: int, length: int, **options: int) -> Self:
            lengths.append(length)
            return super().__new__(cls, fd, length, **options)

        def madvise(self, *_: int) -> None:
            super().madvise(mmap.MADV_NOHUGEPAGE)  # also where they are given unasked: a fault for each page
            raise OSError  # as a kernel without huge pages

    monkeypatch.setattr(mmap, "mmap", Map)
    faults, resident = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, resident_bytes()
    assert limits.make_memory_present(64 << 20) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults >= (64 << 20) // mmap.PAGESIZE
    assert resident_bytes() < resident + (32 << 20)
    monkeypatch.setattr(limits, "available_bytes", lambda: 10 << 20)
    limits.make_memory_present(64 << 20)
    monkeypatch.setattr(limits, "available_bytes", lambda: 0)
    limits.make_memory_present(64 << 20)
    assert lengths == [64 << 20, 5 << 20]


def test_a_command_does_not_inherit_what_importing_spac_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAC_TEST_OURS", "1")
    monkeypatch.setenv("SPAC_TEST_THEIRS", "2")
    monkeypatch.setattr(spac, "variables_set", {"SPAC_TEST_OURS"})
    code = "import os; print(os.environ.get('SPAC_TEST_OURS'), os.environ.get('SPAC_TEST_THEIRS'))"
    assert run_limited([sys.executable, "-c", code]).stdout == "None 2\n"
