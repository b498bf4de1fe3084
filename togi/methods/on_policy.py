"""Rows that the model in training answers itself: the settings of the generation, and the mark of such rows."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.choices import EngineName
from togi.config.fields import Count, Settings, flag

GENERATED = "generated"
"""The value of a sample for whether the model in training wrote its response (1 or 0)."""


class OnPolicySettings(Settings):
    """On-policy distillation"""

    on_policy_share: float = flag(
        0.0, "Share of the rows that the student answers itself; there the divergence alone is learned.", ge=0, le=1
    )
    generate_max_len: Count = flag(1024, "At most this many new tokens per response, within --max_len.")
    temperature: float = flag(
        1.0, "Sampling temperature; the divergence is always that of the models as they are.", gt=0
    )
    rollout_engine: EngineName = flag(EngineName.VLLM, "What generates: vLLM, or Transformers (no extra install).")
    vllm_gpu_memory_utilization: float = flag(
        0.3, "Share of a GPU's memory that vLLM may take, beside the models.", gt=0, le=1
    )
    vllm_cpu_kv_cache_gb: float = flag(1.0, "Size of the key-value cache on a CPU, in GB.", gt=0)
    enforce_eager: bool = flag(False, "No compilation and no CUDA graphs in vLLM.")

    def generation_problems(self) -> Iterator[str]:
        """Generation flags without ``--on_policy_share``, and what the engines exclude."""
        if self.on_policy_share == 0:
            for name in self.changed(*OnPolicySettings.model_fields):
                yield f"--{name} is about generated responses: add --on_policy_share, or leave --{name} out."
        elif self.enforce_eager and self.rollout_engine is EngineName.TRANSFORMERS:
            yield "--enforce_eager needs --rollout_engine vllm: change one of them."
