"""The fields of a row as prompt and answer, and both as one text to tokenise. Raises RowError for anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from togi.data.chat import Tokenizer, plain_prompt, plain_text, template_text
from togi.data.faults import Drop, Note, RowError, check_present, named, parsed
from togi.data.messages import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    TOOLS,
    USER,
    Dialogue,
    Message,
    dialogue_of,
    frame_of,
    is_message,
)
from togi.data.precheck import RecordSpec, missing_field
from togi.data.tables import Row
from togi.data.turns import Draft, check_last, conversation

# A shorter prompt may start an answer by chance.
LONG_PROMPT = 20
MISSING_WORDS = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT"})


def value_of(row: Row, where: str, flag: str, key: str) -> object:
    """The value of a field. Raises RowError naming row, flag and field if it is missing or NaN."""
    if key not in row:
        raise missing_field(where, flag, key, row)
    value: object = row[key]
    check_present(value, where, key)
    return value


def is_empty(value: object) -> bool:
    """Whether a value is nothing, only white space, or no messages."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def as_text(value: object, where: str, key: str, *, chat: bool = True) -> str:
    """The value if it is a string. ``chat``: whether a chat template would accept messages there. Raises RowError."""
    with named(f"{where}: the field {key!r}"):
        return plain_text(value, chat=chat)


def row_frame(row: Row, where: str) -> Dialogue:
    """The tools and the system turn that a row has in separate fields. Raises RowError naming row and field."""
    with named(f"{where}: the field {TOOLS!r}"):
        return frame_of(row)


def prompt_dialogue(value: object, where: str, key: str, frame: Dialogue, tokenizer: Tokenizer) -> Dialogue:
    """The prompt as messages: a string becomes one user message. Raises RowError naming row and field."""
    with named(f"{where}: the field {key!r}"):
        return dialogue_of(value, USER, template_text(tokenizer), frame)


def whole_dialogue(value: object, where: str, key: str, frame: Dialogue, flag: str, tokenizer: Tokenizer) -> Dialogue:
    """A conversation that ends with the answer, for rows without the field of ``flag``. Raises RowError."""
    found = prompt_dialogue(value, where, key, frame, tokenizer)
    if isinstance(value, str) and isinstance(parsed(value, is_message), str):
        raise RowError(
            Drop.WRONG_TYPE,
            f"{where}: the field {key!r} is a string, but without --{flag} it must be a list of messages that ends with the "
            f"answer: set --{flag}, or give the list.",
        )
    return found


def answer_dialogue(value: object, where: str, key: str, frame: Dialogue, tokenizer: Tokenizer) -> Dialogue:
    """The answer as messages that end with the assistant: a string becomes one. Raises RowError naming row and field."""
    with named(f"{where}: the field {key!r}"):
        found = dialogue_of(value, ASSISTANT, template_text(tokenizer), replace(frame, messages=()))
        if found.messages:
            check_last(found.messages)
    return found


def joined(prompt: Dialogue, answer: Dialogue, where: str, keys: tuple[str, str]) -> tuple[Dialogue, int]:
    """Prompt and answer as one conversation, and the number of its messages before the answer.

    An answer that is a conversation may begin with the prompt. Then the prompt is used once, in the wording of the answer's field,
    with the system turn of either. ``keys``: the names of the fields. Raises RowError if the two differ.
    """
    # System turns are compared apart: the answer's field may have it, the prompt's, or both.
    prompt_system, asked = _parted(prompt.messages)
    answer_system, said = _parted(answer.messages)
    system = prompt_system or answer_system
    if prompt_system and answer_system and not _alike(prompt_system, answer_system):
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the fields {keys[0]!r} and {keys[1]!r} begin with different system turns: leave one of them out.",
        )
    # Two turns of the assistant in a row cannot be told apart in training.
    if asked and said and asked[-1]["role"] == said[0]["role"] == ASSISTANT:
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the prompt in {keys[0]!r} ends with a turn of the assistant, and the answer in {keys[1]!r} would follow "
            "it: end the prompt with the turn that is answered.",
        )
    # Does the conversation of the answer repeat the prompt?
    repeats = bool(asked) and _alike(asked, said[: len(asked)])
    if not repeats and asked and said and said[0]["role"] == USER and asked[-1]["role"] in (USER, TOOL):
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the conversation in {keys[1]!r} does not begin with the prompt in {keys[0]!r}: let both have the same "
            "turns, or give only one of the two fields.",
        )
    # The usual case: the answer follows the prompt.
    if not repeats and not answer_system:
        return prompt.extended(answer), len(prompt.messages)
    if not repeats and said[0]["role"] != USER:
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the field {keys[1]!r} begins with a system turn behind the prompt in {keys[0]!r}: put it at the "
            "beginning of the prompt.",
        )
    notes = prompt.notes | answer.notes | {Note.PROMPT_TWICE}
    whole = (*system, *said) if repeats else (*system, *asked, *said)
    return Dialogue(whole, prompt.tools, notes), len(system) + len(asked)


def chat_draft(dialogue: Dialogue, first: int, where: str, tokenizer: Tokenizer) -> Draft | Drop:
    """Train on every assistant turn from message ``first`` on."""
    with named(where):
        draft = conversation(dialogue, first, tokenizer)
    return draft if draft.spans else Drop.EMPTY_ANSWER


def plain_draft(prompt: str, answer: str, notes: frozenset[Note] = frozenset()) -> Draft:
    """Train on the answer, which follows the formatted prompt with nothing in between."""
    text = prompt + answer
    return Draft(text, ((len(prompt), len(text)),), complete=True, notes=notes)


def prompted_draft(
    row: Row, prompt: object, answer: object, where: str, keys: tuple[str, str], spec: RecordSpec, tokenizer: Tokenizer
) -> Draft | Drop:
    """Prompt and answer from two fields, as a chat or as plain text. ``keys``: their names. Raises RowError."""
    if is_empty(prompt):
        return Drop.EMPTY_PROMPT
    if is_empty(answer):
        return Drop.EMPTY_ANSWER
    if spec.apply_chat_template:
        dialogue, first = prompted_dialogue(row, prompt, answer, where, keys, tokenizer)
        return chat_draft(dialogue, 0 if spec.multiturn else first, where, tokenizer)
    text, reply = as_text(prompt, where, keys[0]), as_text(answer, where, keys[1])
    rendered = plain_prompt(text, spec.template)
    notes = frozenset({Note.PROMPT_IN_ANSWER} if _begins(reply, text) or _begins(reply, rendered) else ())
    return plain_draft(rendered, reply, notes | _missing(text, reply))


def prompted_dialogue(
    row: Row, prompt: object, answer: object, where: str, keys: tuple[str, str], tokenizer: Tokenizer
) -> tuple[Dialogue, int]:
    """Prompt and answer from two fields as one conversation, and the number of its messages before the answer."""
    frame = row_frame(row, where)
    question = prompt_dialogue(prompt, where, keys[0], frame, tokenizer)
    whole, first = joined(question, answer_dialogue(answer, where, keys[1], frame, tokenizer), where, keys)
    if isinstance(prompt, str) and isinstance(answer, str) and _begins(answer, prompt):
        whole = replace(whole, notes=whole.notes | {Note.PROMPT_IN_ANSWER})
    return replace(whole, notes=whole.notes | _missing(prompt, answer)), first


def _missing(*values: object) -> frozenset[Note]:
    """A note if a text is a word for a missing value, such as "nan". It may be meant, so it is only a note."""
    words = {value.strip() for value in values if isinstance(value, str)}
    return frozenset({Note.MISSING_WORD} if words & MISSING_WORDS else ())


def _begins(answer: str, prompt: str) -> bool:
    """Whether an answer begins with the whole prompt, and not by chance."""
    return len(prompt.strip()) >= LONG_PROMPT and answer.lstrip().startswith(prompt.strip())


def _parted(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system turn at the start of a conversation, if any, and the other turns."""
    cut = 1 if messages and messages[0]["role"] in (SYSTEM, "developer") else 0
    return tuple(messages[:cut]), tuple(messages[cut:])


def _alike(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether two conversations have the same turns, up to white space."""
    return [_bare(message) for message in some] == [_bare(message) for message in others]


def _bare(message: Message) -> Mapping[str, object]:
    return {"role": message["role"], "content": "".join(message["content"].split()), "calls": message.get("tool_calls")}
