"""The row settings that several methods share, with their rules: a prompt and a response, plain text, pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from togi.config.fields import flag
from togi.config.shared import PLAIN_TEMPLATE, PromptText
from togi.methods.method import Method

if TYPE_CHECKING:
    from togi.data.chat import Tokenizer
    from togi.data.record_spec import RecordSpec
    from togi.data.records import Examples
    from togi.sample import Sample


def rendering_problems(c: PromptText, *, template_given: bool) -> Iterator[str]:
    """Faults of the flags that format a prompt."""
    from togi.config.checks import template_problems

    if template_given and c.input_template is not None:
        yield from template_problems(c.input_template, applied=c.apply_chat_template)


class PromptAndResponse(Method):
    """Rows"""

    input_key: str = flag("input", "Field with the prompt: a string or a list of chat messages.")
    output_key: str | None = flag(
        None, "Field with the response; default: the last message of the chat list in --input_key."
    )
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(
        PLAIN_TEMPLATE, "Format string with one {} around the prompt; not used with --apply_chat_template."
    )

    @property
    def prompt_text(self) -> PromptText | None:
        return self

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {"input_key": self.input_key, "output_key": self.output_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_sft

        return load_sft(spec, tokenizer)


class PlainTextOrResponse(PromptAndResponse):
    """Continued pre-training"""

    pretrain_mode: bool = flag(False, "Plain text in --input_key: no template, no end token, every token in the loss.")

    @property
    def prompt_text(self) -> PromptText | None:
        return None if self.pretrain_mode else self

    @property
    def learns_every_token(self) -> bool:
        return self.pretrain_mode

    def text_problems(self, *, template_given: bool) -> Iterator[str]:
        """Plain text has no prompt to format; a response needs a field, or is in the chat."""
        if self.pretrain_mode and self.apply_chat_template:
            yield "--pretrain_mode trains on plain text but --apply_chat_template is set: leave one of them out."
        if self.pretrain_mode and template_given and self.input_template is not None:
            yield "--pretrain_mode trains on plain text but --input_template is set: leave one of them out."
        if not self.pretrain_mode and not self.apply_chat_template and self.output_key is None:
            yield (
                "--output_key is required without --apply_chat_template: name the field with the response, or use "
                "--pretrain_mode for plain text."
            )


class Pairs(Method):
    """Rows"""

    width: ClassVar[int] = 2

    prompt_key: str | None = flag(None, "Field with the prompt; default: it is part of both conversations.")
    chosen_key: str = flag("chosen", "Field with the preferred response or conversation.")
    rejected_key: str = flag("rejected", "Field with the rejected response or conversation.")
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(None, "Format string with one {} around the prompt, without a chat template.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        yield from rendering_problems(self, template_given=template_given)
        if template_given and self.prompt_key is None:
            yield "--input_template goes around the prompt but --prompt_key is not set: set it, or leave the template out."

    @property
    def prompt_text(self) -> PromptText | None:
        return self

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {"prompt_key": self.prompt_key, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_pairs

        return load_pairs(spec, tokenizer)

    def badness(self, sequences: Sequence[tuple[Sample, float]]) -> float:
        """How far the reward of the rejected response is above the chosen one."""
        (_, chosen), (_, rejected) = sequences
        return rejected - chosen
