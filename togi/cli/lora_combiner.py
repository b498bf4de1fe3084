"""``togi merge-lora``, also ``python -m togi.cli.lora_combiner``: merge an adapter into its base model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from togi.cli.main import main as run_togi
from togi.config.parse import parse
from togi.config.tools import MergeConfig
from togi.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    config = parse(MergeConfig, argv, "merge-lora").config
    for name, value in (("lora_path", config.lora_path), ("output_path", config.output_path)):
        if not value:
            raise ConfigError(f"--{name} is required: {MergeConfig.model_fields[name].description}")
    from togi.run.export import merge

    merge(config)
    print(f"merged model: {Path(config.output_path)}")


if __name__ == "__main__":
    sys.exit(run_togi(["merge-lora", *sys.argv[1:]]))
