"""``togi kd`` under its established name: ``python -m togi.cli.train_kd``, also under torchrun."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("kd")
