"""`spac inspect`: what a model's headers say. Needs no native library."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from spac.cli import options as opt
from spac.gguf.check import ModelFacts
from spac.gguf.remote import headers_of
from spac.host.memory import format_bytes


def inspect(
    model: opt.Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Show what a model is made of, and what paging it takes."""
    with headers_of(model) as (_, facts):
        pass
    if as_json:
        print(json.dumps(describe(facts), ensure_ascii=False))
        return 0
    for name, value in rows(facts):
        print(f"{name:<14}{value}")
    return 0


def describe(facts: ModelFacts) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes."""
    return {
        "path": facts.path,
        "parts": list(facts.parts),
        "name": facts.name,
        "architecture": facts.architecture,
        "layers": facts.n_layers,
        "expert_layers": len(facts.expert_layers),
        "experts": facts.n_experts,
        "experts_used": facts.n_experts_used,
        "context_tokens": facts.n_ctx_train,
        "file_bytes": facts.file_bytes,
        "dense_bytes": facts.dense_bytes,
        "expert_bytes": facts.expert_bytes,
        "skipped_bytes": facts.skipped_bytes,
        "unknown_layout": facts.unknown_layout,
        "bundle_bytes": max((layer.bundle_bytes for layer in facts.expert_layers), default=0),
        "bundle_page_bytes": facts.max_bundle_bytes,
        "floor_bytes": facts.floor_bytes,
        "types": facts.types,
        "chat_template": facts.has_chat_template,
    }


def rows(facts: ModelFacts) -> list[tuple[str, str]]:
    """The same for people."""
    table = [
        ("model", facts.name),
        ("file", facts.path + (f" and {len(facts.parts) - 1} more" if len(facts.parts) > 1 else "")),
        ("architecture", facts.architecture),
        ("size", format_bytes(facts.file_bytes)),
        ("types", ", ".join(f"{name} {format_bytes(size)}" for name, size in facts.types.items())),
        ("context", f"{facts.n_ctx_train} tokens" if facts.n_ctx_train else "not said"),
        ("chat", "has a chat template" if facts.has_chat_template else "no chat template"),
        ("layers", str(facts.n_layers)),
        ("dense", format_bytes(facts.dense_bytes)),
    ]
    if facts.skipped_bytes:
        table.append(("not loaded", f"{format_bytes(facts.skipped_bytes)} (blocks that guess further tokens)"))
    if facts.unknown_layout:
        return [*table, ("experts", f"cannot be paged: {facts.unknown_layout}")]
    if not facts.expert_layers:
        return [*table, ("experts", "none: a dense model, nothing can be paged")]
    bundle = max(layer.bundle_bytes for layer in facts.expert_layers)
    token = facts.n_experts_used * sum(layer.bundle_bytes for layer in facts.expert_layers)
    return [
        *table,
        ("experts", f"{facts.n_experts} in each of {len(facts.expert_layers)} layers, {facts.n_experts_used} used for a token"),
        ("all experts", format_bytes(facts.expert_bytes)),
        ("a bundle", f"{format_bytes(bundle)} (one expert in one layer)"),
        ("a token", f"{format_bytes(token)} of experts"),
        ("floor", f"{format_bytes(facts.floor_bytes)} (the smallest expert budget)"),
    ]
