"""Which rollouts of ``togi rl`` are trained on, the cost of responses that end badly, and mixed-in training data."""

from __future__ import annotations

from togi.config.fields import Count, PathText, Settings, flag


class SampleSettings(Settings):
    """Filtering and length penalties"""

    dynamic_filtering: bool = flag(
        False,
        "Train only on groups whose mean reward lies inside --dynamic_filtering_reward_range; each other one is replaced by that "
        "of another prompt, until the rollout is full or the episode ends (DAPO).",
    )
    dynamic_filtering_reward_range: tuple[float, float] = flag(
        (0.0, 1.0), "The open range, of the reward before length penalties: a mean that is one of its ends is outside."
    )
    dynamic_filtering_max_generations: Count = flag(
        20, "Stop the run when a rollout is not full after so many times its number of prompts."
    )
    overlong_buffer_len: Count | None = flag(
        None, "Responses that reach into the last so many tokens of --generate_max_len lose reward, linearly (DAPO)."
    )
    overlong_penalty_factor: float = flag(1.0, "What a response of --generate_max_len tokens loses.", gt=0)
    stop_properly_penalty_coef: float | None = flag(
        None,
        "Reward of a response cut off by the limit: from 0 to 1 it is multiplied by this, below 0 replaced by it (ProRL).",
        le=1,
    )

    @property
    def uses_length_penalties(self) -> bool:
        return self.overlong_buffer_len is not None or self.stop_properly_penalty_coef is not None


class PretrainMixSettings(Settings):
    """SFT mixing"""

    pretrain_data: PathText | None = flag(
        None,
        "Texts that the actor goes on learning: --ptx_coef x their mean negative log-probability a token is added to the policy "
        "loss of every update (PPO-ptx).",
    )
    ptx_coef: float = flag(0.05, "Weight of the loss on --pretrain_data.", gt=0)
    pretrain_data_probs: str | None = flag(
        None, "Comma-separated sampling probabilities, one per set; default: concatenate."
    )
    pretrain_split: str = flag("train", "Split of these sets.")
    pretrain_input_key: str = flag(
        "input", "Field with the text, or with the prompt if --pretrain_output_key is given."
    )
    pretrain_output_key: str | None = flag(
        None, "Field with the response, which alone is learned; without it every token of the text is."
    )
    pretrain_max_len: Count | None = flag(
        None, "Longer rows are left out and counted; default --prompt_max_len + --generate_max_len."
    )
    pretrain_max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    pretrain_batch_size: Count | None = flag(None, "Rows in each of the actor's updates; default --train_batch_size.")
