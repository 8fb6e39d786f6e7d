"""Running means of what is measured while tokens come."""

from __future__ import annotations

from collections import deque


class _Running:
    """`value`: None before the first one was added."""

    value: float | None = None

    def get(self, default: float = 0.0) -> float:
        return default if self.value is None else self.value


class Mean(_Running):
    """A mean in which old values fade. `weight`: of a new value, once there are enough."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._n = 0

    def add(self, value: float) -> None:
        self._n += 1
        before = self.value or 0.0
        self.value = before + max(self._weight, 1 / self._n) * (value - before)


class Usual(_Running):
    """The mean of the middle half of the last values: for times, since now and then the machine pauses."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=16)

    def add(self, value: float) -> None:
        self._last.append(value)
        ordered = sorted(self._last)
        n = len(ordered)
        middle = ordered[n // 4 : n - n // 4] if n > 2 else ordered[:1]
        self.value = sum(middle) / len(middle)
