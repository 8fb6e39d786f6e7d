"""`spac.Llama` behaves as `llama_cpp.Llama` does, paged or not; and failing, stopping and closing leave nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import spac
from spac import control
from spac.host import memory

PROMPT = "The open() system call"
OPTIONS: dict[str, Any] = {"n_ctx": 512, "verbose": False, "n_threads": 2, "seed": 1}


def load(path: Path, **options: Any) -> spac.Llama:
    return spac.Llama(path, **{"memory": "4G", "paging": "on", **OPTIONS, **options})


def set_budget(llama: spac.Llama, share: float) -> int:
    """A budget for experts as a share of all, at least the floor."""
    info = llama.spac.info()
    assert info is not None
    budget = max(info.floor_bytes, int(share * info.expert_page_bytes))
    llama.spac.cap_experts(budget)
    return budget


@pytest.fixture
def llama(model_path: Path) -> Iterator[spac.Llama]:
    """The demo model, paged, with a quarter of its experts as budget."""
    result = load(model_path)
    set_budget(result, 0.25)
    yield result
    result.close()


def ids(llama: Any, n: int = 16, text: str = PROMPT) -> list[int]:
    """Greedy tokens after a text, from an empty context."""
    llama.reset()
    tokens = llama.tokenize(text.encode())
    return [token for token, _ in zip(llama.generate(tokens, temp=0.0, top_k=1), range(n), strict=False)]


# -- the same as llama_cpp.Llama --


def test_text_is_that_of_stock(model_path: Path, llama: spac.Llama) -> None:
    """The stock class of the same library, with its defaults (all in memory, repacked), writes the same tokens."""
    stock = llama_cpp.Llama(str(model_path), flash_attn=True, n_threads_batch=2, **OPTIONS)
    expected = ids(stock)
    stock.close()
    assert ids(llama) == expected


def test_completions_stream_and_chat(llama: spac.Llama) -> None:
    """The high-level calls of llama-cpp-python work unchanged."""
    whole = llama(PROMPT, max_tokens=12, temperature=0)
    pieces = list(llama(PROMPT, max_tokens=12, temperature=0, stream=True))
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    assert whole["usage"]["prompt_tokens"] == len(llama.tokenize(PROMPT.encode()))
    chat = llama.create_chat_completion([{"role": "user", "content": "What is ls?"}], max_tokens=8)
    assert chat["choices"][0]["message"]["role"] == "assistant"


def test_state_goes_round(llama: spac.Llama) -> None:
    """save_state and load_state continue a paged model where it was."""
    llama.eval(llama.tokenize(PROMPT.encode()))
    token = llama.sample(temp=0.0)
    state = llama.save_state()
    results = []
    for _ in range(2):
        llama.load_state(state)
        llama.eval([token])
        results.append(logits_at(llama, -1).copy())
    assert np.array_equal(*results)


def test_pickle_keeps_the_arguments(llama: spac.Llama) -> None:
    copy = pickle.loads(pickle.dumps(llama))
    try:
        assert copy.spac.paged
        assert ids(copy, 8) == ids(llama, 8)
    finally:
        copy.close()


def test_embeddings(model_path: Path) -> None:
    llama = load(model_path, embedding=True)
    vector = np.array(llama.embed(PROMPT))
    llama.close()
    assert np.isfinite(vector).all()


# -- when to page --


def test_what_fits_is_loaded_as_stock_does(model_path: Path) -> None:
    llama = spac.Llama(model_path, memory="4G", **OPTIONS)
    assert not llama.spac.paged
    assert llama.spac.stats() is None
    llama.close()


def test_a_dense_model_is_loaded_as_stock_does(dense_path: Path) -> None:
    llama = load(dense_path)
    assert not llama.spac.paged
    assert len(ids(llama, 4)) == 4
    llama.close()


def test_a_small_limit_pages(model_path: Path) -> None:
    """With less memory than the model needs, experts are paged and the limit holds."""
    memory.trim_malloc()  # what other tests left, which a load would give back
    limit = memory.resident_bytes() + 60 * 2**20
    with contextlib.closing(spac.Llama(model_path, memory=limit, **OPTIONS)) as llama:
        stats, info = llama.spac.stats(), llama.spac.info()
        assert stats is not None
        assert info is not None
        assert info.floor_bytes <= stats.budget_bytes < info.expert_page_bytes
        assert info.max_bundle_bytes == llama.spac.facts.max_bundle_bytes  # by the header alone


# -- counters and events --


def test_counters_add_up(llama: spac.Llama) -> None:
    budget = set_budget(llama, 0.25)
    ids(llama, 20)
    stats = llama.spac.stats()
    assert stats is not None
    layers = llama.spac.stats_by_layer()
    assert [layer.layer for layer in layers] == list(range(10))
    assert sum(layer.hits for layer in layers) == stats.hits > 0
    assert sum(layer.misses for layer in layers) == stats.misses > 0
    assert stats.used_bytes <= stats.peak_bytes <= budget
    assert stats.bytes_read >= stats.reads * 4096
    assert stats.reads > stats.evictions > 0
    assert 0 < stats.hit_rate < 1


def test_events_tell_every_tokens_routing(llama: spac.Llama) -> None:
    """One event for each token and layer, with the router's choices and whether they were in memory."""
    tokens = llama.tokenize(PROMPT.encode())
    llama.eval(tokens)
    events = llama.spac.events()
    stats = llama.spac.stats()
    assert stats is not None
    assert stats.events == len(events) == len(tokens) * 9 + 1  # the last layer computes the last token only
    assert {event.token for event in events} == set(range(len(tokens)))
    assert all(len(set(event.experts)) == 4 for event in events)
    assert not any(any(event.hits) for event in events)  # all cold
    llama.eval([tokens[0]])
    later = llama.spac.events(stats.events)
    assert [event.layer for event in later] == list(range(10))
    assert later[0].sequence == stats.events


def test_evict_all_makes_cold(llama: spac.Llama) -> None:
    ids(llama, 4)
    assert llama.spac.evict_all() > 0
    stats = llama.spac.stats()
    assert stats is not None
    assert stats.model_used_bytes == 0


# -- several of everything --


def test_parallel_sequences(llama: spac.Llama) -> None:
    """A batch with tokens of two sequences gives each what it gets alone."""
    from llama_cpp import llama_cpp as upstream

    texts = [llama.tokenize(t.encode())[:6] for t in (PROMPT, "Return the name of the file that")]
    n = min(len(t) for t in texts)
    alone = []
    for tokens in texts:
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(tokens[:n])
        alone.append(int(np.argmax(logits_at(llama, -1))))
    params = upstream.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = 256, 2, 2, 2
    context = upstream.llama_init_from_model(llama._model.model, params)  # no context of libspac: the model's own is used
    batch = upstream.llama_batch_init(2 * n, 0, 2)
    batch.n_tokens = 2 * n
    for i in range(n):
        for sequence, tokens in enumerate(texts):
            j = 2 * i + sequence
            batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.logits[j] = tokens[i], i, 1, i == n - 1
            batch.seq_id[j][0] = sequence
    assert upstream.llama_decode(context, batch) == 0
    n_vocab = llama.n_vocab()
    together = [int(np.argmax(np.ctypeslib.as_array(upstream.llama_get_logits_ith(context, 2 * (n - 1) + s), (n_vocab,)))) for s in (0, 1)]
    upstream.llama_batch_free(batch)
    upstream.llama_free(context)
    assert together == alone


def logits_at(llama: spac.Llama, index: int) -> Any:
    from llama_cpp import llama_cpp as upstream

    return np.ctypeslib.as_array(upstream.llama_get_logits_ith(llama._ctx.ctx, index), (llama.n_vocab(),))


def test_two_models_at_a_time_in_two_threads(model_path: Path, llama: spac.Llama) -> None:
    """Both decode at once under one budget and write what they write alone."""
    other = load(model_path)
    budget = set_budget(llama, 0.12)
    expected = ids(llama, 24)
    results: dict[int, list[int]] = {}

    def work(number: int, which: spac.Llama) -> None:
        results[number] = ids(which, 24)

    threads = [threading.Thread(target=work, args=(i, which)) for i, which in enumerate((llama, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = llama.spac.stats()
    other.close()
    assert results == {0: expected, 1: expected}
    assert stats is not None
    assert stats.peak_bytes <= budget


def test_closing_stops_what_another_thread_decodes(model_path: Path) -> None:
    llama = load(model_path)
    set_budget(llama, 0.0)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            llama.eval([300] * 500)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while (stats := llama.spac.stats()) is not None and stats.ubatches == 0:
        pass
    llama.close()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [spac.Cancelled]


@pytest.mark.parametrize("paging", ["on", "off"])
def test_a_closed_model_says_so(model_path: Path, paging: str) -> None:
    """llama-cpp-python's own methods would read what was freed."""
    llama = load(model_path, paging=paging)
    stream = llama.create_completion(PROMPT, max_tokens=8, temperature=0, stream=True)
    next(iter(stream))
    llama.close()
    uses = [
        lambda: next(iter(stream)), lambda: llama.create_completion("x", max_tokens=2), lambda: llama.tokenize(b"x"), llama.save_state,
        lambda: llama.eval([1]), lambda: llama.eval_all([1]), llama.n_vocab, llama.token_eos, lambda: llama.detokenize([1]),
        lambda: llama.create_chat_completion([{"role": "user", "content": "x"}]),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(spac.OptionError, match="this model is closed"):
            use()
    assert llama.closed
    llama.close()


def test_a_context_that_no_model_has_is_refused(model_path: Path) -> None:
    with pytest.raises(spac.OptionError, match="n_ctx is 100000000, expected at most 16777216"):
        load(model_path, n_ctx=100_000_000)


def test_closing_twice_and_using_what_is_closed(model_path: Path) -> None:
    llama = load(model_path)
    llama.close()
    llama.close()
    assert not llama.spac.paged
    assert llama.spac.stats() is None
    llama.spac.cancel()  # nothing to stop


# -- what goes wrong --


def test_a_failing_read_is_an_error_then_all_is_well(model_path: Path) -> None:
    llama = load(model_path, store="mock", signals=())  # a guess that cannot be read is no error, and would take the failure
    set_budget(llama, 0.25)
    expected = ids(llama, 8)
    llama.spac.evict_all()
    control.check(control.spac_mock_fail_reads(llama.spac.model_id, 5, 1, errno.EIO))
    with pytest.raises(spac.ExpertReadError) as caught:
        ids(llama, 8)
    error = caught.value
    assert error.path == str(model_path)
    assert error.errno == errno.EIO
    assert 0 < error.offset < model_path.stat().st_size
    assert error.length > 0
    assert "Input/output error" in str(error)
    assert ids(llama, 8) == expected
    stats = llama.spac.stats()
    assert stats is not None
    assert stats.read_errors == 1
    llama.close()


def test_a_failed_decode_can_be_continued(model_path: Path) -> None:
    """What was in the context before the failed token still is: the next try gives the right token."""
    llama = load(model_path, store="mock", signals=())
    set_budget(llama, 0.0)
    tokens = llama.tokenize(PROMPT.encode())
    expected = ids(llama, 3)
    llama.reset()
    llama.eval(tokens)
    control.check(control.spac_mock_fail_reads(llama.spac.model_id, 0, 1, errno.EIO))
    with pytest.raises(spac.ExpertReadError):
        llama.eval(expected[:1])
    assert llama.n_tokens == len(tokens)
    llama.eval(expected[:1])
    assert llama.sample(temp=0.0) == expected[1]
    llama.close()


@pytest.mark.parametrize("how", ["truncated", "replaced", "touched"])
def test_a_file_that_changes_is_noticed(model_path: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(model_path, path)
    llama = load(path)
    set_budget(llama, 0.0)
    ids(llama, 2)
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "replaced":
        shutil.copy(model_path, tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(path)
    else:
        os.utime(path)
    with pytest.raises(spac.ModelChangedError, match="changed while in use"):
        ids(llama, 8)
    llama.close()


def test_cancel_stops_a_decode(model_path: Path) -> None:
    """cancel() from another thread ends a long prefill; the model is usable afterwards."""
    llama = load(model_path)
    set_budget(llama, 0.0)
    expected = ids(llama, 4)
    tokens = (llama.tokenize(b"and so on, over and over again: ") * 60)[:500]
    raised: list[BaseException] = []

    def work() -> None:
        try:
            llama.reset()
            llama.eval(tokens)
        except BaseException as error:
            raised.append(error)

    before = llama.spac.stats()
    assert before is not None
    thread = threading.Thread(target=work)
    thread.start()
    while (now := llama.spac.stats()) is not None and now.ubatches == before.ubatches and thread.is_alive():
        pass  # until its first layer has begun
    llama.spac.cancel()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [spac.Cancelled]
    assert ids(llama, 4) == expected
    llama.close()


def test_a_load_that_is_cancelled_leaves_no_model_behind(model_path: Path) -> None:
    def n_open() -> int:
        n = 0
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                n += entry.readlink() == model_path.resolve()
        return n

    before = n_open()
    for most in (0.0, 0.5, 0.9):
        with pytest.raises(spac.Cancelled):
            load(model_path, on_progress=lambda done, most=most: done < most)
    assert n_open() == before


def test_an_empty_prompt(llama: spac.Llama) -> None:
    for prompt in ("", []):
        with pytest.raises(spac.DecodeError, match="the prompt is empty"):
            llama(prompt, max_tokens=1)


def test_a_prompt_longer_than_the_context(llama: spac.Llama) -> None:
    with pytest.raises(spac.DecodeError, match="do not fit into the context of 512"):
        llama.eval([300] * 513)


@pytest.mark.parametrize("n_ctx", [100, 1000])
def test_a_context_of_any_length(model_path: Path, n_ctx: int) -> None:
    """llama.cpp makes it a multiple of 256, and all of that can be used."""
    with contextlib.closing(load(model_path, n_ctx=n_ctx)) as llama:
        whole = llama.n_ctx()
        assert whole == -(-n_ctx // 256) * 256
        llama.eval([300] * whole)
        assert llama.n_tokens == whole
        with pytest.raises(spac.DecodeError, match="do not fit"):
            llama.eval([300])


def test_the_budget_cannot_go_below_the_floor(llama: spac.Llama) -> None:
    with pytest.raises(spac.BudgetError, match="floor"):
        llama.spac.cap_experts(4096)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"memory": "lots"}, "not a size"), ({"paging": "maybe"}, "auto, on or off"), ({"store": "tape"}, "direct, buffered or mmap"),
     ({"n_ctx": -5}, "n_ctx"), ({"n_ubatch": 0}, "n_ubatch"), ({"use_mlock": True}, "use_mlock")],
)  # fmt: skip
def test_arguments_without_meaning(model_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(spac.OptionError, match=words):
        load(model_path, **options)


# -- the process --


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("n_reads", [0, 20, 300, 301, 302, 303])
def test_leaving_in_the_middle_of_a_decode(model_path: Path, n_reads: int) -> None:
    """The interpreter ends while another thread decodes and reads: the process leaves, cleanly and soon."""
    code = """
import sys, threading, spac
llama = spac.Llama(sys.argv[1], memory="4G", paging="on", n_ctx=512, verbose=False)
llama.spac.cap_experts(llama.spac.info().floor_bytes)
def work():
    try:
        while True:
            llama.reset()
            llama.eval([300] * 20)
    except spac.Cancelled:
        pass
threading.Thread(target=work, daemon=True).start()
while llama.spac.stats().reads < int(sys.argv[2]): pass
"""
    result = run_python(code, model_path, n_reads)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_relative_path_and_another_folder(model_path: Path, tmp_path: Path) -> None:
    code = """
import os, sys, spac
llama = spac.Llama("model.gguf", memory="4G", paging="on", n_ctx=256, verbose=False)
os.chdir("/")
llama.eval([300] * 20)
"""
    (tmp_path / "model.gguf").symlink_to(model_path)
    result = run_python(code, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_nothing_is_read_any_more_when_the_process_ends(model_path: Path) -> None:
    """What rearranges weights goes first when libraries are unloaded: no reading thread may be left then."""
    code = """
import atexit, os, sys
atexit.register(lambda: print(len(os.listdir("/proc/self/task"))))
import spac
from spac import control
llama = spac.Llama(sys.argv[1], memory="4G", paging="on", n_ctx=256, n_threads=1, verbose=False)
llama.eval([300] * 20)
print(len(os.listdir("/proc/self/task")) - control.IO_THREADS)
"""
    result = run_python(code, model_path)
    assert (result.returncode, result.stderr) == (0, "")
    before, after = result.stdout.split()
    assert before == after


def test_a_forked_child_leaves_cleanly_and_loads_nothing(model_path: Path) -> None:
    """The threads of its parent are not there: what they held would never be let go."""
    code = """
import os, sys, spac
llama = spac.Llama(sys.argv[1], memory="4G", paging="on", n_ctx=256, verbose=False)
llama.eval([300] * 20)
child = os.fork()
if child == 0:
    try:
        spac.Llama(sys.argv[1])
    except spac.OptionError as e:
        print(e)
    llama.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
llama.eval([300] * 20)
"""
    result = run_python(code, model_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "start a new one" in result.stdout


def test_leaving_with_several_models_open(model_path: Path, dense_path: Path) -> None:
    code = """
import sys, spac
models = [spac.Llama(path, memory="4G", n_ctx=256, verbose=False) for path in sys.argv[1:]]
for model in models:
    model.myself = model  # freed last of all
"""
    result = run_python(code, model_path, dense_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_llama_cpp_first_is_refused(tmp_path: Path) -> None:
    """With other libraries already loaded, one clear error."""
    code = """
import sys, types
fake = types.ModuleType("llama_cpp.llama_cpp"); fake._base_path = sys.argv[1]
sys.modules["llama_cpp.llama_cpp"] = fake
import spac
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    result = run_python(code, tmp_path, env=environment)
    assert result.returncode == 1
    assert "LibraryError: llama_cpp was already imported" in result.stderr
    assert "import spac before llama_cpp" in result.stderr


@pytest.mark.parametrize(("given", "used"), [({}, True), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, False)])
def test_waiting_threads_spin_for_a_short_time_unless_the_user_says_how_long(given: dict[str, str], used: object) -> None:
    code = "import os, spac; print(os.environ.get('GOMP_SPINCOUNT'), 'GOMP_SPINCOUNT' in spac.variables_set)"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    value, ours = run_python(code, env=environment).stdout.split()
    assert ours == str(used is True)
    assert value == used if isinstance(used, str) else (value != "None") == used


@pytest.mark.parametrize(("given", "used"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")])
def test_predictions_have_one_thread_unless_the_user_says_how_many(given: dict[str, str], used: str) -> None:
    """Threads are counted after a product that OpenBLAS would share out."""
    code = (
        "import os, spac; import numpy as np; a = np.ones((600, 600), np.float32); a @ a;"
        " print(os.environ['OPENBLAS_NUM_THREADS'], len(os.listdir('/proc/self/task')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"} | given
    value, threads = run_python(code, env=environment).stdout.split()
    assert value == used
    assert int(threads) <= int(used)


def test_import_sets_the_library_paths() -> None:
    code = "import os, spac; print(os.environ['LLAMA_CPP_LIB_PATH'] == str(spac.library_folder) == os.environ['MTMD_CPP_LIB'])"
    environment = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    assert run_python(code, env=environment).stdout == "True\n"
