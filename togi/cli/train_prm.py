"""``togi prm``, also ``python -m togi.cli.train_prm`` and under torchrun: a process reward model."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import PRMConfig

main = partial(train, PRMConfig, "prm")

if __name__ == "__main__":
    sys.exit(run_togi(["prm", *sys.argv[1:]]))
