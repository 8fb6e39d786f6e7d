"""Device profiles: what an edge device leaves a process, as limits. Data files in `profiles/`, each figure with its source.

A profile bounds what a control group can bound. It does not make a core slower, only rarer, and it says nothing of memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from spac.bench import data
from spac.errors import OptionError
from spac.host.cores import allowed_cores
from spac.host.limits import Limits
from spac.host.memory import parse_memory

FOLDER: Final = Path(__file__).resolve().parent / "profiles"
LIMITED: Final = ("memory", "read_bytes_per_s", "read_iops", "cores", "cpu_share")


@dataclass(frozen=True)
class Profile:
    """An edge device.

    Attributes:
        name: of its file.
        title: in words.
        memory: "7G", or "25%" of the model file; None: no limit.
        read_bytes_per_s, read_iops, cores, cpu_share: see `spac.host.limits.Limits`.
        sources: where each figure is from.
    """

    name: str
    title: str
    memory: str | None = None
    read_bytes_per_s: int | None = None
    read_iops: int | None = None
    cores: int | None = None
    cpu_share: float | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def limits(self, model_bytes: int) -> Limits:
        """The limits for a model of this size, on this machine.

        Where the machine has fewer cores than the device, their shares grow, so that the sum is the same as far as possible.
        """
        here = allowed_cores()
        cores, share = self.cores, self.cpu_share
        if cores is not None and cores > here:
            share = None if share is None else min(1.0, share * cores / here)
            cores = here
        return Limits(
            memory_bytes=memory_bytes(self.memory, model_bytes),
            read_bytes_per_s=self.read_bytes_per_s,
            read_iops=self.read_iops,
            cores=cores,
            cpu_share=share,
        )


def names() -> list[str]:
    """Of the profiles that come with spac."""
    return data.names(FOLDER)


def load(name: str) -> Profile:
    """A profile by name, or from a `.toml` file.

    Raises:
        OptionError: there is none, or it cannot be read.
    """
    path, values = data.read(FOLDER, "profile", name)
    unknown = set(values) - {"title", "sources", *LIMITED}
    if unknown:
        raise OptionError(f"{path}: {', '.join(sorted(unknown))}: no such setting of a profile")
    missing = [key for key in LIMITED if key in values and key not in values.get("sources", {})]
    if missing:
        raise OptionError(f"{path}: no source is named for {', '.join(missing)}")
    profile = Profile(name=path.stem, **{"title": path.stem, **values})
    check(profile, path)
    return profile


def check(profile: Profile, path: Path) -> None:
    """Whether all figures have a meaning.

    Raises:
        OptionError: one has none.
    """
    if profile.memory is not None and not isinstance(profile.memory, str):
        raise OptionError(f"{path}: memory is {profile.memory!r}, expected a text such as \"25%\" or \"2G\"")
    memory_bytes(profile.memory, 1 << 30)
    for name in ("read_bytes_per_s", "read_iops", "cores"):
        value = getattr(profile, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    if profile.cpu_share is not None and not (isinstance(profile.cpu_share, int | float) and 0 < profile.cpu_share <= 1):
        raise OptionError(f"{path}: cpu_share is {profile.cpu_share!r}, expected more than 0 and at most 1")


def memory_bytes(text: str | None, model_bytes: int) -> int | None:
    """Bytes meant by "25%" (of the model), "2G", or None or "none": no limit.

    Raises:
        OptionError: the text has no meaning.
    """
    if text is None or text.strip().lower() == "none":
        return None
    if text.strip().endswith("%"):
        try:
            share = float(text.strip().removesuffix("%"))
        except ValueError:
            share = 0
        if not 0 < share <= 1000:
            raise OptionError(f"memory {text!r} is not a share: write '25%', '2G' or 'none'")
        return int(model_bytes * share / 100)
    n = parse_memory(text)
    if n is None:
        raise OptionError("memory 'auto' has no meaning in a benchmark: write '25%', '2G' or 'none'")
    return n
