"""``--best_metric_key``: which metrics an evaluation has, and which direction of each is good. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from togi.algo.best_of_n import reported_ks
from togi.config.rl import RLConfig
from togi.config.shared import NO_METRIC, OutputSettings
from togi.errors import ConfigError
from togi.learn.checkpoint import Aim
from togi.methods.method import Good, Measure, Method
from togi.obs import names

PREFIX = "eval/"


def offline_metrics(config: Method) -> list[str]:
    """The metrics of an evaluation of this command, by their names in the logs."""
    return [_logged(measure) for measure in _offline_measures(config)]


def offline_aim(config: Method) -> Aim | None:
    """The metric of the best model of this run; None if none is kept. Raises ConfigError."""
    return _aim(config, _offline_measures(config))


def rl_aim(config: RLConfig, sources: Iterable[str]) -> Aim | None:
    """Like ``offline_aim``, for an RL run with held-out prompts of these data sources."""
    return _aim(config, _rl_measures(config, sources))


def check_rl_metric(config: RLConfig) -> None:
    """Check ``rl_aim`` before the prompts are read, when any data source is still possible."""
    source = config.best_metric_key.removeprefix(PREFIX).rpartition("/")[0]
    rl_aim(config, [source] if source else [])


def _offline_measures(config: Method) -> list[Measure]:
    return [Measure(names.LOSS, Good.LOW), *config.measures]


def _rl_measures(config: RLConfig, sources: Iterable[str]) -> list[Measure]:
    keys = [f"pass{k}" for k in reported_ks(config.eval_n_samples_per_prompt)]
    passes = [names.eval_of(source, key) for source in sources for key in keys]
    good = {names.EVAL_REWARD: Good.HIGH, names.EVAL_LENGTH: Good.EITHER, names.EVAL_TRUNCATED: Good.LOW}
    good |= dict.fromkeys(passes, Good.HIGH)
    return [Measure(name.removeprefix(PREFIX), which) for name, which in good.items()]


def _aim(config: OutputSettings, measures: Sequence[Measure]) -> Aim | None:
    if config.best_metric_key == NO_METRIC:
        return None
    name = config.best_metric_key.removeprefix(PREFIX)
    found = next((measure for measure in measures if measure.name == name), None)
    if found is None:
        measured = ", ".join(map(_logged, measures))
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key}: an evaluation of this run has {measured}: choose one of them."
        )
    if config.best_metric_mode != "auto":
        return Aim(_logged(found), config.best_metric_mode == "max")
    if found.good is Good.EITHER:
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key} may be good high or low: say which with --best_metric_mode min or max."
        )
    return Aim(_logged(found), found.good is Good.HIGH)


def _logged(measure: Measure) -> str:
    return f"{PREFIX}{measure.name}"
