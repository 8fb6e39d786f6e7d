"""How many tokens to draft, and how many of them to verify. Knows numbers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, Protocol

from spac.means import Mean, Usual

FADING: Final = 0.1  # weight of a new value in a mean, once there are enough


class Length(Protocol):
    """Decides; asked once in each cycle of the token loop."""

    @property
    def wanted(self) -> int:
        """How many tokens to draft in the next cycle; 0: drafting does not pay."""

    def choose(self, chances: Sequence[float], asked: int, draft_s: float) -> int:
        """How many of the drafted tokens to verify.

        Args:
            chances: of each drafted token, that it and those before it are right.
            asked: how many tokens the draft was asked for.
            draft_s: how long that took.
        """

    def measured(self, n_verified: int, decode_s: float) -> None:
        """The decode that verified so many tokens took so long."""


class FixedLength:
    """Always the same number."""

    def __init__(self, n: int) -> None:
        self.wanted = n

    def choose(self, chances: Sequence[float], asked: int, draft_s: float) -> int:
        return min(self.wanted, len(chances))

    def measured(self, n_verified: int, decode_s: float) -> None:
        pass


class DraftLength:
    """What gives most tokens in a second, by measured times and calibrated chances; 0 where no number pays.

    Time is priced at the present rate, r tokens/s: a choice is worth its expected tokens less r times its seconds, and what
    maximizes that maximizes the rate. How many to verify is chosen for each proposal, how many to draft from what proposals
    of that length were worth lately. Now and then another number is tried, or its times would go stale; ever more rarely
    where drafting does not pay.
    """

    MOST: Final = 8
    MARGIN: Final = 0.05  # tokens in each cycle that a change of the number to draft must promise
    TRY_EVERY: Final = 32  # cycles
    REST: Final = (16, 256)  # cycles between tries where drafting does not pay: at first, at most
    GUESSED_SLOPE: Final = 0.25  # time of one more token in a decode, as part of the decode's, before two widths were measured

    def __init__(self) -> None:
        self.wanted = 1
        self._settled = 1  # `wanted`, tries left out
        self._try: int | None = 0  # how many to verify next, whatever they promise
        self._first_tries = [1, 0, 1]
        self._since_try = 0
        self._rest = self.REST[0]
        self._alternate = itertools.cycle((1, 0))
        self._worth = [Mean(FADING) for _ in range(self.MOST + 1)]  # of a proposal by length, its drafting not yet paid for
        self._draft_s = Usual()  # for each token
        self._decode_s: dict[int, Usual] = {}  # by number verified
        self._tokens, self._seconds = Mean(FADING), Usual()  # of a cycle
        self._now: tuple[list[float], float] = ([0.0], 0.0)  # this cycle's sums of chances, and seconds of drafting

    def choose(self, chances: Sequence[float], asked: int, draft_s: float) -> int:
        sums = [0.0, *itertools.accumulate(chances[: self.MOST])]
        self._now = (sums, draft_s)
        n = self._learn(sums, asked, draft_s) if asked and self._decode_s else 0
        if self._try is not None:
            n = min(self._try, len(sums) - 1)
        self._since_try += 1
        self._try = self._next_try()
        self.wanted = max(self._settled, self._try or 0)
        return n

    def measured(self, n_verified: int, decode_s: float) -> None:
        sums, draft_s = self._now
        self._decode_s.setdefault(n_verified, Usual()).add(decode_s)
        self._tokens.add(1 + sums[min(n_verified, len(sums) - 1)])
        self._seconds.add(decode_s + draft_s)

    def decode_s(self, n_verified: int) -> float:
        """Expected seconds of a decode; where it was not measured, on a line through what was."""
        if n_verified in self._decode_s:
            return self._decode_s[n_verified].get()
        known = sorted(self._decode_s)
        below = [k for k in known if k < n_verified] or known[:1]
        above = [k for k in known if k > n_verified]
        a = below[-1]
        b = above[0] if above else known[0]
        base = self._decode_s[a].get()
        slope = (self._decode_s[b].get() - base) / (b - a) if a != b else base * self.GUESSED_SLOPE
        return base + max(slope, 0.0) * (n_verified - a)

    def _rate(self) -> float:
        return self._tokens.get() / self._seconds.get() if self._seconds.get() > 0 else 0.0

    def _gains(self, sums: list[float], times: list[float]) -> list[float]:
        """By number verified: tokens more than with none, less the time that they cost."""
        rate = self._rate()
        return [tokens - rate * (time_s - times[0]) for tokens, time_s in zip(sums, times, strict=False)]

    def _extended(self, sums: list[float], asked: int) -> list[float]:
        """The sums as if MOST tokens had been asked for: a proposal of full length goes on as it ended."""
        n = len(sums) - 1
        if n == 0 or n < min(asked, self.MOST):
            return sums + sums[-1:] * (self.MOST - n)
        last = sums[n] - sums[n - 1]
        ratio = last / (sums[n - 1] - sums[n - 2]) if n > 1 and sums[n - 1] > sums[n - 2] else last
        more = itertools.accumulate([sums[n]] + [last * ratio**i for i in range(1, self.MOST - n + 1)])
        return sums[:n] + list(more)

    def _learn(self, sums: list[float], asked: int, draft_s: float) -> int:
        """From a proposal, what drafting is worth; settles how many to draft, and returns how many of these to verify."""
        self._draft_s.add(draft_s / asked)
        times = [self.decode_s(k) for k in range(self.MOST + 1)]
        longer = self._gains(self._extended(sums, asked), times)
        for worth, best in zip(self._worth, itertools.accumulate(longer, max), strict=True):
            worth.add(best)
        rate = self._rate()
        scores = [worth.get() - rate * n * self._draft_s.get() for n, worth in enumerate(self._worth)]
        if max(scores) > scores[self._settled] + self.MARGIN:
            self._settled = scores.index(max(scores))
        gains = self._gains(sums, times)
        return gains.index(max(gains))

    def _next_try(self) -> int | None:
        if self._first_tries:
            return self._first_tries.pop(0)
        if self._since_try < (self.TRY_EVERY if self._settled > 0 else self._rest):
            return None
        self._since_try = 0
        if self._settled == 0:
            self._rest = min(2 * self._rest, self.REST[1])
            return 1
        self._rest = self.REST[0]
        return min(self._settled + 1, self.MOST) if next(self._alternate) else 0
