"""``togi prm``, also ``python -m togi.cli.train_prm`` and under torchrun: a process reward model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from togi.cli.main import run as run_module
from togi.cli.offline import train
from togi.config.offline import PRMConfig


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    train(PRMConfig, "prm", argv)


if __name__ == "__main__":
    sys.exit(run_module(__spec__.name if __spec__ else __name__, sys.argv[1:]))
