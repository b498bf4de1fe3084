"""Lengths in a model's config.json, as plain data, without torch or Transformers."""

from collections.abc import Mapping

from togi.errors import ConfigError

# The keys of the language model's configuration in models that also read images or audio.
TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
# The names of the longest sequence in configurations.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "model_max_length",
    "seq_length",
)
PLAIN_ROPE = ("default", "mrope")


def text_settings(settings: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of the language model: the top level, overlaid by its text part if there is one."""
    for name in TEXT_PARTS:
        part = settings.get(name)
        if isinstance(part, Mapping):
            return text_settings({**{key: value for key, value in settings.items() if key != name}, **part})
    return settings


def position_limit(settings: Mapping[str, object]) -> int | None:
    """The longest sequence that a config.json allows; None if nothing limits it, or if RoPE scaling extends it."""
    text = text_settings(settings)
    if _is_stretched(text.get("rope_parameters") or text.get("rope_scaling")):
        return None
    found = (text.get(name) for name in POSITIONS)
    limits = (limit for limit in found if isinstance(limit, int) and not isinstance(limit, bool))
    return min((limit for limit in limits if limit > 0), default=None)


def check_length(asked: str, length: int, path: str, settings: Mapping[str, object]) -> None:
    """Raise ConfigError if a model has no positions for sequences of ``length``, which the flags ``asked`` allow."""
    limit = position_limit(settings)
    if limit is not None and length > limit:
        raise ConfigError(f"{asked} is more than the {limit} positions of {path}: lower it.")


def _is_stretched(rope: object) -> bool:
    """Whether rotary embeddings are scaled. Some models have parameters for each kind of layer."""
    if not isinstance(rope, Mapping):
        return False
    kinds = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    return any((kind.get("rope_type") or kind.get("type") or "default") not in PLAIN_ROPE for kind in kinds)
