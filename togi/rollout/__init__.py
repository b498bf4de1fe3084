"""Start an engine by its name. Only the chosen engine's package is imported."""

from __future__ import annotations

from importlib.util import find_spec

from togi.config.choices import EngineName
from togi.errors import EngineUnavailableError
from togi.rollout.engine import EngineSettings, RolloutEngine


def create_engine(name: EngineName, settings: EngineSettings) -> RolloutEngine:
    """Start an engine and return it when it is ready (after seconds).

    Raises ``EngineUnavailableError`` if vLLM is chosen and not installed.
    """
    if name is EngineName.TRANSFORMERS:
        from togi.rollout.transformers_engine import TransformersCore

        return RolloutEngine(TransformersCore, settings)
    if find_spec("vllm") is None:
        raise EngineUnavailableError()
    from togi.rollout.vllm_engine import VllmCore

    return RolloutEngine(VllmCore, settings)
