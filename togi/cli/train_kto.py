"""``togi kto`` under its established name: ``python -m togi.cli.train_kto``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["kto", *sys.argv[1:]]))
