"""Experts that are laid out in a way that is not known: whole with a warning if the model fits, else one clear error."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

import spac
from spac.errors import BudgetError
from spac.gguf.check import check_model
from spac.gguf.reader import read_gguf
from tests.conftest import Result

KEPT = 31  # experts of the tensor that has lost one


def rewrite(source: Path, target: Path, *, metadata: Mapping[str, int] = {}, names: Mapping[str, str] = {}, cut: str = "") -> Path:
    """A copy of a model with more metadata, other names of tensors (parts of them), or one tensor with an expert less."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    for tensor in reader.tensors:
        name = tensor.name
        for old, new in names.items():
            name = name.replace(old, new)
        data = tensor.data[:KEPT] if name == cut else tensor.data
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def foreign(dense_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says it has experts and that llama.cpp loads, without one expert tensor under a known name."""
    architecture = read_gguf(dense_path).metadata["general.architecture"]
    counts = {f"{architecture}.expert_count": 8, f"{architecture}.expert_used_count": 2}
    return rewrite(dense_path, tmp_path_factory.mktemp("layouts") / "foreign.gguf", metadata=counts)


@pytest.mark.parametrize("paging", ["auto", "on"])
def test_whole_with_a_warning(foreign: Path, dense_path: Path, paging: str, caplog: pytest.LogCaptureFixture) -> None:
    def logits(path: Path) -> np.ndarray:
        llama = spac.Llama(path, memory="4G", paging=paging, n_ctx=64, verbose=False, n_threads=2)  # type: ignore[arg-type]
        assert not llama.spac.paged
        llama.eval([300, 301, 302])
        result = np.array(llama._ctx.get_logits()[: llama.n_vocab()])
        llama.close()
        return result

    with caplog.at_level(logging.WARNING, logger="spac"):
        expected = logits(dense_path)
        assert not caplog.records
        assert np.array_equal(logits(foreign), expected)
    assert [record.getMessage() for record in caplog.records] == [
        f"{foreign}: loaded whole, its experts cannot be paged: it says 8 experts, and has no tensor such as blk.0.ffn_up_exps.weight"
    ]


def test_warning_on_the_command_line(foreign: Path) -> None:
    command = [sys.executable, "-m", "spac", "run", str(foreign), "-p", "x", "-n", "1", "--memory", "4G"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{foreign}: loaded whole, its experts cannot be paged: ")


def test_too_large_is_one_error(foreign: Path, cli: Callable[..., Result]) -> None:
    with pytest.raises(BudgetError, match=r"needs at least .* its experts cannot be paged: it says 8 experts"):
        spac.Llama(foreign, memory="20M", n_ctx=64, verbose=False)
    assert "its experts cannot be paged" in cli("run", foreign, "-p", "x", "--memory", "20M").line


def test_unexpected_names(model_path: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """llama.cpp does not know them either: its reason, not the last of the lines that follow from it."""
    path = rewrite(model_path, tmp_path / "names.gguf", names={"_exps.": "_specialists."})
    assert "it says 32 experts" in cli("inspect", path).out
    line = cli("run", path, "-p", "x", "--memory", "4G").line
    assert str(path) in line and "tensor 'blk.0.ffn_gate_exps.weight' not found" in line


def test_differing_counts(model_path: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    cut = "blk.3.ffn_down_exps.weight"
    path = rewrite(model_path, tmp_path / "counts.gguf", cut=cut)
    facts = check_model(path)
    assert re.fullmatch(r"blk\.3\.ffn_\w+_exps\.weight has 3[12] experts, others of its block have 3[12]", facts.unknown_layout)
    assert facts.expert_layers == () and facts.expert_bytes == 0 and facts.floor_bytes == 0
    line = cli("run", path, "-p", "x", "--memory", "4G").line
    assert f"tensor '{cut}' has wrong shape" in line


def test_blocks_that_are_skipped(model_path: Path, tmp_path: Path) -> None:
    """What predicts further tokens is in the file and not in the plan: as if the model had two layers less."""
    whole = check_model(model_path)
    facts = check_model(rewrite(model_path, tmp_path / "mtp.gguf", metadata={"qwen3moe.nextn_predict_layers": 2}))
    assert facts.n_layers == 8
    assert [layer.layer for layer in facts.expert_layers] == list(range(8))
    assert facts.expert_bytes == whole.expert_bytes * 8 // 10
    assert facts.skipped_bytes == whole.expert_bytes + whole.dense_bytes - facts.expert_bytes - facts.dense_bytes > 0
