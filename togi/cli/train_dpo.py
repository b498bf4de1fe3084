"""``togi dpo``, also ``python -m togi.cli.train_dpo`` and under torchrun: DPO, cDPO, IPO."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import DPOConfig

main = partial(train, DPOConfig, "dpo")

if __name__ == "__main__":
    sys.exit(run_togi(["dpo", *sys.argv[1:]]))
