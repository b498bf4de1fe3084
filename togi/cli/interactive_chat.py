"""The established name of ``togi chat``: ``python -m togi.cli.interactive_chat``."""

from __future__ import annotations

import sys

from togi.cli.chat import main
from togi.cli.main import main as run_togi

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run_togi(["chat", *sys.argv[1:]]))
