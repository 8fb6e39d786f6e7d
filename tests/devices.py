"""A made-up device: round figures, nothing measured."""

from __future__ import annotations

from spac.device import Device, ProductRow, ReadRow

RATE = 1e9  # bytes/s of its disk, however many reads are in flight


def make_device(**changes: object) -> Device:
    """1 GB/s, 10 G weights a second for one token of Q4_0 and ten times that for 64, repacking at 4 G."""
    sizes = ((size, depth) for size in (1 << 16, 1 << 20, 1 << 23) for depth in (1, 6))
    reads = tuple(ReadRow("direct", s, d, s * d / RATE, 0.8 * s * d / RATE, 1.25 * s * d / RATE) for s, d in sizes)
    products = (ProductRow("Q4_0", 1, 1e10), ProductRow("Q4_0", 64, 1e11), ProductRow("Q8_0", 1, 5e9), ProductRow("Q8_0", 64, 1e11))
    values: dict[str, object] = {
        "cpu": "made up", "cores": 4, "disk": "ext4 on /dev/none", "build": "test", "threads": 4, "reads": reads, "products": products,
        "repack": {"Q4_0": 4e9}, "op_s": 2e-6, "wakeup_s": 1e-5, "memory_bytes_per_s": 1e10, "measured": "2026-01-01 00:00:00",
    }  # fmt: skip
    return Device(**(values | changes))  # type: ignore[arg-type]
