"""A small bounded parser of GGUF headers: metadata and the table of tensors, never the weights.

Every count and length is compared with what the file can hold before anything is allocated or looped over, so a damaged
file costs one clear error. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, overload

from spac.errors import ModelFileError

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32

MAX_METADATA: Final = 1 << 16
MAX_TENSORS: Final = 1 << 20
MAX_NAME_BYTES: Final = 1 << 16
MAX_KEPT_STRING_BYTES: Final = 1 << 20  # longer values are skipped over
MAX_STRINGS: Final = 1 << 24  # in one array; the largest vocabularies have 2**18
MAX_KEPT_ARRAY: Final = 1 << 12

# value types: gguf_type in ggml/include/gguf.h
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9

# ggml_type -> (name, elements in a block, bytes of a block); type_traits in ggml/src/ggml.c, less what is never in files
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Tensor:
    """One row of the table of tensors.

    Attributes:
        name: at most 63 bytes.
        shape: innermost dimension first, as ggml counts; an expert tensor's last one counts experts.
        type_name: ggml's name of the type.
        offset: in the file, bytes.
        n_bytes: size of the data, bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of one GGUF file.

    Attributes:
        metadata: scalars and strings; long strings and arrays of strings are left out.
        arrays: short arrays of numbers.
        array_lengths: number of elements of every array.
        tensors: in the order of the file.
        header_bytes: up to the end of the table of tensors.
        file_bytes: size of the whole file.
    """

    path: str
    metadata: dict[str, Scalar]
    arrays: dict[str, tuple[Scalar, ...]]
    array_lengths: dict[str, int]
    tensors: tuple[Tensor, ...]
    header_bytes: int
    file_bytes: int


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read and check one file's header.

    Raises:
        ModelFileError: the file is missing, not readable, not a GGUF, damaged, or shorter than its tensors.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    except OSError as e:
        raise ModelFileError(f"{name}: cannot open the model file: {e.strerror}") from None
    try:
        try:
            return parse_gguf(name, _regular_file_bytes(name, fd), lambda n, offset: os.pread(fd, n, offset))
        except OSError as e:
            raise ModelFileError(f"{name}: cannot read the model file: {e.strerror}") from None
    finally:
        with contextlib.suppress(OSError, AttributeError):  # a FIFO has no cache, macOS no such call
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what was read here would count in a memory cgroup
        os.close(fd)


def parse_gguf(name: str, size: int, read: Callable[[int, int], bytes]) -> GgufFile:
    """Parse and check the header of a file of `size` bytes, wherever it is.

    Args:
        name: of the file, for messages.
        read: returns up to n bytes from an offset on, as os.pread; nothing at the end only.

    Raises:
        ModelFileError: it is not a GGUF, damaged, or shorter than its tensors.
    """
    return _HeaderParser(name, size, read).parse()


def _regular_file_bytes(path: str, fd: int) -> int:
    import stat

    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise ModelFileError(f"{path}: is a directory, give the .gguf file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path}: is not a regular file")
    return status.st_size


class _HeaderParser:
    """Reads forward through one file, in chunks."""

    _CHUNK_BYTES = 1 << 18

    def __init__(self, path: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self.path = path
        self.read = read
        self.size = size
        self.buffer = b""
        self.base = 0  # file offset of buffer
        self.at = 0  # position in buffer

    # -- reading --

    @property
    def position(self) -> int:
        return self.base + self.at

    @property
    def left(self) -> int:
        return self.size - self.position

    def fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}; the file is damaged or incomplete, download it again")

    def need(self, n: int, what: str) -> None:
        """Make n bytes available in the buffer."""
        if len(self.buffer) - self.at >= n:
            return
        if n > self.left:
            raise self.fail(f"ends inside {what} (at byte {self.size})")
        begin = self.position
        parts, have = [], 0
        while have < n:
            part = self.read(max(n - have, self._CHUNK_BYTES), begin + have)
            if not part:
                raise self.fail(f"ends inside {what} (at byte {begin + have})")
            parts.append(part)
            have += len(part)
        self.buffer, self.base, self.at = b"".join(parts), begin, 0

    def skip(self, n: int, what: str) -> None:
        if n > self.left:
            raise self.fail(f"ends inside {what} (at byte {self.size})")
        if self.at + n <= len(self.buffer):
            self.at += n
        else:
            self.base, self.buffer, self.at = self.position + n, b"", 0

    def number(self, code: str, what: str) -> int:
        n = struct.calcsize("<" + code)
        self.need(n, what)
        value = struct.unpack_from("<" + code, self.buffer, self.at)[0]
        self.at += n
        return int(value)

    @overload
    def string(self, what: str, limit: int, *, may_skip: Literal[False] = False) -> str: ...
    @overload
    def string(self, what: str, limit: int, *, may_skip: Literal[True]) -> str | None: ...
    def string(self, what: str, limit: int, *, may_skip: bool = False) -> str | None:
        n = self.number("Q", what)
        if n > self.left:
            raise self.fail(f"{what} claims {n} bytes, {self.left} are left")
        if n > limit:
            if not may_skip:
                raise self.fail(f"{what} is {n} bytes long")
            self.skip(n, what)
            return None
        self.need(n, what)
        value = self.buffer[self.at : self.at + n].decode("utf-8", errors="replace")
        self.at += n
        return value

    def skip_strings(self, count: int, what: str) -> None:
        for _ in range(count):
            if len(self.buffer) - self.at < 8:
                self.need(8, what)
            n = int.from_bytes(self.buffer[self.at : self.at + 8], "little")
            self.at += 8
            if self.at + n <= len(self.buffer):
                self.at += n
            else:
                self.skip(n, what)

    # -- the parts of a header --

    def parse(self) -> GgufFile:
        n_tensors, n_metadata = self.parse_preamble()
        metadata: dict[str, Scalar] = {}
        arrays: dict[str, tuple[Scalar, ...]] = {}
        lengths: dict[str, int] = {}
        seen: set[str] = set()
        for _ in range(n_metadata):
            key = self.string("a metadata key", MAX_NAME_BYTES)
            if not key or key in seen:
                raise self.fail(f"metadata key {key!r} is empty or comes twice")
            seen.add(key)
            self.parse_value(key, metadata, arrays, lengths)
        rows = self.parse_tensor_table(n_tensors)
        header_bytes = self.position
        tensors = self.place_tensors(rows, self.alignment(metadata), header_bytes)
        return GgufFile(self.path, metadata, arrays, lengths, tensors, header_bytes, self.size)

    def parse_preamble(self) -> tuple[int, int]:
        if self.size == 0:
            raise ModelFileError(f"{self.path}: is empty; the download may have failed")
        if self.size < 24:
            raise ModelFileError(f"{self.path}: is not a GGUF model, {self.size} bytes are too few")
        self.need(24, "the header")
        magic, version, n_tensors, n_metadata = struct.unpack_from("<4sIQQ", self.buffer, 0)
        self.at = 24
        if magic != MAGIC:
            raise ModelFileError(f"{self.path}: is not a GGUF model (it begins with {magic!r})")
        if version & 0xFFFF == 0:
            raise ModelFileError(f"{self.path}: is a big-endian GGUF; convert it for this machine")
        if version not in (2, 3):
            raise ModelFileError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are); convert the model again")
        # the smallest row of either table bounds how many there can be
        if n_tensors > min(MAX_TENSORS, self.left // 32):
            raise self.fail(f"claims {n_tensors} tensors")
        if n_metadata > min(MAX_METADATA, self.left // 13):
            raise self.fail(f"claims {n_metadata} metadata entries")
        return n_tensors, n_metadata

    def parse_value(
        self, key: str, metadata: dict[str, Scalar], arrays: dict[str, tuple[Scalar, ...]], lengths: dict[str, int]
    ) -> None:
        what = f"metadata {key!r}"
        kind = self.number("I", what)
        if kind == _STRING:
            text = self.string(what, MAX_KEPT_STRING_BYTES, may_skip=True)
            if text is not None:
                metadata[key] = text
        elif kind == _ARRAY:
            self.parse_array(key, what, arrays, lengths)
        elif kind in _SCALARS:
            metadata[key] = self.scalars(_SCALARS[kind], 1, what)[0]
        else:
            raise self.fail(f"{what} has unknown type {kind}")

    def scalars(self, code: str, count: int, what: str) -> tuple[Scalar, ...]:
        form = f"<{count}{code}"
        n = struct.calcsize(form)
        self.need(n, what)
        values: tuple[Scalar, ...] = struct.unpack_from(form, self.buffer, self.at)
        self.at += n
        return values

    def parse_array(self, key: str, what: str, arrays: dict[str, tuple[Scalar, ...]], lengths: dict[str, int]) -> None:
        kind, count = self.number("I", what), self.number("Q", what)
        lengths[key] = count
        if kind == _STRING:
            if count > min(MAX_STRINGS, self.left // 8):
                raise self.fail(f"{what} claims {count} strings")
            self.skip_strings(count, what)
        elif kind in _SCALARS:
            n_bytes = count * struct.calcsize("<" + _SCALARS[kind])
            if n_bytes > self.left:
                raise self.fail(f"{what} claims {count} elements")
            if count <= MAX_KEPT_ARRAY:
                arrays[key] = self.scalars(_SCALARS[kind], count, what)
            else:
                self.skip(n_bytes, what)
        else:
            raise self.fail(f"{what} is an array of unknown type {kind}")

    def alignment(self, metadata: dict[str, Scalar]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value <= 0 or value & (value - 1) or value > 1 << 30:
            raise self.fail(f"general.alignment is {value!r}, not a power of two")
        return value

    def parse_tensor_table(self, n_tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        rows = []
        for i in range(n_tensors):
            name = self.string(f"the name of tensor {i}", MAX_NAME_BYTES)
            if not name or len(name.encode()) > 63:
                raise self.fail(f"tensor {i} has a bad name ({name[:80]!r})")
            what = f"the table row of tensor {name!r}"
            n_dims = self.number("I", what)
            if not 1 <= n_dims <= 4:
                raise self.fail(f"tensor {name!r} has {n_dims} dimensions")
            shape = tuple(self.number("Q", what) for _ in range(n_dims))
            kind, offset = self.number("I", what), self.number("Q", what)
            rows.append((name, shape, kind, offset))
        return rows

    def place_tensors(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: int, header_bytes: int
    ) -> tuple[Tensor, ...]:
        data_begin = (header_bytes + alignment - 1) // alignment * alignment
        tensors = []
        names: set[str] = set()
        expected = 0
        for name, shape, kind, offset in rows:
            if name in names:
                raise self.fail(f"tensor {name!r} comes twice")
            names.add(name)
            type_name, n_bytes = self.tensor_bytes(name, shape, kind)
            if offset != expected:
                raise self.fail(f"tensor {name!r} has offset {offset}, expected {expected}")
            if data_begin + offset + n_bytes > self.size:
                raise self.fail(
                    f"has {self.size} bytes, tensor {name!r} ends at byte {data_begin + offset + n_bytes}"
                )
            expected += (n_bytes + alignment - 1) // alignment * alignment
            tensors.append(Tensor(name, shape, type_name, data_begin + offset, n_bytes))
        return tuple(tensors)

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        if kind not in TENSOR_TYPES:
            raise self.fail(f"tensor {name!r} has type {kind}, which is unknown or no longer supported")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        elements = 1
        for extent in shape:
            elements *= extent
        if elements <= 0 or elements >= 1 << 62 or shape[0] % block:
            raise self.fail(f"tensor {name!r} has shape {list(shape)}, which type {type_name} cannot have")
        return type_name, elements // block * block_bytes
