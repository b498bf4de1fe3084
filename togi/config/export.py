"""The settings of ``togi export``."""

from __future__ import annotations

from typing import Literal

from togi.config.fields import PathText, Settings, flag


class ExportConfig(Settings):
    """Make a plain Hugging Face folder with a model card of a run's final model, or of one of its checkpoints."""

    run_dir: PathText = flag("", "Folder of the run (--run_dir of its command). Required.")
    output_path: PathText = flag("", "Folder for the model. Required.")
    ckpt: PathText | None = flag(
        None,
        "A checkpoint of the run in place of its final model: one folder, or the --ckpt_path of the run for the newest. "
        "Any backend, ZeRO stage and number of ranks.",
    )
    role: Literal["actor", "critic"] = flag("actor", "Which model of togi rl.")
    pretrain: PathText | None = flag(None, "The model that training started from, where it has moved since.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
