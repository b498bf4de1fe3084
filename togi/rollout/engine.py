"""The generation engine: its settings, and what runs it on a thread of its own, used from asyncio.

Engines take tokens and return tokens, never text. ``RolloutEngine`` has admission, pausing, weight updates, cancellation and
failure, once for all. Below it is a ``Core``: the few synchronous operations in which vLLM and Transformers differ. All calls of
a core run on the engine's thread, because OpenMP threads belong to the thread that starts them. So cores need no locks. The token
ids that end a sequence come from the files of a model folder. They are never guessed from token values or the pad token.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import count
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.errors import ConfigError, DataError, WeightSyncError
from togi.plan.engine_args import Scalar
from togi.plan.machine import Released
from togi.sample import Generation, Sampling
from togi.weights.adapters import Base
from togi.weights.buckets import Bucket, Manifest, TensorSpec, pack_buckets
from togi.weights.carriers import Announced, Rendezvous
from togi.weights.updates import UpdateLog

T = TypeVar("T")
P = ParamSpec("P")
MERGED_BUCKET_BYTES = 256 << 20
STOP_SECONDS = 10.0


def end_token_ids(folder: str) -> frozenset[int]:
    """All end-of-sequence ids of generation_config.json, config.json and the tokenizer. May be empty.

    Models often have several (Llama 3: end of text and end of turn), and the files often disagree: each of the ids ends a
    sequence. Raises ConfigError if the folder has no config.json.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise ConfigError(f"{folder!r} is not a model folder: it has no config.json")

    def entry(name: str, key: str) -> object:
        """An entry of a JSON file. None if there is none, or no such file: not every model folder has all of them."""
        path = root / name
        return json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None

    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        match entry(name, "eos_token_id"):
            case int() as eos:
                found.add(eos)
            case list() as several:
                found.update(several)
    # the tokenizer configuration has the text of the token: look up its id
    token, added = entry("tokenizer_config.json", "eos_token"), entry("tokenizer.json", "added_tokens")
    content = token["content"] if isinstance(token, dict) else token
    if isinstance(added, list):
        found.update(known["id"] for known in added if known["content"] == content)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run one engine. ``model`` is a local folder in Hugging Face format.

    ``kv_cache_gb`` (GiB) is the size of the KV cache of vLLM on CPUs and of the Transformers engine.
    ``tensor_parallel_size``: the number of vLLM's worker processes that share the model, with one GPU each if there are GPUs.
    ``enforce_eager``: no compilation. CPUs never compile. ``gpu_memory_utilization`` is vLLM's share of a GPU's memory.
    ``enable_sleep_mode``: ``sleep`` will be called; without it vLLM on a GPU cannot. ``max_num_seqs``: sequences in progress, by
    default what vLLM takes for the GPU, or 128 in the Transformers engine. ``extra``: more arguments of vLLM, by its own names.
    ``threads`` 0 does not change the number of CPU threads.
    ``device_index``: the accelerator of the Transformers engine. ``recompute_kv``: after an update, running requests compute their
    keys and values again, by the new weights.
    """

    model: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_model_len: int = 2048
    seed: int = 0
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float = 1.0
    enable_sleep_mode: bool = False
    quantization: Literal["fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    max_num_seqs: int | None = None
    threads: int = 0
    trust_remote_code: bool = False
    device_index: int = 0
    recompute_kv: bool = False
    extra: Mapping[str, Scalar] = field(default_factory=dict)


class Parts(Protocol):
    """The worker processes of a tensor-parallel engine, each of which can open a parcel of weights itself."""

    def join(self, meetings: Sequence[Rendezvous], *, on_gpu: bool) -> None:
        """Each joins a channel with its own of the ``meetings``."""

    def load(self, parcels: Sequence[Announced]) -> None:
        """Each loads its own of the ``parcels``, or the only one."""

    def checksum(self) -> str:
        """The checksum of what each has received in this update; all of them if they differ."""


Done = dict[int, Generation | list[float]]
"""What has finished, by key: an answer, or the log-probs of a text."""


class Core(Protocol):
    """A synchronous engine. The arguments of ``add`` are already checked: ``sampling.max_tokens`` fits the model's length.

    ``step`` returns what has finished, by the key passed to ``add``, or to ``score`` if that returned None. ``hold`` makes sure
    that no step is in flight, and returns what has finished in doing so: weights may then change, until ``finish_update`` gives
    them their ``version``.
    """

    expected: tuple[TensorSpec, ...]
    parts: Parts | None
    facts: Mapping[str, str | bool]

    def add(self, key: int, prompt: tuple[int, ...], sampling: Sampling) -> None: ...
    def abort(self, key: int) -> None: ...
    def step(self) -> Done: ...
    def hold(self) -> Done: ...
    def score(self, key: int, tokens: tuple[int, ...]) -> list[float] | None: ...
    def routes(self, tokens: tuple[int, ...]) -> NDArray[np.int64]: ...
    def begin_update(self) -> None: ...
    def load(self, bucket: Bucket) -> None: ...
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def finish_update(self, version: int) -> None: ...
    def drop_weights(self) -> None: ...
    def sleep(self, *, keep_weights: bool) -> Released: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


def on_thread(
    method: Callable[Concatenate[RolloutEngine, P], T],
) -> Callable[Concatenate[RolloutEngine, P], Coroutine[object, object, T]]:
    """The method as a coroutine that runs it on the engine's thread, between two steps of the core."""

    @wraps(method)
    async def call(engine: RolloutEngine, /, *arguments: P.args, **named: P.kwargs) -> T:
        result: Future[T] = Future()
        engine.send(partial(engine.answer, result, partial(method, engine, *arguments, **named)))
        return await asyncio.wrap_future(result)

    return call


class RolloutEngine:
    """A generation engine: a core on its own thread. All methods may be called concurrently from any event loop.

    A weight update takes three calls: ``begin_update``, ``load_bucket`` (once or more), ``finish_update``. In between, and after a
    failed update, no request goes on until a complete update has succeeded: those that run keep their tokens and go on with the
    new weights, new ones wait. An error of ``make_core`` is raised by the constructor.
    """

    def __init__(self, make_core: Callable[[EngineSettings], Core], settings: EngineSettings) -> None:
        self._model, self._max_model_len = settings.model, settings.max_model_len
        self._adapter: dict[str, Tensor] = {}
        self._base: Base | None = None  # made by the first adapter
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._keys = count()
        # only the engine's thread uses these: other threads put a call into the queue
        self._running: dict[int, Future[Any]] = {}
        self._waiting: dict[
            Future[Generation], Callable[[], None]
        ] = {}  # for an update, each with the call that admits it
        self._asleep = self._stopped = False
        self._failure: Exception | None = None
        # guards _failure: no call may enter the queue after the engine has failed
        self._door = threading.Lock()
        # make the core on the thread, and wait until it is ready
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_core, settings, started), daemon=True, name="engine"
        )
        self._thread.start()
        started.result()

    @property
    def version(self) -> int:
        """The policy version of the loaded weights: 0 at the start, then the version of the last finished update."""
        return self._log.version

    @property
    def facts(self) -> Mapping[str, str | bool]:
        """What computes, by name: version, and with vLLM the model runner and the scheduling."""
        return self._core.facts

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one continuation. Concurrent calls are batched. Cancelling the call aborts the request.

        Generation stops at the model's end-of-sequence ids (all of generation config, config and tokenizer) unless
        ``sampling.ignore_eos``, at ``sampling.stop_token_ids``, at ``max_tokens``, or when ``max_model_len`` is reached.
        The stop token is part of the result and counts for ``min_tokens``, so ``min_tokens=1`` restricts nothing.
        Raises ``DataError`` for an empty prompt, or one that leaves no room for a token.
        """
        room = self._max_model_len - len(prompt_tokens)
        if room < 1 or len(prompt_tokens) == 0:
            raise DataError(
                f"a prompt of {len(prompt_tokens)} tokens cannot be continued within --max_len {self._max_model_len}: "
                "it needs at least one token and room for one more"
            )
        assert sampling.max_tokens >= 1
        key, future = next(self._keys), Future[Generation]()
        fitting = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        self.send(partial(self._admit, key, tuple(prompt_tokens), fitting, future))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.send(partial(self._abort, key))
            raise

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ``tokens[1:]``, each given the tokens before it, under the current weights.

        Raises ``DataError`` if ``tokens`` are too few or too many.
        """
        future: Future[list[float]] = Future()
        await self._begin_score(tuple(tokens), future)
        return await asyncio.wrap_future(future)

    @on_thread
    def _begin_score(self, tokens: tuple[int, ...], future: Future[list[float]]) -> None:
        """Score a text, at once or as a request among the others."""
        self._check_scorable(tokens)
        key = next(self._keys)
        scores = self._core.score(key, tokens)
        future.set_running_or_notify_cancel()
        if scores is None:
            self._running[key] = future
        else:
            future.set_result(scores)

    @on_thread
    def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The experts of each token in each layer of a mixture, under the current weights: [tokens, layers, choices].

        Empty if the engine cannot observe the routing, as in compiled graphs of vLLM. The engine must be idle.
        """
        self._check_scorable(tokens)
        self._check_idle("its routes are read")
        return self._core.routes(tuple(tokens))

    @on_thread
    def begin_update(self, manifest: Manifest) -> None:
        """Begin an update. It may replace an unfinished one. Requests that run stop where they are.

        Raises ``WeightSyncError``, without any change, if the manifest does not fit the model.
        """
        if self._asleep:
            raise WeightSyncError("the weights of a sleeping engine cannot be updated: call wake first")
        # an adapter alone is merged into the weights of the engine's own files
        if manifest.adapter_scale is not None:
            self._base = self._base or Base(self._model, self._core.expected)
        self._log.begin(manifest)
        self._adapter = {}
        self._give(self._core.hold())
        self._core.begin_update()

    @on_thread
    def load_bucket(self, bucket: Bucket) -> None:
        """Load some tensors of the manifest. ``bucket.data`` may be reused once this returns."""
        self._log.arrive(bucket.tensors)
        if self._log.adapter_scale is None:
            self._core.load(bucket)
        else:
            self._adapter |= dict(bucket.own().unpack())

    @on_thread
    def join_parts(self, meetings: Sequence[Rendezvous], *, on_gpu: bool) -> None:
        """Connect every part of a tensor-parallel engine with the sender of weights."""
        self._parts.join(meetings, on_gpu=on_gpu)

    @on_thread
    def load_in_parts(self, parcels: Sequence[Announced]) -> None:
        """``load_bucket`` for parcels that the parts of a tensor-parallel engine open themselves."""
        self._log.arrive(parcels[0].tensors)
        self._parts.load(parcels)

    @on_thread
    def checksum_of_parts(self) -> str:
        return self._parts.checksum()

    @on_thread
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """``load_bucket`` for tensors of this process. The engine may use them without a copy.

        They must not change before the next update begins.
        """
        if self._log.adapter_scale is None:
            self._core.load_tensors(self._arriving(tensors))
        else:
            self._adapter |= {name: tensor.clone() for name, tensor in self._arriving(tensors)}

    @on_thread
    def finish_update(self) -> None:
        """Finish the update: no request will read what older weights have cached but those that ran, and those only their own.

        ``version`` becomes the manifest's. Raises ``WeightSyncError`` with the names of missing tensors.
        """
        self._log.check_complete()
        if self._log.adapter_scale is not None:
            self._load_merged(self._log.adapter_scale)
        self._core.finish_update(self._log.arriving)
        self._log.finish()
        waiting, self._waiting = self._waiting, {}
        for admit in waiting.values():
            admit()

    @on_thread
    def sleep(self, *, keep_weights: bool = True) -> Released:
        """Free the memory of the KV cache. Requests and updates are refused until ``wake``.

        vLLM on a GPU also moves its weights to host memory, or forgets them without ``keep_weights``: requests are then refused
        until the next update. Returns the bytes freed, and the memory in use before and after.
        """
        self._check_idle("it sleeps")
        if not keep_weights:
            self._log.expire()
        released = Released(0, 0, 0) if self._asleep else self._core.sleep(keep_weights=keep_weights)
        self._asleep = True
        return released

    @on_thread
    def drop_weights(self) -> None:
        """Forget weights that are out of date, as their policy trains. Requests raise ``WeightSyncError`` until the next update.

        The Transformers engine frees the memory of its weights and caches, vLLM keeps it.
        """
        self._check_idle("its weights are dropped")
        self._log.expire()
        self._core.drop_weights()

    @on_thread
    def wake(self) -> None:
        """Allocate again what ``sleep`` freed; the KV cache of an engine without weights only when an update has finished."""
        if self._asleep:
            self._core.wake()
        self._asleep = False

    async def shutdown(self) -> None:
        """Stop the engine's thread and free its memory. Unfinished requests fail."""
        if self._failure is None:
            self.send(self._stop)
        await asyncio.to_thread(self._thread.join)

    def stop(self) -> None:
        """``shutdown`` outside of an event loop. Waits for the thread for a limited time only."""
        if self._failure is None:
            self.send(self._stop)
        self._thread.join(STOP_SECONDS)

    # All methods below run on the engine's thread, except send.

    def send(self, call: Callable[[], None]) -> None:
        """Put a call into the queue of the engine's thread."""
        with self._door:
            if self._failure is not None:
                raise RuntimeError("the generation engine is not running") from self._failure
            self._calls.put(call)

    def answer(self, result: Future[T], function: Callable[[], T]) -> None:
        """Call ``function`` and give ``result`` what it returns or raises. Not if nobody waits for it any more."""
        if not result.set_running_or_notify_cancel():
            return
        try:
            self._check_alive()
            result.set_result(function())
        except Exception as error:  # noqa: BLE001 - passed to the caller, which waits on another thread
            result.set_exception(error)

    def _run(
        self, make_core: Callable[[EngineSettings], Core], settings: EngineSettings, started: Future[None]
    ) -> None:
        try:
            if settings.threads > 0:
                torch.set_num_threads(settings.threads)
            self._core = make_core(settings)
            self._log = UpdateLog(self._core.expected)
        except BaseException as error:  # noqa: BLE001 - the thread's edge: the constructor raises it
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while not self._stopped:
                self._turn()
            self._core.close()
            self._fail(RuntimeError("the generation engine was shut down"))
        except Exception as error:  # noqa: BLE001 - the thread's edge: all waiting callers get the error
            self._fail(error)

    def _turn(self) -> None:
        """Run all queued calls, then one step of the core. Blocks only while no request can go on."""
        if not self._running or self._log.open:
            self._calls.get()()
        while not self._calls.empty():
            self._calls.get()()
        if self._running and not (self._log.open or self._stopped):
            self._give(self._core.step())

    def _give(self, done: Done) -> None:
        """Give what has finished to those who asked for it."""
        for key, result in done.items():
            if (future := self._running.pop(key, None)) is not None:
                future.set_result(result)

    def _admit(self, key: int, prompt: tuple[int, ...], sampling: Sampling, future: Future[Generation]) -> None:
        # an update: wait for its end; after a failure fall through, so that the request gets the error
        if self._log.open and self._failure is None:
            self._waiting[future] = partial(self._admit, key, prompt, sampling, future)
            return
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._check_usable()
            self._core.add(key, prompt, sampling)
        except Exception as error:  # noqa: BLE001 - an error of this request only: its caller gets it
            future.set_exception(error)
            return
        self._running[key] = future

    def _abort(self, key: int) -> None:
        if self._running.pop(key, None) is not None:
            self._core.abort(key)

    @property
    def _parts(self) -> Parts:
        assert self._core.parts is not None
        return self._core.parts

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the generation engine is not running") from self._failure

    def _check_usable(self) -> None:
        self._check_alive()
        if self._asleep:
            raise RuntimeError("the generation engine is asleep: call wake first")
        if self._log.open or self._log.expired:
            raise WeightSyncError(f"{self._log.opening}: the engine waits for a complete update")

    def _check_idle(self, what: str) -> None:
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests are running: wait for their end before {what}")

    def _check_scorable(self, tokens: Sequence[int]) -> None:
        if not 1 < len(tokens) < self._max_model_len:
            raise DataError(
                f"{len(tokens)} tokens cannot be scored: at least 2 and fewer than {self._max_model_len} can"
            )
        self._check_usable()

    def _arriving(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self._log.arrive([TensorSpec.of(name, tensor)])
            yield name, tensor

    def _load_merged(self, scale: float) -> None:
        """Load full weights into the core: those of the engine's files, merged with the received adapter."""
        assert self._base is not None
        whole = self._base.with_adapter(self._adapter, scale)
        device = next(iter(self._adapter.values())).device
        for bucket in pack_buckets(whole, MERGED_BUCKET_BYTES, device):
            self._core.load(bucket)
        self._adapter = {}

    def _stop(self) -> None:
        self._stopped = True

    def _fail(self, error: Exception) -> None:
        """Fail all unfinished and all later calls with ``error``, so that no caller waits for ever."""
        with self._door:
            self._failure = error
        for future in [*self._running.values(), *self._waiting]:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._running.clear()
        self._waiting.clear()
        # calls that entered the queue before the failure was set: each finds it and fails
        while not self._calls.empty():
            self._calls.get()()
