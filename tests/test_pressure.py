"""Memory that others take, or that is taken from the limit, while tokens are decoded: experts give way, answers stay the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import spac
from spac.errors import BudgetError, OptionError
from spac.host import limits

MIB = 1 << 20
PROMPT = "The purpose of this page is " * 20  # long enough to fill the budget

# In a group of its own: decodes while another process takes a third of the limit, 4 MiB after each token. After each step it is
# waited for that there is room again; the test's time limit ends a wait in vain.
WORKER = """
import json, subprocess, sys, time, spac
from spac.host import memory
from spac.generate import Sampling, generate, tokenize

HOG = "import sys\\nheld = []\\nfor line in sys.stdin:\\n  held.append(bytearray(b'x' * (4 << 20)))\\n  print(len(held), flush=True)"
path, limit = sys.argv[1], int(sys.argv[2])
hog = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
group = min(memory.cgroup_limits(), key=lambda g: g.limit_bytes)
assert group.limit_bytes == limit
llama = spac.Llama(path, memory=limit - (24 << 20), paging="on", n_ctx=512, verbose=False)
result, pieces = generate(llama, tokenize(llama, sys.argv[3]), Sampling(temperature=0), 48)
taken, budgets = 0, []
for i, piece in enumerate(pieces):
    if i >= 12 and taken < limit // 3:  # experts have filled what the prompt's buffers left to them
        hog.stdin.write("more\\n")
        hog.stdin.flush()
        hog.stdout.readline()
        taken += 4 << 20
        while memory.cgroup_limits()[0].limit_bytes - memory.cgroup_limits()[0].used_bytes < 4 << 20:
            time.sleep(0.01)
    budgets.append(llama.spac.stats().budget_bytes)
hog.kill()
hog.wait()
after = llama.spac.stats()
while llama.spac.stats().budget_bytes < llama.spac.stats().granted_bytes:
    time.sleep(0.1)
print(json.dumps({"tokens": result.token_ids, "taken": taken, "most": max(budgets), "least": min(budgets[budgets.index(max(budgets)):]), "shortages": after.shortages,
                  "granted": after.granted_bytes, "floor": llama.spac.info().floor_bytes}))
"""


def tokens_of(path: Path, n_ubatch: int | None = None) -> list[int]:
    from spac.generate import Sampling, generate, tokenize

    llama = spac.Llama(path, memory="4G", paging="on", n_ctx=512, n_ubatch=n_ubatch, verbose=False)
    result, pieces = generate(llama, tokenize(llama, PROMPT), Sampling(temperature=0), 48)
    for _ in pieces:
        pass
    llama.close()
    return result.token_ids


def test_experts_give_way_to_another_process(big_model: Path) -> None:
    """The group's limit would kill one of both; what is decoded stays the same; what was taken comes back."""
    reason = limits.unavailable()
    if reason:
        pytest.skip(reason)
    limit = 320 * MIB
    run = limits.run_limited([sys.executable, "-c", WORKER, str(big_model), str(limit), PROMPT], memory_bytes=limit, files=[big_model], timeout_s=300)
    assert run.returncode == 0, run.stderr
    assert not run.oom_killed
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["tokens"] == tokens_of(big_model)
    assert result["shortages"] >= 1
    assert result["taken"] >= limit // 3
    assert result["floor"] <= result["least"] < result["most"] - limit // 6
    assert result["granted"] >= result["least"]


def test_the_limit_of_a_loaded_model_may_change(big_model: Path) -> None:
    """A third less between two tokens: experts are gone at once; nothing else changes. Ubatches are short: a limit leaves room for them."""
    from spac.generate import Sampling, generate, tokenize

    llama = spac.Llama(big_model, memory="450M", paging="on", n_ctx=512, n_ubatch=64, verbose=False)
    try:
        result, pieces = generate(llama, tokenize(llama, PROMPT), Sampling(temperature=0), 48)
        for i, _ in enumerate(pieces):
            if i == 10:
                before = llama.spac.stats()
                llama.spac.limit_memory("300M")
                after = llama.spac.stats()
                assert before is not None and after is not None
                assert after.used_bytes <= after.budget_bytes <= before.budget_bytes - 149 * MIB
        with pytest.raises(BudgetError, match="are not enough for what is loaded"):
            llama.spac.limit_memory("20M")
        with pytest.raises(OptionError, match="not a size"):
            llama.spac.limit_memory("much")
        assert llama.spac.plan is not None and llama.spac.plan.limit_bytes == 300 * MIB
    finally:
        llama.close()
    assert result.token_ids == tokens_of(big_model, n_ubatch=64)


def test_a_limit_needs_something_paged(model_path: Path) -> None:
    llama = spac.Llama(model_path, memory="4G", paging="off", n_ctx=512, verbose=False)
    with pytest.raises(OptionError, match="nothing is paged"):
        llama.spac.limit_memory("1G")
    llama.close()
