"""What an estimator has learned, as one .npz file beside the model's cache entry. A file is never trusted: every array's name, type, shape
and range is checked before any is used, and a file that fails is ignored with one warning line.

Sizes are checked in the archive's directory before anything is read; nothing is inflated or unpickled."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spac import cache
from spac.estimator.memory import NO_TOKEN
from spac.estimator.tokens import MEMORY_BYTES, TokenEstimator

_log = logging.getLogger(__name__)

_FORMAT = 1
_WEIGHTS = ("prior", "layer_weights", "class_weights", "links_in", "links_out")
_NAMES = {"format", "model", "shape", "tokens_learned", "context", "ids", *_WEIGHTS}
_WEIGHT_MAX = 1e4  # learned weights are of the size of 1; more is damage
_HEADERS_BYTES = 1 << 16
_END_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16  # what malloc keeps


class _Unusable(ValueError):
    """A file that is not taken, with the reason."""


def fingerprint(parts: Sequence[str | Path]) -> str:
    """Of a model's files: SHA-256, in hex, of the first and the last megabyte of each, which are header, metadata and weights.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        with Path(part).open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def default_path(model: str) -> Path:
    """Where what was learned of a model with this fingerprint is kept: in the user's cache directory."""
    return cache.folder() / f"{model[:24]}.npz"


def save(estimator: TokenEstimator, path: Path, model: str) -> None:
    """Writes what was learned; a file that is there is replaced whole or not at all.

    Args:
        model: what the tables belong to, a fingerprint of the model file, say; `load` wants the same.

    Raises:
        OSError: the file cannot be written.
    """
    context, ids = estimator.memory.records()
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache.replacing(path) as file:
        np.savez(
            file,
            format=np.int64(_FORMAT),
            model=np.frombuffer(model.encode(), np.uint8),
            shape=_shape(estimator),
            tokens_learned=np.int64(estimator.tokens_learned),
            context=context,
            ids=ids,
            **{key: getattr(estimator, key) for key in _WEIGHTS},
        )


def load(estimator: TokenEstimator, path: Path, model: str) -> bool:
    """Fills a new estimator from a file. A file that is broken or belongs to something else changes nothing and is named in one warning.

    Returns:
        Whether the estimator now knows what the file knew; False without a warning if there is no file.
    """
    begin = time.perf_counter()
    try:
        arrays = _read(estimator, path, model)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError, MemoryError) as e:
        _log.warning("%s: learned tables ignored: %s", path, " ".join(str(e).split()) or type(e).__name__)
        return False
    for key in _WEIGHTS:
        getattr(estimator, key)[...] = arrays[key]
    estimator.tokens_learned = int(arrays["tokens_learned"])
    estimator.memory.restore(arrays["context"])
    estimator.start_request()
    _log.info("%s: tables of %d tokens loaded in %.0f ms", path, len(estimator.memory), (time.perf_counter() - begin) * 1e3)
    return True


def _shape(estimator: TokenEstimator) -> NDArray[np.int64]:
    return np.array([estimator.n_layers, estimator.n_experts, estimator.n_used, estimator.rank], np.int64)


def _read(estimator: TokenEstimator, path: Path, model: str) -> dict[str, NDArray[Any]]:
    """Every array, checked; ids are in the estimator's memory then, where nothing points to them yet."""
    weights_bytes = sum(getattr(estimator, key).nbytes for key in _WEIGHTS)
    with zipfile.ZipFile(path) as archive:
        if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in _NAMES):
            raise _Unusable("not written by this version of spac")
        size = sum(item.file_size for item in archive.infolist())
        if size > MEMORY_BYTES + weights_bytes + _HEADERS_BYTES:
            raise _Unusable(f"{size} bytes are more than an estimator learns")
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise _Unusable("compressed, which spac does not do")
        arrays = {name: _array(archive, name) for name in _NAMES - {"ids"}}
        _check(estimator, arrays, model)
        _read_ids(archive, estimator, len(arrays["context"]))
    return arrays


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _read_ids(archive: zipfile.ZipFile, estimator: TokenEstimator, n: int) -> None:
    """Of n observations as many as fit, the last ones, straight into the memory: tens of megabytes are then touched once."""
    memory = estimator.memory
    rows = memory.ids[: min(n, memory.capacity)]
    to_skip, to_fill = (n - len(rows)) * rows.itemsize * memory.width, rows.reshape(-1).view(np.uint8).data
    with archive.open("ids.npy") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0) or np.lib.format.read_array_header_1_0(file) != ((n, memory.width), False, rows.dtype):
            raise _Unusable("ids are damaged")
        while to_skip > 0:
            to_skip -= len(file.read(min(to_skip, _CHUNK_BYTES))) or to_skip
        while chunk := file.read(_CHUNK_BYTES):
            if len(chunk) > len(to_fill):
                raise _Unusable("ids are damaged")
            to_fill[: len(chunk)], to_fill = chunk, to_fill[len(chunk) :]
    if to_fill or rows.max(initial=0) >= estimator.n_experts:
        raise _Unusable("ids are damaged")


def _check(estimator: TokenEstimator, arrays: dict[str, NDArray[Any]], model: str) -> None:
    """Every array but ids."""
    if arrays["format"].shape != () or arrays["format"].dtype != np.int64 or arrays["format"] != _FORMAT:
        raise _Unusable("another format")
    if arrays["model"].dtype != np.uint8 or arrays["model"].tobytes() != model.encode():
        raise _Unusable("it belongs to another model")
    if not np.array_equal(arrays["shape"], _shape(estimator)):
        raise _Unusable("another number of layers, experts or links")
    learned = arrays["tokens_learned"]
    if learned.shape != () or learned.dtype != np.int64 or learned < 0:
        raise _Unusable("tokens_learned is damaged")
    for key in _WEIGHTS:
        expected, array = getattr(estimator, key), arrays[key]
        if array.dtype != expected.dtype or array.shape != expected.shape or not (np.abs(array) <= _WEIGHT_MAX).all():
            raise _Unusable(f"{key} is damaged")
    if not ((arrays["prior"] >= 0) & (arrays["prior"] <= 1)).all():
        raise _Unusable("prior is damaged")
    context = arrays["context"]
    if context.dtype != np.int64 or context.ndim != 2 or context.shape[1] != 3:
        raise _Unusable("context is damaged")
    if context.min(initial=0) < NO_TOKEN or context[:, 0].min(initial=0) < 0 or context.max(initial=0) >= 1 << 31:
        raise _Unusable("context is damaged")
