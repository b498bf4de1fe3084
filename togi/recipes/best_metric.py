"""``--best_metric_key``: which metrics an evaluation has, and which direction of each is good. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from togi.algo.best_of_n import reported_ks
from togi.config.offline import DPOConfig, KDConfig, KTOConfig, OfflineConfig, PRMConfig, RMConfig, SFTConfig
from togi.config.rl import RLConfig
from togi.config.shared import NO_METRIC, OutputSettings
from togi.errors import ConfigError
from togi.learn.checkpoint import Aim
from togi.obs import names

PREFIX = "eval/"
_REWARDS = (names.ACCURACY, names.REWARD_CHOSEN, names.REWARD_REJECTED, names.REWARD_MARGIN)
# The metrics of an evaluation beside its loss, by command.
_MEASURED: dict[type[OfflineConfig], tuple[str, ...]] = {
    SFTConfig: (names.PERPLEXITY,),
    RMConfig: _REWARDS,
    DPOConfig: (*_REWARDS, names.CHOSEN_NLL),
    KTOConfig: (*_REWARDS, names.KL_ESTIMATE),
    PRMConfig: (names.ACCURACY,),
    KDConfig: (names.CROSS_ENTROPY, names.KL_TEACHER),
}
_LOWER = (
    names.LOSS,
    names.PERPLEXITY,
    names.CROSS_ENTROPY,
    names.CHOSEN_NLL,
    names.KL_TEACHER,
    names.EVAL_TRUNCATED.removeprefix(PREFIX),
)
_HIGHER = (
    names.ACCURACY,
    names.REWARD_CHOSEN,
    names.REWARD_MARGIN,
    names.EVAL_REWARD.removeprefix(PREFIX),
)


def offline_metrics(config: OfflineConfig) -> list[str]:
    """The metrics of an evaluation of this command, by their names in the logs."""
    return [f"{PREFIX}{name}" for name in (names.LOSS, *_MEASURED[type(config)])]


def rl_metrics(config: RLConfig, sources: Iterable[str]) -> list[str]:
    """The metrics of an evaluation on prompts of these data sources."""
    keys = [f"pass{k}" for k in reported_ks(config.eval_n_samples_per_prompt)]
    passes = [names.eval_of(source, key) for source in sources for key in keys]
    return [names.EVAL_REWARD, names.EVAL_LENGTH, names.EVAL_TRUNCATED, *passes]


def offline_aim(config: OfflineConfig) -> Aim | None:
    """What the best model of this run is the best in; None where none is kept. Raises ConfigError."""
    return _aim(config, offline_metrics(config))


def rl_aim(config: RLConfig, sources: Iterable[str]) -> Aim | None:
    """The same for a run with held-out prompts of these data sources."""
    return _aim(config, rl_metrics(config, sources))


def check_rl_metric(config: RLConfig) -> None:
    """``rl_aim`` before the prompts are read: any data source may be there."""
    source = config.best_metric_key.removeprefix(PREFIX).rpartition("/")[0]
    rl_aim(config, [source] if source else [])


def _aim(config: OutputSettings, measured: list[str]) -> Aim | None:
    if config.best_metric_key == NO_METRIC:
        return None
    name = config.best_metric_key.removeprefix(PREFIX)
    if f"{PREFIX}{name}" not in measured:
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key}: an evaluation of this run has {', '.join(measured)}: choose one of them."
        )
    last = name.rpartition("/")[2]
    if config.best_metric_mode != "auto":
        return Aim(f"{PREFIX}{name}", config.best_metric_mode == "max")
    if name not in (*_LOWER, *_HIGHER) and not last.startswith("pass"):
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key} may be good high or low: say which with --best_metric_mode min or max."
        )
    return Aim(f"{PREFIX}{name}", name not in _LOWER)
