"""Switch off dropout in training, because log-probs are compared with those of a reference, an engine or an earlier forward.

A model reads its dropout rates from its configuration when it is built, and keeps them in modules or passes them to functions. So
the rates are set to 0 in the configuration, under any name. ``--lora_dropout`` is not part of the model and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# "jitter" is the noise by which routers of experts multiply their inputs in training.
NOISE = ("drop", "jitter")
# Rates of heads for other tasks, which Togi does not load.
OTHER_HEADS = ("classifier", "summary")


def switch_off(config: PreTrainedConfig) -> dict[str, float]:
    """Set every rate to 0, in place. Returns the rates that were not 0, by the configuration's own keys."""
    return _zeroed(vars(config))


def _zeroed(settings: MutableMapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in list(settings.items()):
        if isinstance(value, PreTrainedConfig):
            found |= _zeroed(vars(value), f"{prefix}{key}.")
        elif isinstance(value, dict):
            found |= _zeroed(value, f"{prefix}{key}.")
        elif _is_noise(str(key)) and _is_rate(value):
            found[prefix + key] = float(value)
            settings[key] = 0.0
    return found


def _is_noise(key: str) -> bool:
    return any(word in key for word in NOISE) and not key.startswith(OTHER_HEADS)


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def remove_fixed(model: nn.Module) -> None:
    """Switch off dropout modules whose rate is not in the configuration."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def notice(path: str, rates: Mapping[str, float]) -> str:
    """The warning for the user about the ``rates`` that were switched off."""
    told = ", ".join(f"{key} {rate:g}" for key, rate in sorted(rates.items()))
    return f"{path}: dropout is off in training ({told} in its config.json, 0 in that of the trained model)"
