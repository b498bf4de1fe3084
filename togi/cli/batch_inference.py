"""``togi infer``, also ``python -m togi.cli.batch_inference``: outputs for prompts, scores for outputs, to a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from togi.cli.main import main as run_togi
from togi.config.infer import InferConfig
from togi.config.parse import parse
from togi.run.start import start_infer


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    written = start_infer(parse(InferConfig, argv, "infer"), announce=lambda line: print(line, flush=True))
    print(f"{written.rows} rows: {written.path}")


if __name__ == "__main__":
    sys.exit(run_togi(["infer", *sys.argv[1:]]))
