"""``togi dpo`` under its established name: ``python -m togi.cli.train_dpo``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
