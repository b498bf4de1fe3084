"""The established name of ``togi chat``: ``python -m togi.cli.interactive_chat``."""

from __future__ import annotations

import sys

from togi.cli.chat import main
from togi.cli.main import run as run_module

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run_module(__spec__.name if __spec__ else __name__, sys.argv[1:]))
