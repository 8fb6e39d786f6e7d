"""The trace file: a `.npz` of plain arrays and a JSON text. docs/traces.md describes it for other programs.

Knows nothing of models and caches.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from spac.errors import SpacError

FORMAT: Final = "spac-trace"
VERSION: Final = 1
PHASES: Final = ("prefill", "decode", "draft", "verify")  # a phase's number is its place

Array = npt.NDArray[Any]


class TraceError(SpacError, ValueError):
    """A file is no trace, is damaged, or comes from a newer spac."""


@dataclass(frozen=True)
class Trace:
    """Routing of a number of tokens, in the order in which they were computed.

    Attributes:
        ids: uint16 [tokens, layers, k], the experts chosen; from `n_experts` on: none (a last layer that was not computed).
        weights: float16 [tokens, layers, k], what the experts' outputs are multiplied with.
        seq: int32 [tokens], the request that a token belongs to.
        pos: int32 [tokens], its place in the sequence.
        phase: uint8 [tokens], index in `PHASES`.
        token_ids: int32 [tokens], -1 where they are not known.
        ubatch: int32 [tokens], not falling; tokens with the same number were computed together.
        ubatch_s: float32 [ubatches], seconds a ubatch took; empty if it was not measured.
        expert_s: float32 [ubatches, layers], the part of it in the experts' products (and waiting for them); may be empty.
        blocks: block number of each layer in the model.
        bundle_bytes: an expert's bytes in each layer; empty if not known.
        meta: the file's JSON object: model, architecture, and whatever else its writer said.
    """

    ids: Array
    weights: Array
    seq: Array
    pos: Array
    phase: Array
    token_ids: Array
    ubatch: Array
    ubatch_s: Array
    expert_s: Array
    n_experts: int
    blocks: tuple[int, ...]
    bundle_bytes: tuple[int, ...]
    meta: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def n_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def n_used(self) -> int:
        """Experts that a token uses in a layer."""
        return int(self.ids.shape[2])

    @property
    def n_bundles(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def requests(self) -> Array:
        """Numbers of the requests, in the order in which they begin."""
        _, first = np.unique(self.seq, return_index=True)
        return np.asarray(self.seq[np.sort(first)])

    def select(self, tokens: Array) -> Trace:
        """Only the tokens of a boolean mask [tokens]. Times are of whole ubatches and are left out."""
        empty = np.zeros(0, np.float32)
        chosen = {name: getattr(self, name)[tokens] for name in ("ids", "weights", "seq", "pos", "phase", "token_ids", "ubatch")}
        return replace(self, **chosen, ubatch_s=empty, expert_s=empty)

    def of_requests(self, which: str) -> Trace:
        """The tokens of some requests: "all", "first-half", "second-half", "even" or "odd" (by order of beginning).

        Raises:
            TraceError: no request is among them.
        """
        requests = self.requests
        half = (len(requests) + 1) // 2
        parts = {
            "all": slice(None),
            "first-half": slice(half),
            "second-half": slice(half, None),
            "even": slice(0, None, 2),
            "odd": slice(1, None, 2),
        }
        chosen = requests[parts[which]]
        if not len(chosen):
            raise TraceError(f"the trace has {len(requests)} request(s): none is in {which}")
        return self if which == "all" else self.select(np.isin(self.seq, chosen))

    def head(self, n_tokens: int) -> Trace:
        """The first tokens."""
        return self.select(np.arange(self.n_tokens) < n_tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        meta = self.meta | {
            "format": FORMAT,
            "version": VERSION,
            "experts": self.n_experts,
            "layers": self.n_layers,
            "k": self.n_used,
            "blocks": list(self.blocks),
            "bundle_bytes": list(self.bundle_bytes),
            "phases": list(PHASES),
        }
        narrow = np.uint8 if self.n_experts < 256 else np.uint16
        missing = np.iinfo(narrow).max
        target = Path(path)
        partial = target.with_name(target.name + ".part")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(
                    file,
                    ids=np.where(self.ids < self.n_experts, self.ids, missing).astype(narrow),
                    weights=self.weights.astype(np.float16),
                    seq=self.seq.astype(np.int32),
                    pos=self.pos.astype(np.int32),
                    phase=self.phase.astype(np.uint8),
                    token_ids=self.token_ids.astype(np.int32),
                    ubatch=self.ubatch.astype(np.int32),
                    ubatch_s=self.ubatch_s.astype(np.float32),
                    expert_s=self.expert_s.astype(np.float32),
                    meta=np.array(json.dumps(meta, ensure_ascii=False)),
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace of spac's, or another with at least `ids`, `seq`, `pos` and `meta` ("experts" in it).

        Raises:
            TraceError: with one line that says what is wrong with the file.
        """
        name = os.fspath(path)
        try:
            with np.load(name, allow_pickle=False) as file:
                fields = {field: np.asarray(file[field]) for field in file.files}
        except FileNotFoundError:
            raise TraceError(f"{name}: No such file") from None
        except IsADirectoryError:
            raise TraceError(f"{name}: is a directory, not a trace") from None
        except PermissionError as e:
            raise TraceError(f"{name}: {e.strerror}") from None
        except Exception as e:  # a damaged archive may raise nearly anything: BadZipFile, zlib.error, ValueError, EOFError
            reason = "" if "pickle" in str(e) else f" ({e})"  # numpy's words for any file that is no archive
            raise TraceError(f"{name}: is not a trace, a .npz file that `spac run --trace` writes, or is damaged{reason}") from None
        try:
            return _from_fields(fields)
        except TraceError as e:
            raise TraceError(f"{name}: {e}") from None


def _from_fields(fields: dict[str, Array]) -> Trace:
    lacking = [field for field in ("ids", "seq", "pos", "meta") if field not in fields]
    if lacking:
        raise TraceError(f"is not a trace: {', '.join(lacking)} not in it")
    meta = _read_meta(fields["meta"])
    ids = fields["ids"]
    if ids.dtype.kind in "iu":
        ids = ids.astype(np.int64)
    if ids.ndim != 3 or 0 in ids.shape or ids.dtype.kind not in "iu":
        raise TraceError(f"ids must be whole numbers [tokens, layers, k], not {ids.dtype} {list(ids.shape)}")
    n, layers, _ = ids.shape
    n_experts = meta.get("experts")
    if not isinstance(n_experts, int) or not 0 < n_experts < 65535:
        raise TraceError(f"meta says experts: {n_experts!r}, expected a number")
    trace = Trace(
        ids=np.where((ids >= 0) & (ids < n_experts), ids, 65535).astype(np.uint16),
        weights=_column(fields, "weights", ids.shape, np.zeros(0), np.float16),
        seq=_column(fields, "seq", (n,), None, np.int32),
        pos=_column(fields, "pos", (n,), None, np.int32),
        phase=_column(fields, "phase", (n,), np.full(n, 1), np.uint8),
        token_ids=_column(fields, "token_ids", (n,), np.full(n, -1), np.int32),
        ubatch=_column(fields, "ubatch", (n,), np.arange(n), np.int32),
        ubatch_s=_column(fields, "ubatch_s", (None,), np.zeros(0), np.float32),
        expert_s=_column(fields, "expert_s", (None, layers), np.zeros((0, layers)), np.float32),
        n_experts=n_experts,
        blocks=_numbers(meta, "blocks", layers, tuple(range(layers))),
        bundle_bytes=_numbers(meta, "bundle_bytes", layers, ()),
        meta=meta,
    )
    if (trace.ids == 65535).all():
        raise TraceError(f"no id in it is an expert's number (0 to {n_experts - 1})")
    if (np.diff(trace.ubatch) < 0).any() or (trace.phase >= len(PHASES)).any():
        raise TraceError("damaged: ubatch falls, or a phase has no meaning")
    return trace


def _read_meta(field: Array) -> dict[str, Any]:
    try:
        meta = json.loads(str(field[()]))
    except (ValueError, IndexError):
        meta = None
    if not isinstance(meta, dict):
        raise TraceError("meta is not a JSON object")
    version = meta.get("version", 0)
    if meta.get("format", FORMAT) != FORMAT or not isinstance(version, int):
        raise TraceError(f"format {meta.get('format')!r} is not {FORMAT}")
    if version > VERSION:
        raise TraceError(f"format version {version}; this spac reads up to {VERSION}")
    return meta


def _column(fields: dict[str, Array], name: str, shape: tuple[int | None, ...], default: Array | None, dtype: Any) -> Array:
    column = fields.get(name, default)
    if column is None or column is default:
        return np.asarray(column, dtype)
    fits = len(column.shape) == len(shape) and all(want is None or have == want for have, want in zip(column.shape, shape, strict=True))
    if not fits or column.dtype.kind not in "iuf":
        raise TraceError(f"{name} is {column.dtype} {list(column.shape)}, which does not go with ids")
    return column.astype(dtype)


def _numbers(meta: dict[str, Any], name: str, n: int, default: tuple[int, ...]) -> tuple[int, ...]:
    numbers = meta.get(name)
    if not numbers:
        return default
    if not isinstance(numbers, list) or len(numbers) != n or not all(isinstance(x, int) and x >= 0 for x in numbers):
        raise TraceError(f"meta's {name} is not a list of {n} numbers")
    return tuple(numbers)
