"""What a generation engine is: its settings and its protocol.

Tokens in, tokens out: engines never see text. ``vllm_engine`` and ``transformers_engine`` both run behind
``ThreadedEngine`` (``threaded.py``), so waiting, pausing, weight updates and versions behave the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from togi.errors import ConfigError
from togi.model.weights import Bucket, Manifest
from togi.plan.memory import Released
from togi.sample import Generation, Sampling

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run one engine. ``model`` is a local folder in Hugging Face format.

    ``kv_cache_gb`` (GiB) bounds the KV cache where it is sized by hand: vLLM on CPUs, and the Transformers engine.
    ``tensor_parallel_size``: of vLLM, the worker processes that share the model, on one GPU each where there are any.
    ``enforce_eager``: no compilation, which is never done on CPUs. ``gpu_memory_utilization`` is vLLM's share of a GPU.
    ``threads`` 0 leaves the number of CPU threads alone.
    ``device_index``: the accelerator that the Transformers engine runs on.
    """

    model: str
    dtype: str = "bfloat16"
    max_model_len: int = 2048
    seed: int = 0
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float = 1.0
    max_num_seqs: int = 128
    threads: int = 0
    trust_remote_code: bool = False
    device_index: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"a generation engine runs in {' or '.join(DTYPES)}, not in {self.dtype!r}")


class RolloutEngine(Protocol):
    """A generation engine. All methods may be called concurrently from any event loop.

    Weights change in three calls, ``begin_update``, ``load_bucket`` (once or more), ``finish_update``. In between, and
    after an update that failed, requests get ``WeightSyncError`` until a complete update has succeeded.
    """

    @property
    def version(self) -> int:
        """The policy version of the loaded weights: 0 at the start, then that of the last finished update."""
        ...

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one continuation; concurrent calls are batched. Cancelling the call aborts the request.

        Stops at the model's end-of-sequence ids (all of generation config, config and tokenizer) unless
        ``sampling.ignore_eos``, at ``sampling.stop_token_ids``, at ``max_tokens``, or where ``max_model_len`` is full.
        The stop token is part of the result and counts for ``min_tokens``, so ``min_tokens=1`` restricts nothing.
        Raises ``DataError`` for a prompt that leaves no room for a token.
        """
        ...

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ``tokens[1:]``, each given what is before it, under the current weights.

        The engine must be idle.
        """
        ...

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The experts that each token goes to in each layer of a mixture, under the current weights (tokens x layers x choices).

        Empty where they cannot be seen: in compiled graphs of vLLM. The engine must be idle.
        """
        ...

    async def begin_update(self, manifest: Manifest) -> None:
        """Open an update. If requests run or the tensors are not those of the model: ``WeightSyncError``, nothing changes.

        A new update may replace one that was not finished.
        """
        ...

    async def load_bucket(self, bucket: Bucket) -> None:
        """Load some tensors of the manifest. ``bucket.data`` may be reused once this returns."""
        ...

    async def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """``load_bucket`` for tensors of this process, which the engine may use as they are: they must not change before the
        next update begins.
        """
        ...

    async def finish_update(self) -> None:
        """Close the update: caches of the old weights are dropped and ``version`` becomes the manifest's.

        Raises ``WeightSyncError`` with their names if tensors are missing.
        """
        ...

    async def pause(self) -> None:
        """Admit no new requests (they wait) and return when the running ones have finished."""
        ...

    async def resume(self) -> None:
        """Admit requests again, the waiting ones first."""
        ...

    async def sleep(self) -> Released:
        """Give back the memory of the KV cache. Requests and updates are refused until ``wake``.

        vLLM on a GPU also moves its weights to host memory. Returns what was let go of and the memory measured before and
        after.
        """
        ...

    async def wake(self) -> None:
        """Undo ``sleep``."""
        ...

    async def shutdown(self) -> None:
        """Stop the engine's thread and free what it holds. Unfinished requests fail."""
        ...

    def stop(self) -> None:
        """The same outside an event loop; waits no longer than a step takes."""
        ...
