"""The seam to llama-cpp-python: its model and context, with what it does not let callers set.

`llama_cpp.Llama.__init__` fills in params and hands them to `_internals.LlamaModel` and `LlamaContext`. While `substitute()`
is active in a thread, those two names make ours there; other threads keep the stock ones.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import llama_cpp._internals
import llama_cpp.llama_cpp as upstream

from spac import control, log
from spac.errors import Cancelled, DecodeError, LibraryError, ModelFileError, SpacError
from spac.gguf.check import EXPERT_PATTERN

if TYPE_CHECKING:
    from spac.engine import Foresight
    from spac.trace.recorder import Recorder

MAX_FORESEEN: Final = 65  # tokens: a larger batch is a prompt's, of which nothing is foreseen or learned

internals: Any = llama_cpp._internals  # its classes are replaced here
_StockModel: Any = internals.LlamaModel
_StockContext: Any = internals.LlamaContext
_lock = threading.RLock()
_leaving = False  # the process ends: nothing is freed any more, another thread may still be using it


def leave() -> None:
    """Free nothing from now on."""
    global _leaving
    _leaving = True


class _TensorBufferOverride(ctypes.Structure):
    # struct llama_model_tensor_buft_override { const char * pattern; ggml_backend_buffer_type_t buft; };
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def expert_overrides() -> ctypes.Array[_TensorBufferOverride]:
    """Override list that places expert tensors in the pager's buffer type; keep it alive while params point to it."""
    overrides = (_TensorBufferOverride * 2)()  # the second ends the list
    overrides[0] = _TensorBufferOverride(EXPERT_PATTERN.encode(), control.spac_buffer_type())
    return overrides


@contextmanager
def substitute(model: Callable[..., Any], context: Callable[..., Any]) -> Iterator[None]:
    """Make `_internals.LlamaModel` and `LlamaContext` call these instead, in this thread only."""
    owner = threading.get_ident()

    def dispatch(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **kwargs: (ours if threading.get_ident() == owner else stock)(**kwargs)

    with _lock:
        internals.LlamaModel = dispatch(model, _StockModel)
        internals.LlamaContext = dispatch(context, _StockContext)
        try:
            yield
        finally:
            internals.LlamaModel = _StockModel
            internals.LlamaContext = _StockContext


class Model(_StockModel):  # type: ignore[misc]
    """A `LlamaModel` whose expert tensors are paged if `store` is given.

    Raises:
        ModelFileError: llama.cpp cannot load the file; with the first error of its log.
        Cancelled: `on_progress` returned False.
    """

    def __init__(
        self,
        *,
        path_model: str,
        params: Any,
        verbose: bool,
        store: str | None,
        n_io_threads: int,
        on_progress: Callable[[float], bool] | None,
    ) -> None:
        self.model_id = 0  # libspac's; 0: not paged
        self.sampler = None
        self._cancelled = False
        if on_progress is not None:
            params.progress_callback = self._callback = upstream.llama_progress_callback(self._progress(on_progress))
        if store is not None:
            self._overrides = expert_overrides()
            params.tensor_buft_overrides = ctypes.addressof(self._overrides)
            control.begin_load(store, n_io_threads, repack=params.use_extra_bufts)
        log.forget_error()
        loaded = False
        try:
            # verbose: stock would point this process's stdout and stderr at /dev/null meanwhile, for all threads
            super().__init__(path_model=path_model, params=params, verbose=True)
            loaded = True
        except ValueError as e:
            if self._cancelled:
                raise Cancelled("loading was cancelled") from None
            raise ModelFileError(f"{path_model}: llama.cpp cannot load this model: {log.first_error() or e}") from None
        finally:
            self.verbose = verbose
            code = control.spac_load_end() if store is not None else 0
            if loaded and store is not None and code <= 0:
                self.close()
        if store is not None:
            self.model_id = control.check(code)
            if code == 0:
                raise LibraryError(f"{path_model}: llama.cpp placed no expert tensor in the pager's buffer type")

    def _progress(self, on_progress: Callable[[float], bool]) -> Callable[[float, Any], bool]:
        def callback(progress: float, _: Any) -> bool:
            self._cancelled = not on_progress(progress)
            return not self._cancelled

        return callback

    def close(self) -> None:
        if hasattr(self, "_exit_stack") and not _leaving:
            super().close()


class Context(_StockContext):  # type: ignore[misc]
    """A `LlamaContext` that can be cancelled and says why a decode stopped.

    Frees llama.cpp's context, then libspac's; the model comes after both.
    """

    def __init__(
        self,
        *,
        model: Model,
        params: Any,
        verbose: bool,
        before_decode: Callable[[int], None],
        after_decode: Callable[[int, Callable[[], bool]], None],
        recorder: Recorder | None = None,
    ) -> None:
        self.sampler = None
        self.ctx = None
        self._before_decode = before_decode
        self._after_decode = after_decode
        self._lock = threading.Lock()
        self.foresight: Foresight | None = None
        self.busy = threading.RLock()  # held while llama.cpp computes, and while a failed evaluation is undone
        user = ctypes.cast(params.abort_callback, ctypes.c_void_p).value
        self._user_callback = params.abort_callback  # keeps it alive
        self.spac_context = control.spac_context_new(user, params.abort_callback_data)
        if self.spac_context is None:
            raise SpacError("out of memory for a context")
        params.abort_callback = ctypes.cast(control.abort_callback_address(), upstream.ggml_abort_callback)
        params.abort_callback_data = self.spac_context
        self._recorder = recorder
        if recorder is not None:
            params.cb_eval = ctypes.cast(control.recorder_callback_address(), upstream.ggml_backend_sched_eval_callback)
            params.cb_eval_user_data = recorder.handle
        log.forget_error()
        try:
            super().__init__(model=model, params=params, verbose=verbose)
        except ValueError as e:
            self._free_spac_context()
            raise SpacError(f"llama.cpp cannot create a context: {log.first_error() or e}") from None

    def decode(self, batch: Any) -> None:
        """Evaluate one batch.

        Raises:
            ExpertReadError, ModelChangedError, Cancelled: paging stopped it.
            DecodeError: llama.cpp refused it, for example because the context is full.
        """
        with self.busy:
            if self.ctx is None:
                raise DecodeError("the model is closed")
            n_tokens = int(batch.batch.n_tokens)
            self._before_decode(n_tokens)
            position, tokens = _single_sequence(batch.batch) if self.foresight is not None else (0, None)
            if self.foresight is not None:
                self.foresight.before(position, tokens)
            if self._recorder is not None:
                self._recorder.before_decode()
            code = upstream.llama_decode(self.ctx, batch.batch)
            if self._recorder is not None:
                self._recorder.after_decode(batch.batch, code == 0)
            if code != 0:
                raise self._error("llama_decode", code)
            self._after_decode(n_tokens, self._trim)
            if self.foresight is not None:
                self.foresight.after(position, tokens)

    def encode(self, batch: Any) -> None:
        """As `decode`, for encoders."""
        with self.busy:
            code = upstream.llama_encode(self.ctx, batch.batch)
        if code != 0:
            raise self._error("llama_encode", code)

    def _error(self, function: str, code: int) -> SpacError:
        cause = control.take_error(self.spac_context) if self.spac_context else None
        if cause is not None:
            return cause
        if code == 1:
            return DecodeError("the context is full: no room for this batch; use a larger context or a shorter prompt")
        if code == 2:
            return Cancelled("stopped by the abort callback")
        return DecodeError(f"{function} returned {code}")

    def _trim(self) -> bool:
        """Give the compute buffer's pages back, between decodes; False: none is known."""
        return self.spac_context is not None and control.spac_context_trim(self.spac_context)

    def cancel(self) -> None:
        """Stop the running decode, or the next one. Any thread; nothing happens after close."""
        with self._lock:
            if self.spac_context is not None:
                control.spac_cancel(self.spac_context)

    def forget_cancel(self) -> None:
        """Undo a cancel that no decode has seen yet. Waits for a running one: it must see its own end."""
        with self.busy, self._lock:
            if self.spac_context is not None:
                control.take_error(self.spac_context)

    def _free_spac_context(self) -> None:
        with self._lock:
            context, self.spac_context = self.spac_context, None
            if context is not None:
                control.spac_context_free(context)

    def close(self) -> None:
        """Stop what runs, wait for it, free the context."""
        if not hasattr(self, "busy") or _leaving:
            return
        self.cancel()
        with self.busy:
            if hasattr(self, "_exit_stack"):
                super().close()
            self.ctx = None
            self._free_spac_context()
            if self._recorder is not None:
                self._recorder.close()


def _single_sequence(batch: Any) -> tuple[int, list[int] | None]:
    """First position and tokens of a batch of a few tokens of sequence 0; no tokens if it is another kind of batch."""
    n = int(batch.n_tokens)
    if n > MAX_FORESEEN or not batch.token or any(batch.n_seq_id[i] != 1 or batch.seq_id[i][0] != 0 for i in range(n)):
        return 0, None
    return int(batch.pos[0]), list(batch.token[:n])
