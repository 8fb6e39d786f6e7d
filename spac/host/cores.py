"""Processors that this process may use."""

from __future__ import annotations

import contextlib
import os


def allowed_cores() -> int:
    """Processors that it may run on; all of the machine's where it may not ask."""
    with contextlib.suppress(OSError, AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """The same, hyper-threads not counted."""
    import psutil

    allowed = allowed_cores()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
