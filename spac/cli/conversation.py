"""A chat's history: turns in, prompt tokens out, within the context. Knows nothing of terminals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spac.errors import DecodeError, SpacError
from spac.generate import tokenize
from spac.llama import Llama


class TemplateError(SpacError):
    """The model has no chat template, or it refuses these messages."""


@dataclass
class Conversation:
    """Messages so far, rendered by the model's own chat template.

    When prompt and answer no longer fit into the context, the oldest turns (a question and its answer) are dropped; the
    system prompt stays. A quarter of the context, or `max_tokens` if that is less, is kept for the answer.
    """

    llama: Llama
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        template = self.llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise TemplateError(f"{self.llama.model_path}: has no chat template, so it cannot chat; use `spac run`")
        import jinja2
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text_of(token: int) -> str:
            return str(self.llama._model.token_get_text(token)) if token >= 0 else ""

        self._template_errors: tuple[type[Exception], ...] = (jinja2.TemplateError, ValueError, TypeError)
        self._formatter: Any = Jinja2ChatFormatter(
            template=template, eos_token=text_of(self.llama.token_eos()), bos_token=text_of(self.llama.token_bos())
        )

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages.clear()

    def ask(self, text: str, max_tokens: int | None = None) -> tuple[list[int], int]:
        """Add a question; returns the prompt's tokens and how many old turns were dropped for it. Of an error nothing is left.

        Raises:
            DecodeError: the question alone does not fit.
            TemplateError: the template refuses it.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        n_ctx = int(self.llama.n_ctx())
        room = min(n_ctx // 4, max_tokens or n_ctx)
        dropped = 0
        try:
            tokens = self._render()
            while len(tokens) + room > n_ctx and len(self.messages) > 1:
                del self.messages[: 2 if self.messages[1]["role"] == "assistant" else 1]
                dropped += 1
                tokens = self._render()
            if len(tokens) >= n_ctx:
                raise DecodeError(f"the message has {len(tokens)} tokens, the context only {n_ctx}; shorten it or raise --ctx")
        except BaseException:  # Ctrl-C, too
            self.messages[:] = before
            raise
        return tokens, dropped

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last question: it got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _render(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompt = self._formatter(messages=[*system, *self.messages]).prompt
        except self._template_errors as e:
            raise TemplateError(f"the model's chat template refuses these messages: {e}") from None
        # the template writes the first special token itself
        return tokenize(self.llama, prompt, add_special=False)
