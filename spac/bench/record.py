"""Records: one JSON file for each run, with all that is needed to repeat it, and the figures that follow from what it holds.

Keys of a record, besides those of `LimitedRun`:
    row, contender, repeat, limits, not_enforced, profile, commands, environment, threads: what was asked for.
    repacked: whether kernels for repacked weights computed. sha256: of the programs or libraries, and of the files they were given.
    model, machine, versions, commit, time, bench_command: where and when.
    complete: false if the run was interrupted, killed or failed; what it left is kept. error: why. skipped: it never ran.
    prompts: for each prompt kind, id, prompt_tokens, ttft_s (from reading the prompt on, loading not included), token_s (seconds
        for each token after the first; empty where only mean_token_s and tokens are known), token_ids, and decode: what was counted
        between the first and the last token (eval_s in llama_decode, cpu_s, device_read_bytes, and the pager's counters).
    load_s, expert, layers: what spac says at the end. board: see `spac.host.board`. tuning: what a contender tried out beforehand.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spac.errors import OptionError, SpacError
from spac.estimator import fingerprint
from spac.host.cores import allowed_cores
from spac.host.memory import MIB
from spac.host.system import System, cpu_model

FORMAT: Final = 1
ROOT: Final = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


# -- where and when --


def machine() -> dict[str, Any]:
    """The computer: processor, cores, memory, kernel."""
    return {
        "cpu": cpu_model(System()) or platform.machine(),
        "board": System().text("/proc/device-tree/model") or None,  # of a PC its firmware's names tell nothing
        "cores": os.cpu_count(),
        "allowed_cores": allowed_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }


def versions() -> dict[str, str]:
    """Of spac and of what it stands on."""
    found = {"python": platform.python_version()}
    for package in ("spac", "llama-cpp-python", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The working tree's commit, with "+" if files differ from it; None outside of git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def model_facts(parts: Sequence[Path]) -> dict[str, Any]:
    """Name, size, and a digest of the first megabyte (header and metadata) and the last."""
    return {
        "name": parts[0].name, "bytes": sum(path.stat().st_size for path in parts), "files": len(parts),
        "sha256_of_ends": fingerprint(parts),
    }  # fmt: skip


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of files one after another, its first 16 hex digits."""
    found = hashlib.sha256()
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


# -- files --


def file_name(number: int, row: str, contender: str, repeat: int) -> str:
    """A run's file: its running number, and words that tell people what it is."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{row}-{contender}").strip("-").lower()
    return f"{number:03d}-{words[:80]}-{repeat}.json"


def write(path: Path, record: Record, short: Mapping[str, str]) -> None:
    """Writes a record.

    Args:
        short: paths of this machine, and what stands for them in the file.

    Raises:
        SpacError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False)
    for long, name in sorted(short.items(), key=lambda item: -len(item[0])):
        text = text.replace(long, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (text + "\n").encode())
    except OSError as e:
        raise SpacError(f"{path}: cannot be written: {e.strerror or e}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, or leaves what was there.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_suffix(".part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_folder(folder: Path) -> list[Record]:
    """All records of a benchmark, in the order in which they were made.

    Raises:
        OptionError: there are none, or a file is not a record.
    """
    records = []
    for path in sorted(folder.glob("runs/*.json")):
        try:
            record = json.loads(path.read_text())
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OptionError(f"{path}: not a record of spac bench: {e}") from None
        records.append(record)
    if not records:
        raise OptionError(f"{folder}: no records of spac bench (runs/*.json)")
    return records


# -- figures --


@dataclass(frozen=True)
class Breakdown:
    """Where the seconds between first and last token went.

    Attributes:
        compute_s: in llama_decode, not waiting for experts.
        wait_s: waiting for experts.
        other_s: sampling, Python.
        unknown_s: computing and waiting, where a contender does not tell one from the other: page faults look like computing.
    """

    compute_s: float = 0.0
    wait_s: float = 0.0
    other_s: float = 0.0
    unknown_s: float = 0.0


def decode_tokens(record: Record) -> int:
    """Tokens after the first one of each prompt."""
    return sum(len(p["token_s"]) or p.get("tokens", 0) for p in record.get("prompts", []))


def decode_s(record: Record) -> float:
    """Seconds that these took."""
    return sum(sum(p["token_s"]) or p.get("mean_token_s", 0) * p.get("tokens", 0) for p in record.get("prompts", []))


def decode_tokens_per_s(record: Record) -> float | None:
    """Decoding speed of a run; None if it produced no two tokens."""
    seconds = decode_s(record)
    return decode_tokens(record) / seconds if seconds > 0 else None


def prefill_tokens_per_s(record: Record) -> float | None:
    """Speed of reading prompts, cold, with the first token's sampling."""
    read = [p for p in record.get("prompts", []) if p.get("ttft_s") and p.get("prompt_tokens")]
    seconds = sum(p["ttft_s"] for p in read)
    return sum(p["prompt_tokens"] for p in read) / seconds if seconds > 0 else None


def per_token(record: Record, *names: str) -> float | None:
    """A counter of decoding, for each token: the first of these names that all prompts have."""
    prompts, tokens = record.get("prompts", []), decode_tokens(record)
    for name in names:
        if tokens and all(name in p.get("decode", {}) for p in prompts):
            return float(sum(p["decode"][name] for p in prompts) / tokens)
    return None


def bytes_per_token(record: Record) -> float | None:
    """Read from the disk while decoding, for each token: the device's counter, or what a peer says of itself."""
    return per_token(record, "device_read_bytes", "own_read_bytes")


def expert_share(record: Record) -> float | None:
    """Share of the memory limit that a contender's own expert cache has: spac's budget, or the cache size that was found for a peer.

    None without a limit, and where the page cache is the only one: what that holds is the kernel's choice.
    """
    limit = record["limits"]["memory_bytes"]
    cache = record.get("expert", {}).get("budget_bytes") or record.get("tuning", {}).get("cache_mib", 0) * MIB
    return cache / limit if limit and cache else None


def tpot_s(record: Record) -> list[float]:
    """Mean time of a token after the first, for each prompt (MLPerf's TPOT)."""
    found = []
    for p in record.get("prompts", []):
        if p["token_s"]:
            found.append(sum(p["token_s"]) / len(p["token_s"]))
        elif p.get("mean_token_s"):
            found.append(p["mean_token_s"])
    return found


def breakdown(record: Record) -> Breakdown | None:
    """Where a run's decoding time went; None if it says nothing of that."""
    prompts, total = record.get("prompts", []), decode_s(record)
    if not total or not all("eval_s" in p.get("decode", {}) for p in prompts):
        return Breakdown(unknown_s=total) if total else None
    evaluating = sum(p["decode"]["eval_s"] for p in prompts)
    other = max(total - evaluating, 0.0)
    if not all("stall_s" in p["decode"] for p in prompts):
        return Breakdown(other_s=other, unknown_s=evaluating)
    wait = sum(p["decode"]["stall_s"] for p in prompts)
    return Breakdown(compute_s=max(evaluating - wait, 0.0), wait_s=wait, other_s=other)
