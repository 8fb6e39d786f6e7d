"""The memory limit holds, seen from outside: by a control group, by the kernel's page tables, and over many chats."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import spac
from spac.host import limits
from tests.conftest import MODELS

MIB = 1 << 20


@pytest.mark.parametrize(
    ("memory_mib", "options"),
    [(150, []), (300, []), (450, []), (300, ["--ubatch", "512"]), (150, ["--draft", str(MODELS / "spac-demo-draft.gguf"), "--draft-max", "4"]),
     (200, ["--draft", str(MODELS / "spac-demo-moe.gguf"), "--draft-max", "4"])],
)  # fmt: skip
def test_peak_in_a_control_group(big_model: Path, memory_mib: int, options: list[str]) -> None:
    """In a group limited to twice --memory, its peak, page cache included, stays within --memory."""
    reason = limits.unavailable()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "spac", "run", str(big_model), "-p", "The purpose of this page is " * 90, "-n", "48",
               "--memory", f"{memory_mib}M", "--ctx", "1024", "--temp", "0", "--json", *options]  # fmt: skip
    run = limits.run_limited(command, memory_bytes=2 * memory_mib * MIB, files=[big_model], timeout_s=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["paging"] == "on"
    assert result["expert"]["peak_bytes"] <= result["expert"]["budget_bytes"]
    assert run.peak_bytes is not None
    assert run.peak_bytes <= memory_mib * MIB, f"{run.peak_bytes / MIB:.1f} MiB"


ALTERNATING = """
import json, sys, spac
llama = spac.Llama(sys.argv[1], memory=sys.argv[2], n_ctx=1024, n_ubatch=512, verbose=False)
budgets = []
for chat in range(3):
    llama.reset()
    llama.eval(llama.tokenize(f"{chat} The purpose of this page is".encode() * 90)[:700])
    prompt = llama.spac.stats().budget_bytes
    for token in range(24):
        llama.eval([100 + token])
    budgets.append((prompt, llama.spac.stats().budget_bytes))
print(json.dumps({"budgets": budgets, "compute": llama.spac.plan.sizes.compute_bytes}))
"""


def test_buffers_of_a_prompt_and_experts_take_turns(big_model: Path) -> None:
    """Prompts and tokens one by one in turn: a prompt's buffers become the experts' and the other way round, within the limit."""
    reason = limits.unavailable()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-c", ALTERNATING, str(big_model), "300M"]
    run = limits.run_limited(command, memory_bytes=600 * MIB, files=[big_model], timeout_s=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    for prompt, decoding in result["budgets"]:
        assert decoding - prompt > result["compute"] * 0.7
    assert run.peak_bytes is not None
    assert run.peak_bytes <= 300 * MIB, f"{run.peak_bytes / MIB:.1f} MiB"


def window_rss_bytes(pid: int | str = "self") -> int:
    """Resident bytes of all windows of a process: dontcopy and told about huge pages; what reads arrive in is left out of dumps as well."""
    total, rss = 0, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"Rss:\s+(\d+) kB", line):
            rss = int(match.group(1)) * 1024
        elif line.startswith("VmFlags:") and "dc" in (flags := line.split()) and {"nh", "hg"} & set(flags) and "dd" not in flags:
            total += rss
    return total


DECODING = """
import sys, spac
llama = spac.Llama(sys.argv[1], memory="4G", paging="on", n_ctx=512, verbose=False)
budget = llama.spac.info().expert_page_bytes // 5
llama.spac.cap_experts(budget)
print(budget, flush=True)
while True:
    llama.reset()
    llama("What does this function return, and why? " * 8, max_tokens=24, temperature=0)
"""


def test_windows_stay_within_the_budget(big_model: Path) -> None:
    """The kernel's own count of the windows' pages, sampled while decoding, never exceeds the expert budget.

    The process is stopped for each sample: smaps is read window by window, and pages that move meanwhile would count twice.
    """
    process = subprocess.Popen([sys.executable, "-c", DECODING, str(big_model)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        budget = int(process.stdout.readline())
        samples = []
        while len(samples) < 60 or (max(samples) < budget * 0.9 and len(samples) < 600):
            time.sleep(0.02)  # let it run on; nothing depends on how far
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            samples.append(window_rss_bytes(process.pid))
            process.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, process.pid, os.WCONTINUED)
    finally:
        process.kill()
        process.wait()
    assert max(samples) >= budget * 0.9  # the windows were found, and filled
    assert max(samples) <= budget


def chat_fifty_times(model: str) -> None:
    """Prints by how many bytes the last forty of fifty chats grew the process."""
    llama = spac.Llama(model, memory="4G", paging="on", n_ctx=512, verbose=False)
    process = psutil.Process()
    after_ten = 0
    for chat in range(50):
        llama.create_chat_completion([{"role": "user", "content": f"What is page {chat}?"}], max_tokens=8)
        if chat == 9:
            after_ten = process.memory_info().rss - window_rss_bytes()
    print(process.memory_info().rss - window_rss_bytes() - after_ten)


def test_many_chats_leak_nothing(model_path: Path) -> None:
    """Fifty chats in a row, in a process that no other test has used: the last forty take no more memory than the first ten left."""
    command = "import sys; from tests.test_budget import chat_fifty_times; chat_fifty_times(sys.argv[1])"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", command, str(model_path)], cwd=root, check=True, capture_output=True, text=True)
    grown = int(run.stdout.splitlines()[-1])
    assert grown < 4 * MIB


def test_closing_gives_everything_back(model_path: Path) -> None:
    """Ten models opened, used and closed: windows, files and threads are gone."""
    process = psutil.Process()

    def open_and_close() -> None:
        with_paging = spac.Llama(model_path, memory="4G", paging="on", n_ctx=256, verbose=False)
        with_paging("The", max_tokens=4)
        with_paging.close()

    open_and_close()
    files, threads = process.num_fds(), process.num_threads()
    for _ in range(10):
        open_and_close()
    assert window_rss_bytes() == 0
    assert process.num_fds() <= files
    assert process.num_threads() <= threads
