"""Supervised rows that are mixed into the actor's updates, so that it does not unlearn what they teach.

PPO-ptx of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, equation 2): their language-model loss, times ``--ptx_coef``, is
added to the policy loss in every optimizer step. Which rows a step gets depends on seed and number of the step only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from togi.config.rl import RLConfig
from togi.data.chat import Tokenizer
from togi.data.record_spec import RecordSpec
from togi.data.records import Examples, load_sft
from togi.errors import CheckpointError, DataError
from togi.recipes.offline_plan import EpochPlan
from togi.sample import Sample


@dataclass(frozen=True, slots=True)
class Pretraining:
    """The rows, and which of them each of the actor's optimizer steps gets, over as many epochs as there are steps."""

    examples: Examples
    plan: EpochPlan

    def batch(self, step: int) -> list[Sample]:
        """The rows of optimizer step ``step``, counted from 0."""
        return [sample for row in self.plan.rows_of(step) for sample in self.examples[row]]

    def state(self, steps: int) -> dict[str, Any]:
        """What a checkpoint holds after ``steps`` optimizer steps."""
        return {"steps": steps, "batch": self.plan.batch, "fingerprint": self.examples.fingerprint()}

    def steps_of(self, state: Mapping[str, Any] | None) -> int:
        """The number of steps in a checkpoint's state. Raises CheckpointError when it was made with other rows or none."""
        if state is None:
            raise CheckpointError(
                "The checkpoint was made without --pretrain_data: leave it out, or start anew without --load_checkpoint."
            )
        steps: int = state["steps"]
        if state != self.state(steps):
            raise CheckpointError(
                "The checkpoint was made with other rows of --pretrain_data, or another number of them a step: go on with the "
                "same ones, or start anew without --load_checkpoint."
            )
        return steps


def load_pretraining(config: RLConfig, data: str, tokenizer: Tokenizer) -> Pretraining:
    """Read ``--pretrain_data``: plain texts, of which every token is learned, or prompts and responses. Raises DataError."""
    spec = RecordSpec(
        dataset=data,
        dataset_probs=config.pretrain_data_probs,
        split=config.pretrain_split,
        max_samples=config.pretrain_max_samples,
        max_len=config.pretrain_max_len or config.prompt_max_len + config.generate_max_len,
        input_key=config.pretrain_input_key,
        output_key=config.pretrain_output_key,
        input_template=config.input_template,
        apply_chat_template=config.apply_chat_template and config.pretrain_output_key is not None,
        pretrain_mode=config.pretrain_output_key is None,
        seed=config.seed,
        max_bad_rows=config.max_bad_rows,
    )
    try:
        examples = load_sft(spec, tokenizer)
    except DataError as error:
        raise DataError(f"--pretrain_data: {error}") from None
    # ``rows_of`` goes on after the last epoch of a plan, in new orders.
    return Pretraining(examples, EpochPlan(len(examples), config.pretrain_rows, epochs=1, seed=config.seed))
