"""Function-preserving inflation of a mixture-of-experts GGUF, so that a small trained model makes multi-gigabyte test files.

Every hidden unit of every expert is repeated 2^k times and the down projection is divided by 2^k, which is exact in binary
floating point: the layer computes the same sum, only longer. Routing, and so every cache figure, is that of the trained model.

Units are repeated as whole blocks (unit 0..n-1, then 0..n-1 again), so that a quantised row of the result is the small model's
quantised row, repeated. Upstream's quantiser (`ggml_quantize_chunk`, libggml-base) therefore runs on the small model only, in
float32, and its bytes are tiled into the result: the file is byte for byte what quantising the large model would give, without
the tens of gigabytes of float32 in between.

This module knows nothing of paging.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import spac
from spac.errors import LibraryError, ModelFileError, OptionError
from spac.host.memory import format_bytes

_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inflation:
    """What was written.

    Attributes:
        paths: the files, one unless the model was split.
        factor: how often each hidden unit stands in the result (2^k).
        expert_type: quantisation of the expert tensors, as read back from the files.
        total_bytes: size of all files.
    """

    paths: tuple[Path, ...]
    factor: int
    expert_type: str
    total_bytes: int


def inflate(
    source: Path,
    target: Path,
    *,
    expert_type: str,
    factor: int | None = None,
    size_bytes: int | None = None,
    n_splits: int = 1,
    progress: Progress | None = None,
) -> Inflation:
    """Write `source` with its experts inflated and quantised to `expert_type`; other tensors stay as they are.

    Args:
        source: a GGUF of one file with `ffn_{gate,up,down}_exps` tensors of any type that the gguf package can dequantise.
        target: the file to write; with `n_splits` > 1 the stem of `-00001-of-0000N.gguf` files.
        expert_type: a ggml type name (F32, F16, Q8_0, Q4_0, Q4_K, Q6_K, IQ4_NL, MXFP4, ...).
        factor: repetitions, a power of two; or
        size_bytes: the smallest factor that reaches this total size is chosen.
        n_splits: number of files.
        progress: called with (bytes written, bytes in all).

    Raises:
        OptionError: a factor that is no power of two, an unknown type, a type whose blocks do not fit the model's rows.
        ModelFileError: `source` cannot be read, has no such tensors, or `target` cannot be written (a partial file is removed).
    """
    quantiser = Quantiser(expert_type)
    reader = _open(source)
    experts = [t for t in reader.tensors if _EXPERTS.fullmatch(t.name)]
    if not experts:
        raise ModelFileError(f"{source}: no expert tensors (ffn_gate_exps, ffn_up_exps, ffn_down_exps): not a model to inflate")
    quantiser.check_rows(experts)
    if factor is None:
        factor = _factor_for(size_bytes or 0, reader, experts, quantiser)
    if factor < 1 or factor & (factor - 1):
        raise OptionError(f"factor {factor}: must be a power of two, or dividing by it would round")

    plan = [_Tensor.plan(t, factor, quantiser) for t in reader.tensors]
    paths = _split_paths(target, n_splits)
    total, done = sum(t.n_bytes for t in plan), 0
    shares = [list(part) for part in np.array_split(np.arange(len(plan)), len(paths))]
    partial = [path.with_name(path.name + ".part") for path in paths]
    try:
        for number, (path, share) in enumerate(zip(partial, shares, strict=True)):
            for n in _write_file(path, reader, [plan[i] for i in share], factor, quantiser, (number, len(paths), len(plan))):
                done += n
                if progress:
                    progress(done, total)
        for written, path in zip(partial, paths, strict=True):
            written.replace(path)
    except OSError as error:
        raise ModelFileError(f"{target}: cannot be written: {write_failure(error)}; {format_bytes(total)} are needed") from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return Inflation(tuple(paths), factor, _assert_types(paths, quantiser), sum(path.stat().st_size for path in paths))


def write_failure(error: OSError) -> str:
    """Why writing failed, in words."""
    # numpy's tofile says "N requested and M written", without an errno, when the disk is full
    return error.strerror or ("the disk is full" if "written" in str(error) else str(error))


class Quantiser:
    """Upstream's quantiser for one type. Types that want an importance matrix get one in which all columns count alike.

    Raises:
        OptionError: there is no such type.
        LibraryError: the native libraries are missing.
    """

    def __init__(self, name: str) -> None:
        try:
            self.type = gguf.GGMLQuantizationType[name.upper()]
        except KeyError:
            raise OptionError(f"{name!r}: no such ggml type; try F16, Q8_0, Q4_0, Q4_K, Q6_K, IQ4_NL or MXFP4") from None
        self.block, self.block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        if spac.library_folder is None:
            raise LibraryError("the native libraries are missing: run `make build`")
        library = ctypes.CDLL(str(spac.library_folder / "libggml-base.so"))
        # size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows,
        #                            int64_t n_per_row, const float * imatrix);
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        # bool ggml_quantize_requires_imatrix(enum ggml_type type);
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self._wants_importance = library.ggml_quantize_requires_imatrix(int(self.type))

    def check_rows(self, experts: list[Any]) -> None:
        for tensor in experts:
            if int(tensor.shape[0]) % self.block:
                raise OptionError(
                    f"{self.type.name} has blocks of {self.block} and {tensor.name} has rows of {tensor.shape[0]}: "
                    "upstream would silently take another type; choose one with smaller blocks"
                )

    def row_bytes(self, n: int) -> int:
        return n // self.block * self.block_bytes

    def __call__(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """float32 [..., n] to bytes [..., row_bytes(n)]."""
        rows = np.ascontiguousarray(rows)
        n = rows.shape[-1]
        out = np.empty((*rows.shape[:-1], self.row_bytes(n)), dtype=np.uint8)
        if self.type == gguf.GGMLQuantizationType.F32:
            out[...] = rows.view(np.uint8)
        elif self.type == gguf.GGMLQuantizationType.F16:
            out[...] = rows.astype(np.float16).view(np.uint8)
        else:
            importance = np.ones(n, dtype=np.float32) if self._wants_importance else None
            weights = None if importance is None else importance.ctypes.data
            written = self._quantize(int(self.type), rows.ctypes.data, out.ctypes.data, 0, rows.size // n, n, weights)
            if written != out.nbytes:
                raise OptionError(f"{self.type.name}: upstream's quantiser wrote {written} bytes for {out.nbytes}")
        return out


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the result; `shape` is numpy's order, rows last."""

    source: Any
    part: str | None
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    n_bytes: int

    @classmethod
    def plan(cls, tensor: Any, factor: int, quantiser: Quantiser) -> _Tensor:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        match = _EXPERTS.fullmatch(tensor.name)
        if match is None:
            return cls(tensor, None, shape, tensor.tensor_type, int(tensor.n_bytes))
        part = match.group(1)
        n, rows, row = shape
        shape = (n, rows, row * factor) if part == "down" else (n, rows * factor, row)
        return cls(tensor, part, shape, quantiser.type, n * shape[1] * quantiser.row_bytes(shape[2]))

    def data(self, factor: int, quantiser: Quantiser) -> npt.NDArray[Any]:
        if self.part is None:
            return np.asarray(self.source.data)
        values = gguf.quants.dequantize(self.source.data, self.source.tensor_type).astype(np.float32)
        values = values.reshape(tuple(int(n) for n in reversed(self.source.shape)))
        if self.part == "down":
            return np.tile(quantiser(values / np.float32(factor)), (1, 1, factor))
        return np.tile(quantiser(values), (1, factor, 1))


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF: {error}") from error


def _factor_for(size_bytes: int, reader: Any, experts: list[Any], quantiser: Quantiser) -> int:
    other = sum(int(t.n_bytes) for t in reader.tensors) - sum(int(t.n_bytes) for t in experts)
    once = sum(quantiser.row_bytes(int(t.n_elements)) for t in experts)
    factor = 1
    while other + factor * once < size_bytes:
        factor *= 2
    return factor


def _split_paths(target: Path, n: int) -> list[Path]:
    if n < 1 or n > 999:
        raise OptionError(f"cannot split into {n} files")
    if n == 1:
        return [target]
    stem = target.name.removesuffix(".gguf")
    return [target.with_name(f"{stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]


def _write_file(
    path: Path, reader: Any, tensors: list[_Tensor], factor: int, quantiser: Quantiser, split: tuple[int, int, int]
) -> Iterator[int]:
    """Writes one file; yields the bytes of each tensor when it is on its way to the disk."""
    number, n_files, n_tensors = split
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    if number == 0:
        _copy_metadata(writer, reader, architecture, factor, quantiser)
    if n_files > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", n_files)
        writer.add_int32("split.tensors.count", n_tensors)
    for tensor in tensors:
        raw = None if tensor.type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16) else tensor.type
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(tensor.type.name, np.uint8))
        shape = tensor.shape
        if raw is not None:
            block, block_bytes = gguf.GGML_QUANT_SIZES[raw]
            shape = (*shape[:-1], shape[-1] // block * block_bytes)
        writer.add_tensor_info(tensor.source.name, shape, dtype, tensor.n_bytes, raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data(factor, quantiser).view(np.uint8))
            yield tensor.n_bytes
    finally:
        writer.close()


def _copy_metadata(writer: Any, reader: Any, architecture: str, factor: int, quantiser: Quantiser) -> None:
    length_key = f"{architecture}.expert_feed_forward_length"
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith(("GGUF.", "split.")):
            continue
        value = field.contents()
        if field.name == length_key:
            value *= factor
        elif field.name == "general.file_type":
            value = int(getattr(gguf.LlamaFileType, f"MOSTLY_{quantiser.type.name}", value))
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type)


def _assert_types(paths: list[Path], quantiser: Quantiser) -> str:
    """The type of every expert tensor, read back from the files."""
    for path in paths:
        for tensor in _open(path).tensors:
            if _EXPERTS.fullmatch(tensor.name) and tensor.tensor_type != quantiser.type:
                raise ModelFileError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, not {quantiser.type.name}")
    return str(quantiser.type.name)
