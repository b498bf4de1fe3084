"""Whether ``--bf16`` helps on this machine: decided and announced before anything is loaded."""

from __future__ import annotations

from typing import TypeVar, cast

from togi.config.infer import InferConfig
from togi.config.iterate import IterateConfig
from togi.config.parse import Parsed, Source
from togi.config.shared import ModelSettings
from togi.plan.machine import Machine

Config = TypeVar("Config", bound=ModelSettings | InferConfig | IterateConfig)
WITHOUT_BF16 = (
    "--bf16: this CPU has no bfloat16 instructions and would be hundreds of times slower with it, so everything is computed and "
    "saved in float32"
)


def usable_precision(parsed: Parsed[Config], machine: Machine) -> tuple[Parsed[Config], str]:
    """The settings with ``--bf16`` off if the machine cannot compute in it, and the sentence to print ("" if none)."""
    if not parsed.config.bf16 or machine.fast_bf16:
        return parsed, ""
    sources = dict(parsed.sources) | {"bf16": Source.AUTO}
    config = cast(Config, parsed.config.model_copy(update={"bf16": False}))
    return Parsed(config, sources), WITHOUT_BF16
