"""``togi export``: a run's final model, or one of its checkpoints, as a plain Hugging Face folder with a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from togi.config.export import ExportConfig
from togi.config.parse import parse
from togi.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    config = parse(ExportConfig, argv, "export").config
    for name, value in (("run_dir", config.run_dir), ("output_path", config.output_path)):
        if not value:
            raise ConfigError(f"--{name} is required: {ExportConfig.model_fields[name].description}")
    from togi.run.export import export

    for line in export(config):
        print(line)
    print(f"exported model: {Path(config.output_path)}")
