"""``togi kto``, also ``python -m togi.cli.train_kto`` and under torchrun: KTO."""

from __future__ import annotations

import sys
from functools import partial

from togi.cli.main import main as run_togi
from togi.cli.offline import train
from togi.config.offline import KTOConfig

main = partial(train, KTOConfig, "kto")

if __name__ == "__main__":
    sys.exit(run_togi(["kto", *sys.argv[1:]]))
