"""``togi sft`` under its established name: ``python -m togi.cli.train_sft``, also under torchrun."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("sft")
