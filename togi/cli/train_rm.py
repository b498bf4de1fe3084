"""``togi rm``, also ``python -m togi.cli.train_rm`` and under torchrun: a reward model."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import RMConfig

main = partial(train, RMConfig, "rm")

if __name__ == "__main__":
    sys.exit(run_togi(["rm", *sys.argv[1:]]))
