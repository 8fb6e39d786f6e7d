"""Prompts: short ones that come with spac, of five kinds, or those of a JSON Lines file."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from spac.errors import OptionError

FOLDER: Final = Path(__file__).resolve().parent / "prompts"
KINDS: Final = ("code", "maths", "chat", "summary", "question")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, its kind, and its name within its file."""

    kind: str
    id: str
    text: str


def load(kinds: Sequence[str], file: Path | None = None) -> list[Prompt]:
    """Prompts, the kinds in turn, so that the first few are of different kinds.

    Args:
        kinds: only these; empty: all.
        file: JSON Lines with `prompt`, and `category` or `kind`, and `id`, if it has them; None: those that come with spac.

    Raises:
        OptionError: there are none, or the file cannot be read.
    """
    if file is None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise OptionError(f"kind {unknown[0]!r} does not exist: use {', '.join(KINDS)}")
        found = [prompt for kind in KINDS for prompt in read(FOLDER / f"{kind}.jsonl", kind)]
    else:
        found = read(file, file.stem)
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in found:
        if not kinds or prompt.kind in kinds:
            by_kind.setdefault(prompt.kind, []).append(prompt)
    if not by_kind:
        raise OptionError(f"{file or FOLDER}: no prompts" + (f" of kind {', '.join(kinds)}" if kinds else ""))
    longest = max(map(len, by_kind.values()))
    return [prompts[i] for i in range(longest) for prompts in by_kind.values() if i < len(prompts)]


def of_length(prompt: Prompt, n_tokens: int, count: Callable[[str], int]) -> Prompt:
    """Its text, repeated as often as it takes, as far as it has no more than so many tokens: a text that all contenders can be given.

    Args:
        count: tokens of a text.
    """
    text = prompt.text * (n_tokens // max(1, count(prompt.text)) + 1)
    end = bisect.bisect_right(range(len(text) + 1), n_tokens, key=lambda n: count(text[:n])) - 1
    return replace(prompt, text=text[:end])


def read(path: Path, kind: str) -> list[Prompt]:
    """The prompts of a file; `kind` for those that name none.

    Raises:
        OptionError: it cannot be read, or a line is not such an object.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise OptionError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise OptionError(f"{path}: not UTF-8 text (byte {e.start})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            text = value["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise OptionError(f"{path}, line {number}: not a JSON object with a prompt") from None
        if not isinstance(text, str) or not text:
            raise OptionError(f"{path}, line {number}: the prompt is not a text")
        prompts.append(Prompt(str(value.get("category", value.get("kind", kind))), str(value.get("id", number)), text))
    return prompts
