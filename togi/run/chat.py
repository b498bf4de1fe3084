"""A conversation with a model: the whole history is formatted anew for each turn, and answers stream as text.

With a chat template the history is a list of messages. In plain text it is one text that grows by a line break and
``--input_template`` per turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from togi.config.infer import ChatConfig
from togi.data import chat
from togi.data.faults import Note, check_whole, named
from togi.data.messages import Dialogue, Tool, read_tools
from togi.data.precheck import asked_reward, with_reward
from togi.data.turns import lost
from togi.errors import DataError
from togi.model.generate import Answering, load_generator, stream
from togi.model.loading import known_tokens
from togi.parallel.process import default_device
from togi.run.loading import tokenizer_of


class Chat:
    """The model and the turns so far. Raises DataError or ModelError for a model that cannot chat."""

    def __init__(self, config: ChatConfig) -> None:
        path, trust = config.pretrain, config.trust_remote_code
        self._tokenizer = tokenizer_of(config)
        self._history: ChatHistory | PlainHistory = (
            ChatHistory(self._tokenizer, path, config.tools) if config.apply_chat_template else PlainHistory(config)
        )
        self._known = known_tokens(path, trust)
        chat.check_vocabulary(self._tokenizer, path, self._known, apply_chat_template=config.apply_chat_template)
        stops = chat.stop_token_ids(self._tokenizer, path, chat=config.apply_chat_template)
        temperature = 0.0 if config.greedy_sampling else config.temperature
        self._how = Answering(config.max_len, temperature, config.top_p, stops, config.repetition_penalty)
        # The checks above read small files only; the weights come last.
        self._model = load_generator(
            path,
            bf16=config.bf16,
            trust_remote_code=trust,
            flash_attn=config.flash_attn and default_device().type == "cuda",
            in_4bit=config.load_in_4bit,
        )
        self._config = config

    def clear(self) -> None:
        """Clear the history."""
        self._history.clear()

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to ``text``, as a stream. Both are added to the history when the answer is complete."""
        rendered, config = self._history.render(text), self._config
        if config.enable_csft:
            reward = asked_reward(config.csft_prompt, config.reward_template)
            rendered = with_reward(config.reward_template, rendered, reward)
        tokens = chat.encode([rendered], self._tokenizer, add_special_tokens=not config.apply_chat_template)[0]
        chat.check_tokens(self._tokenizer, config.pretrain, self._known, lambda: max(tokens))
        pieces = []
        for piece in stream(self._model, self._tokenizer, tokens, self._how):
            pieces.append(piece)
            yield piece
        # Not reached if the caller stops early: an interrupted answer does not enter the history.
        self._history.add(text, "".join(pieces))


class ChatHistory:
    """A history of messages. Raises DataError if the tokenizer has no chat template, or if ``--tools`` cannot be read."""

    def __init__(self, tokenizer: chat.Tokenizer, path: str, tools: str | None) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {path} has no chat template: use an instruct model, give --tokenizer_chat_template, or "
                "talk in plain text with --no_apply_chat_template."
            )
        self._tokenizer = tokenizer
        self._tools = () if tools is None else _tools(Path(tools))
        self.clear()

    def clear(self) -> None:
        self._messages: list[dict[str, str]] = []

    def render(self, text: str) -> str:
        dialogue = Dialogue((*self._messages, {"role": "user", "content": text}), self._tools)
        with named("The conversation"):
            rendered = chat.render_messages(dialogue, self._tokenizer, add_generation_prompt=True)
            check_whole(rendered, "has")
        if Note.TOOLS_UNSEEN in lost(dialogue, rendered):
            raise DataError(
                "--tools: the chat template does not show the tools to the model: use a template that renders tools "
                "(--tokenizer_chat_template), or leave --tools out."
            )
        return rendered

    def add(self, text: str, answer: str) -> None:
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class PlainHistory:
    """A history as one text, which starts with ``--ta_prompt``. Raises DataError if that file cannot be read."""

    def __init__(self, config: ChatConfig) -> None:
        self._template = "{}" if config.input_template is None else config.input_template
        self._start = [] if config.ta_prompt is None else [_read(Path(config.ta_prompt), "ta_prompt", "a text file")]
        self.clear()

    def clear(self) -> None:
        self._parts = list(self._start)

    def render(self, text: str) -> str:
        return "\n".join([*self._parts, self._template.replace("{}", text)])

    def add(self, text: str, answer: str) -> None:
        self._parts = [self.render(text) + answer]


def _tools(path: Path) -> tuple[Tool, ...]:
    text = _read(path, "tools", "a JSON file with a list of tools")
    with named(f"--tools {path}"):
        return read_tools(text, set())


def _read(path: Path, flag: str, wanted: str) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--{flag} {path} cannot be read ({error}): give {wanted}.") from None
