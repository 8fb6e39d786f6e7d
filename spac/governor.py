"""Keeps the whole process under its memory limit: sets libspac's expert budget from what everything else really takes.

One governor serves the process, since the budget is one for all models. It is asked when a model comes or goes, and before and
after every decode; in between, the reserve of `spac.plan` covers what grows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from spac.errors import BudgetError
from spac.host import memory
from spac.host.memory import format_bytes
from spac.plan.fit import MIN_UBATCH, reserve_bytes, with_reserve


@dataclass
class _Member:
    limit_bytes: int
    floor_bytes: int = 0
    n_ubatch: int = 1
    compute_bytes: int = 0  # buffers of a ubatch; fewer tokens touch about their part of them
    n_touched: int = 0  # tokens of the largest ubatch since they were last trimmed: what is in memory of them
    n_next: int = 0  # tokens of the ubatch that comes or is computed
    n_failed: int = 0  # tokens of the largest one since then that was not finished: nobody knows what it touched

    def untouched_bytes(self, n_tokens: int) -> int:
        """What a ubatch of so many tokens adds to what is in memory."""
        return self.compute_bytes * max(0, n_tokens - self.n_touched) // self.n_ubatch


class Governor:
    """Budget of experts = limit - everything else.

    `set_budget` and `used_bytes` are libspac's, and so is `watch`: whether to look for other programs' need of memory meanwhile.
    `resident` measures the process. Thread-safe.
    """

    def __init__(
        self,
        set_budget: Callable[[int], None],
        used_bytes: Callable[[], int],
        watch: Callable[[bool], None],
        resident: Callable[[], int] = memory.resident_bytes,
    ) -> None:
        self._set_budget = set_budget
        self._used_bytes = used_bytes
        self._watch = watch
        self._resident = resident
        self._members: dict[int, _Member] = {}
        self._lock = threading.RLock()
        self._next = 1
        self.budget_bytes = 0
        self._cap_bytes: int | None = None
        self._leaving = False

    @property
    def limit_bytes(self) -> int:
        """The tightest limit of all models that are loaded."""
        return min((member.limit_bytes for member in self._members.values()), default=0)

    def rest_bytes(self, *, most: bool = False) -> int:
        """What the process takes besides experts, with what decodes are about to touch; `most`: with all that any decode may touch."""
        untouched = sum(m.untouched_bytes(m.n_ubatch if most else m.n_next) for m in self._members.values())
        return max(0, self._resident() - self._used_bytes()) + untouched

    def admit(self, limit_bytes: int, floor_bytes: int, need_bytes: int) -> int:
        """Make room for a model that is about to load: experts of others shrink for the time.

        Args:
            limit_bytes: for the whole process.
            floor_bytes: the smallest budget of the new model; 0 if it is not paged.
            need_bytes: what it takes besides paged experts.

        Returns:
            A number for `settle` and `release`.
        """
        with self._lock:
            member = self._next
            self._next += 1
            self._members[member] = _Member(limit_bytes, floor_bytes)
            budget = self._left(most=True) - need_bytes
            self._apply(max(self._floor(), min(budget, self.budget_bytes)))
            return member

    def settle(self, member: int, floor_bytes: int, compute_bytes: int, n_ubatch: int) -> int:
        """Give experts all that is left, now that the model is loaded; returns the budget in bytes.

        Args:
            compute_bytes: compute buffers, in memory when the first ubatch of n_ubatch tokens has been computed.

        Raises:
            BudgetError: what is left is below a floor.
        """
        with self._lock:
            m = self._members[member]
            m.floor_bytes, m.compute_bytes, m.n_ubatch, m.n_next = floor_bytes, compute_bytes, n_ubatch, n_ubatch
            least, floor = self._left(most=True), self._floor()
            if least < floor:
                raise BudgetError(
                    f"the loaded model leaves {format_bytes(max(least, 0))} for experts, they need {format_bytes(floor)};"
                    f" raise --memory by {format_bytes(with_reserve(floor - least), up=True)} or lower --ctx"
                )
            budget = self._left()
            self._apply(budget)
            if floor > 0:
                self._watch(True)
            return budget

    def before_decode(self, member: int, n_tokens: int) -> None:
        """Make room for what the decode will touch of its buffers."""
        with self._lock:
            m = self._members[member]
            before, m.n_next = m.n_next, min(n_tokens, m.n_ubatch)
            if before > m.n_touched:  # the last one was not finished, or there was none
                m.n_failed = max(m.n_failed, before)
            if m.untouched_bytes(m.n_next) != m.untouched_bytes(before):
                self._follow()

    def after_decode(self, member: int, n_tokens: int, trim: Callable[[], bool]) -> None:
        """Follow what the rest really takes now.

        Args:
            trim: gives back all that is in memory of the compute buffers, if it can: called when a prompt is over, which needed more
                of them than tokens one by one do.
        """
        with self._lock:
            m = self._members[member]
            m.n_touched = max(m.n_touched, min(n_tokens, m.n_ubatch))
            if n_tokens <= MIN_UBATCH < max(m.n_touched, m.n_failed) and trim():
                m.n_touched = m.n_next = m.n_failed = 0
            self._follow()

    def _follow(self) -> None:
        """Shrink if the rest has grown into half of the reserve, grow if it has become much less."""
        budget, reserve = self._left(), reserve_bytes(self.limit_bytes)
        if budget + reserve // 2 < self.budget_bytes or budget > self.budget_bytes + reserve // 2:
            self._apply(max(budget, self._floor()))

    def limit(self, limit_bytes: int) -> None:
        """Change the process's limit, whatever each model was loaded with; experts shrink at once, or may grow.

        Raises:
            BudgetError: what else is in memory leaves less than a floor; nothing changes.
        """
        with self._lock:
            before = [member.limit_bytes for member in self._members.values()]
            for member in self._members.values():
                member.limit_bytes = limit_bytes
            least, floor = self._left(most=True), self._floor()
            if least < floor:
                for member, old in zip(self._members.values(), before, strict=True):
                    member.limit_bytes = old
                enough = format_bytes(limit_bytes + with_reserve(floor - least), up=True)
                raise BudgetError(f"{format_bytes(limit_bytes)} are not enough for what is loaded: it needs {enough}")
            self._apply(self._left())

    def cap(self, n_bytes: int | None) -> None:
        """Give experts no more than this, however much is left; None: no cap. Gone when the last model is.

        Raises:
            BudgetError: it is below a loaded model's floor.
        """
        with self._lock:
            before, self._cap_bytes = self._cap_bytes, n_bytes
            try:
                self._apply(self._left())
            except BudgetError:
                self._cap_bytes = before
                raise

    def release(self, member: int) -> None:
        """A model is gone, or did not come about: the others may take its room."""
        with self._lock:
            if self._leaving:
                return
            self._members.pop(member, None)
            if self._members:
                self._apply(max(self._left(), self._floor()))
            else:
                self.budget_bytes, self._cap_bytes = 0, None
                self._watch(False)

    def leave(self) -> None:
        """The process ends: what measures memory may be gone when models are, and no budget matters any more."""
        self._leaving = True

    def _left(self, *, most: bool = False) -> int:
        left = self.limit_bytes - self.rest_bytes(most=most) - reserve_bytes(self.limit_bytes)
        return left if self._cap_bytes is None else min(left, self._cap_bytes)

    def _floor(self) -> int:
        return max((m.floor_bytes for m in self._members.values()), default=0)

    def _apply(self, budget: int) -> None:
        if budget != self.budget_bytes:
            self._set_budget(budget)
            self.budget_bytes = budget
