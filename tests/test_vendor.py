"""scripts/vendor on small made-up archives: no network, and nothing of the real tree is touched.

Run: pytest tests/test_vendor.py
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "scripts" / "vendor"
PACKAGE = "llama-cpp-python"
MESSAGE = "What: {0}.\n\nWhy: a test wants it.\n\nUpstream: cannot take it, by design."
UPSTREAM = {
    "vendor/llama.cpp/CMakeLists.txt": "project(llama.cpp)\n",
    "vendor/llama.cpp/src/llama.cpp": "".join(f"int line_{n};\n" for n in range(30)),
    "vendor/llama.cpp/.git": "gitdir: ../../.git/modules/vendor/llama.cpp\n",
    "vendor/llama.cpp/.gitignore": "*.bin\n",
    "vendor/llama.cpp/kept.bin": "ignored by upstream, part of the archive all the same\n",
    "llama_cpp/__init__.py": "not ours\n",
}


class Checkout:
    """A made-up checkout of spac: a pin, its archive in the cache, and no patches yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = root / "vendor" / "llama.cpp"
        self.lock = root / "vendor" / "llama.cpp.lock"
        self.cache = root / "vendor" / ".cache"
        self.patches = root / "patches"
        self.cache.mkdir(parents=True)
        self.patches.mkdir()
        self.pin("1.0", self.publish("1.0"))

    def publish(self, version: str, **changes: str) -> str:
        """Put an archive into the cache, as a download would; returns its hash."""
        top = f"llama_cpp_python-{version}"
        path = self.cache / f"{top}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in (UPSTREAM | changes).items():
                member = tarfile.TarInfo(f"{top}/{name}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def pin(self, version: str, sha256: str) -> None:
        sdist = f"llama_cpp_python-{version}.tar.gz"
        fields = {"package": PACKAGE, "version": version, "sdist": sdist, "sha256": sha256}
        self.lock.write_text("# a comment that stays\n" + "".join(f'{k} = "{v}"\n' for k, v in fields.items()))

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        # an index that has nothing: a test that reached for it fails at once instead of downloading
        env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull} | env
        command = [sys.executable, str(SCRIPT), "--root", str(self.root), *args]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def ok(self, *args: str) -> str:
        done = self.run(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, *args: str, **env: str) -> str:
        """The one line that a failing command printed."""
        done = self.run(*args, **env)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("downloading ")]
        assert done.returncode == 1
        assert len(lines) == 1 and lines[0].startswith("vendor: "), done.stderr
        return lines[0]

    def git(self, *args: str) -> str:
        return subprocess.run(["git", "-C", str(self.tree), *args], check=True, capture_output=True, text=True).stdout

    def edit(self, old: str, new: str) -> None:
        path = self.tree / "src" / "llama.cpp"
        path.write_text(path.read_text().replace(old, new))

    def commit(self, old: str, new: str, subject: str, message: str = MESSAGE) -> None:
        self.edit(old, new)
        self.git("commit", "-q", "-a", "-m", subject, "-m", message.format(subject))

    def source(self) -> str:
        return (self.tree / "src" / "llama.cpp").read_text()

    def series(self) -> list[str]:
        return (self.patches / "series").read_text().split()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "spac")


@pytest.fixture
def patched(checkout: Checkout) -> Checkout:
    """A checkout with a series of two patches, applied."""
    checkout.ok("fetch")
    checkout.commit("int line_3;", "int three;", "llama : name three")
    checkout.commit("int line_20;", "int twenty;\nint more;", "llama : name twenty")
    checkout.ok("export")
    return checkout


# ---- the real pin and series --------------------------------------------------------------------------------------


def test_lock_names_one_archive_exactly() -> None:
    pin = tomllib.loads((REPO / "vendor" / "llama.cpp.lock").read_text())
    assert sorted(pin) == ["package", "sdist", "sha256", "version"]
    assert pin["sdist"] == f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    assert re.fullmatch("[0-9a-f]{64}", pin["sha256"])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_requirements_agree_with_the_lock(name: str) -> None:
    pin = tomllib.loads((REPO / "vendor" / "llama.cpp.lock").read_text())
    assert re.findall(rf"{pin['package']}==([^\s\",]+)", (REPO / name).read_text()) == [pin["version"]]


def test_real_series_passes_its_check() -> None:
    """Complete, explained, below the line limit, and unchanged by apply -> export."""
    done = subprocess.run([sys.executable, str(SCRIPT), "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-9]\d* patches, [1-9]\d* changed lines .* round trip exact", done.stdout)


# ---- fetch --------------------------------------------------------------------------------------------------------


def test_fetch_unpacks_upstream_whole(checkout: Checkout) -> None:
    checkout.ok()
    assert (checkout.tree / "kept.bin").exists()
    assert not (checkout.tree / "llama_cpp").exists()
    assert checkout.git("status", "--porcelain", "--ignored") == ""


def test_fetch_twice_touches_nothing(patched: Checkout) -> None:
    before = (patched.tree / "src" / "llama.cpp").stat().st_mtime_ns
    assert "up to date" in patched.ok("fetch")
    assert (patched.tree / "src" / "llama.cpp").stat().st_mtime_ns == before


def test_fetch_applies_in_the_order_of_series(patched: Checkout) -> None:
    shutil.rmtree(patched.tree)
    patched.ok("fetch")
    assert "int three;" in patched.source() and "int twenty;\nint more;" in patched.source()
    subjects = patched.git("log", "--format=%s", "--reverse").splitlines()
    assert subjects[1:] == ["llama : name three", "llama : name twenty"]


def test_same_series_gives_same_commits_in_any_clone(patched: Checkout, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(patched.root, other, ignore=shutil.ignore_patterns("llama.cpp"))
    clone = Checkout.__new__(Checkout)
    clone.root, clone.tree = other, other / "vendor" / "llama.cpp"
    clone.ok("fetch")
    shutil.rmtree(patched.tree)
    patched.ok("fetch")
    assert clone.git("rev-parse", "HEAD") == patched.git("rev-parse", "HEAD")


def test_changed_series_is_applied_without_touching_other_files(patched: Checkout) -> None:
    before = (patched.tree / "CMakeLists.txt").stat().st_mtime_ns
    (patched.patches / "series").write_text(patched.series()[0] + "\n")
    patched.ok("fetch")
    assert "int three;" in patched.source() and "int twenty;" not in patched.source()
    assert (patched.tree / "CMakeLists.txt").stat().st_mtime_ns == before


def test_tree_of_another_pin_is_replaced(patched: Checkout) -> None:
    patched.pin("2.0", patched.publish("2.0", **{"vendor/llama.cpp/new.txt": "new\n"}))
    patched.ok("fetch")
    assert (patched.tree / "new.txt").exists() and "int three;" in patched.source()


def test_wrong_hash_is_refused(checkout: Checkout) -> None:
    checkout.pin("1.0", "0" * 64)
    assert re.search(f"sha256 is [0-9a-f]{{64}}, the pin of {PACKAGE} 1.0 wants 0000", checkout.fails("fetch"))
    assert not checkout.tree.exists()


def test_missing_patch_is_named(patched: Checkout) -> None:
    name = patched.series()[1]
    (patched.patches / name).unlink()
    assert f"{name} is missing" in patched.fails("fetch")


def test_patch_that_does_not_apply_leaves_the_tree_alone(patched: Checkout) -> None:
    before = patched.git("rev-parse", "HEAD")
    path = patched.patches / patched.series()[1]
    path.write_text(path.read_text().replace("-int line_20;", "-int another;"))
    assert f"{path.name} does not apply to {PACKAGE} 1.0" in patched.fails("fetch")
    assert patched.git("rev-parse", "HEAD") == before and patched.git("status", "--porcelain") == ""


@pytest.mark.parametrize("commit", [False, True], ids=["uncommitted", "committed"])
@pytest.mark.parametrize("moved", [False, True], ids=["same pin", "other pin"])
def test_dirty_tree_is_refused(patched: Checkout, commit: bool, moved: bool) -> None:
    if moved:
        patched.pin("2.0", patched.publish("2.0"))
    if commit:
        patched.commit("int line_9;", "int nine;", "llama : name nine")
    else:
        patched.edit("int line_9;", "int nine;")
    message = patched.fails("fetch")
    assert f"pinned to {PACKAGE} 1.0" in message and "scripts/vendor export" in message
    assert "int nine;" in patched.source()


def test_foreign_tree_is_refused(checkout: Checkout) -> None:
    checkout.tree.mkdir()
    (checkout.tree / "precious").write_text("mine\n")
    assert "was not made by scripts/vendor" in checkout.fails("fetch")
    assert (checkout.tree / "precious").exists()


def test_no_network_says_what_to_do(checkout: Checkout) -> None:
    (checkout.cache / "llama_cpp_python-1.0.tar.gz").unlink()
    message = checkout.fails("fetch")
    assert f"cannot download {PACKAGE} 1.0" in message and "offline, put llama_cpp_python-1.0.tar.gz into" in message


def test_no_git_says_what_to_do(checkout: Checkout, tmp_path: Path) -> None:
    assert "git is not installed" in checkout.fails("fetch", PATH=str(tmp_path))
    assert not checkout.tree.exists()


@pytest.mark.parametrize("text", ["version = 1\n", "not toml", 'package = "x"\n'])
def test_broken_lock_is_named(checkout: Checkout, text: str) -> None:
    checkout.lock.write_text(text)
    assert str(checkout.lock) in checkout.fails("fetch")


# ---- export and check ---------------------------------------------------------------------------------------------


def test_round_trip_is_exact(patched: Checkout) -> None:
    before = {path.name: path.read_bytes() for path in patched.patches.iterdir()}
    shutil.rmtree(patched.tree)
    patched.ok("fetch")
    patched.ok("export")
    assert {path.name: path.read_bytes() for path in patched.patches.iterdir()} == before
    assert "2 patches, 5 changed lines (limit 249), round trip exact" in patched.ok("check")


def test_export_keeps_a_patch_file_name(patched: Checkout) -> None:
    old = patched.patches / patched.series()[0]
    old.rename(patched.patches / "0001-three.patch")
    (patched.patches / "series").write_text(f"0001-three.patch\n{patched.series()[1]}\n")
    patched.ok("fetch")
    patched.commit("int line_9;", "int nine;", "llama : name nine")
    patched.ok("export")
    assert patched.series() == ["0001-three.patch", "0002-llama-name-twenty.patch", "0003-llama-name-nine.patch"]
    assert sorted(path.name for path in patched.patches.glob("*.patch")) == patched.series()


def test_fetch_accepts_what_export_wrote(patched: Checkout) -> None:
    patched.commit("int line_9;", "int nine;", "llama : name nine")
    patched.ok("export")
    assert "3 patches, up to date" in patched.ok("fetch")


def test_export_refuses_uncommitted_changes(patched: Checkout) -> None:
    patched.edit("int line_9;", "int nine;")
    assert "uncommitted changes" in patched.fails("export")


def test_check_finds_an_orphan(patched: Checkout) -> None:
    shutil.copy(patched.patches / patched.series()[0], patched.patches / "0009-forgotten.patch")
    assert "0009-forgotten.patch is not listed" in patched.fails("check")


def test_check_finds_a_double(patched: Checkout) -> None:
    with (patched.patches / "series").open("a") as file:
        file.write(patched.series()[0] + "\n")
    assert f"lists {patched.series()[0]} twice" in patched.fails("check")


def test_check_finds_an_empty_series(checkout: Checkout) -> None:
    assert "lists no patch" in checkout.fails("check")


@pytest.mark.parametrize("section", ["What:", "Why:", "Upstream:"])
def test_check_wants_every_section(checkout: Checkout, section: str) -> None:
    checkout.ok("fetch")
    checkout.commit("int line_3;", "int three;", "llama : name three", MESSAGE.replace(section, "And"))
    checkout.ok("export")
    assert repr(section) in checkout.fails("check")


def test_check_holds_the_line_limit(checkout: Checkout) -> None:
    checkout.ok("fetch")
    checkout.commit("int line_3;\n", "int more;\n" * 249, "llama : say it all")
    checkout.ok("export")
    assert "250 changed lines, the limit is 249" in checkout.fails("check")


@pytest.mark.parametrize("cut", [r"(?s)\Adiff.*?\n", r"(?s)\n int line_\d+;\n\Z", r"(?s)\ndiff --git.*"])
def test_check_finds_a_patch_that_does_not_parse(patched: Checkout, cut: str) -> None:
    path = patched.patches / patched.series()[0]
    text = path.read_text()
    path.write_text(re.sub(cut, "\n", text) if re.search(cut, text) else "garbage\n" + text)
    assert path.name in patched.fails("check")


def test_check_finds_a_patch_that_export_would_write_otherwise(patched: Checkout) -> None:
    path = patched.patches / patched.series()[0]
    path.write_text(path.read_text() + "-- \n2.39.5\n\n")
    assert f"{path.name} is not as `scripts/vendor export` writes it" in patched.fails("check")


# ---- refresh and pristine -----------------------------------------------------------------------------------------


def test_refresh_to_the_same_version_changes_nothing(patched: Checkout) -> None:
    before = patched.lock.read_text(), [(patched.patches / name).read_bytes() for name in patched.series()]
    patched.ok("refresh", "1.0")
    patched.ok("export")
    assert (patched.lock.read_text(), [(patched.patches / name).read_bytes() for name in patched.series()]) == before


def test_refresh_moves_pin_requirements_and_patches(patched: Checkout) -> None:
    (patched.root / "pyproject.toml").write_text(f'dependencies = ["{PACKAGE}==1.0"]\n')
    moved = UPSTREAM["vendor/llama.cpp/src/llama.cpp"].replace("int line_10;", "int a;\nint b;")
    sha256 = patched.publish("2.0", **{"vendor/llama.cpp/src/llama.cpp": moved})
    assert "2 patches applied" in patched.ok("refresh", "2.0")
    assert tomllib.loads(patched.lock.read_text())["sha256"] == sha256
    assert patched.lock.read_text().startswith("# a comment that stays\n")
    assert f"{PACKAGE}==2.0" in (patched.root / "pyproject.toml").read_text()
    patched.ok("export")
    assert "round trip exact" in patched.ok("check")


def test_refresh_that_conflicts_leaves_the_rest_to_a_person(patched: Checkout) -> None:
    changed = UPSTREAM["vendor/llama.cpp/src/llama.cpp"].replace("int line_20;", "int zwanzig;")
    patched.publish("2.0", **{"vendor/llama.cpp/src/llama.cpp": changed})
    message = patched.fails("refresh", "2.0")
    assert patched.series()[1] in message and "holds 1 of 2 patches" in message
    patched.commit("int zwanzig;", "int twenty;\nint more;", "llama : name twenty")
    patched.ok("export")
    assert "2 patches, 5 changed lines" in patched.ok("check")
    assert "up to date" in patched.ok("fetch")


def test_a_conflict_can_be_gone_back_from(patched: Checkout) -> None:
    before = patched.lock.read_text(), patched.source()
    patched.publish("2.0", **{"vendor/llama.cpp/src/llama.cpp": "all new\n"})
    assert "or go back: `scripts/vendor refresh 1.0`" in patched.fails("refresh", "2.0")
    patched.ok("refresh", "1.0")
    assert (patched.lock.read_text(), patched.source()) == before


def test_try_says_what_applies_and_changes_nothing(patched: Checkout) -> None:
    moved = UPSTREAM["vendor/llama.cpp/src/llama.cpp"].replace("int line_10;", "int a;\nint b;")
    patched.publish("2.0", **{"vendor/llama.cpp/src/llama.cpp": moved})
    before = patched.lock.read_text(), patched.git("rev-parse", "HEAD"), sorted(patched.lock.parent.iterdir())
    first, second = patched.series()
    assert f"{first}: applies\n{second}: applies\n" in patched.ok("try", "2.0")
    assert (patched.lock.read_text(), patched.git("rev-parse", "HEAD"), sorted(patched.lock.parent.iterdir())) == before


def test_try_names_every_conflict(patched: Checkout) -> None:
    """The first patch conflicts, and the second is tried all the same."""
    changed = UPSTREAM["vendor/llama.cpp/src/llama.cpp"].replace("int line_3;", "int drei;")
    patched.publish("2.0", **{"vendor/llama.cpp/src/llama.cpp": changed})
    first, second = patched.series()
    done = patched.run("try", "2.0")
    assert done.returncode == 1
    assert done.stdout == f"{first}: conflicts at src/llama.cpp:1\n{second}: applies\n"
    assert done.stderr.splitlines()[-1].startswith(f"vendor: {PACKAGE} 2.0: 1 of 2 patches conflict")
    patched.publish("3.0", **{"vendor/llama.cpp/src/llama.cpp": "all new\n"})
    assert patched.run("try", "3.0").stdout.count("conflicts at src/llama.cpp:") == 2
    assert "up to date" in patched.ok("fetch")


def test_pristine_is_unpatched_and_idempotent(patched: Checkout, tmp_path: Path) -> None:
    patched.ok("pristine", str(tmp_path / "stock"))
    assert (tmp_path / "stock" / "src" / "llama.cpp").read_text() == UPSTREAM["vendor/llama.cpp/src/llama.cpp"]
    assert "up to date" in patched.ok("pristine", str(tmp_path / "stock"))
    patched.pin("2.0", patched.publish("2.0"))
    assert "remove it" in patched.fails("pristine", str(tmp_path / "stock"))
