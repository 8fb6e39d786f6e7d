"""Headers of model files, whole and damaged: facts, or one error that names the file, and never anything else."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spac.errors import ModelFileError
from spac.gguf.check import check_model
from spac.gguf.reader import TENSOR_TYPES, read_gguf

ARCHITECTURE = "qwen3moe"


def write_model(path: Path, *, experts: int = 4, used: int = 2, layers: int = 2) -> Path:
    """A tiny model in form only: the tables and sizes of a mixture of experts."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(used)
    writer.add_tensor("token_embd.weight", np.zeros((16, 32), np.float32))
    for layer in range(layers):
        for part in ("gate", "up", "down"):
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", np.zeros((experts, 64, 32), np.float16))
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.bias", np.zeros((experts, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_facts(tiny: Path) -> None:
    facts = check_model(tiny)
    assert (facts.architecture, facts.n_layers, facts.n_experts, facts.n_experts_used) == (ARCHITECTURE, 2, 4, 2)
    assert facts.n_ctx_train == 2048
    assert facts.expert_bytes == 2 * 3 * 4 * 64 * 32 * 2
    assert facts.dense_bytes == 16 * 32 * 4 + 2 * 3 * 4 * 32 * 4  # biases are not paged
    assert facts.file_bytes == tiny.stat().st_size
    assert [layer.layer for layer in facts.expert_layers] == [0, 1]
    assert facts.expert_layers[0].bundle_bytes == 3 * 64 * 32 * 2
    assert facts.floor_bytes == 2 * facts.max_bundle_bytes


def test_types_are_those_of_the_gguf_package() -> None:
    """The table of tensor types says what the gguf package says."""
    for number, (name, block, size) in TENSOR_TYPES.items():
        try:
            known = gguf.GGMLQuantizationType(number)
        except ValueError:
            continue  # newer than the package
        assert known.name == name
        assert gguf.GGML_QUANT_SIZES[known] == (block, size)


def test_every_type_that_upstream_multiplies_is_known() -> None:
    """A type that comes with a newer llama.cpp fails here until it is in the table; graph_test.cpp pages each of them."""
    source = (Path(__file__).parents[2] / "vendor/llama.cpp/ggml/src/ggml-cpu/ggml-cpu.c").read_text()
    table = re.search(r"type_traits_cpu\[GGML_TYPE_COUNT\] = \{(.*?)\n\};", source, re.DOTALL)
    assert table is not None
    rows = re.split(r"\[GGML_TYPE_(\w+)\]", table[1])[1:]
    multiplied = {name for name, row in zip(rows[::2], rows[1::2], strict=True) if ".vec_dot " in row}
    assert len(multiplied) >= 28
    assert multiplied <= {name for name, _, _ in TENSOR_TYPES.values()}


def damaged(tiny: Path, folder: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(tiny.read_bytes())
    result = change(content)
    path = folder / "damaged.gguf"
    path.write_bytes(bytes(result) if isinstance(result, bytes | bytearray) else bytes(content))
    return path


def first_tensor_row(content: bytes) -> int:
    return content.index(b"token_embd.weight") + len(b"token_embd.weight")


CASES: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "empty": (lambda b: b"", "is empty"),
    "a few bytes": (lambda b: b[:10], "not a GGUF"),
    "other format": (lambda b: b"PK\x03\x04" + b[4:], "not a GGUF"),
    "big-endian": (lambda b: b.__setitem__(slice(4, 8), struct.pack(">I", 3)), "big-endian"),
    "version 1": (lambda b: b.__setitem__(slice(4, 8), struct.pack("<I", 1)), "version 1"),
    "cut in the metadata": (lambda b: b[:460], "ends inside"),
    "cut in the table": (lambda b: b[: b.index(b"blk.1.")], "damaged or incomplete"),
    "cut in the data": (lambda b: b[:-100], "damaged or incomplete"),
    "many tensors": (lambda b: b.__setitem__(slice(8, 16), struct.pack("<Q", 1 << 60)), "claims 1152921504606846976 tensors"),
    "many keys": (lambda b: b.__setitem__(slice(16, 24), struct.pack("<Q", 1 << 62)), "metadata entries"),
    "long key": (lambda b: b.__setitem__(slice(24, 32), struct.pack("<Q", 1 << 63)), "claims"),
    "many dimensions": (lambda b: struct.pack_into("<I", b, first_tensor_row(b), 99), "99 dimensions"),
    "huge extent": (lambda b: struct.pack_into("<Q", b, first_tensor_row(b) + 4, 1 << 63), "shape"),
    "far offset": (lambda b: struct.pack_into("<Q", b, first_tensor_row(b) + 4 + 16 + 4, 1 << 40), "offset"),
    "unknown type": (lambda b: struct.pack_into("<I", b, first_tensor_row(b) + 4 + 16, 77), "type 77"),
    "tensor twice": (lambda b: b.replace(b"blk.1.ffn_up_exps.weight", b"blk.0.ffn_up_exps.weight"), "twice"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage(tiny: Path, tmp_path: Path, case: str) -> None:
    change, words = CASES[case]
    path = damaged(tiny, tmp_path, change)
    with pytest.raises(ModelFileError) as caught:
        check_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(("key", "value", "words"), [("expert_count", 2000, "at most 1024"), ("expert_used_count", 5, "uses 5 of 4"),
                                                    ("expert_used_count", 0, "uses 0 of 4"), ("block_count", 100_000, "block_count"),
                                                    ("context_length", 2**32 - 1, "context_length is 4294967295, expected at most")])  # fmt: skip
def test_counts_that_upstream_would_abort_on(tiny: Path, tmp_path: Path, key: str, value: int, words: str) -> None:
    path = damaged(tiny, tmp_path, lambda b: set_count(b, f"{ARCHITECTURE}.{key}".encode(), value))
    with pytest.raises(ModelFileError, match=words):
        check_model(path)


def set_count(content: bytearray, key: bytes, value: int) -> None:
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, value)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot open.*No such file"):
        check_model(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="is a directory"):
        check_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        check_model(tmp_path / "pipe")


def test_no_permission(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(tiny.read_bytes())
    path.chmod(0)
    as_root = os.geteuid() == 0
    if as_root:  # root may read everything: become nobody for a moment
        for folder in [tmp_path, *list(tmp_path.parents)[:2]]:
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(ModelFileError, match="Permission denied"):
            check_model(path)
    finally:
        if as_root:
            os.seteuid(0)


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    name = "m-{:05d}-of-00002.gguf"
    first, second = tmp_path / name.format(1), tmp_path / name.format(2)
    for number, path in enumerate((first, second)):
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_block_count(2)
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(f"blk.{number}.ffn_up_exps.weight", np.zeros((4, 64, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    facts = check_model(first)
    assert facts.parts == (str(first), str(second))
    assert len(facts.expert_layers) == 2
    with pytest.raises(ModelFileError, match="give the first part"):
        check_model(second)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(ModelFileError, match="must be named"):
        check_model(alone)
    second.unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        check_model(first)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_harmless(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Random bytes changed in the header, or the file cut: facts or ModelFileError."""
    content = bytearray(tiny.read_bytes())
    header = read_gguf(tiny).header_bytes
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    try:
        check_model(path)
    except ModelFileError as error:
        assert str(path) in str(error)
