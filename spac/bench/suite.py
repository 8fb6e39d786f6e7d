"""Suites: rows of a benchmark, as data files in `suites/`. A row is a set of limits and lengths that all its contenders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spac.bench import data
from spac.bench.profile import Profile, check, memory_bytes
from spac.errors import OptionError
from spac.host.limits import Limits

FOLDER: Final = Path(__file__).resolve().parent / "suites"
DEFAULT_CONTENDERS: Final = ("stock:mmap", "spac")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: as the table shows it.
        memory, read_bytes_per_s, read_iops, cores, cpu_share: limits; see `Profile`.
        prompt_tokens: length of the prompt, cut or repeated to fit; 0: prompts as they are.
        tokens: to generate after the first.
        ctx, ubatch: of all contenders.
        contenders: their specifications.
        warm: time the second of two passes, so that all the text needs has been read.
    """

    name: str
    memory: str | None = None
    read_bytes_per_s: int | None = None
    read_iops: int | None = None
    cores: int | None = None
    cpu_share: float | None = None
    prompt_tokens: int = 0
    tokens: int = 64
    ctx: int = 1024
    ubatch: int = 64
    contenders: tuple[str, ...] = DEFAULT_CONTENDERS
    warm: bool = False

    def profile(self) -> Profile:
        """Its limits."""
        return Profile(
            self.name, self.name, self.memory, self.read_bytes_per_s, self.read_iops, self.cores, self.cpu_share
        )  # fmt: skip

    def limits(self, model_bytes: int) -> Limits:
        """Its limits, for a model of this size on this machine."""
        return self.profile().limits(model_bytes)


def names() -> list[str]:
    """Of the suites that come with spac."""
    return data.names(FOLDER)


def load(name: str) -> list[Row]:
    """Rows of a suite by name, or from a `.toml` file.

    Raises:
        OptionError: there is none, or it cannot be read.
    """
    path, values = data.read(FOLDER, "suite", name)
    rows = [_row(path, {**values.get("defaults", {}), **row}) for row in values.get("row", [])]
    if not rows:
        raise OptionError(f"{path}: no rows ([[row]])")
    return rows


def _row(path: Path, values: dict[str, Any]) -> Row:
    fields = {f.name: f for f in dataclasses.fields(Row)}
    unknown = set(values) - set(fields)
    if unknown or "name" not in values:
        raise OptionError(f"{path}: a row {'needs a name' if not unknown else 'has no setting ' + ', '.join(sorted(unknown))}")
    row = Row(**{**values, "contenders": tuple(values.get("contenders", DEFAULT_CONTENDERS))})
    check(row.profile(), path)
    for name in ("prompt_tokens", "tokens", "ctx", "ubatch"):
        if not isinstance(getattr(row, name), int) or getattr(row, name) < (name != "prompt_tokens"):
            raise OptionError(f"{path}: {row.name}: {name} is {getattr(row, name)!r}, expected a whole number")
    return row


def of_profile(profile: Profile, memories: Sequence[str], reads: Sequence[str], template: Row) -> list[Row]:
    """Rows for a profile: one for each memory limit and read limit, or the profile's own where none are given.

    Raises:
        OptionError: a limit has no meaning.
    """
    rows = []
    for memory in memories or [profile.memory or "none"]:
        for read in reads or [str(profile.read_bytes_per_s or "none")]:
            bytes_per_s = memory_bytes(read, 0)
            row = dataclasses.replace(
                template, memory=memory, read_bytes_per_s=bytes_per_s, read_iops=profile.read_iops, cores=profile.cores,
                cpu_share=profile.cpu_share, name=f"{profile.name}: {memory}, {rate(bytes_per_s)}",
            )  # fmt: skip
            memory_bytes(memory, 1 << 30)
            rows.append(row)
    return rows


def rate(bytes_per_s: int | None) -> str:
    """A read limit for people, in 1000s as disks are sold."""
    return "unthrottled" if bytes_per_s is None else f"{bytes_per_s / 1e6:.0f} MB/s"
