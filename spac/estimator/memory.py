"""What the experts of a token were, the last times it was decoded: the table behind the token signal.

One observation is the routing of one decoded token: its experts in every layer, k bytes for each. Two rows may point to an
observation: that of its token (the last `TOKEN_WINDOW` observations) and that of its token pair (the last `PAIR_WINDOW` after the same
previous token). An observation to which no row points any more is free for reuse, so a frequent token costs no more than its window;
when none is free, the rows touched longest ago go.

A prediction is a weighted count over the observations of the token. The weights are a chain of back-offs (token, pair, triple, same
request), each level mixed with the one below by Witten and Bell's idea: the more often a context was seen, the less the one below
says (IEEE Trans. Information Theory 37(4), 1991; here with constant masses in place of counts of distinct successors).

It knows nothing of probabilities beyond counts: see `tokens.py` for what becomes of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOKEN_WINDOW = 16
PAIR_WINDOW = 8
# Bytes of Python objects for one observation with its own two rows (dict entry, list, ints): measured with tracemalloc, rounded up.
_ROWS_BYTES = 460

# mass of the level below: token against prior, pair against token, triple against pair, same request against all
_TOKEN_MASS, _PAIR_MASS, _TRIPLE_MASS, _REQUEST_MASS = 1.0, 1.0, 1.0, 2.0

NO_TOKEN = -1


class Recall(NamedTuple):
    """What is remembered of coming tokens.

    Attributes:
        slots: int64 [n], observations, of all the tokens together.
        owners: int64 [n], the token that each is of.
        weights: float64 [n], of each.
        rest: float64 [tokens], what the prior weighs; with the weights of a token's observations it is 1.
        support: int64 [tokens], class of confidence, 0 <= support < SUPPORT_CLASSES, by how often the token, pair and triple were seen.
    """

    slots: NDArray[np.int64]
    owners: NDArray[np.int64]
    weights: NDArray[np.float64]
    rest: NDArray[np.float64]
    support: NDArray[np.int64]

    def mixed(self, positions: NDArray[np.int64], shares: NDArray[np.float64]) -> Recall:
        """The same of tokens that are one of several each, the first one's support counting.

        Args:
            positions: [tokens], ascending: which of the mixtures each belongs to.
            shares: [tokens], its part; those of a mixture sum to 1.
        """
        first = np.flatnonzero(np.diff(positions, prepend=-1))
        rest = np.add.reduceat(self.rest * shares, first)
        return Recall(self.slots, positions[self.owners], self.weights * shares[self.owners], rest, self.support[first])


_COUNT_CLASS = np.array([0, 1, 2, 3, 3, *[4] * 4, *[5] * 8, *[6] * 64], np.int64)
SUPPORT_CLASSES = 7 * 7 * 3 * 2


class RoutingMemory:
    """Observations of routing by token and token pair, in bounded memory. Not thread safe."""

    def __init__(self, n_layers: int, n_experts: int, n_used: int, memory_bytes: int) -> None:
        """`memory_bytes` bounds observations and rows together; at least one observation is kept."""
        self.n_layers, self.n_experts, self.n_used = n_layers, n_experts, n_used
        self.width = n_layers * n_used
        ids_type = np.dtype(np.uint8 if n_experts <= 256 else np.uint16)
        self.capacity = max(1, memory_bytes // (self.width * ids_type.itemsize + 6 * 8 + _ROWS_BYTES))
        self.ids = np.zeros((self.capacity, self.width), ids_type)
        # token, previous token, the one before, request; and the number of rows that point here
        self.context = np.full((self.capacity, 4), NO_TOKEN, np.int64)
        self._references = np.zeros(self.capacity, np.int8)
        self._serial = np.zeros(self.capacity, np.int64)  # the order in which observations came
        self._added = 0
        self._fresh = 0  # slots from here on have never been used
        self._free: list[int] = []
        # by token, or token pair (see `_pair`); touched longest ago first
        self._rows: OrderedDict[int, list[int]] = OrderedDict()
        self._restored = _RestoredRows(self.context[:0])  # all of them touched longer ago than any in `_rows`

    def __len__(self) -> int:
        """Observations kept."""
        return self._fresh - len(self._free)

    def add(self, token: int, previous: int, before: int, request: int, ids: NDArray[np.integer]) -> None:
        """Remembers the routing of one token: `ids` [layers, k]; `previous`, `before`: tokens before it, or NO_TOKEN."""
        slot = self._take()
        self.ids[slot] = ids.reshape(-1)
        self.context[slot] = (token, previous, before, request)
        self._serial[slot] = self._added
        self._added += 1
        self._references[slot] = 1 if previous == NO_TOKEN else 2
        self._append(token, slot, TOKEN_WINDOW)
        if previous != NO_TOKEN:
            self._append(_pair(previous, token), slot, PAIR_WINDOW)

    def recall(self, contexts: Sequence[tuple[int, int, int]], request: int) -> Recall:
        """What is remembered of tokens in `request`.

        Args:
            contexts: of each: token, the one before it, and the one before that.
        """
        rows = [self._observed(token, previous) for token, previous, _ in contexts]
        n = np.array([len(row) for row in rows], np.int64)
        slots = np.fromiter(chain.from_iterable(rows), np.int64, n.sum())
        owners = np.repeat(np.arange(len(rows)), n)
        asked, seen = np.array(contexts, np.int64)[owners], self.context[slots]
        in_pair = (seen[:, 1] == asked[:, 1]) & (asked[:, 1] != NO_TOKEN)
        in_triple = in_pair & (seen[:, 2] == asked[:, 2]) & (asked[:, 2] != NO_TOKEN)
        in_request = seen[:, 3] == request
        n_pair, n_triple, n_request = (np.bincount(owners[inside], minlength=len(rows)) for inside in (in_pair, in_triple, in_request))
        w_request = 1 / (n_request + _REQUEST_MASS)
        w_triple = w_request * _REQUEST_MASS / (n_triple + _TRIPLE_MASS)
        w_pair = w_triple * _TRIPLE_MASS / (n_pair + _PAIR_MASS)
        w_token = w_pair * _PAIR_MASS / (n + _TOKEN_MASS)
        weights = w_token[owners] + w_pair[owners] * in_pair + w_triple[owners] * in_triple + w_request[owners] * in_request
        support = ((_COUNT_CLASS[n] * 7 + _COUNT_CLASS[n_pair]) * 3 + np.minimum(2, n_triple)) * 2 + (n_request > 0)
        return Recall(slots, owners, weights, w_token * _TOKEN_MASS, support)

    def records(self) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """For saving, oldest first: token, previous token and the one before, int64 [n, 3]; ids [n, layers * k]."""
        slots = np.flatnonzero(self._references[: self._fresh])
        slots = slots[np.argsort(self._serial[slots])]
        return self.context[slots, :3], self.ids[slots]

    def restore(self, context: NDArray[np.int64]) -> None:
        """Fills an empty memory with saved records, which the caller has validated; of more than fit, the last ones.

        Their ids are in the first rows of `ids` already. The saved requests are over, so no record counts as of the same request.
        """
        context = context[-self.capacity :]
        n = len(context)
        self.context[:n, :3] = context
        self._serial[:n] = np.arange(n)
        self._fresh = self._added = n
        self._restored = _RestoredRows(context)
        self._references[:n] = self._restored.references(n)
        self._free = np.flatnonzero(self._references[:n] == 0).tolist()

    def _take(self) -> int:
        if self._fresh < self.capacity and not self._free:
            self._fresh += 1
            return self._fresh - 1
        while not self._free:
            for slot in self._restored.take_oldest() or self._rows.popitem(last=False)[1]:
                self._release(slot)
        return self._free.pop()

    def _observed(self, token: int, previous: int) -> list[int]:
        """Slots of a token's observations, and of those after the same token before it."""
        row = self._row(token) or []
        pair = self._row(_pair(previous, token)) if previous != NO_TOKEN else None
        return row + [slot for slot in pair if slot not in row] if pair else row

    def _row(self, key: int) -> list[int] | None:
        row = self._rows.get(key)
        return self._restored.row(key) if row is None else row

    def _append(self, key: int, slot: int, window: int) -> None:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = self._restored.row(key, take=True) or []
        self._rows.move_to_end(key)
        row.append(slot)
        if len(row) > window:
            self._release(row.pop(0))

    def _release(self, slot: int) -> None:
        self._references[slot] -= 1
        if not self._references[slot]:
            self._free.append(slot)


class _Sorted:
    """Observations by key: the rows that `RoutingMemory.add` would leave of many, found by search. No Python object is built for each."""

    def __init__(self, keys: NDArray[np.int64], slots: NDArray[np.int64], window: int) -> None:
        """`keys` [n], ascending, of the observations in `slots` [n], those of a key oldest first; `window`: so many make a row."""
        self.keys, self.slots, self.window = keys, slots, window
        self._taken = np.zeros(len(keys), np.bool_)

    def pointed(self) -> NDArray[np.int64]:
        """The slots to which rows point."""
        inside = np.ones(len(self.keys), np.bool_)
        inside[: -self.window] = self.keys[: -self.window] != self.keys[self.window :]
        return self.slots[inside]

    def row(self, key: int, take: bool) -> list[int] | None:
        """A copy of a row; None: there is none, or it was taken."""
        begin = int(self.keys.searchsorted(key))
        if begin == len(self.keys) or self.keys[begin] != key:
            return None
        end = begin + int(self.keys[begin:].searchsorted(key, "right"))
        if self._taken[end - 1]:
            return None
        self._taken[end - 1] = take
        row: list[int] = self.slots[max(begin, end - self.window) : end].tolist()
        return row


class _RestoredRows:
    """The rows of a restored memory, by token and token pair. A row is taken out when its key is added to."""

    def __init__(self, context: NDArray[np.int64]) -> None:
        """`context`: of observations, oldest first: token and previous token, int64 [n, 2 or more]."""
        token, previous = context[:, 0], context[:, 1]
        by_token = _order(token)
        self._tokens = _Sorted(token[by_token], by_token, TOKEN_WINDOW)
        by_pair = by_token[previous[by_token] != NO_TOKEN]
        by_pair = by_pair[_order(previous[by_pair])]
        self._pairs = _Sorted((previous[by_pair] + 1) << 32 | token[by_pair], by_pair, PAIR_WINDOW)
        self._by_age: Iterator[int] | None = None

    def references(self, n: int) -> NDArray[np.int64]:
        """How many rows point to each of n observations."""
        return np.bincount(self._tokens.pointed(), minlength=n) + np.bincount(self._pairs.pointed(), minlength=n)

    def row(self, key: int, take: bool = False) -> list[int] | None:
        """A copy of a row; None: there is none, or it was taken. `take`: it is now."""
        return (self._pairs if key >> 32 else self._tokens).row(key, take)

    def take_oldest(self) -> list[int] | None:
        """The row whose last observation is the oldest; None: none is left."""
        if self._by_age is None:
            ends = [(each, np.flatnonzero(np.diff(each.keys, append=NO_TOKEN))) for each in (self._tokens, self._pairs)]
            by_age = np.argsort(np.concatenate([each.slots[end] for each, end in ends]), kind="stable")
            self._by_age = iter(np.concatenate([each.keys[end] for each, end in ends])[by_age].tolist())
        for key in self._by_age:
            row = self.row(key, take=True)
            if row is not None:
                return row
        return None


def _order(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """np.argsort(tokens, kind="stable") in an eighth of the time: a token, below 2^31, and its place are sorted as one number."""
    bits = len(tokens).bit_length()
    return np.sort(tokens << bits | np.arange(len(tokens))) & ((1 << bits) - 1)


def _pair(previous: int, token: int) -> int:
    """A key that no token has: token ids are below 2^32."""
    return (previous + 1) << 32 | token
