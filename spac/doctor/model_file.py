"""A model's files on their disk: whole, in long pieces, readable past the page cache, and how experts lie in pages.

Fragments come from FIEMAP: Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spac.doctor.finding import Finding, Level
from spac.errors import SpacError
from spac.gguf.check import ModelFacts, check_model
from spac.host.memory import KIB, MIB, format_bytes
from spac.stats import StoresProbe

_FS_IOC_FIEMAP: Final = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_HEADER, _EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
_LAST, _ENCODED = 0x1, 0x8
_AT_ONCE: Final = 256
MAX_EXTENTS: Final = 1 << 20

SHORT_BYTES, TINY_BYTES = 2 * MIB, 256 * KIB  # pieces of a file: an expert's tensor has some hundred KiB to some MiB


@dataclass(frozen=True)
class Extents:
    """Pieces of a file that lie together on the disk."""

    n: int
    compressed: bool


def extents_of(path: Path) -> Extents | None:
    """None where the file system does not tell.

    Raises:
        OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    n, start, end, compressed, last = 0, 0, None, False, False
    try:
        while not last and n < MAX_EXTENTS:
            buffer = bytearray(_HEADER.pack(start, (1 << 64) - 1 - start, 0, 0, _AT_ONCE, 0) + bytes(_AT_ONCE * _EXTENT.size))
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
            mapped = _HEADER.unpack_from(buffer)[3]
            if mapped == 0:
                break
            for i in range(mapped):
                logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, _HEADER.size + i * _EXTENT.size)
                n += physical != end or flags & _ENCODED != 0  # ext4 cuts what lies together into 128 MiB
                start, end = logical + length, physical + length
                compressed, last = compressed or flags & _ENCODED != 0, last or flags & _LAST != 0
    except OSError:
        return None
    finally:
        os.close(fd)
    return Extents(n, compressed)


def check(path: Path, probe: StoresProbe | None) -> Iterator[Finding]:
    """The model's headers, then each of its files. A file that is damaged is a finding."""
    try:
        facts = check_model(path)
    except SpacError as e:
        yield Finding("model", "headers", Level.warning, str(e), "")
        parts = [path]
    else:
        yield from _experts(facts)
        parts = [Path(part) for part in facts.parts]
    for part in parts:
        try:
            yield from _file(part)
        except OSError as e:
            yield Finding("model", "file", Level.warning, f"{part.name}: cannot be read: {e.strerror}")
    if probe is not None:
        yield _direct(probe)


def _experts(facts: ModelFacts) -> Iterator[Finding]:
    if not facts.expert_layers:
        yield Finding("model", "experts", Level.ok, f"{facts.name}: a dense model, nothing is paged")
        return
    own = sum(layer.bundle_bytes * layer.n_experts for layer in facts.expert_layers)
    paged = sum(layer.bundle_page_bytes * layer.n_experts for layer in facts.expert_layers)
    bundle = max(layer.bundle_bytes for layer in facts.expert_layers)
    share = paged / own - 1
    text = f"{format_bytes(bundle)} for an expert in a layer; in whole pages at most {share:.1%} more"
    advice = "small experts on large pages: budgets hold fewer of them than their bytes suggest" if share > 0.25 else ""
    figures = {"bundle_bytes": bundle, "page_overhead": round(share, 4), "floor_bytes": facts.floor_bytes}
    yield Finding("model", "experts", Level.note if share > 0.25 else Level.ok, text, advice, figures)


def _file(path: Path) -> Iterator[Finding]:
    status = path.stat()
    if status.st_blocks * 512 < status.st_size * 0.99:
        text = f"{path.name}: only {format_bytes(status.st_blocks * 512)} of {format_bytes(status.st_size)} are on the disk"
        yield Finding(
            "model", "file", Level.warning, text, "an unfinished download, a sparse or a compressed file: copy or download it anew"
        )
    extents = extents_of(path)
    if extents is None or extents.n == 0:
        yield Finding("model", "fragments", Level.note, f"{path.name}: this file system does not tell")
        return
    mean = status.st_size // extents.n
    facts = {"file": path.name, "extents": extents.n, "mean_bytes": mean}
    text = f"{path.name}: {extents.n} piece{'s' * (extents.n > 1)}, {format_bytes(mean)} on average"
    if extents.compressed:
        yield Finding(
            "model", "fragments", Level.warning, f"{text}, compressed", "reads go through the page cache: store it uncompressed", facts
        )
    elif extents.n > 1 and mean < SHORT_BYTES:
        advice = f"reads are cut up: `cp --reflink=never {path.name} new && mv new {path.name}` on a disk with room"
        yield Finding("model", "fragments", Level.warning if mean < TINY_BYTES else Level.note, text, advice, facts)
    else:
        yield Finding("model", "fragments", Level.ok, text, "", facts)


def _direct(probe: StoresProbe) -> Finding:
    facts = {"direct_align": probe.direct_align, "errno": probe.direct_error}
    if probe.direct_error == 0:
        return Finding("model", "direct reads", Level.ok, f"O_DIRECT in blocks of {probe.direct_align} bytes", "", facts)
    reason = errno.errorcode.get(probe.direct_error, str(probe.direct_error))
    text = f"O_DIRECT is refused ({reason}): reads go through the page cache, which is dropped behind them"
    return Finding(
        "model", "direct reads", Level.note, text, "ext4 and xfs allow it; encrypted and network file systems often do not", facts
    )
