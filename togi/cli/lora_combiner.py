"""``togi merge-lora`` under its established name: ``python -m togi.cli.lora_combiner``."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("merge-lora")
