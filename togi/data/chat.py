"""Prompt text and token ids: the only module that tokenises text.

A prompt is formatted to text once and tokenised once. Text from a chat template already holds its special tokens, so none are
added; plain text gets the tokenizer's own. This module does not know rows and data sets.

Check that a model's embedding has a row for the tokens that its tokenizer makes.

A tokenizer may have more tokens than the model has rows: some published models do, with tokens that no text contains. So only
tokens that occur are checked: first those of the chat template and of text ends, later those of the rows.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import tokenizers
import transformers
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from togi.data.faults import Drop, RowError, named_value, short
from togi.data.messages import ASSISTANT, SYSTEM, USER, Dialogue, Message, Tool, holds_text
from togi.errors import DataError, ModelError

SHOWN_CHARACTERS = 80
PROBE = "probe-text"

Tokenizer: TypeAlias = PreTrainedTokenizerBase


def load_tokenizer(path: str, *, chat_template: str | None, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of a folder or hub name; ``chat_template`` (Jinja text) replaces its template. Raises DataError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  the files are the user's, and each tokenizer class fails in its own way
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise DataError(f"No tokenizer can be loaded from {path} ({reason}): check its tokenizer files.") from None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def check_rendering(tokenizer: Tokenizer, *, apply_chat_template: bool, input_template: str | None) -> None:
    """Raise DataError if prompts cannot be formatted this way. Called before any row is read."""
    assert not (apply_chat_template and input_template is not None), "the configuration refuses both"
    if apply_chat_template and not tokenizer.chat_template:
        raise DataError(
            "--apply_chat_template needs a chat template but the tokenizer has none: use an instruct model, give "
            "--tokenizer_chat_template, or leave the flag out."
        )
    assert input_template is None or input_template.count("{}") == 1, "--input_template must contain {} exactly once"
    plain = tokenizer("a")["input_ids"]
    if not apply_chat_template and plain[-1] == tokenizer.eos_token_id:
        raise DataError(
            "The tokenizer ends every text with its EOS token, so that no answer could follow: set add_eos_token to "
            "false in its tokenizer_config.json, or use --apply_chat_template."
        )


def plain_prompt(value: object, input_template: str | None) -> str:
    """The text of a prompt without a chat template; ``input_template`` has ``{}`` for the prompt. Raises RowError."""
    text = plain_text(value)
    return text if input_template is None else input_template.replace("{}", text)


def render_messages(
    dialogue: Dialogue,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    options: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The formatted text of a conversation, with its tools. Raises RowError if the template refuses it.

    ``options``: further variables of the template, such as ``enable_thinking``.
    """
    if not dialogue.messages:
        return ""
    return _rendered(_as_asked(dialogue, tokenizer), dialogue.tools, tokenizer, add_generation_prompt, options)


def _rendered(
    messages: list[Message],
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    opened: bool,
    options: Mapping[str, object] = MappingProxyType({}),
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=opened, **options
        )
    except Exception as error:  # noqa: BLE001  a template is the user's code, and can fail in any way on a row
        raise _refused(error) from None
    assert isinstance(text, str)
    return text


def _as_asked(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Message]:
    """The messages in the form that the template reads: templates of vision models may accept content as parts only."""
    if not _knows_parts_only(tokenizer, template_text(tokenizer)):
        return list(dialogue.messages)
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in dialogue.messages]


@lru_cache(maxsize=8)
def _knows_parts_only(tokenizer: Tokenizer, template: str) -> bool:
    if not template:
        return False

    # Try the template: there is no field that says which form it accepts.
    def shows(content: object) -> bool:
        try:
            return PROBE in _rendered([{"role": USER, "content": content}], (), tokenizer, opened=False)
        except RowError:
            return False

    return not shows(PROBE) and shows([{"type": "text", "text": PROBE}])


def template_text(tokenizer: Tokenizer) -> str:
    """The chat template; all of them joined if there are several; "" if there is none."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def closing_text(tokenizer: Tokenizer) -> str:
    """The text that the chat template writes after an answer, stripped; "" if it cannot be determined."""
    return _closing_text(tokenizer, template_text(tokenizer))


@lru_cache(maxsize=8)
def _closing_text(tokenizer: Tokenizer, template: str) -> str:
    question = ({"role": USER, "content": "?"}, {"role": ASSISTANT, "content": PROBE})
    # Some templates demand a system turn, so the second probe has one.
    for probe in (question, ({"role": SYSTEM, "content": "!"}, *question)) if template else ():
        try:
            _, found, rest = render_messages(Dialogue(probe), tokenizer).rpartition(PROBE)
        except RowError:  # a template that refuses such a conversation
            continue
        if found:
            return rest.strip()
    return ""


def closing_token(tokenizer: Tokenizer) -> int | None:
    """The special token with which the chat template closes an assistant turn, so an answer ends with it; None if none."""
    ids = tokenizer(closing_text(tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if ids and ids[0] in enders(tokenizer, ids[:1]) else None


def enders(tokenizer: Tokenizer, token_ids: Iterable[int]) -> set[int]:
    """Those of the tokens that can end a turn: special tokens other than BOS."""
    added = tokenizer.added_tokens_decoder
    return {token for token in token_ids if token in added and added[token].special} - {tokenizer.bos_token_id}


@lru_cache(maxsize=8)
def _control_texts(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    """The special tokens that a chat template writes, by their text or as ``bos_token`` and ``eos_token``."""
    named = {str(text) for name, text in tokenizer.special_tokens_map.items() if re.search(rf"\b{name}\b", template)}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(text for text in special if text in named or text in template))


def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that are no words, with their texts: special ones, and added ones that the chat template writes."""
    template = template_text(tokenizer)
    added = {token: (str(entry), entry.special) for token, entry in tokenizer.added_tokens_decoder.items()}
    return {
        token: text
        for token, (text, special) in added.items()
        if len(text) > 1 and (special or text.strip() in template)
    }


def holds_controls(texts: Iterable[str], tokenizer: Tokenizer) -> bool:
    """Whether a text holds a special token that the chat template writes."""
    controls = _control_texts(tokenizer, template_text(tokenizer))
    return any(control in text for text in texts for control in controls)


def marks_turns(tokenizer: Tokenizer) -> bool:
    """Whether the chat template marks the trained parts with ``{% generation %}``."""
    return re.search(r"{%-?\s*generation\s*-?%}", template_text(tokenizer)) is not None


def render_marked(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The formatted text of a conversation, and the (start, end) characters of each part that the template marks for training."""
    tools = [dict(tool) for tool in dialogue.tools] or None
    try:
        texts, marks = render_jinja_template(
            [_as_asked(dialogue, tokenizer)],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # noqa: BLE001  as above
        raise _refused(error) from None
    return texts[0], [(start, end) for start, end in marks[0]]


def plain_text(value: object, *, chat: bool = True) -> str:
    """The value if it is a string, else RowError says what it is. ``chat``: whether a chat template would accept a list."""
    if not isinstance(value, str):
        is_chat = chat and isinstance(value, list | dict)
        way_out = "use --apply_chat_template for lists of messages" if is_chat else "correct or remove the row"
        raise Drop.WRONG_TYPE.error(f"is {named_value(value)}, not a string: {way_out}.")
    if chat and _holds_messages(value):
        raise Drop.WRONG_TYPE.error(f"is a list of messages, as text ({short(value)}): use --apply_chat_template.")
    return value


def _holds_messages(text: str) -> bool:
    try:
        return not holds_text(text)
    except RowError:  # malformed messages count as text here
        return False


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
    """Whether the tokenizer puts BOS before plain text, so that its model expects one."""
    first = tokenizer("a")["input_ids"][0]
    return tokenizer.bos_token_id is not None and bool(first == tokenizer.bos_token_id)


def as_plain_text(text: str, tokenizer: Tokenizer) -> str:
    """Formatted text as plain text of a data set: without the BOS that the tokenizer would add again."""
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text


def stop_token_ids(tokenizer: Tokenizer, model_path: str, *, chat: bool) -> tuple[int, ...]:
    """Every token that ends an answer, ascending: EOS of the generation config and of the tokenizer, and in a ``chat`` the token
    that closes a turn. Raises DataError if there is none.
    """
    ends = tokenizer.eos_token_id, closing_token(tokenizer) if chat else None, *_generation_eos(model_path)
    found = {int(token) for token in ends if token is not None}
    if not found:
        raise DataError(f"Neither the tokenizer nor the generation config of {model_path} names an EOS token: set one.")
    return tuple(sorted(found))


def end_notice(tokenizer: Tokenizer, model_path: str, ends: Iterable[int]) -> str:
    """A notice if chat answers end with tokens that the model's files do not name as an end; else ""."""
    new = sorted(set(ends) - set(stop_token_ids(tokenizer, model_path, chat=False)))
    if not new:
        return ""
    return (
        f"answers end with {', '.join(repr(visible(tokenizer, [token])) for token in new)}, which is no end token in the files of "
        f"{model_path}: generation stops there too, and the saved model names it in its generation_config.json"
    )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest that is equal for tokenizers that format and tokenise alike: of the fast tokenizer, its settings, and the
    versions of the libraries.
    """
    tokenizer("a")  # a call sets truncation and padding, which are part of the content
    versions = transformers.__version__, tokenizers.__version__
    name, special = type(tokenizer).__name__, tokenizer.special_tokens_map
    around = name, special, tokenizer.chat_template, tokenizer.split_special_tokens
    content = tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b(f"{versions} {around} {content}".encode(errors="surrogatepass"), digest_size=16).hexdigest()


def visible(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids with special tokens, to show to people."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids without special tokens, for rewards."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _generation_eos(model_path: str) -> list[int]:
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return []
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # a hub model need not have one
        return []
    return [eos] if isinstance(eos, int) else eos or []


def _refused(error: Exception) -> RowError:
    reason = _one_line(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {_one_line(error)}"
    return Drop.TEMPLATE.error(f"is refused by the chat template ({reason}): change the row or the template.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_vocabulary(tokenizer: Tokenizer, path: str, rows: int, *, apply_chat_template: bool = False) -> None:
    """Raise ModelError if BOS, EOS or a token of the template is beyond the ``rows`` of the embedding of ``path``."""
    texts = _without_row(tokenizer, rows)
    template = (tokenizer.chat_template or "") if apply_chat_template else ""
    for token, text in texts.items():
        if token in (tokenizer.bos_token_id, tokenizer.eos_token_id) or text in str(template):
            raise _too_small(texts, path, rows, token)


def check_tokens(tokenizer: Tokenizer, path: str, rows: int, largest: Callable[[], int]) -> None:
    """Raise ModelError if the ``largest`` occurring token has no row. ``largest`` is called only if that is possible."""
    texts = _without_row(tokenizer, rows)
    if texts and (token := largest()) >= rows:
        raise _too_small(texts, path, rows, token)


def _without_row(tokenizer: Tokenizer, rows: int) -> dict[int, str]:
    return dict(sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= rows))


def _too_small(texts: dict[int, str], path: str, rows: int, token: int) -> ModelError:
    total = max(texts) + 1
    return ModelError(
        f"The tokenizer has {total} tokens and the embedding of {path} has {rows} rows, none for {texts[token]!r} ({token}): "
        f"use the tokenizer that the model was made with, or enlarge the embedding (model.resize_token_embeddings({total}) in "
        "Transformers) and save the model."
    )
