"""The methods of training on fixed data, one file each, their table and what is checked before one starts. Imports no torch."""

from collections.abc import Iterator, Mapping

from togi.config import shared
from togi.config.fields import missing, refuse, unread
from togi.config.parse import Parsed
from togi.methods.dpo import DPO
from togi.methods.kd import KD
from togi.methods.kto import KTO
from togi.methods.method import Method
from togi.methods.orpo import ORPO
from togi.methods.prm import PRM
from togi.methods.rm import RM
from togi.methods.sft import SFT
from togi.methods.simpo import SimPO
from togi.obs import names

METHODS: Mapping[str, type[Method]] = {method.command: method for method in (SFT, RM, DPO, SimPO, ORPO, KTO, PRM, KD)}
"""The methods by the name of their command, in the order of ``togi --help``."""

names.OF_METHODS.update(
    {each.name: each.explanation for method in METHODS.values() for each in method.measures if each.explanation}
)


def check_method(parsed: Parsed[Method]) -> None:
    """Raise ConfigError with the first contradiction. Each message names both flags and the remedy."""
    # A chat template replaces the default of ``--input_template``, but contradicts one that the user wrote.
    refuse(parsed.config, _problems(parsed.config, template_given="input_template" in parsed.given))


def _problems(c: Method, *, template_given: bool) -> Iterator[str]:
    yield from missing(c, pretrain=shared.MODEL_TO_TRAIN, dataset=shared.ROWS)
    yield from c.problems(template_given=template_given)
    yield from shared.model_problems(c)
    yield from shared.train_problems(c, c)
    yield from shared.parallel_problems(c, c)
    text = c.prompt_text
    applied = text is not None and text.apply_chat_template
    if template_given and text is not None and text.input_template is not None:
        yield from shared.template_problems(text.input_template, applied=applied)
    yield from shared.chat_template_problems(c.tokenizer_chat_template, applied=applied)
    if c.max_tokens_per_gpu * c.ring_attn_size < c.max_len:
        yield "{max_tokens_per_gpu} x {ring_attn_size} is less than {max_len}: raise one of the first or lower the last."
    if c.lr_scheduler.follows_a_loss and c.eval_dataset is None:
        yield "{lr_scheduler} follows the held-out loss: add --eval_dataset (and --eval_steps), or choose another schedule."
    yield from unread(c, {"eval_dataset": ("eval_at_start",)})
    yield from shared.output_problems(c, evaluates=c.eval_dataset is not None)
    if c.eval_steps == 0:
        yield "--eval_steps must be positive, or -1."
