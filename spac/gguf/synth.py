"""Structure-exact synthetic models: the tensors, shapes, types and metadata of a known model, with random weights.

What a loader, a plan or a pager meets at true scale (expert counts, bundle sizes, odd row lengths, a vocabulary of the true
size) can so be tried without the model. The text that comes out means nothing, but logits are finite, and the routers send
tokens to differing experts. Names and shapes: `spac.gguf.structures`; types follow `llama_tensor_get_type_impl` in upstream's
src/llama-quant.cpp.

With content "sparse" the routed experts are a hole in the file: they read as zeros, which is a valid block of every type, so
that the model runs and a 30B file takes a gigabyte on disk. With "header" everything is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import gguf
import numpy as np
import numpy.typing as npt

from spac.errors import ModelFileError, OptionError
from spac.gguf.check import expert_layer_of
from spac.gguf.inflate import Progress, Quantiser, write_failure
from spac.gguf.structures import STRUCTURES, Shape, Structure, Value
from spac.host.memory import format_bytes

Content = Literal["full", "sparse", "header"]

RECIPES: Final = ("Q4_K_M", "MXFP4")  # mixtures of types; any ggml type's name is one too
POOL_ROWS: Final = 256  # tensors are made of so many differing rows for each type and length
CHUNK_BYTES: Final = 16 << 20


# -- types --


@cache
def _quantiser(type_name: str) -> Quantiser:
    return Quantiser(type_name)


def _quantiser_for(structure: Structure, name: str, recipe: str) -> Quantiser:
    """The type that upstream's quantiser would give a tensor."""
    shape = structure.tensors[name]
    kept = len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight"))
    if kept:
        return _quantiser("F32")
    quantiser = _quantiser(_wanted_type(structure, name, recipe))
    if shape[0] % quantiser.block:
        smaller = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
        quantiser = _quantiser(smaller.get(quantiser.type.name, "IQ4_NL"))
    return _quantiser("F16") if shape[0] % quantiser.block else quantiser


def _wanted_type(structure: Structure, name: str, recipe: str) -> str:
    is_output = name == ("output.weight" if "output.weight" in structure.tensors else "token_embd.weight")
    if recipe == "MXFP4":
        return "MXFP4" if len(structure.tensors[name]) == 3 else "Q8_0"
    if recipe != "Q4_K_M":
        return "Q6_K" if is_output and _quantiser(recipe).block > 1 and recipe != "Q8_0" else recipe
    if is_output:
        return "Q6_K"
    values = [n for n in structure.tensors if n.endswith(("attn_v.weight", "attn_qkv.weight"))]
    if name in values:
        more = _more_bits(values.index(name), len(values))
    else:
        more = "ffn_down" in name and _more_bits(int(name.split(".")[1]), structure.n_layers)
    return "Q6_K" if more else "Q4_K"


def _more_bits(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


# -- the vocabulary --

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _vocabulary(n_vocab: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: three special tokens, all bytes, then pairs of bytes, then pairs and a byte."""
    # GPT-2's way to write a byte as a printable character
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(unprintable))]
    left, tokens = list(characters), [*SPECIAL_TOKENS, *characters]
    merges: list[str] = []
    at = 0
    while len(tokens) < n_vocab:
        merges.extend(f"{left[at]} {right}" for right in characters[: n_vocab - len(tokens)])
        made = [left[at] + right for right in characters[: n_vocab - len(tokens)]]
        tokens.extend(made)
        left.extend(made)
        at += 1
    return tokens, merges


# -- weights --


class _Weights:
    """Random rows: quantised once for each type and length, then drawn from."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[str, int], npt.NDArray[np.uint8]] = {}

    def chunks(self, name: str, shape: Shape, quantiser: Quantiser) -> Iterator[bytes]:
        """The bytes of a tensor, some rows at a time."""
        if quantiser.type == gguf.GGMLQuantizationType.F32:
            yield self._plain(name, shape).astype("<f4").tobytes()
            return
        n, n_rows = shape[0], math.prod(shape[1:])
        pool = self._pool(n, quantiser)
        step = max(1, CHUNK_BYTES // pool.shape[1])
        for begin in range(0, n_rows, step):
            yield pool[self._random.integers(len(pool), size=min(step, n_rows - begin))].tobytes()

    def _plain(self, name: str, shape: Shape) -> npt.NDArray[np.float32]:
        if name.endswith(("norm.weight", "ssm_norm.weight")):
            return np.ones(shape, dtype=np.float32)
        if name.endswith("ssm_a"):  # minus the exponential of what the checkpoint has: a decay
            return -self._random.uniform(1, 16, shape).astype(np.float32)
        scale = 0.02 if len(shape) == 1 or name.endswith(".bias") else shape[0] ** -0.5
        return self._random.normal(0, scale, shape).astype(np.float32)

    def _pool(self, n: int, quantiser: Quantiser) -> npt.NDArray[np.uint8]:
        key = (quantiser.type.name, n)
        if key not in self._pools:  # inputs are normalised: such rows keep the size of what goes through
            self._pools[key] = quantiser(self._random.normal(0, n**-0.5, (POOL_ROWS, n)).astype(np.float32))
        return self._pools[key]


# -- the file --


@dataclass(frozen=True)
class Written:
    """What was written: the file's size, and what of it is on the disk."""

    path: Path
    file_bytes: int
    disk_bytes: int
    n_tensors: int


def synthesise(
    like: str | Structure,
    target: Path,
    *,
    recipe: str | None = None,
    content: Content = "full",
    seed: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write a model with the structure of `like`.

    Args:
        like: a key of STRUCTURES, or one of your own.
        target: the file to write.
        recipe: of RECIPES or a ggml type's name; None: what the model is usually run in.
        content: "full", "sparse" (routed experts are a hole) or "header" (all weights are).
        progress: called with (bytes written, bytes in all), holes included.

    Raises:
        OptionError: no such structure or type.
        ModelFileError: `target` cannot be written (a partial file is removed).
    """
    if isinstance(like, str) and like not in STRUCTURES:
        raise OptionError(f"{like!r}: no such structure; known are {', '.join(STRUCTURES)}")
    structure = STRUCTURES[like] if isinstance(like, str) else like
    recipe = (recipe or structure.recipe).upper()
    if recipe not in RECIPES:
        _quantiser(recipe)  # a wrong name is said before anything is written
    quantisers = {name: _quantiser_for(structure, name, recipe) for name in structure.tensors}
    sizes = {name: quantisers[name].row_bytes(math.prod(shape)) for name, shape in structure.tensors.items()}
    total = sum(sizes.values())
    partial = target.with_name(target.name + ".part")
    try:
        _write_header(partial, structure, recipe, quantisers, sizes)
        with partial.open("r+b") as file:
            _write_weights(file, structure, quantisers, sizes, content, seed, lambda done: progress and progress(done, total))
        partial.replace(target)
    except OSError as error:
        raise ModelFileError(f"{target}: cannot be written: {write_failure(error)}; {format_bytes(total)} are needed") from error
    finally:
        partial.unlink(missing_ok=True)
    status = target.stat()
    return Written(target, status.st_size, 512 * status.st_blocks, len(structure.tensors))


def _write_header(path: Path, structure: Structure, recipe: str, quantisers: dict[str, Quantiser], sizes: dict[str, int]) -> None:
    writer = gguf.GGUFWriter(path, structure.architecture)
    writer.add_name(f"synthetic, like {structure.name}")
    writer.add_file_type(int(getattr(gguf.LlamaFileType, f"MOSTLY_{'MXFP4_MOE' if recipe == 'MXFP4' else recipe}", 0)))
    for key, value in structure.metadata.items():
        _add(writer, f"{structure.architecture}.{key}", value)
    tokens, merges = _vocabulary(structure.n_vocab)
    n_special = len(SPECIAL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(structure.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL if i < n_special else gguf.TokenType.NORMAL) for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, shape in structure.tensors.items():
        quantiser = quantisers[name]
        plain = quantiser.type == gguf.GGMLQuantizationType.F32
        bytes_shape = tuple(reversed(shape)) if plain else (*reversed(shape[1:]), quantiser.row_bytes(shape[0]))
        dtype = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(name, bytes_shape, dtype, sizes[name], raw_dtype=None if plain else quantiser.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    types = gguf.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    if isinstance(value, list):
        writer.add_key_value(key, value, types.ARRAY, kinds[type(value[0])])
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _write_weights(
    file: BinaryIO,
    structure: Structure,
    quantisers: dict[str, Quantiser],
    sizes: dict[str, int],
    content: Content,
    seed: int,
    progress: Callable[[int], object],
) -> None:
    weights, done = _Weights(seed), 0
    at = _aligned(file.seek(0, 2))
    for name, shape in structure.tensors.items():
        if content == "full" or (content == "sparse" and expert_layer_of(name) is None):
            file.seek(at)
            for chunk in weights.chunks(name, shape, quantisers[name]):
                file.write(chunk)
        at += _aligned(sizes[name])
        done += sizes[name]
        progress(done)
    file.truncate(at)


def _aligned(n: int) -> int:
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    return -(-n // alignment) * int(alignment)
