"""``togi iterate``: rejection sampling, iterative DPO, conditional SFT, in rounds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from togi.cli.main import main as run_togi
from togi.config.iterate import IterateConfig
from togi.config.parse import parse
from togi.run.iterate import start_iterate


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    result = start_iterate(parse(IterateConfig, argv, "iterate"), announce=lambda line: print(line, flush=True))
    print(f"summary: {result.summary}")
    print(f"model:   {result.model}")


if __name__ == "__main__":
    sys.exit(run_togi(["iterate", *sys.argv[1:]]))
