"""What the tests share: the bundled models, and the command line called as a function."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import spac  # noqa: F401 - before any test imports llama_cpp: it says where the libraries are
from spac.gguf.inflate import inflate

_cache = tempfile.TemporaryDirectory(prefix="spac-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # what is learned by one run stays there, not in the user's

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The demo model: qwen3moe, 10 layers of 32 experts, 4 used."""
    return MODELS / "spac-demo-moe.gguf"


@pytest.fixture(scope="session")
def dense_path() -> Path:
    """The demo draft: dense, the same tokenizer."""
    return MODELS / "spac-demo-draft.gguf"


@pytest.fixture(scope="session")
def big_model(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model, inflated to about 560 MB."""
    path = tmp_path_factory.mktemp("big") / "big.gguf"
    inflate(model_path, path, expert_type="Q4_0", factor=16)
    yield path
    path.unlink()


@dataclass(frozen=True)
class Result:
    """What a command line left."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr that explains exit code 1; anything else fails the test."""
        assert self.code == 1, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("spac: "), self.err
        return lines[0]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("run", path, "-p", "x")`: as the command line would, in this process; native output is caught too."""
    from spac.cli import _run

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = _run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call
