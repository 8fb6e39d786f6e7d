"""What the balancer is told, all of it measured, and what it answers. docs/balancer.md has the mathematics.

Knows nothing of models and disks; numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from spac.balancer.curves import MissCurve
from spac.errors import OptionError
from spac.trace.timing import PARTS, Reads

IN_FLIGHT: Final = (1, 2, 4, 6, 8, 16)


@dataclass(frozen=True)
class Cache:
    """Bundles among which one order decides: those of a layer, or those of a whole model.

    Attributes:
        curve: misses for each token that its model decodes, by slots.
        floor: slots at least.
        of_draft: of the draft model; else of the model that answers.
    """

    name: str
    bundle_bytes: int
    curve: MissCurve
    floor: int = 1
    of_draft: bool = False

    @property
    def n_experts(self) -> int:
        return int(self.curve.slots[-1])


@dataclass(frozen=True)
class FastTier:
    """Memory beside the RAM, whose experts compute faster, a GPU's. No bundle is in both.

    Attributes:
        budget_bytes: for bundles.
        saved_s: seconds that a use of an expert takes less there than where it is in RAM, copying it included if it is copied.
    """

    budget_bytes: int
    saved_s: float


class Lookahead(NamedTuple):
    """What reading ahead so many layers does.

    recall: the part of the misses that is read ahead, while others compute. precision: the part of what is read ahead that is used.
    """

    recall: float
    precision: float


@dataclass(frozen=True)
class State:
    """What was measured, on this device, lately.

    Attributes:
        caches: what shares the budget.
        budget_bytes: RAM for bundles and for reads in flight.
        reads: bandwidth of the disk, by size and number of reads in flight.
        decode_s: seconds of a decode with all experts in RAM, by number of drafted tokens that it verifies, from 0 on.
        growth: misses of such a decode, in those of a decode of one token; [0] is 1.
        accepted: of each drafted token, the chance that it and all before it are right.
        draft_s: seconds for each drafted token, the draft's experts in RAM; None: there is no draft. `draft_start_s`: besides, if any is.
        sensed: the part of the misses that knowing so many drafted tokens beyond the verified ones saves, from 0 on; [0] is 0.
        lookahead: by layers read ahead, from 0 on; [0] is (0, 1).
        in_flight: numbers of reads in flight to choose among.
        fast: None: the device has none.

    Raises:
        OptionError: numbers that make no sense, which are named.
    """

    caches: tuple[Cache, ...]
    budget_bytes: int
    reads: Reads
    decode_s: tuple[float, ...]
    growth: tuple[float, ...] = (1.0,)
    accepted: tuple[float, ...] = ()
    draft_s: float | None = None
    draft_start_s: float = 0.0
    sensed: tuple[float, ...] = (0.0,)
    lookahead: tuple[Lookahead, ...] = (Lookahead(0.0, 1.0),)
    in_flight: tuple[int, ...] = IN_FLIGHT
    fast: FastTier | None = None

    def __post_init__(self) -> None:
        def need(good: bool, what: str) -> None:
            if not good:
                raise OptionError(f"the balancer cannot plan with this: {what}")

        fast = [] if self.fast is None else [float(self.fast.budget_bytes), self.fast.saved_s]
        drafting = self.draft_s or 0.0, self.draft_start_s
        numbers = [self.budget_bytes, *self.decode_s, *self.growth, *self.accepted, *drafting, *self.sensed, *fast]
        need(all(math.isfinite(x) and x >= 0 for x in numbers), "a number is negative or no number")
        need(any(not cache.of_draft for cache in self.caches), "no cache of the model")
        for cache in self.caches:
            need(cache.bundle_bytes > 0, f"{cache.name}: bundles of {cache.bundle_bytes} bytes")
            need(0 <= cache.floor <= cache.n_experts, f"{cache.name}: a floor of {cache.floor} slots for {cache.n_experts} experts")
            need(bool((cache.curve.misses >= 0).all()), f"{cache.name}: its miss curve is negative or no number")
        lengths = len(self.decode_s), len(self.growth), len(self.accepted) + 1
        need(
            lengths[0] > 0 and len(set(lengths)) == 1, f"{lengths[0]} decode times, {lengths[1]} growths, acceptance up to {lengths[2] - 1}"
        )
        need(all(x <= 1 for x in (*self.accepted, *self.sensed)), "an acceptance or a saved part is above 1")
        need(bool(self.sensed) and bool(self.lookahead) and bool(self.in_flight), "nothing to choose from")
        need(all(0 <= look.recall <= 1 and 0 < look.precision <= 1 for look in self.lookahead), "lookahead outside of 0 to 1")
        need(all(n >= 1 for n in self.in_flight), "reads in flight: at least one")

    @property
    def slice_bytes(self) -> float:
        """The largest read: a part of a bundle."""
        return max(cache.bundle_bytes for cache in self.caches) / PARTS

    def disk_bytes_per_s(self, in_flight: int) -> float:
        """Of the disk, with so many reads in flight; behind a limit, if there is one, it comes to that in the mean."""
        return self.reads.bytes_per_s(self.slice_bytes, in_flight)


@dataclass(frozen=True)
class Choice:
    """The settings that are no slots.

    Attributes:
        verified: drafted tokens in each decode; 0: no speculation.
        drafted: how many are drafted, verified or only sensed.
        depth: layers read ahead.
        in_flight: reads.
    """

    verified: int = 0
    drafted: int = 0
    depth: int = 0
    in_flight: int = 1


@dataclass(frozen=True)
class Plan:
    """An answer.

    Attributes:
        slots: of each cache, in RAM and in the fast tier together.
        fast_slots: those of them in the fast tier.
        seconds_per_token: expected, for each accepted token.
        method: what found it: "program", "greedy", ...
    """

    choice: Choice
    slots: tuple[int, ...]
    fast_slots: tuple[int, ...]
    seconds_per_token: float
    method: str
