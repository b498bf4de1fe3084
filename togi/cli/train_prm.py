"""``togi prm`` under its established name: ``python -m togi.cli.train_prm``, also under torchrun."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("prm")
