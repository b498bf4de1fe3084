"""The settings of ``togi check`` beyond the flags of the command that it checks."""

from __future__ import annotations

from togi.config.fields import Int, flag
from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.errors import ConfigError

SAMPLE_GROUPS = "sample_groups"


class RLCheckConfig(RLConfig):
    """Would it learn?"""

    sample_groups: Int = flag(
        0,
        "Load the model to train, sample answers to so many prompts, score them with the reward and say what would stop "
        "learning; 0 loads no weights.",
        ge=0,
    )


def without_check(parsed: Parsed[RLCheckConfig]) -> tuple[Parsed[RLConfig], int]:
    """The settings of the run itself, and the number of groups to sample. Raises ConfigError."""
    config = parsed.config
    if config.sample_groups > 0 and config.replay is not None:
        raise ConfigError("--sample_groups generates, and --replay reads what was generated: leave one of them out.")
    sources = {name: source for name, source in parsed.sources.items() if name != SAMPLE_GROUPS}
    plain = RLConfig(**config.model_dump(exclude={SAMPLE_GROUPS}))
    return Parsed(plain, sources), config.sample_groups
