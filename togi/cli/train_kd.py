"""``togi kd`` under its established name: ``python -m togi.cli.train_kd``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["kd", *sys.argv[1:]]))
