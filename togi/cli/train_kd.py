"""``togi kd``, also ``python -m togi.cli.train_kd`` and under torchrun: knowledge distillation."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import KDConfig

main = partial(train, KDConfig, "kd")

if __name__ == "__main__":
    sys.exit(run_togi(["kd", *sys.argv[1:]]))
