"""The generation engine: its settings and its protocol.

Engines take tokens and return tokens, never text. ``vllm_engine`` and ``transformers_engine`` both run behind
``ThreadedEngine`` (``threaded.py``), so waiting, pausing, weight updates and versions are the same.

The token ids that end a sequence come from the files of a model folder. They are never guessed from token values or the pad token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from togi.errors import ConfigError
from togi.plan.machine import Released
from togi.sample import Generation, Sampling
from togi.weights.buckets import Bucket, Manifest


def end_token_ids(folder: str) -> frozenset[int]:
    """All end-of-sequence ids of generation_config.json, config.json and the tokenizer. May be empty.

    Models often have several (Llama 3: end of text and end of turn), and the files often disagree: each of the ids ends a
    sequence. Raises ConfigError if the folder has no config.json.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise ConfigError(f"{folder!r} is not a model folder: it has no config.json")
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        eos = _read(root / name).get("eos_token_id")
        if eos is not None:
            found.update(eos if isinstance(eos, list) else [eos])
    # the tokenizer configuration has the text of the token: look up its id
    token = _read(root / "tokenizer_config.json").get("eos_token")
    content = token["content"] if isinstance(token, dict) else token
    added = _read(root / "tokenizer.json").get("added_tokens", [])
    found.update(entry["id"] for entry in added if entry["content"] == content)
    return frozenset(found)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Empty if there is no such file, since not every model folder has all of them."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run one engine. ``model`` is a local folder in Hugging Face format.

    ``kv_cache_gb`` (GiB) is the size of the KV cache of vLLM on CPUs and of the Transformers engine.
    ``tensor_parallel_size``: the number of vLLM's worker processes that share the model, with one GPU each if there are GPUs.
    ``enforce_eager``: no compilation. CPUs never compile. ``gpu_memory_utilization`` is vLLM's share of a GPU's memory.
    ``threads`` 0 does not change the number of CPU threads.
    ``device_index``: the accelerator of the Transformers engine.
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

    A weight update takes three calls: ``begin_update``, ``load_bucket`` (once or more), ``finish_update``. In between, and after a
    failed update, requests raise ``WeightSyncError`` until a complete update has succeeded.
    """

    @property
    def version(self) -> int:
        """The policy version of the loaded weights: 0 at the start, then the version of the last finished update."""
        ...

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one continuation. Concurrent calls are batched. Cancelling the call aborts the request.

        Generation stops at the model's end-of-sequence ids (all of generation config, config and tokenizer) unless
        ``sampling.ignore_eos``, at ``sampling.stop_token_ids``, at ``max_tokens``, or when ``max_model_len`` is reached.
        The stop token is part of the result and counts for ``min_tokens``, so ``min_tokens=1`` restricts nothing.
        Raises ``DataError`` for an empty prompt, or one that leaves no room for a token.
        """
        ...

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ``tokens[1:]``, each given the tokens before it, under the current weights.

        The engine must be idle. Raises ``DataError`` if ``tokens`` are too few or too many.
        """
        ...

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The experts of each token in each layer of a mixture, under the current weights: [tokens, layers, choices].

        Empty if the engine cannot observe the routing, as in compiled graphs of vLLM. The engine must be idle.
        """
        ...

    async def begin_update(self, manifest: Manifest) -> None:
        """Begin an update. It may replace an unfinished one.

        Raises ``WeightSyncError``, without any change, if requests are running or the manifest does not fit the model.
        """
        ...

    async def load_bucket(self, bucket: Bucket) -> None:
        """Load some tensors of the manifest. ``bucket.data`` may be reused once this returns."""
        ...

    async def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """``load_bucket`` for tensors of this process. The engine may use them without a copy.

        They must not change before the next update begins.
        """
        ...

    async def finish_update(self) -> None:
        """Finish the update: clear the caches of the old weights, and set ``version`` to the manifest's.

        Raises ``WeightSyncError`` with the names of missing tensors.
        """
        ...

    async def pause(self) -> None:
        """Hold back new requests, and return when the running ones have finished."""
        ...

    async def resume(self) -> None:
        """Admit requests again, the waiting ones first."""
        ...

    async def sleep(self) -> Released:
        """Free the memory of the KV cache. Requests and updates are refused until ``wake``.

        vLLM on a GPU also moves its weights to host memory. Returns the bytes freed, and the memory in use before and after.
        """
        ...

    async def wake(self) -> None:
        """Allocate again what ``sleep`` freed."""
        ...

    async def shutdown(self) -> None:
        """Stop the engine's thread and free its memory. Unfinished requests fail."""
        ...

    def stop(self) -> None:
        """``shutdown`` outside of an event loop. Waits for the thread for a limited time only."""
        ...
