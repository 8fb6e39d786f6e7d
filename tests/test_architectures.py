"""scripts/architectures, on every architecture with experts that the vendored llama.cpp declares, and on models that break its rules.

Run: pytest tests/test_architectures.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import gguf
import pytest

from spac.errors import SpacError
from spac.gguf.check import expert_layer_of

REPO = Path(__file__).resolve().parent.parent

_loader = SourceFileLoader("architectures", str(REPO / "scripts" / "architectures"))
_spec = importlib.util.spec_from_loader("architectures", _loader)
assert _spec is not None
architectures = importlib.util.module_from_spec(_spec)
sys.modules["architectures"] = architectures  # its dataclasses look there
_loader.exec_module(architectures)


@pytest.mark.parametrize("architecture", [name for name in architectures.declared() if name not in architectures.LEFT_OUT])
def test_exact(architecture: str, tmp_path: Path) -> None:
    rows = list(architectures.rows_of(architecture, tmp_path))
    assert rows
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("architecture", architectures.LEFT_OUT)
def test_left_out(architecture: str, tmp_path: Path) -> None:
    assert architecture in architectures.declared()
    architectures.check_left_out(architecture, tmp_path)


def test_what_is_paged_is_what_upstream_multiplies_by_expert() -> None:
    """spac's pattern of names is upstream's table of tensor classes, no more and no less."""
    classes = architectures.expert_classes()
    names = architectures.tensor_names()
    assert classes
    assert classes <= set(names)
    for tensor_class, name in names.items():
        layer = expert_layer_of(name.replace("%d", "7") + ".weight")
        assert layer == (7 if tensor_class in classes else None), tensor_class
        assert expert_layer_of(name.replace("%d", "7") + ".bias") is None


def test_page_is_complete() -> None:
    """docs/architectures.md has a row for all that is declared: after a change of upstream it is made anew."""
    page = (REPO / "docs" / "architectures.md").read_text()
    assert set(re.findall(r"^\| ([\w.-]+) \|", page, re.M)) - {"architecture", "---"} == set(architectures.declared())
    assert "| NO |" not in page


def test_other_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's weights changed after the unpaged run: the comparison must not pass."""
    path = tmp_path / "model.gguf"
    multiplied = architectures.make("qwen3moe", path)
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.2.ffn_up_exps.weight")
    load = architectures.load

    def change_then_load(*arguments: object, **options: object) -> object:
        if options["paging"] == "on":
            tensor.data[:] = tensor.data[::-1].copy()
            reader.data.flush()
        return load(*arguments, **options)

    monkeypatch.setattr(architectures, "load", change_then_load)
    row = architectures.try_model("qwen3moe", path, multiplied)
    assert not row.equal[0]
    assert not row.passed


def test_unpaged_experts_are_noticed(tmp_path: Path) -> None:
    """A graph that multiplies other tensors by expert than spac pages fails."""
    path = tmp_path / "model.gguf"
    multiplied = architectures.make("qwen3moe", path)
    with pytest.raises(SpacError, match=r"not both: blk\.0\.ffn_new_exps\.weight$"):
        architectures.try_model("qwen3moe", path, {*multiplied, "blk.0.ffn_new_exps.weight"})
