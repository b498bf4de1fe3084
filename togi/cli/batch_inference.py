"""``togi infer`` under its established name: ``python -m togi.cli.batch_inference``."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("infer")
