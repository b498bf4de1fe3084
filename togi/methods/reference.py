"""The settings of methods that compare the model in training with a frozen reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from togi.config.fields import PathText, flag
from togi.methods.method import Method


class HeldToReference(Method):
    """Reference model"""

    ref_pretrain: PathText | None = flag(None, "Reference model; default: --pretrain.")
    ref_offload: bool = flag(False, "Keep the frozen reference in host memory, on the device only while it scores.")
    precompute_ref: bool = flag(
        False, "Score all rows with the reference once, ahead of training, then free it (dpo only)."
    )

    def reference_problems(self) -> Iterator[str]:
        """Noise in logprobs that are compared."""
        from togi.config.policy_checks import lora_dropout_problems

        yield from lora_dropout_problems(self)

    @property
    def reference(self) -> str:
        return self.ref_pretrain or self.pretrain

    @property
    def more_models(self) -> Mapping[str, str]:
        return {} if self.ref_pretrain is None else {"ref_pretrain": self.ref_pretrain}

    @property
    def offload_flag(self) -> str:
        return "--ref_offload" if self.ref_offload else ""
