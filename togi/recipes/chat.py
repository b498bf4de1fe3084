"""A conversation with a model: history in messages, rendered once per turn, answers as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.chat import ChatConfig
from togi.data.chat import encode, load_tokenizer, render_prompt, stop_token_ids
from togi.errors import DataError
from togi.model.generate import Answering, load_generator, stream


class Chat:
    """Holds the model and the messages so far. Raises DataError or ModelError for a model that cannot talk."""

    def __init__(self, config: ChatConfig) -> None:
        path, trust = config.pretrain, config.trust_remote_code
        self._tokenizer = load_tokenizer(path, chat_template=config.tokenizer_chat_template, trust_remote_code=trust)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {path} has no chat template: use an instruct model or give --tokenizer_chat_template."
            )
        stops = stop_token_ids(self._tokenizer, path)
        self._how = Answering(config.max_len, config.temperature, config.top_p, stops)
        self._model = load_generator(path, bf16=config.bf16, trust_remote_code=trust)
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget the conversation."""
        self._messages = []

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to ``text``, piece by piece. Both join the history when the answer is complete."""
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            rendered = render_prompt(messages, self._tokenizer, apply_chat_template=True, input_template=None)
        except DataError as error:
            raise DataError(f"The conversation {error}") from None
        tokens = encode([rendered], self._tokenizer, add_special_tokens=False)[0]
        pieces = []
        for piece in stream(self._model, self._tokenizer, tokens, self._how):
            pieces.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
