"""``togi sft`` under its established name: ``python -m togi.cli.train_sft``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
