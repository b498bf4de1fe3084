"""``togi rm`` under its established name: ``python -m togi.cli.train_rm``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rm", *sys.argv[1:]]))
