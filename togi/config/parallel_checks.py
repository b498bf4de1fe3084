"""What tensor parallelism and compilation cannot be combined with, found before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from togi.config.choices import BackendName
from togi.config.shared import SPLITTABLE, ModelSettings, TrainSettings
from togi.errors import ConfigError


def parallel_problems(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    """Faults of ``--ds_tensor_parallel_size`` and ``--torch_compile``."""
    yield from _compiled(c, model)
    yield from _tensor(c, model)


def _compiled(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    if not model.torch_compile:
        return
    if model.use_liger_kernel:
        yield "--torch_compile and --use_liger_kernel exclude each other, both compute the layers: leave one of them out."
    if model.load_in_4bit:
        yield "--torch_compile with --load_in_4bit: weights in NF4 are not compiled, leave one of them out."
    if model.aux_loss_coef > 0:
        yield f"--torch_compile with --aux_loss_coef {model.aux_loss_coef:g}: experts are not compiled, leave one of them out."
    if c.backend is BackendName.DEEPSPEED and c.zero_stage == 3:
        yield (
            "--torch_compile with --backend deepspeed and --zero_stage 3: weights would be gathered inside of what is compiled, "
            "use --backend fsdp2, or leave the first out."
        )
    if c.ds_tensor_parallel_size > 1:
        yield (
            f"--torch_compile with --ds_tensor_parallel_size {c.ds_tensor_parallel_size}: split weights are not compiled, leave "
            "one of them out."
        )


def _tensor(c: TrainSettings, model: ModelSettings) -> Iterator[str]:
    size = c.ds_tensor_parallel_size
    if size == 1:
        return
    tensor = f"--ds_tensor_parallel_size {size}"
    if c.ring_attn_size > 1:
        yield (
            f"{tensor} with --ring_attn_size {c.ring_attn_size}: the first parts the weights and the second the tokens of a batch "
            "among the same processes, leave one of them out."
        )
    # Tensor parallelism is built on FSDP2's shards of plain weights.
    if c.backend is not BackendName.FSDP2:
        yield f"{tensor} splits weights beneath FSDP2: use --backend fsdp2, or leave it out."
    if c.zero_stage == 0:
        yield f"{tensor} with --zero_stage 0, which keeps every weight whole: use --zero_stage 1, 2 or 3."
    if model.lora is not None:
        yield f"{tensor} with --lora_rank {model.lora_rank}: adapters are not split, leave one of them out."
    if model.aux_loss_coef > 0:
        yield f"{tensor} with --aux_loss_coef {model.aux_loss_coef:g}: experts are not split, leave one of them out."
    if model.use_liger_kernel:
        yield f"{tensor} with --use_liger_kernel: Liger's kernels take whole weights, leave one of them out."
    if c.adam_offload:
        yield f"{tensor} with --adam_offload is not supported yet: leave one of them out."


def check_splittable(size: int, flag: str, path: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError if the layers of a model, by its config.json, cannot be split in ``size`` equal parts."""
    if size == 1 or not settings:
        return
    kind = settings.get("model_type")
    if kind not in SPLITTABLE:
        raise ConfigError(
            f"--ds_tensor_parallel_size {size} can split {', '.join(SPLITTABLE)} models, but --{flag} {path} is a {kind} model: "
            "leave it out."
        )
    # Query heads, key/value heads and the hidden units of the MLP are all split.
    heads = settings.get("num_attention_heads")
    groups, hidden = settings.get("num_key_value_heads", heads), settings.get("intermediate_size")
    if any(isinstance(number, int) and number % size != 0 for number in (heads, groups, hidden)):
        raise ConfigError(
            f"--ds_tensor_parallel_size {size} does not divide the {heads} heads, the {groups} key/value heads or the {hidden} "
            f"hidden units of --{flag} {path}: choose a divisor of all three."
        )
