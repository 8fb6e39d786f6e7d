"""`spac tune`: measures this machine once, for `spac plan`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spac.cli import options as opt
from spac.cli.terminal import note
from spac.errors import SpacError
from spac.host.memory import KIB, format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from spac.device import Device

BAR: int = 40


def tune(
    place: Annotated[
        Path, typer.Argument(metavar="[FOLDER|MODEL]", help="Where models are: a folder, or one of them to read from.", show_default=False)
    ] = Path(),
    show_: Annotated[bool, typer.Option("--show", help="Only show what was measured.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, too: .png, .svg (needs matplotlib).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile itself.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Measure this machine's disk, processor and memory, in half a minute to a minute, and keep it."""
    from spac import device
    from spac.host.cores import physical_cores

    kept = device.path_of(place)
    found = None
    try:
        found = device.load(kept)
        if show_ and found is None:
            raise SpacError(f"{kept}: nothing was measured for {device.identity(place)['disk']}; run `spac tune {place}`")
    except device.UnusableProfile as e:
        note(f"spac: {e}; measuring again")
        show_ = False
    if found is None or not show_:
        device.check_writable(kept)
        found = device.measure(place, n_threads=physical_cores(), progress=_progress())
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        device.save(found, kept)
    if as_json:
        print(kept.read_text(), end="")
    else:
        show(found, kept)
    if plot is not None:
        draw(found, plot)
    return 0


def _progress() -> Callable[[str], None] | None:
    if not sys.stderr.isatty():
        return None
    return lambda text: print(f"\r\x1b[Kmeasuring {text}", end="", file=sys.stderr, flush=True)


def show(device: Device, kept: Path) -> None:
    """Tables, and bars for the reads that paging makes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 140)
    for name, value in (
        ("processor", f"{device.cpu}, {device.cores} cores, {device.threads} compute threads"),
        ("disk", device.disk),
        ("memory", f"{device.memory_bytes_per_s / 1e9:.3g} GB/s read by all threads"),
        ("wake-up", f"{device.wakeup_s * 1e6:.3g} µs of a sleeping thread; an op of the graph {device.op_s * 1e6:.3g} µs"),
        ("visit", f"{device.visit_s * 1e3:.3g} ms of a layer that misses experts, besides its reads"),
        ("contention", f"{device.contention_s * 1e12:.3g} ms of computing lost for each GB that is read meanwhile"),
        ("signals", f"{(device.signals_s + 48 * 128 * device.signals_expert_s) * 1e3:.3g} ms for each token of 48 layers of 128 experts"),
        ("measured", f"{device.measured} in {device.took_s:.0f} s, spac {device.build}"),
        ("kept", str(kept)),
    ):
        console.print(f"{name:<12}{value}", markup=False)
    for store in dict.fromkeys(row.store for row in device.reads):
        rows = {(row.size_bytes, row.depth): row for row in device.reads if row.store == store}
        depths = sorted({depth for _, depth in rows})
        title = f"\nreads, {store}: MB/s by size and reads at once; latency of one"
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for column in ("KiB", *map(str, depths), "ms"):
            table.add_column(column, justify="right", no_wrap=True)
        for size in sorted({size for size, _ in rows}):
            cells = [f"{rows[size, depth].bytes_per_s / 1e6:.0f}" if (size, depth) in rows else "" for depth in depths]
            table.add_row(str(size // KIB), *cells, f"{rows[size, 1].seconds * 1e3:.2f}" if (size, 1) in rows else "")
        console.print(table)
    show_bars(console, device)
    batches = sorted({row.n_tokens for row in device.products})
    table = Table(box=None, pad_edge=False, title="\nproducts: billions of weights times tokens a second, by batch", title_justify="left")
    for i, column in enumerate(("type", *(f"{n} token{'s' * (n > 1)}" for n in batches), "rearranged, one thread")):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for name in dict.fromkeys(row.type for row in device.products):
        rates = {row.n_tokens: row.weights_per_s for row in device.products if row.type == name}
        repack = f"{device.repack[name] / 1e9:.3g}" if name in device.repack else ""
        table.add_row(name, *(f"{rates[n] / 1e9:.3g}" if n in rates else "" for n in batches), repack)
    console.print(table)


def show_bars(console: Console, device: Device) -> None:
    """The bandwidth of six reads at once, or about that, by size."""
    rows = [row for row in device.reads if row.store == device.store]
    depth = min({row.depth for row in rows}, key=lambda n: abs(n - 6))
    bars = [row for row in rows if row.depth == depth]
    most = max(row.bytes_per_s for row in bars)
    console.print(f"\n{depth} reads at once, {device.store}")
    for row in bars:
        bar = "█" * max(1, round(BAR * row.bytes_per_s / most))
        console.print(f"{format_bytes(row.size_bytes):>8}  {row.bytes_per_s / 1e6:6.0f} MB/s  {bar}", markup=False)


def draw(device: Device, path: Path) -> None:
    """Bandwidth by size, a line for each depth, a panel for each store.

    Raises:
        SpacError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SpacError("--plot needs matplotlib: pip install matplotlib, or spac[bench]") from None
    stores = list(dict.fromkeys(row.store for row in device.reads))
    figure, panels = plt.subplots(1, len(stores), figsize=(5 * len(stores), 4), squeeze=False, sharey=True)
    for panel, store in zip(panels[0], stores, strict=True):
        for depth in sorted({row.depth for row in device.reads}):
            rows = [row for row in device.reads if (row.store, row.depth) == (store, depth)]
            x, y = [row.size_bytes / KIB for row in rows], [row.bytes_per_s / 1e6 for row in rows]
            panel.plot(x, y, marker="o", label=f"{depth} at once")
        panel.set(xscale="log", xlabel="KiB", title=f"{store} reads")
    panels[0][0].set(ylabel="MB/s")
    panels[0][0].legend()
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as e:
        raise SpacError(f"{path}: cannot be written: {e}") from None
    finally:
        plt.close(figure)
