"""Checkpoint names of tensors, which model folders and weight updates to generation engines use.

In memory Transformers may hold tensors in another form (all experts of a layer in one tensor), and Togi's modules add a prefix.
``checkpoint_tensors`` reverts both, one decoder layer at a time, so that a large model streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from togi.model.policy import HEAD, PolicyModel, ScalarModel

_PREFIX = "hf."
_LAYER = re.compile(r"^.*?\.\d+\.")


def checkpoint_tensors(
    model: PolicyModel | ScalarModel, named_tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) for the full parameters of ``model``, which come by the model's own names.

    Tied copies are skipped. The tensors of one decoder layer must follow each other, as ``named_parameters`` and ``state_dict``
    yield them. Names are sorted within a layer. The results may be views of the inputs.
    """
    hf: Any = model.hf
    tied = hf.all_tied_weights_keys
    plain = ((name.removeprefix(_PREFIX), tensor) for name, tensor in named_tensors)
    kept = ((name, tensor) for name, tensor in plain if name not in tied)
    # a conversion may need all tensors of a layer, such as all its experts
    for _, layer in groupby(kept, key=lambda item: _layer_of(item[0])):
        for name, tensor in sorted(revert_weight_conversion(hf, dict(layer)).items()):
            yield _head_name(model, name), tensor


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    return match.group() if match else ""


def _head_name(model: PolicyModel | ScalarModel, name: str) -> str:
    if isinstance(model, ScalarModel) and name.startswith(f"{HEAD}."):
        return f"{model.value_head_prefix}.{name.removeprefix(f'{HEAD}.')}"
    return name
