"""The settings of every command on fixed data; those of one method are in ``togi.methods``."""

from __future__ import annotations

from togi.config.choices import Overlong
from togi.config.fields import Count, CountOrAuto, Int, PathText, Settings, flag


class DatasetSettings(Settings):
    """Data"""

    dataset: PathText = flag(
        "", "Training sets: comma-separated files, folders or hub names, each optionally name@dir. Required."
    )
    dataset_probs: str | None = flag(None, "Comma-separated sampling probabilities, one per set; default: concatenate.")
    dataset_split: str = flag("train", "Split of the training sets.")
    max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    max_len: Count = flag(2048, "At most this many tokens per sequence, prompt and response together.")
    overlong: Overlong = flag(
        Overlong.DROP, "What becomes of longer rows: left out and counted, cut (without an end token), or an error."
    )
    max_bad_rows: float = flag(
        0.05,
        "Stop before training if a larger share of the rows is faulty; 0 stops at any. They are left out.",
        ge=0,
        le=1,
    )
    dataset_num_proc: CountOrAuto = flag(
        "auto", "Processes that tokenise the rows; auto: one per core for large sets, else this one."
    )


class EvaluationSettings(Settings):
    """Evaluation"""

    eval_dataset: PathText | None = flag(None, "Held-out sets, with the same fields as --dataset.")
    eval_split: str = flag("test", "Split of the held-out sets.")
    eval_steps: Int = flag(-1, "Evaluate every N optimizer steps; in any case at the end of each epoch.")
    eval_at_start: bool = flag(False, "Also evaluate before the first update.")


class LaunchSettings(Settings):
    """Launch"""

    local_rank: Int = flag(-1, "Set by launchers that start one process per device; wins over LOCAL_RANK.")
