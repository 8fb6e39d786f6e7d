"""`spac plan`: before a model runs, or is even downloaded: does it fit, how fast will it be, what would make it faster?"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spac.cli import options as opt
from spac.cli.terminal import note
from spac.errors import OptionError, SpacError
from spac.gguf.check import MAX_CTX
from spac.host.memory import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from spac.device import Device
    from spac.gguf.check import ModelFacts
    from spac.host.limits import Limits
    from spac.plan.forecast import Choice, Forecast, Point, Question, Work

BAR: int = 40  # columns of the longest bar

PlanModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A GGUF file, its address (https://...), or hf:OWNER/REPO/FILE.gguf; the first part of a split model.",
        show_default=False,
    ),
]  # fmt: skip


def plan(
    model: PlanModel,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Limit of the whole process: 4G, 512M, 50%; else the device's, or auto.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="The device to stand in for (spac bench --list), or a .toml file; what spac tune kept there, a .json"
            " file; else this machine.",
            show_default=False,
        ),
    ] = None,
    ctx: opt.Ctx = 4096,
    ubatch: opt.Ubatch = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_CTX, metavar="N", help="Length of the prompt that the first token waits for.")
    ] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Tell whether a model fits and how fast it will be, from its header alone."""
    from spac.gguf.remote import headers_of

    with headers_of(model) as (paths, facts):
        question, device_used, limit_bytes = ask(paths, facts, device, memory, ctx, ubatch, prompt_tokens)
        from spac.plan.forecast import curve, quantisations

        answer = question.answer(limit_bytes)
        points = curve(question, limit_bytes)
        if as_json:
            print(json.dumps(describe(answer, points)))
            return 0
        choices = quantisations(question, limit_bytes)
    show(facts, question, answer, points, choices, device_used)
    return 0


def ask(
    paths: tuple[str, ...], facts: ModelFacts, profile: str | None, memory: str | None, ctx: int, ubatch: int | None, prompt_tokens: int
) -> tuple[Question, Device, int]:
    """The question, the device that was measured, and the memory limit in bytes."""
    from spac.gguf.reader import read_gguf
    from spac.host.memory import auto_limit_bytes, parse_memory, resident_bytes
    from spac.plan.forecast import GROWTH_BYTES, Machine, Question, Work

    tuned = profile if profile is not None and profile.endswith(".json") else None
    if tuned is not None and (memory is None or memory == "auto" or memory.endswith("%")):
        raise OptionError(f"--device {tuned}: give --memory in bytes, too, as 4G: that device's is not in the file")
    limits = limits_of(profile if tuned is None else None, facts)
    given = (parse_memory(memory, limits.memory_bytes) if memory is not None else None) or limits.memory_bytes
    work = Work.of(facts, (tensor for path in paths for tensor in read_gguf(path).tensors))
    from spac.plan.sizes import measure_default_sizes

    n_ctx = ctx or facts.n_ctx_train or 4096
    base_bytes = resident_bytes() + GROWTH_BYTES  # as `spac run` has when it plans, and later
    measured = find_device(paths[0] if facts.path == paths[0] else None, work) if tuned is None else load_device(tuned)
    threads = min(limits.cores or sys.maxsize, measured.threads)

    @functools.cache
    def measure(n_ubatch: int) -> Any:
        return measure_default_sizes(paths[0], facts, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=threads)

    machine = Machine(measured, limits)
    question = Question(work, measure, machine, base_bytes, n_ctx, ubatch, prompt_tokens)
    return question, measured, given if given is not None else auto_limit_bytes()


def limits_of(profile: str | None, facts: ModelFacts) -> Limits:
    """Of a device profile; none without.

    Raises:
        OptionError: there is no such profile.
    """
    from spac.host.limits import Limits

    if profile is None:
        return Limits()
    from spac.bench import profile as profiles

    try:
        return profiles.load(profile).limits(facts.file_bytes)
    except OptionError as e:
        raise OptionError(f"--device: {e}") from None


def load_device(path: str) -> Device:
    """What `spac tune` kept, on another device.

    Raises:
        OptionError: it cannot be read.
    """
    from spac import device

    try:
        return device.parse(Path(path).read_bytes())
    except OSError as e:
        raise OptionError(f"--device: {path}: cannot read the device: {e.strerror}") from None
    except ValueError as e:
        raise OptionError(f"--device: {path}: damaged, or not what spac tune keeps: {e}") from None


def find_device(model: str | None, work: Work) -> Device:
    """What was measured for the disk of a local model, its reads as they are now, or of the working directory; else a quick probe.

    Raises:
        SpacError: neither could be done.
    """
    from spac import cache, device
    from spac.host.cores import physical_cores
    from spac.trace.timing import PARTS

    place = Path.cwd() if model is None else Path(model)
    if place.is_file() and place.stat().st_size < device.SIZES[-1]:
        place = place.resolve().parent
    kept = device.path_of(place)
    try:
        found = device.load(kept)
    except device.UnusableProfile as e:
        note(f"spac: {e}; measured again in short, `spac tune` does it in full")
        found = None
    read_bytes = max((layer.bundle_bytes // PARTS for layer in work.layers), default=MIB)
    if found is not None:
        if not place.is_file() or place.stat().st_blocks * 512 < place.stat().st_size:  # a folder, or a header with a hole behind it
            return found
        return dataclasses.replace(
            device.as_it_is_now(found, place, read_bytes, work.main_types[0]), measured=f"{found.measured}, speed now"
        )
    # other types are taken for the nearest of these
    probe = functools.partial(device.probe, types=work.main_types, read_bytes=read_bytes, n_threads=physical_cores())
    try:
        return probe(place)
    except SpacError:
        if model is not None:
            raise
        cache.folder().mkdir(parents=True, exist_ok=True)  # the working directory cannot be written to
        return probe(cache.folder())


def describe(answer: Forecast, points: list[Point]) -> dict[str, Any]:
    """What `--json` prints: bytes, seconds, tokens by second; null where the model does not fit."""
    speed = answer.speed
    return {
        "fits": answer.plan is not None,
        "decode_tokens_per_s": speed.decode_tokens_per_s if speed else None,
        "decode_interval": [speed.low_tokens_per_s, speed.high_tokens_per_s] if speed else None,
        "prefill_tokens_per_s": speed.prefill_tokens_per_s if speed else None,
        "ttft_s": speed.ttft_s if speed else None,
        "budget": budget(answer),
        "curve": [
            {
                "memory_bytes": point.memory_bytes,
                "decode_tokens_per_s": point.speed.decode_tokens_per_s,
                "decode_interval": [point.speed.low_tokens_per_s, point.speed.high_tokens_per_s],
                "faster_disk_tokens_per_s": point.faster_disk_tokens_per_s,
            }
            for point in points
        ],
    }


def budget(answer: Forecast) -> dict[str, Any]:
    """Which bytes go where."""
    from spac.plan import reserve_bytes

    sizes, made = answer.sizes, answer.plan
    experts = 0 if made is None else made.expert_budget_bytes if made.paged else sizes.expert_bytes
    return {
        "limit_bytes": answer.limit_bytes,
        "paged": made is not None and made.paged,
        "ubatch_tokens": answer.n_ubatch,
        "dense_bytes": sizes.dense_bytes,
        "context_bytes": sizes.context_bytes,
        "compute_bytes": sizes.compute_bytes,
        "vocabulary_bytes": sizes.vocabulary_bytes,
        "process_bytes": made.base_bytes if made is not None else None,
        "reserve_bytes": reserve_bytes(answer.limit_bytes),
        "expert_bytes": experts,
        "all_expert_bytes": sizes.expert_bytes,
    }


# -- for people --


def show(facts: ModelFacts, question: Question, answer: Forecast, points: list[Point], choices: list[Choice], device: Device) -> None:
    """Tables, and a plot of bars."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 140)
    for name, value in rows(facts, question, answer, device):
        console.print(f"{name:<12}{value}", markup=False)
    show_budget(console, answer)
    if facts.expert_layers:
        show_curve(console, points, answer.limit_bytes)
    show_choices(console, choices, facts)


def rows(facts: ModelFacts, question: Question, answer: Forecast, device: Device) -> list[tuple[str, str]]:
    """The answer in lines."""
    speed, made = answer.speed, answer.plan
    found = [
        ("model", f"{facts.name}, {format_bytes(facts.file_bytes)}, {facts.path}"),
        ("memory", format_bytes(answer.limit_bytes)),
        ("device", machine_line(question, device)),
    ]
    if speed is None or made is None:
        return [*found, ("fits", f"no: {answer.why_not}")]
    if facts.unknown_layout:
        how = f"yes, whole: its experts cannot be paged ({facts.unknown_layout})"
    elif not facts.expert_layers:
        how = "yes, whole: a dense model, nothing is paged"
    elif made.paged:
        from spac.plan.forecast import resident_share

        how = f"yes: {resident_share(question.work, made):.0%} of the experts in memory, the others are read when they are needed"
    else:
        how = "yes, whole"
    decode = f"{speed.decode_tokens_per_s:.3g} tokens/s ({speed.low_tokens_per_s:.3g} to {speed.high_tokens_per_s:.3g})"
    if made.paged:
        decode += f": {speed.miss_rate:.0%} of the experts missed, {format_bytes(round(speed.read_bytes_per_token))} read for a token"
    first = f"after {speed.ttft_s:.3g} s: a prompt of {question.prompt_tokens} tokens, {speed.prefill_tokens_per_s:.3g} tokens/s"
    return [*found, ("fits", how), ("decode", decode), ("first token", first)]


def machine_line(question: Question, device: Device) -> str:
    """What the speed is for."""
    limits = dataclasses.asdict(question.machine.limits)
    text = [f"{device.cpu}, {device.disk}", "a quick probe (spac tune measures more)" if device.quick else f"measured {device.measured}"]
    if limits["read_bytes_per_s"]:
        text.append(f"reads limited to {limits['read_bytes_per_s'] / 1e6:.0f} MB/s")
    if limits["cores"]:
        text.append(f"{limits['cores']} cores" + (f" at {limits['cpu_share']:.0%}" if limits["cpu_share"] else ""))
    return "; ".join(text)


def show_budget(console: Console, answer: Forecast) -> None:
    """Where memory goes."""
    from rich.table import Table

    names = {
        "dense_bytes": "dense weights", "context_bytes": "context (KV)", "compute_bytes": f"compute, ubatch of {answer.n_ubatch}",
        "vocabulary_bytes": "vocabulary", "process_bytes": "Python and libraries", "reserve_bytes": "reserve", "expert_bytes": "experts",
    }  # fmt: skip
    values = budget(answer)
    table = Table(box=None, pad_edge=False, title="where memory goes", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for key, name in names.items():
        if values[key]:
            of = f" of {format_bytes(values['all_expert_bytes'])}" if key == "expert_bytes" else ""
            table.add_row(name, format_bytes(values[key]) + of)
    console.print()
    console.print(table)


def show_curve(console: Console, points: list[Point], limit_bytes: int) -> None:
    """Speed by memory, as bars; beyond each bar what a disk twice as fast would add."""
    console.print("\ntokens/s by memory (· with a disk twice as fast)")
    most = max((max(p.speed.decode_tokens_per_s, p.faster_disk_tokens_per_s) for p in points), default=1.0)
    for point in points:
        now, faster = point.speed.decode_tokens_per_s, point.faster_disk_tokens_per_s
        full = max(1, round(BAR * now / most))
        bar = "█" * full + "·" * max(0, round(BAR * faster / most) - full)
        mark = "← this memory" if point.memory_bytes == limit_bytes else "← one GiB more" if point.memory_bytes == limit_bytes + GIB else ""
        console.print(f"{format_bytes(point.memory_bytes):>10}  {now:7.3g} {faster:7.3g}  {bar:<{BAR}}  {mark}".rstrip(), markup=False)


def show_choices(console: Console, choices: list[Choice], facts: ModelFacts) -> None:
    """The same model in other types."""
    from rich.table import Table

    from spac.plan.forecast import READING_SPEED, pick

    picked = pick(choices)
    if picked is None:
        return
    table = Table(box=None, pad_edge=False, title="\nthe same tensors in other types", title_justify="left")
    for i, column in enumerate(("type", "size", "tokens/s", "interval", "")):
        table.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for choice in choices:
        speed = choice.speed
        table.add_row(
            choice.type_name, format_bytes(choice.file_bytes), f"{speed.decode_tokens_per_s:.3g}" if speed else "does not fit",
            f"{speed.low_tokens_per_s:.3g} to {speed.high_tokens_per_s:.3g}" if speed else "",
            "← pick" if choice is picked else "",
        )  # fmt: skip
    console.print(table)
    main = max(facts.types, key=lambda name: facts.types[name])
    rule = f"the most bits that decode {READING_SPEED:.0f} tokens/s, else the fastest of four bits or more"
    console.print(f"now mostly {main}; picked: {rule}")
