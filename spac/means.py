"""Running means of what is measured while tokens come."""

from __future__ import annotations

from collections import deque


class Mean:
    """A mean in which old values fade; None before the first value. `weight`: of a new value, once there are enough."""

    def __init__(self, weight: float) -> None:
        self.value: float | None = None
        self._weight = weight
        self._n = 0

    def add(self, value: float) -> None:
        self._n += 1
        before = self.value or 0.0
        self.value = before + max(self._weight, 1 / self._n) * (value - before)

    def get(self, default: float = 0.0) -> float:
        return default if self.value is None else self.value


class Usual:
    """The mean of the middle half of the last values: for times, since now and then the machine pauses. None before the first value."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._last: deque[float] = deque(maxlen=16)

    def add(self, value: float) -> None:
        self._last.append(value)
        ordered = sorted(self._last)
        n = len(ordered)
        middle = ordered[n // 4 : n - n // 4] if n > 2 else ordered[:1]
        self.value = sum(middle) / len(middle)

    def get(self, default: float = 0.0) -> float:
        return default if self.value is None else self.value
