"""``togi prm`` under its established name: ``python -m togi.cli.train_prm``, also under torchrun."""

import sys

from togi.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prm", *sys.argv[1:]]))
