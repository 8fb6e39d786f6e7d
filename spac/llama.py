"""`spac.Llama`: llama_cpp.Llama for models that are larger than memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
import llama_cpp
import llama_cpp.llama_cpp as upstream
import numpy as np

from spac import control, log, seam
from spac.errors import BudgetError, DecodeError, ModelFileError, OptionError, SpacError
from spac.gguf.check import MAX_CTX, ModelFacts, check_model
from spac.governor import Governor
from spac.host import memory
from spac.host.cores import physical_cores
from spac.plan import Paging, Plan, Sizes
from spac.plan.fit import fit
from spac.plan.sizes import measure_sizes
from spac.stats import SIGNALS, LayerStats, ModelInfo, ModelStats, RoutingEvent

if TYPE_CHECKING:
    from spac.balancer.live import LiveBalancer
    from spac.engine import Foresight, SignalStats
    from spac.speculative import Proposal
    from spac.trace.recorder import Recorder

THREAD_BYTES: Final = 8 * memory.MIB  # address space of a thread's stack
CTX_STEP: Final = 256  # tokens: contexts are multiples of it
ESTIMATOR_DIVISOR: Final = 64  # the part of `memory` that what the signals learn may take, at most
PAGINGS: Final = ("auto", "on", "off")

_log = logging.getLogger(__name__)

_governor = Governor(
    set_budget=lambda n: void(control.check(control.spac_budget_set(n))),
    used_bytes=lambda: _used_bytes(),
    watch=lambda watched: control.watch_pressure(memory.headrooms() if watched else {}),
)
_live: weakref.WeakSet[Llama] = weakref.WeakSet()
_forked = False  # from a process with a model


def void(*_: object) -> None:
    """Drop values."""


def _used_bytes() -> int:
    """Bytes of experts in memory, of all models."""
    for llama in list(_live):
        if llama.spac.paged:
            stats = llama.spac.stats()
            if stats is not None:
                return stats.used_bytes
    return 0


class _Freed:
    """In place of what belonged to a closed model."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise OptionError("this model is closed; load it again")


class Handle:
    """What a `spac.Llama` says and takes beyond `llama_cpp.Llama`, as its attribute `spac`.

    Attributes:
        plan: how the model was loaded into the limit; None with paging="off".
        facts: what the model's headers say.
        keep_learned: whether `learned` is written at the end.
        recorder: with record_routing=True: `recorder.trace()` is what was routed so far.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self.facts = facts
        self.plan: Plan | None = None
        self.recorder: Recorder | None = None
        self.keep_learned = True
        self._model: seam.Model | None = None
        self._context: seam.Context | None = None
        self._member: int | None = None  # the governor's number

    def _detach(self) -> None:
        self._model = None
        self._context = None

    @property
    def model_id(self) -> int:
        """libspac's number of the model; 0 if it is not paged or closed."""
        return int(self._model.model_id) if self._model is not None else 0

    @property
    def paged(self) -> bool:
        """Whether experts are paged."""
        return self.model_id > 0

    def info(self) -> ModelInfo | None:
        """Sizes of the paged model; None if nothing is paged."""
        return control.model_info(self.model_id) if self.paged else None

    def stats(self) -> ModelStats | None:
        """Counters since the load; None if nothing is paged."""
        return control.model_stats(self.model_id) if self.paged else None

    def stats_by_layer(self) -> list[LayerStats]:
        """Hits and misses of every paged layer."""
        return control.model_stats_by_layer(self.model_id) if self.paged else []

    def events(self, from_: int = 0) -> list[RoutingEvent]:
        """Routing events from sequence number `from_` on; the ring holds the last few thousand."""
        return control.model_events(self.model_id, from_) if self.paged else []

    def cap_experts(self, n_bytes: int | None) -> None:
        """Give experts, of all models in this process, at most this much, for measuring; None: what `memory` leaves.

        Raises:
            BudgetError: it is below the floor of a model.
        """
        _governor.cap(n_bytes)

    def limit_memory(self, limit: str | int) -> None:
        """Change `memory`, which bounds the process, for all models in it. Experts that have no room any more leave at once, from any
        thread; others come back with use.

        Raises:
            OptionError: the limit has no meaning, or nothing is paged.
            BudgetError: the loaded model needs more; says how much.
        """
        if self.plan is None or self._member is None or not self.paged:
            raise OptionError(f"{self.facts.path}: nothing is paged that a limit could bound")
        n_bytes = memory.parse_memory(limit)
        n_bytes = memory.auto_limit_bytes() if n_bytes is None else n_bytes
        try:
            _governor.limit(n_bytes)
        except BudgetError as e:
            raise BudgetError(f"{self.facts.path}: {e}") from None
        self.plan = replace(self.plan, limit_bytes=n_bytes)

    def evict_all(self) -> int:
        """Drop every expert from memory, for measuring cold; returns how many slices that were."""
        return control.check(control.spac_model_evict_all(self.model_id)) if self.paged else 0

    @contextlib.contextmanager
    def recording(self, phase: str) -> Iterator[None]:
        """What is decoded meanwhile is recorded as this phase, a name of `spac.trace.format.PHASES`."""
        if self.recorder is None:
            yield
            return
        before, self.recorder.phase = self.recorder.phase, phase
        try:
            yield
        finally:
            self.recorder.phase = before

    def cancel(self) -> None:
        """Stop the running decode, or the next one: it raises `Cancelled`. From any thread."""
        if self._context is not None:
            self._context.cancel()

    @property
    def _foresight(self) -> Foresight | None:
        return self._context.foresight if self._context is not None else None

    def signals(self) -> dict[str, SignalStats]:
        """How good the predictions of experts were, by signal; empty if nothing is foreseen."""
        return self._foresight.stats if self._foresight is not None else {}

    def horizon(self, verifies: bool = True) -> int:
        """How many drafted tokens it pays to know before the next decode, verified or not; `verifies`: some may be."""
        return self._foresight.horizon(verifies) if self._foresight is not None else 0

    def balancer(self) -> LiveBalancer | None:
        """What decides how much is drafted, verified and read ahead; None if nothing is foreseen."""
        return self._foresight.balancer if self._foresight is not None else None

    def propose(self, proposal: Proposal, chances: Sequence[float], draft_s: float = 0.0) -> None:
        """Say which tokens may follow the last one sampled: it tells the pager what to keep in memory.

        Args:
            chances: of each proposed token, that it and those before it come.
            draft_s: seconds that the proposal took, to find out whether it pays.
        """
        if self._foresight is not None:
            self._foresight.propose(proposal, chances, draft_s)

    def forget_cancel(self) -> None:
        """Undo a `cancel()` that came when nothing was running."""
        if self._context is not None:
            self._context.forget_cancel()


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama`, with expert weights paged from disk when the model does not fit into `memory`.

    All arguments of `llama_cpp.Llama` keep their meaning. The differences:

    - `memory` bounds the whole process, Python's share included; see `spac.host.memory.parse_memory`.
    - The model file is checked first, and errors are `spac.errors`, each with one clear line.
    - A model that declares experts, but in tensors that are not known, is loaded whole with a warning, if it fits.
    - When experts are paged, the other weights are read past the page cache (load mode "direct I/O") and `use_mlock` is
      refused. When all fits, weights are mapped as stock does, unless repacked copies would then exceed `memory`.
    - `flash_attn` defaults to llama.cpp's own choice ("auto") instead of off.
    - `n_ubatch`, if it is not given, is 512 as in stock, or less where experts are paged and compute buffers of that size
      would take more than half of what they and experts share (`spac.plan.fit.paged_ubatch`).
    - `n_threads` and `n_threads_batch` default to the physical cores, instead of half of and all the logical ones.
    - `n_ctx=0` takes the training context from the file, as stock does, but before the memory plan is made.
    - A decode can be stopped by `spac.cancel()` and fails with `ExpertReadError` when weights cannot be read. Afterwards the
      instance is as it was before that `eval()`; recurrent and hybrid models start their sequence anew.
    - glibc's malloc is told to return freed memory at once (fixed thresholds, two arenas).
    - Loading does not redirect the process's stdout and stderr; llama.cpp's log is shown with `verbose` only, errors too.

    Args:
        model_path: a GGUF file; the first part of a split model.
        memory: limit of the process: "4G", "512MiB", "50%", bytes, or "auto" (what is available, less headroom).
        paging: "auto" pages if the model does not fit, "on" always, "off" never: stock loading, `memory` not enforced.
        store: how experts are read: "auto", "direct" (O_DIRECT), "buffered" or "mmap" (the limit is then best effort).
        n_io_threads: reads in flight; 0: libspac's default.
        repack: weights are rearranged for the CPU's faster kernels, as llama.cpp does by default: dense ones when they are
            loaded, paged experts each time that they are read (not with the store "mmap"). False is llama.cpp's --no-repack.
        signals: what foresees experts, of "tokens" (those decoded next) and "draft" (those that `Speculation` guesses).
        learned: file in which what the signals learned is kept from one instance to the next; "auto": in the user's cache
            directory, by model; None: nowhere.
        record_routing: keep each token's experts, as `llama.spac.recorder` tells. Slows decoding down.
        on_progress: called while loading with 0.0 to 1.0; False cancels.

    Raises:
        ModelFileError: the file is missing, damaged or not supported.
        BudgetError: the model needs more than `memory`; says how much.
        OptionError: an argument has no meaning.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        memory: str | int = "auto",
        paging: Paging = "auto",
        store: str = "auto",
        n_io_threads: int = 0,
        repack: bool = True,
        signals: Sequence[str] = SIGNALS,
        learned: str | os.PathLike[str] | None = None,
        on_progress: Callable[[float], bool] | None = None,
        record_routing: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # close() may be called on what was never finished
        if _forked:
            raise OptionError("this process was forked from one with a model; start a new one (multiprocessing: the method 'spawn')")
        self._spac_arguments = {"memory": memory, "paging": paging, "store": store, "n_io_threads": n_io_threads, "repack": repack}
        self._signals, self._learned = tuple(signals), learned
        self._prepare_arguments(memory, paging, store, kwargs)
        path = os.fspath(model_path)
        facts = check_model(path)
        self.spac = Handle(facts)
        if record_routing:
            from spac.trace.recorder import Recorder

            self.spac.recorder = Recorder(facts)
        self._on_progress = on_progress
        self._flash_attn: bool | None = kwargs.pop("flash_attn", None)
        self._automatic_ubatch = kwargs.get("n_ubatch") is None
        if self._automatic_ubatch:
            kwargs.pop("n_ubatch", None)
        if kwargs.get("n_ctx") == 0 and facts.n_ctx_train:
            kwargs["n_ctx"] = facts.n_ctx_train
        if kwargs.get("n_ctx"):  # as upstream does with the context, but not with llama_cpp.Llama's arrays
            kwargs["n_ctx"] = -(-kwargs["n_ctx"] // CTX_STEP) * CTX_STEP
        cores = physical_cores()
        kwargs["n_threads"] = kwargs.get("n_threads") or cores
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]
        try:
            with seam.substitute(self._make_model, self._make_context):
                super().__init__(path, flash_attn=bool(self._flash_attn), **kwargs)
            self._check_adapter()
            self._settle()
        except jinja2.TemplateError as e:
            self.close()
            raise ModelFileError(f"{path}: its chat template cannot be read: {e}") from None
        except BaseException:
            self.close()
            raise
        _live.add(self)

    def _prepare_arguments(self, limit: str | int, paging: str, store: str, kwargs: dict[str, Any]) -> None:
        if paging not in PAGINGS:
            raise OptionError(f"paging {paging!r} does not exist: use auto, on or off")
        if store not in control.STORES:
            raise OptionError(f"store {store!r} does not exist: use auto, direct, buffered or mmap")
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"):
            value = kwargs.get(name)
            if value is not None and (not isinstance(value, int) or value < 0 or (value == 0 and name in ("n_batch", "n_ubatch"))):
                raise OptionError(f"{name} is {value!r}, expected a positive number")
        if (kwargs.get("n_ctx") or 0) > MAX_CTX:
            raise OptionError(f"n_ctx is {kwargs['n_ctx']}, expected at most {MAX_CTX}")
        for name in self._signals:
            if name not in SIGNALS:
                raise OptionError(f"signal {name!r} does not exist: use {', '.join(SIGNALS)}")
        given = memory.parse_memory(limit)
        self._automatic_limit = given is None
        self._limit_bytes = given if given is not None else memory.auto_limit_bytes()

    # -- called by llama_cpp.Llama.__init__ through the seam --

    def _make_model(self, *, path_model: str, params: Any, verbose: bool) -> seam.Model:
        arguments = self._spac_arguments
        params.use_extra_bufts = params.use_extra_bufts and bool(arguments["repack"])
        paged = False
        if arguments["paging"] != "off" and not params.vocab_only:
            memory.tame_malloc()
            plan = self.spac.plan = self._make_plan(path_model, params)
            paged = plan.paged
            if paged and params.load_mode in (upstream.LLAMA_LOAD_MODE_MLOCK, upstream.LLAMA_LOAD_MODE_MMAP_MLOCK):
                raise OptionError("use_mlock cannot be combined with paging")
            memory.check_address_space(plan.sizes.total_bytes + THREAD_BYTES * (self.context_params.n_threads + control.IO_THREADS))
            if plan.direct_io:
                params.load_mode = upstream.LLAMA_LOAD_MODE_DIRECT_IO
            need = plan.sizes.dense_bytes + plan.sizes.context_bytes + plan.sizes.compute_bytes + plan.sizes.vocabulary_bytes
            need += 0 if paged else plan.sizes.expert_bytes
            self.spac._member = _governor.admit(plan.limit_bytes, plan.sizes.floor_bytes if paged else 0, need)
            self._stack.callback(_governor.release, self.spac._member)  # after the model is freed
        model = seam.Model(
            path_model=path_model,
            params=params,
            verbose=verbose,
            store=str(arguments["store"]) if paged else None,
            n_io_threads=int(arguments["n_io_threads"]),
            on_progress=self._on_progress,
        )
        self.spac._model = model
        self._stack.callback(self.spac._detach)
        return model

    def _make_context(self, *, model: seam.Model, params: Any, verbose: bool) -> seam.Context:
        self._adjust_context(params)
        member = self.spac._member
        context = seam.Context(
            model=model,
            params=params,
            verbose=verbose,
            before_decode=void if member is None else functools.partial(self._before_decode, member),
            after_decode=void if member is None else functools.partial(self._after_decode, member),
            recorder=self.spac.recorder,
        )
        self.spac._context = context
        return context

    def _before_decode(self, member: int, n_tokens: int) -> None:
        # a chat handler may have images computed in the same buffers, which the context is not told
        _governor.before_decode(member, n_tokens if self.chat_handler is None else self.context_params.n_ubatch)

    def _after_decode(self, member: int, n_tokens: int, trim: Callable[[], bool]) -> None:
        _governor.after_decode(member, n_tokens, trim if self.chat_handler is None else lambda: False)

    def _adjust_context(self, context_params: Any) -> None:
        """Set what llama_cpp.Llama cannot be asked for."""
        if self._flash_attn is None:
            context_params.flash_attn_type = upstream.LLAMA_FLASH_ATTN_TYPE_AUTO
        if not self._logits_all and not context_params.embeddings:
            context_params.n_outputs_max = seam.MAX_FORESEEN  # what is verified at once; of a prompt the last token's logits are wanted

    # -- memory --

    def _make_plan(self, path: str, params: Any) -> Plan:
        facts = self.spac.facts

        def measure(n_ubatch: int) -> Sizes:
            self.context_params.n_ubatch = n_ubatch
            return self._measure(path, params)

        try:
            _, plan = fit(
                self._limit_bytes,
                _governor.rest_bytes(most=True),
                measure,
                self.context_params.n_ubatch,
                automatic_ubatch=self._automatic_ubatch,
                paging=self._spac_arguments["paging"],  # type: ignore[arg-type]
                n_ctx=self.context_params.n_ctx,
                automatic=self._automatic_limit,
            )
            if facts.unknown_layout:
                _log.warning("%s: loaded whole, its experts cannot be paged: %s", facts.path, facts.unknown_layout)
            return plan
        except BudgetError as e:
            unpaged = f"; its experts cannot be paged: {facts.unknown_layout}" if facts.unknown_layout else ""
            raise BudgetError(f"{facts.path}: {e}{unpaged}") from None
        finally:
            memory.trim_malloc()

    def _measure(self, path: str, params: Any) -> Sizes:
        context_params = type(self.context_params).from_buffer_copy(self.context_params)
        self._adjust_context(context_params)
        if context_params.embeddings:  # as llama_cpp.Llama sets it later
            context_params.n_seq_max = min(self.n_batch, upstream.llama_max_parallel_sequences())
            context_params.kv_unified = True
        return measure_sizes(path, self.spac.facts, params, context_params)

    def _check_adapter(self) -> None:
        """llama_cpp.Llama takes the null pointer of a LoRA adapter that did not load for one, and the first decode would crash."""
        if self.lora_path and not self._lora_adapter:
            self._lora_adapter = None  # nothing to free
            raise ModelFileError(f"{self.lora_path}: llama.cpp cannot load this adapter: {log.first_error() or 'no reason given'}")

    def _settle(self) -> None:
        """All is loaded: give experts what is left."""
        memory.trim_malloc()
        if self.spac.plan is None or self.spac._member is None:
            return
        if self.spac.plan.direct_io:
            memory.drop_file_cache(*self.spac.facts.parts)
            memory.drop_own_file_cache()
        info = self.spac.info()
        if info is not None and self._signals:
            self._foresee(self.spac.plan.limit_bytes)
        try:
            floor, compute = info.floor_bytes if info else 0, self.spac.plan.sizes.compute_bytes
            _governor.settle(self.spac._member, floor, compute, self.context_params.n_ubatch)
        except BudgetError as e:
            raise BudgetError(f"{self.spac.facts.path}: {e}") from None

    def _foresee(self, limit_bytes: int) -> None:
        """Let experts of coming tokens be foreseen, by what is learned here and was learned before."""
        from spac.engine import Foresight
        from spac.estimator.tokens import MEMORY_BYTES

        facts = self.spac.facts
        memory_bytes = min(MEMORY_BYTES, limit_bytes // ESTIMATOR_DIVISOR)
        foresight = Foresight.of_model(self.spac.model_id, facts, self._signals, memory_bytes)
        if foresight is None:
            return
        context: Any = self._ctx
        context.foresight = foresight
        self._stack.callback(foresight.balancer.close)
        if self._learned is not None:
            from spac.estimator import default_path, fingerprint

            model = fingerprint(facts.parts)
            try:
                path = default_path(model) if self._learned == "auto" else Path(self._learned).absolute()
            except OptionError as e:
                _log.warning("what is learned of experts is not kept: %s", e)
                return
            foresight.load(path, model)
            self._stack.callback(lambda: foresight.save(path, model) if self.spac.keep_learned else None)

    # -- llama_cpp.Llama's own methods --

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those that are in the context.

        Raises:
            ExpertReadError, ModelChangedError, Cancelled, DecodeError: what was evaluated before this call is still valid,
                and may be continued; recurrent and hybrid models begin with an empty context.
        """
        with self._evaluating(len(tokens)):
            super().eval(tokens)

    def eval_all(self, tokens: Sequence[int]) -> None:
        """As `eval`, in one batch and with logits for every token: the context's `get_logits_ith(i)` is the i-th one's.

        Raises:
            DecodeError: also if there are more than n_batch tokens.
        """
        if len(tokens) > self.n_batch:
            raise DecodeError(f"{len(tokens)} tokens do not fit into one batch of {self.n_batch}; raise n_batch")
        with self._evaluating(len(tokens)):
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
            self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=True)
            self._ctx.decode(self._batch)
            self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
            self.n_tokens += len(tokens)
            self._requires_eval = False

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """A token to follow what is in the context.

        Raises:
            DecodeError: nothing is in the context, since the prompt is empty.
        """
        if self.n_tokens == 0:
            raise DecodeError("the prompt is empty")
        return int(super().sample(*args, **kwargs))

    @contextlib.contextmanager
    def _evaluating(self, n_new: int) -> Iterator[None]:
        """Check that so many tokens fit; if evaluating them fails, leave things as they were."""
        context: Any = self._ctx
        with context.busy:
            before = self.n_tokens
            if before + n_new > self._n_ctx:
                raise DecodeError(f"{before + n_new} tokens do not fit into the context of {self._n_ctx}; raise n_ctx (--ctx)")
            try:
                yield
                self._check_logits(n_new)
            except SpacError:
                self.forget_after(before)
                raise

    def _check_logits(self, n_new: int) -> None:
        """Of the last token: damaged weights may compute what is no number, of which a sampler would still choose something."""
        if n_new == 0 or self.context_params.embeddings:
            return
        logits = np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), (self._n_vocab,))
        if np.isnan(logits.sum()):
            raise DecodeError(f"{self.spac.facts.path}: what its weights compute is no number: they are damaged; fetch the file again")

    def forget_after(self, n_tokens: int) -> bool:
        """Keep only the first n_tokens of the context. False: the model cannot take tokens back, and the context is empty now."""
        kept = not (self._is_recurrent or self._is_hybrid) and self._ctx.kv_cache_seq_rm(-1, n_tokens, -1)
        if not kept:
            self._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]
        self.n_tokens = n_tokens if kept else 0
        self._requires_eval = True
        return kept

    def close(self) -> None:
        """Free the context and the model; other models may take their room. May be called again."""
        _live.discard(self)
        super().close()
        # what was freed must not be reached by llama-cpp-python's methods, which do not ask
        freed: Any = _Freed()
        self._model = self._ctx = self._batch = self.tokenizer_ = freed

    @property
    def closed(self) -> bool:
        """Whether `close()` was called; then nothing can be evaluated any more."""
        return isinstance(getattr(self, "_ctx", None), _Freed)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        ubatch = {"n_ubatch": None} if self._automatic_ubatch else {}
        learned = {"signals": self._signals, "learned": self._learned}
        return {**state, **self._spac_arguments, **learned, **ubatch, "flash_attn": self._flash_attn}


def _leave() -> None:
    """At exit: stop what decodes, and let nothing begin. Nothing is freed: other threads may be anywhere, and the system frees."""
    seam.leave()
    _governor.leave()
    for llama in list(_live):
        llama.spac.cancel()
    for llama in list(_live):
        context: Any = llama._ctx
        context.busy.acquire(timeout=5)
    if not _forked:
        control.spac_halt()  # reading threads rearrange weights by what static destructors of llama.cpp's libraries end


def _after_fork() -> None:
    """In a child: the threads that read and compute are not there, and what they held stays locked."""
    global _forked
    if len(_live):
        _forked = True
        seam.leave()
        _governor.leave()
        _live.clear()


atexit.register(_leave)
os.register_at_fork(after_in_child=_after_fork)
