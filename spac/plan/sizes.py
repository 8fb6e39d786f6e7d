"""Sizes of a model and its context by upstream's own account: a load and a context that allocate nothing but the vocabulary.

No weights are read, so a file that holds the header only, and a hole in their place, has the same sizes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as upstream

from spac import control, log, seam
from spac.errors import SpacError
from spac.gguf.check import ModelFacts
from spac.plan.fit import VOCABULARY_FACTOR, Sizes


def measure_sizes(path: str, facts: ModelFacts, model_params: Any, context_params: Any) -> Sizes:
    """What upstream says.

    Args:
        path: of the file that is loaded, which `facts` may name differently.
        model_params: llama_model_params; experts are placed in the pager's buffer type whatever they say.
        context_params: llama_context_params.

    Raises:
        ModelFileError, OptionError: upstream cannot load this model, or create such a context; with the first error of its log.
    """
    model_params = type(model_params).from_buffer_copy(model_params)
    model_params.progress_callback = upstream.llama_progress_callback()
    overrides = seam.expert_overrides()
    if facts.expert_bytes:
        model_params.tensor_buft_overrides = ctypes.addressof(overrides)
    log.forget_error()
    try:
        with log.quiet():
            measured = control.memory_measure(path, model_params, context_params)
    except SpacError as e:
        reason = log.first_error()
        raise type(e)((f"{e}: {reason}" if reason else str(e)).replace(path, facts.path)) from None
    return Sizes(
        dense_bytes=measured.dense_bytes,
        expert_bytes=measured.expert_bytes,
        context_bytes=measured.context_bytes,
        compute_bytes=measured.compute_bytes + context_params.n_ubatch * facts.work_bytes_per_token,
        staging_bytes=2 * facts.largest_dense_bytes,
        vocabulary_bytes=VOCABULARY_FACTOR * facts.vocabulary_bytes,
        file_bytes=facts.file_bytes,
        floor_bytes=facts.floor_bytes,
    )


def measure_default_sizes(path: str, facts: ModelFacts, *, n_ctx: int, n_ubatch: int, n_threads: int, repack: bool = True) -> Sizes:
    """The same with the parameters that `spac run` has by default.

    Raises:
        ModelFileError, OptionError: as `measure_sizes`.
    """
    model_params = upstream.llama_model_default_params()
    model_params.use_extra_bufts = repack
    context_params = upstream.llama_context_default_params()
    context_params.n_ctx = n_ctx or facts.n_ctx_train
    context_params.n_ubatch = n_ubatch
    context_params.n_batch = max(512, n_ubatch)
    context_params.n_outputs_max = seam.MAX_FORESEEN
    context_params.n_threads = context_params.n_threads_batch = n_threads
    context_params.flash_attn_type = upstream.LLAMA_FLASH_ATTN_TYPE_AUTO
    return measure_sizes(path, facts, model_params, context_params)
