"""``togi kd``, also ``python -m togi.cli.train_kd`` and under torchrun: knowledge distillation."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from togi.cli.main import run as run_module
from togi.cli.offline import train
from togi.config.offline import KDConfig


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    train(KDConfig, "kd", argv)


if __name__ == "__main__":
    sys.exit(run_module(__spec__.name if __spec__ else __name__, sys.argv[1:]))
