"""Checks a model's files before llama.cpp sees them, and yields the facts that planning and `spac inspect` need.

Upstream aborts the process on some malformed models, so what can be checked from headers is checked here first. Knows
nothing of memory limits.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spac.errors import ModelFileError
from spac.gguf.reader import GgufFile, Scalar, Tensor, read_gguf
from spac.host.memory import page_bytes

# What is paged: upstream's classes of tensors that MUL_MAT_ID multiplies (LLM_TENSOR_INFOS in llama-arch.cpp), whatever the model; a
# test compares. llama.cpp is given the same pattern. Without the `\.weight$` it would catch biases and scales.
EXPERT_PATTERN: Final = r"\.ffn_(gate|up|down|gate_up)_(ch)?exps\.weight$"

_PAGED = re.compile(EXPERT_PATTERN)
_EXPERT = re.compile(r"^blk\.(\d+)" + EXPERT_PATTERN)
_BLOCK = re.compile(r"^blk\.(\d+)\.")
SPLIT_NAME: Final = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

# upstream asserts these: src/llama-hparams.h
MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 1024

MAX_CTX: Final = 1 << 24  # tokens of a context; llama.cpp keeps some 50 bytes for each besides what it caches

# An expert keeps its place in a page of the file, so sizes in pages follow from file offsets: Model::reserve in pager.cpp.
PAGE_BYTES: Final = page_bytes()


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        layer: block number.
        n_experts: experts in it.
        expert_bytes: all of them, as in the file.
        bundle_bytes: one expert's tensors, as in the file.
        bundle_page_bytes: the same in whole pages.
    """

    layer: int
    n_experts: int
    expert_bytes: int
    bundle_bytes: int
    bundle_page_bytes: int


@dataclass(frozen=True)
class ModelFacts:
    """What a model's headers say. Sizes in bytes.

    Attributes:
        path: of the first file; `parts` are all of them.
        name: general.name, or the file's name.
        architecture: upstream's name, such as "qwen3moe".
        n_layers: blocks, with or without experts, that a token goes through.
        n_experts: experts in a layer (0: a dense model); `n_experts_used` of them compute a token.
        n_ctx_train: context length of training, tokens; 0 if it is not said.
        dense_bytes: all tensors but the paged ones; `expert_bytes`: the paged ones.
        largest_dense_bytes: the largest tensor that is not paged.
        vocabulary_bytes: headers of all files, which are mostly the vocabulary.
        work_bytes_per_token: what a matrix product's input takes once more, converted to the type that the weights are
            multiplied with (ggml_graph_plan's work buffer); the largest of all products, by token of a ubatch.
        skipped_bytes: blocks that guess further tokens (MTP), which llama.cpp leaves in the file; not in the others.
        expert_layers: the layers that have experts, in order; none if they cannot be paged.
        unknown_layout: why they cannot be paged though the model says that it has some; "" otherwise.
        types: bytes by tensor type, of the whole file.
    """

    path: str
    parts: tuple[str, ...]
    name: str
    architecture: str
    n_layers: int
    n_experts: int
    n_experts_used: int
    n_ctx_train: int
    file_bytes: int
    dense_bytes: int
    expert_bytes: int
    largest_dense_bytes: int
    vocabulary_bytes: int
    work_bytes_per_token: int
    skipped_bytes: int
    expert_layers: tuple[ExpertLayer, ...]
    unknown_layout: str
    types: dict[str, int]
    has_chat_template: bool

    @property
    def max_bundle_bytes(self) -> int:
        """The largest bundle in whole pages; 0 without experts."""
        return max((layer.bundle_page_bytes for layer in self.expert_layers), default=0)

    @property
    def floor_bytes(self) -> int:
        """The smallest expert budget: two bundles, one in use and one on its way."""
        return 2 * self.max_bundle_bytes


def expert_layer_of(name: str) -> int | None:
    """The layer of a paged tensor; None: the tensor is not paged."""
    match = _EXPERT.search(name)
    return int(match[1]) if match is not None else None


def in_layers(name: str, n_layers: int) -> bool:
    """Whether a tensor belongs to the first n_layers blocks, or to no block."""
    match = _BLOCK.match(name)
    return match is None or int(match[1]) < n_layers


def check_model(path: str | os.PathLike[str]) -> ModelFacts:
    """Check a model's file, or all parts of a split one (give the first).

    Raises:
        ModelFileError: one line that says what is wrong, and with which file.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ModelFileError(f"{path}: its name is not UTF-8, which llama.cpp wants: rename it") from None
    first = read_gguf(path)
    files = [first, *_read_other_parts(first)]
    architecture = _architecture(first)
    _check_hyperparameters(first, architecture)
    tensors = [tensor for file in files for tensor in file.tensors]
    if not tensors:
        raise ModelFileError(f"{first.path}: holds no tensors; it is a vocabulary or a template, not a model")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ModelFileError(f"{first.path}: the same tensor is in two parts; the parts are of different models")
    return _facts(first, files, architecture, tensors)


def _facts(first: GgufFile, files: list[GgufFile], architecture: str, tensors: list[Tensor]) -> ModelFacts:
    n_layers = _integer(first, f"{architecture}.block_count") - _integer(first, f"{architecture}.nextn_predict_layers")
    loaded = [tensor for tensor in tensors if in_layers(tensor.name, n_layers)]
    n_experts = _integer(first, f"{architecture}.expert_count")
    unknown_layout = _unknown_layout(loaded, n_experts)
    experts = [] if unknown_layout else [tensor for tensor in loaded if _EXPERT.search(tensor.name)]
    dense = [tensor.n_bytes for tensor in loaded if unknown_layout or not _EXPERT.search(tensor.name)]
    types: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        types[tensor.type_name] += tensor.n_bytes
    return ModelFacts(
        path=first.path,
        parts=tuple(file.path for file in files),
        name=str(first.metadata.get("general.name") or Path(first.path).stem),
        architecture=architecture,
        n_layers=n_layers,
        n_experts=n_experts,
        n_experts_used=_integer(first, f"{architecture}.expert_used_count"),
        n_ctx_train=_integer(first, f"{architecture}.context_length"),
        file_bytes=sum(file.file_bytes for file in files),
        dense_bytes=sum(dense),
        expert_bytes=sum(tensor.n_bytes for tensor in experts),
        largest_dense_bytes=max(dense, default=0),
        vocabulary_bytes=sum(file.header_bytes for file in files),
        work_bytes_per_token=_work_bytes_per_token(loaded, _integer(first, f"{architecture}.expert_used_count")),
        skipped_bytes=sum(tensor.n_bytes for tensor in tensors) - sum(tensor.n_bytes for tensor in loaded),
        expert_layers=_expert_layers(experts),
        unknown_layout=unknown_layout,
        types=dict(sorted(types.items(), key=lambda item: -item[1])),
        has_chat_template="tokenizer.chat_template" in first.metadata,
    )


def _work_bytes_per_token(tensors: list[Tensor], n_used: int) -> int:
    """Upper bound: Q8_K has the most bytes of the quantised types that products are made in, F16 of the others."""
    largest = 0.0
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name.endswith(".weight") and not tensor.name.startswith("token_embd"):
            rows = n_used if "down_exps" in tensor.name or "down_chexps" in tensor.name else 1
            largest = max(largest, tensor.shape[0] * rows * (2 if tensor.type_name in ("F32", "F16", "BF16") else 292 / 256))
    return int(largest)


def _architecture(file: GgufFile) -> str:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileError(f"{file.path}: does not say its architecture; it is not a language model")
    if file.metadata.get("general.type", "model") != "model":
        raise ModelFileError(f"{file.path}: is a {file.metadata['general.type']!r} file, not a model")
    return architecture


def _integer(file: GgufFile, key: str) -> int:
    """A count from the metadata, the largest if it is given by layer; 0 if it is absent."""
    value: Scalar = file.metadata.get(key, 0)
    if key in file.arrays:
        value = max((v for v in file.arrays[key] if isinstance(v, int)), default=0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelFileError(f"{file.path}: {key} is {value!r}, not a count; the file is damaged")
    return value


def _check_hyperparameters(file: GgufFile, architecture: str) -> None:
    """What upstream asserts about counts: llama_model_base::load_hparams in src/llama-model.cpp."""
    n_layers = _integer(file, f"{architecture}.block_count")
    if not 0 < n_layers <= MAX_LAYERS:
        raise ModelFileError(f"{file.path}: {architecture}.block_count is {n_layers}, expected 1 to {MAX_LAYERS}")
    n_ctx = _integer(file, f"{architecture}.context_length")
    if n_ctx > MAX_CTX:
        raise ModelFileError(f"{file.path}: {architecture}.context_length is {n_ctx}, expected at most {MAX_CTX}")
    n_guessing = _integer(file, f"{architecture}.nextn_predict_layers")
    if n_guessing > n_layers:
        raise ModelFileError(f"{file.path}: {architecture}.nextn_predict_layers is {n_guessing}, of {n_layers} blocks")
    n_experts = _integer(file, f"{architecture}.expert_count")
    n_used = _integer(file, f"{architecture}.expert_used_count")
    if n_experts > MAX_EXPERTS:
        raise ModelFileError(f"{file.path}: {architecture}.expert_count is {n_experts}, at most {MAX_EXPERTS} are supported")
    if n_used > n_experts or (n_experts > 0 and n_used == 0):
        raise ModelFileError(f"{file.path}: {architecture} uses {n_used} of {n_experts} experts, which cannot be")


def _unknown_layout(tensors: list[Tensor], n_experts: int) -> str:
    """Why experts cannot be paged, in words; "" if they can, or if there are none."""
    experts = [tensor for tensor in tensors if _PAGED.search(tensor.name)]
    if not experts:
        return f"it says {n_experts} experts, and has no tensor such as blk.0.ffn_up_exps.weight" if n_experts else ""
    counts: dict[tuple[str, bool], int] = {}
    for tensor in experts:
        match = _EXPERT.search(tensor.name)
        if match is None:
            return f"{tensor.name} is in no block"
        if len(tensor.shape) != 3:
            return f"{tensor.name} has shape {list(tensor.shape)}, expected 3 dimensions"
        group = (match[1], "chexps" in tensor.name)
        if counts.setdefault(group, tensor.shape[2]) != tensor.shape[2]:
            return f"{tensor.name} has {tensor.shape[2]} experts, others of its block have {counts[group]}"
    return ""


def _expert_layers(experts: list[Tensor]) -> tuple[ExpertLayer, ...]:
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in experts:
        layer = expert_layer_of(tensor.name)
        assert layer is not None
        by_layer[layer].append(tensor)
    slots: dict[int, int] = defaultdict(int)  # pages, of all slices of a size those of the one that touches most
    for tensor in experts:
        for expert in range(tensor.shape[2]):
            size = _slice_bytes(tensor)
            begin = tensor.offset + expert * size
            slots[size] = max(slots[size], (begin + size - 1) // PAGE_BYTES - begin // PAGE_BYTES + 1)
    return tuple(
        ExpertLayer(
            layer=layer,
            n_experts=max(tensor.shape[2] for tensor in tensors),
            expert_bytes=sum(tensor.n_bytes for tensor in tensors),
            bundle_bytes=sum(_slice_bytes(tensor) for tensor in tensors),
            bundle_page_bytes=sum(slots[_slice_bytes(tensor)] for tensor in tensors) * PAGE_BYTES,
        )
        for layer, tensors in sorted(by_layer.items())
    )


def _slice_bytes(tensor: Tensor) -> int:
    return tensor.n_bytes // tensor.shape[2]


# -- split models --


def _read_other_parts(first: GgufFile) -> list[GgufFile]:
    count = _integer(first, "split.count")
    if count <= 1:
        return []
    match = SPLIT_NAME.match(Path(first.path).name)
    if not match or int(match["count"]) != count:
        raise ModelFileError(
            f"{first.path}: is part of a model in {count} files, which must be named NAME-00001-of-{count:05d}.gguf and so on"
        )
    folder = Path(first.path).parent
    names = [folder / f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if _integer(first, "split.no") != 0 or int(match["number"]) != 1:
        raise ModelFileError(f"{first.path}: is part {match['number']} of {count}; give the first part, {names[0]}")
    for name in names[1:]:
        if not name.exists():
            raise ModelFileError(f"{name}: this part of {first.path} is missing; all {count} parts must be in one folder")
    parts = [read_gguf(name) for name in names[1:]]
    for number, part in enumerate(parts, start=1):
        if _integer(part, "split.count") != count or _integer(part, "split.no") != number:
            raise ModelFileError(f"{part.path}: says that it is another part than its name does; the parts are mixed up")
    declared = _integer(first, "split.tensors.count")
    actual = len(first.tensors) + sum(len(part.tensors) for part in parts)
    if declared and declared != actual:
        raise ModelFileError(f"{first.path}: the parts hold {actual} tensors, {declared} are expected; a part is of another model")
    return parts
