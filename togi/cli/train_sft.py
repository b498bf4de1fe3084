"""``togi sft``, also ``python -m togi.cli.train_sft`` and under torchrun: supervised fine-tuning."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import SFTConfig

main = partial(train, SFTConfig, "sft")

if __name__ == "__main__":
    sys.exit(run_togi(["sft", *sys.argv[1:]]))
