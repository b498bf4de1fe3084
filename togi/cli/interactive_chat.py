"""``togi chat`` under its established name: ``python -m togi.cli.interactive_chat``."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("chat")
