"""Prompt text and token ids: the only place where text becomes tokens.

A prompt is rendered to text once and tokenised once. Text from a chat template already holds its special tokens,
so none are added; plain text gets the tokenizer's own. Rows and data sets are not known here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
import transformers
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from togi.config.checks import template_problems
from togi.data.faults import Drop, RowError
from togi.errors import DataError

SHOWN_CHARACTERS = 80

Tokenizer: TypeAlias = PreTrainedTokenizerBase


def load_tokenizer(path: str, *, chat_template: str | None, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of a folder or hub name; ``chat_template`` (Jinja text) replaces its own. Raises DataError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  the files are the user's, and each tokenizer class fails in its own way
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise DataError(f"No tokenizer can be loaded from {path} ({reason}): check its tokenizer files.") from None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def check_rendering(tokenizer: Tokenizer, *, apply_chat_template: bool, input_template: str | None) -> None:
    """Raise DataError if prompts cannot be rendered this way, before any row is read."""
    assert not (apply_chat_template and input_template is not None), "the configuration refuses both"
    if apply_chat_template and not tokenizer.chat_template:
        raise DataError(
            "--apply_chat_template needs a chat template but the tokenizer has none: use an instruct model, give "
            "--tokenizer_chat_template, or leave the flag out."
        )
    for problem in template_problems(input_template) if input_template is not None else ():
        raise DataError(problem)
    plain = tokenizer("a")["input_ids"]
    if not apply_chat_template and plain[-1] == tokenizer.eos_token_id:
        raise DataError(
            "The tokenizer ends every text with its EOS token, so that no answer could follow: set add_eos_token to "
            "false in its tokenizer_config.json, or use --apply_chat_template."
        )


def render_prompt(value: object, tokenizer: Tokenizer, *, apply_chat_template: bool, input_template: str | None) -> str:
    """The text of one prompt: a string is one user message, a list of messages is rendered as it is. Raises RowError.

    With the chat template the text ends with the generation prompt. ``input_template`` gets the string for its ``{}``.
    """
    if not apply_chat_template:
        if not isinstance(value, str):
            raise RowError(
                Drop.WRONG_TYPE,
                f"is of type {type(value).__name__}, not a string: use --apply_chat_template for lists of messages.",
            )
        return value if input_template is None else input_template.replace("{}", value)
    return render_messages(as_messages(value), tokenizer, add_generation_prompt=True)


def render_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
    """The text of a conversation. Raises RowError if the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # noqa: BLE001  a template is the user's code, and can fail in any way on a row
        raise _refused(error) from None
    assert isinstance(text, str)
    return text


def marks_turns(tokenizer: Tokenizer) -> bool:
    """Whether the chat template says with ``{% generation %}`` which parts the model is to learn."""
    return re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()) is not None


def render_marked(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the (start, end) characters of each part that the template marks for learning."""
    try:
        texts, marks = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # noqa: BLE001  as above
        raise _refused(error) from None
    return texts[0], [(start, end) for start, end in marks[0]]


def as_messages(value: object) -> list[dict[str, Any]]:
    """A string as one user message, or a checked list of messages. Raises RowError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence):
        raise RowError(
            Drop.WRONG_TYPE, f"is of type {type(value).__name__}: a prompt must be a string or a list of messages."
        )
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RowError(
                Drop.WRONG_ROLES,
                f"has no role and content in its message {number}: write {{'role': 'user', 'content': ...}}.",
            )
    # Arrow gives every message all keys that any message has; templates must not see those that are only filled in.
    return [{key: item for key, item in message.items() if item is not None or key == "content"} for message in value]


def encode(texts: Sequence[str], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text. Raises DataError if one starts with two BOS tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    bos = tokenizer.bos_token_id
    for text, tokens in zip(texts, ids, strict=True):
        if bos is not None and tokens[:2] == [bos, bos]:
            raise DataError(
                f"The prompt {text[:SHOWN_CHARACTERS]!r} would start with the BOS token {tokenizer.bos_token!r} twice: "
                "remove it from the data or from the template."
            )
    return ids


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts BOS before plain text, which says that its model expects one."""
    first = tokenizer("a")["input_ids"][0]
    return tokenizer.bos_token_id is not None and bool(first == tokenizer.bos_token_id)


def as_plain_text(text: str, tokenizer: Tokenizer) -> str:
    """Rendered text as a plain text of a data set: without the BOS that the tokenizer would put there once more."""
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text


def stop_token_ids(tokenizer: Tokenizer, model_path: str) -> tuple[int, ...]:
    """Every token that ends an answer: EOS of the model's generation config and of the tokenizer, ascending.

    Raises DataError if there is none.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    eos = _generation_eos(model_path)
    found.update([eos] if isinstance(eos, int) else eos)
    if not found:
        raise DataError(f"Neither the tokenizer nor the generation config of {model_path} names an EOS token: set one.")
    return tuple(sorted(found))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that render and tokenise alike: of the fast tokenizer's content, what is around it, and the
    versions of the libraries.
    """
    tokenizer("a")  # settles truncation and padding, which are part of the content
    versions = transformers.__version__, tokenizers.__version__
    around = (
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.split_special_tokens,
    )
    content = tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b(f"{versions} {around} {content}".encode(errors="surrogatepass"), digest_size=16).hexdigest()


def visible(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids with special tokens shown, for people."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids without special tokens, for rewards."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generation_eos(model_path: str) -> int | list[int]:
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return []
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # a hub model need not have one
        return []
    return [] if eos is None else eos


def _refused(error: Exception) -> RowError:
    reason = _one_line(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {_one_line(error)}"
    return RowError(Drop.TEMPLATE, f"is refused by the chat template ({reason}): change the row or the template.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
