"""A conversation with a model: history in messages, rendered once per turn, answers as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.chat import ChatConfig
from togi.data.chat import encode, load_tokenizer, render_prompt
from togi.model.generate import stream


class Chat:
    """Holds the model and the messages so far."""

    def __init__(self, config: ChatConfig) -> None:
        from togi.model.generate import load_generator

        self._config = config
        self._tokenizer = load_tokenizer(
            config.pretrain, chat_template=config.tokenizer_chat_template, trust_remote_code=config.trust_remote_code
        )
        self._model = load_generator(config.pretrain, bf16=config.bf16, trust_remote_code=config.trust_remote_code)
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget the conversation."""
        self._messages = []

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to ``text``, piece by piece; it joins the history when it is complete."""
        config = self._config
        self._messages.append({"role": "user", "content": text})
        rendered = render_prompt(self._messages, self._tokenizer, apply_chat_template=True, input_template=None)
        tokens = encode([rendered], self._tokenizer, add_special_tokens=False)[0]
        pieces = []
        for piece in stream(self._model, self._tokenizer, tokens, config.max_len, config.temperature, config.top_p):
            pieces.append(piece)
            yield piece
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
