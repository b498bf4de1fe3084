"""The settings of ``togi merge-lora`` (established name: ``lora_combiner``)."""

from __future__ import annotations

from togi.config.fields import PathText, Settings, flag


class MergeConfig(Settings):
    """Merge a LoRA adapter into its base model."""

    lora_path: PathText = flag("", "Folder of the adapter: the --save_path of a run with --lora_rank. Required.")
    output_path: PathText = flag("", "Folder for the merged model. Required.")
    model_path: PathText = flag("", "Base model; default: the one that the adapter was trained on.")
    is_rm: bool = flag(False, "The model has a scalar head: a reward model or a critic.")
    bf16: bool = flag(False, "Write bfloat16; the sum itself is always made in float32.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
