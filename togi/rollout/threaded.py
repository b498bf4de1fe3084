"""An engine on its own thread, used from asyncio: admission, pausing, weight updates, cancellation and failure.

``ThreadedEngine`` implements ``RolloutEngine`` over a ``Core``: the few synchronous operations in which vLLM and Transformers
differ. All calls of a core run on the engine's thread, because OpenMP threads belong to the thread that starts them. So cores need
no locks.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.errors import DataError, WeightSyncError
from togi.plan.machine import Released
from togi.rollout.engine import EngineSettings
from togi.sample import FinishReason, Generation, Sampling
from togi.weights.adapters import BaseFiles
from togi.weights.buckets import Bucket, Manifest, TensorSpec, pack_buckets
from togi.weights.updates import UpdateLog

T = TypeVar("T")
MERGED_BUCKET_BYTES = 256 << 20
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request of a core. ``key`` is the one passed to ``Core.add``. Log-probs in nats."""

    key: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: FinishReason


class Core(Protocol):
    """A synchronous engine. The arguments of ``add`` are already checked: ``sampling.max_tokens`` fits the model's length."""

    expected: tuple[TensorSpec, ...]

    def add(self, key: int, prompt: tuple[int, ...], sampling: Sampling) -> None: ...
    def abort(self, key: int) -> None: ...
    def step(self) -> list[Finished]: ...
    def score(self, tokens: tuple[int, ...]) -> list[float]: ...
    def routes(self, tokens: tuple[int, ...]) -> NDArray[np.int64]: ...
    def begin_update(self) -> None: ...
    def load(self, bucket: Bucket) -> None: ...
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def finish_update(self) -> None: ...
    def sleep(self) -> Released: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    future: Future[Generation] = field(default_factory=Future)


class ThreadedEngine:
    """Runs a core on its own thread. Thread-safe; see ``RolloutEngine`` for the contract.

    An error of ``make_core`` is raised by the constructor.
    """

    def __init__(self, make_core: Callable[[], Core], settings: EngineSettings) -> None:
        self._model, self._max_model_len = settings.model, settings.max_model_len
        self._adapter: dict[str, Tensor] = {}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # only the engine's thread uses these: other threads put a call into the queue
        self._running: dict[int, _Request] = {}
        self._waiting: list[_Request] = []
        self._drained: list[Future[None]] = []
        self._paused = self._asleep = self._stopped = False
        self._next_key = 0
        self._failure: Exception | None = None
        # guards _failure: no call may enter the queue after the engine has failed
        self._door = threading.Lock()
        # make the core on the thread, and wait until it is ready
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_core, settings.threads, started), daemon=True, name="engine"
        )
        self._thread.start()
        started.result()

    @property
    def version(self) -> int:
        return self._log.version

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        room = self._max_model_len - len(prompt_tokens)
        if room < 1 or len(prompt_tokens) == 0:
            raise DataError(
                f"a prompt of {len(prompt_tokens)} tokens cannot be continued within --max_len {self._max_model_len}: "
                "it needs at least one token and room for one more"
            )
        assert sampling.max_tokens >= 1
        request = _Request(tuple(prompt_tokens), replace(sampling, max_tokens=min(sampling.max_tokens, room)))
        self._send(partial(self._admit, request))
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._send(partial(self._abort, request))
            raise

    async def score(self, tokens: Sequence[int]) -> list[float]:
        self._check_length(tokens)
        return await self._call(lambda: self._idle_core().score(tuple(tokens)))

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        self._check_length(tokens)
        return await self._call(lambda: self._idle_core().routes(tuple(tokens)))

    async def begin_update(self, manifest: Manifest) -> None:
        await self._call(partial(self._begin_update, manifest))

    async def load_bucket(self, bucket: Bucket) -> None:
        await self._call(partial(self._load_bucket, bucket))

    async def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        await self._call(partial(self._load_tensors, tensors))

    async def finish_update(self) -> None:
        await self._call(self._finish_update)

    async def pause(self) -> None:
        drained: Future[None] = Future()
        self._send(partial(self._pause, drained))
        await asyncio.wrap_future(drained)

    async def resume(self) -> None:
        await self._call(self._resume)

    async def sleep(self) -> Released:
        return await self._call(self._sleep)

    async def wake(self) -> None:
        await self._call(self._wake)

    async def shutdown(self) -> None:
        if self._failure is None:
            self._send(self._stop)
        await asyncio.to_thread(self._thread.join)

    def stop(self) -> None:
        if self._failure is None:
            self._send(self._stop)
        self._thread.join(STOP_SECONDS)

    def _check_length(self, tokens: Sequence[int]) -> None:
        if not 1 < len(tokens) < self._max_model_len:
            raise DataError(
                f"{len(tokens)} tokens cannot be scored: at least 2 and fewer than {self._max_model_len} can"
            )

    # All methods below run on the engine's thread, except _send and _call.

    def _send(self, call: Callable[[], None]) -> None:
        with self._door:
            if self._failure is not None:
                raise RuntimeError("the generation engine is not running") from self._failure
            self._calls.put(call)

    async def _call(self, function: Callable[[], T]) -> T:
        result: Future[T] = Future()

        def call() -> None:
            try:
                self._check_alive()
                result.set_result(function())
            except Exception as error:  # noqa: BLE001 - passed to the caller, which waits on another thread
                result.set_exception(error)

        self._send(call)
        return await asyncio.wrap_future(result)

    def _run(self, make_core: Callable[[], Core], threads: int, started: Future[None]) -> None:
        try:
            if threads > 0:
                torch.set_num_threads(threads)
            self._core = make_core()
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
        """Run all queued calls, then one step of the core. Blocks only while no request is running."""
        if not self._running:
            self._calls.get()()
        while not self._calls.empty():
            self._calls.get()()
        if self._running and not self._stopped:
            for done in self._core.step():
                request = self._running.pop(done.key)
                request.future.set_result(Generation(done.tokens, done.logprobs, done.reason, self._log.version))
        if not self._running:
            self._release_drained()

    def _admit(self, request: _Request) -> None:
        # paused: wait for resume; after a failure fall through, so that the request gets the error
        if self._paused and self._failure is None:
            self._waiting.append(request)
            return
        if not request.future.set_running_or_notify_cancel():
            return
        try:
            self._check_usable()
            self._core.add(self._next_key, request.prompt, request.sampling)
        except Exception as error:  # noqa: BLE001 - an error of this request only: its caller gets it
            request.future.set_exception(error)
            return
        self._running[self._next_key] = request
        self._next_key += 1

    def _abort(self, request: _Request) -> None:
        for key, running in self._running.items():
            if running is request:
                self._core.abort(key)
                del self._running[key]
                break

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the generation engine is not running") from self._failure

    def _check_usable(self) -> None:
        self._check_alive()
        if self._asleep:
            raise RuntimeError("the generation engine is asleep: call wake first")
        if self._log.open:
            raise WeightSyncError(f"{self._log.opening}: the engine waits for a complete update")

    def _idle_core(self) -> Core:
        self._check_usable()
        if self._running:
            raise RuntimeError("scoring needs an idle engine: pause it first")
        return self._core

    def _begin_update(self, manifest: Manifest) -> None:
        if self._asleep:
            raise WeightSyncError("the weights of a sleeping engine cannot be updated: call wake first")
        if self._running:
            raise WeightSyncError(f"{len(self._running)} requests are running: pause the engine before an update")
        # an adapter alone is merged into the weights of the engine's own files
        if manifest.adapter_scale is not None:
            self._base = BaseFiles.of(self._model, self._core.expected)
        self._log.begin(manifest)
        self._adapter = {}
        self._core.begin_update()

    def _load_bucket(self, bucket: Bucket) -> None:
        self._log.arrive(bucket.tensors)
        if self._log.adapter_scale is None:
            self._core.load(bucket)
        else:
            self._adapter |= dict(bucket.own().unpack())

    def _load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._log.adapter_scale is None:
            self._core.load_tensors(self._arriving(tensors))
        else:
            self._adapter |= {name: tensor.clone() for name, tensor in self._arriving(tensors)}

    def _arriving(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self._log.arrive([TensorSpec.of(name, tensor)])
            yield name, tensor

    def _finish_update(self) -> None:
        self._log.check_complete()
        if self._log.adapter_scale is not None:
            self._load_merged(self._log.adapter_scale)
        self._core.finish_update()
        self._log.finish()

    def _load_merged(self, scale: float) -> None:
        """Load full weights into the core: those of the engine's files, merged with the received adapter."""
        whole = self._base.with_adapter(self._core.expected, self._adapter, scale)
        device = next(iter(self._adapter.values())).device
        for bucket in pack_buckets(whole, MERGED_BUCKET_BYTES, device):
            self._core.load(bucket)
        self._adapter = {}

    def _pause(self, drained: Future[None]) -> None:
        if self._failure is not None:
            drained.set_exception(self._failure)
            return
        self._paused = True
        self._drained.append(drained)

    def _release_drained(self) -> None:
        for drained in self._drained:
            if drained.set_running_or_notify_cancel():
                drained.set_result(None)
        self._drained.clear()

    def _resume(self) -> None:
        self._paused = False
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._admit(request)

    def _sleep(self) -> Released:
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests are running: pause the engine before it sleeps")
        released = Released(0, 0, 0) if self._asleep else self._core.sleep()
        self._asleep = True
        return released

    def _wake(self) -> None:
        if self._asleep:
            self._core.wake()
        self._asleep = False

    def _stop(self) -> None:
        self._stopped = True

    def _fail(self, error: Exception) -> None:
        """Fail all unfinished and all later calls with ``error``, so that no caller waits for ever."""
        with self._door:
            self._failure = error
        for request in [*self._running.values(), *self._waiting]:
            if request.future.running() or request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)
        self._running.clear()
        self._waiting.clear()
        for drained in self._drained:
            drained.set_exception(error)
        # calls that entered the queue before the failure was set: each finds it and fails
        while not self._calls.empty():
            self._calls.get()()
