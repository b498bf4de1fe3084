"""The architectures that the test suite trains packed, by their ``model_type``, and what each may be combined with.

Others are tested on their own weights when they are loaded (``togi.model.support``) and have none of these abilities. A test of
each column runs over its models, so a new entry is a line here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Abilities:
    """``compiled``: --torch_compile; ``split``: --ds_tensor_parallel_size; ``liger``: --use_liger_kernel. ``experts``: a mixture.

    A mixture's router is read for --aux_loss_coef. Its layers are not compiled, as experts get varying numbers of tokens.
    """

    compiled: bool = False
    split: bool = False
    liger: bool = False
    experts: bool = False


ARCHITECTURES = {
    "gemma": Abilities(compiled=True),
    "gemma2": Abilities(compiled=True),
    "gemma3_text": Abilities(compiled=True),
    "llama": Abilities(compiled=True, split=True, liger=True),
    "mistral": Abilities(compiled=True, split=True, liger=True),
    "mixtral": Abilities(experts=True),
    "qwen2": Abilities(compiled=True, split=True, liger=True),
    "qwen3": Abilities(compiled=True, split=True, liger=True),
    "qwen3_moe": Abilities(experts=True),
}
COMPILABLE = tuple(kind for kind, able in ARCHITECTURES.items() if able.compiled)
SPLITTABLE = tuple(kind for kind, able in ARCHITECTURES.items() if able.split)
WITH_LIGER = tuple(kind for kind, able in ARCHITECTURES.items() if able.liger)
MIXTURES = tuple(kind for kind, able in ARCHITECTURES.items() if able.experts)
