"""The vLLM engine in this process. Only this file imports vLLM and uses its internals.

With tensor parallelism the scheduler stays in this process, and each part of the model gets a worker process of vLLM's, on a CPU
too. Calls to workers are sent as functions of this module, and weights through shared memory.

Written for vLLM 0.32 and its V1 engine. Side effects on the process: at the start vLLM sets the global seed and, on CPUs, strict
NUMA memory binding; requests without a seed draw from torch's global generator.

Weight updates use vLLM's layerwise reload (``vllm.model_executor.model_loader.reload``), with three repairs. Without them outputs
are silently wrong; ``tests/e2e/test_rollout_engines.py`` compares an updated engine with a fresh one:

* A tied ``lm_head`` on a CPU has its own packed copy of the embedding, which the reload does not update: it is packed again.
* Experts whose kernel exists are not packed again on a CPU: the kernel is dropped before the reload.
* An abandoned update leaves half-filled layers, which would count tensors twice: they are finalised first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from togi.algo.policy import chosen_experts
from togi.errors import ConfigError, RunError
from togi.model.checkpoint import expected_manifest
from togi.plan.machine import Released, release_pages, resident_bytes, return_freed
from togi.rollout.engine import Done, EngineSettings, Parts, end_token_ids
from togi.sample import FinishReason, Generation, Sampling
from togi.weights.buckets import Bucket, TensorSpec
from togi.weights.carriers import Announced, Channel, Inbox, Rendezvous

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_worker import Worker

T = TypeVar("T")
SCORE_REQUEST = -1  # of an idle engine
NOT_SHARED = (
    "gpu_memory_utilization",
    "enable_sleep_mode",
    "kv_cache_gb",
    "threads",
    "device_index",
    "recompute_kv",
    "extra",
)
"""The settings that vLLM does not have on every device; it has all others, by the same names."""
MIN_BATCHED_TOKENS = 4096
BLOCK_ON_CPU = 32  # tokens; the minimum of vLLM's attention on CPUs


class VllmCore:
    """``Core`` over vLLM's synchronous ``LLMEngine``. Starts in about 8 s, most of them imports."""

    def __init__(self, settings: EngineSettings) -> None:
        _set_environment()
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.core.sched.interface import PauseState
        from vllm.v1.engine.llm_engine import LLMEngine

        self.expected = expected_manifest(settings.model, settings.dtype, settings.trust_remote_code)
        self._on_cpu = bool(current_platform.is_cpu())
        self._is_eager = self._on_cpu or settings.enforce_eager
        self._ends = end_token_ids(settings.model)
        self._in_process = settings.tensor_parallel_size == 1
        self._forgot_weights = False
        self._states = PauseState
        self._recompute_kv = settings.recompute_kv
        self._updates = 0
        _skip_token_ranks()
        set_num_threads = torch.set_num_threads
        try:
            arguments = EngineArgs(**engine_arguments(settings, self._on_cpu))
            # as vLLM's own offline class: 4 to 8 times the batch that an engine without a context takes on a GPU
            self._engine = LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS)
        except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            if not settings.extra:
                raise
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            given = " ".join(f"{name}={value}" for name, value in settings.extra.items())
            raise ConfigError(
                f"--vllm_args {given}: vLLM does not start with it ({' '.join(reason.split())[:300]}): change it, or leave it out."
            ) from error
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a no-op
        self._label(0)
        config = self._engine.vllm_config
        self.facts: Mapping[str, str | bool] = {
            "vllm": vllm.__version__,
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }
        self.parts: Parts | None = None
        if not self._in_process:
            self._ask_workers(_skip_token_ranks)
            self.parts = WorkerParts(self._ask_workers)

    def add(self, key: int, prompt: tuple[int, ...], sampling: Sampling) -> None:
        ends = frozenset() if sampling.ignore_eos else self._ends
        params = _parameters(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_tokens=max(0, min(sampling.min_tokens, sampling.max_tokens) - 1),  # vLLM does not count the stop token
            stop_token_ids=sorted(ends.union(sampling.stop_token_ids)),
            ignore_eos=True,  # stop_token_ids has the end tokens: without a tokenizer vLLM knows only some of them
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=0,
        )
        self._engine.add_request(str(key), self._prompt(prompt), params)

    def abort(self, key: int) -> None:
        self._engine.abort_request([str(key)])

    def step(self) -> Done:
        return {int(output.request_id): _result(output) for output in self._engine.step() if output.finished}

    def hold(self) -> Done:
        """With asynchronous scheduling vLLM computes the next step while it hands out the last: wait for it, and begin none."""
        done: Done = {}
        self._scheduler.set_pause_state(self._states.PAUSED_ALL)
        while self._engine.engine_core.engine_core.batch_queue:
            done |= self.step()
        return done

    def score(self, key: int, tokens: tuple[int, ...]) -> None:
        self._engine.add_request(str(key), self._prompt(tokens), _parameters(max_tokens=1, prompt_logprobs=0))
        # ahead of all that wait: the caller waits for this one
        waiting = self._scheduler.waiting
        *_, request = waiting
        waiting.remove_request(request)
        waiting.prepend_request(request)

    def routes(self, tokens: tuple[int, ...]) -> NDArray[np.int64]:
        """Read the routers' outputs by hooks while the tokens are scored.

        vLLM's own option to return routes does not support CPUs. A compiled graph runs no hooks.
        """
        if not self._is_eager:
            return np.empty((0, 0, 0), dtype=np.int64)
        self._ask_workers(_watch_routers)
        try:
            self.score(SCORE_REQUEST, tokens)
            while SCORE_REQUEST not in self.step():
                pass
        finally:
            seen = self._ask_workers(_routers_seen)
        routes_TMC = seen[0]  # tensor parallelism does not split routers: all workers have the same
        assert len(routes_TMC) == len(tokens), f"vLLM routed {len(routes_TMC)} tokens for {len(tokens)}"
        return routes_TMC

    def begin_update(self) -> None:
        self._ask_workers(_start_reload)
        if self.parts is not None:
            self._ask_workers(_open_inbox)

    def load(self, bucket: Bucket) -> None:
        if self._in_process:
            # the reload keeps references until a layer is complete: give it a copy that the sender cannot overwrite
            self.load_tensors(bucket.own().unpack())
            return
        # worker processes: they copy the bucket from shared memory before this returns
        segment = SharedMemory(create=True, size=max(1, bucket.data.nbytes))
        try:
            _bytes_of(segment, bucket.data.nbytes)[:] = bucket.as_tensor().numpy()
            self._ask_workers(_load_shared, segment.name, bucket.tensors, bucket.offsets, bucket.data.nbytes)
        finally:
            segment.close()
            segment.unlink()

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        assert self._in_process
        self._ask_workers(_load, tensors)

    def finish_update(self, version: int) -> None:
        self._ask_workers(_finish_reload)
        if self._forgot_weights:  # only now: an update needs room of its own
            self._engine.wake_up(["kv_cache"])
            self._forgot_weights = False
        # A new salt for the cache, so that no later request finds a block of earlier weights. A request that runs keeps its own
        # blocks, unless it is to compute them again.
        self._updates += 1
        self._label(version)
        self._engine.reset_prefix_cache(reset_running_requests=self._recompute_kv)
        # those that wait have no blocks, and shall find none of older weights
        for request in self._scheduler.waiting:
            request.cache_salt, request.block_hashes = str(self._updates), []
            request.update_block_hashes()
        self._scheduler.set_pause_state(self._states.UNPAUSED)

    def sleep(self, *, keep_weights: bool) -> Released:
        self._reset_prefix_cache()
        if self._on_cpu:
            return _added_up(self._ask_workers(_release_kv_pages))
        # on a GPU vLLM frees the cache, and moves the weights (level 1) or frees them too (level 2); measure the memory around it
        before = self._ask_workers(_cache_and_memory)
        self._engine.sleep(level=1 if keep_weights else 2)
        self._forgot_weights = not keep_weights
        after = self._ask_workers(_cache_and_memory)
        return _added_up([Released(cache, used, now) for (cache, used), (_, now) in zip(before, after, strict=True)])

    def drop_weights(self) -> None:
        """Do nothing: vLLM loads new weights into the memory of the old ones."""

    def wake(self) -> None:
        if not self._on_cpu:  # on a CPU released pages are allocated again, zeroed, at the first access
            self._engine.wake_up(["weights"] if self._forgot_weights else None)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    @property
    def _scheduler(self) -> Scheduler:
        return self._engine.engine_core.engine_core.scheduler

    def _prompt(self, tokens: tuple[int, ...]) -> dict[str, object]:
        """A prompt that shares cached blocks only with others under the same weights."""
        return {"prompt_token_ids": list(tokens), "cache_salt": str(self._updates)}

    def _label(self, version: int) -> None:
        """Tell vLLM the version of its weights, with which it marks tokens."""
        self._engine.set_weight_version(str(version))

    def _ask_workers(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Call a function of this module on every worker. Returns the results by rank."""
        answers: list[T] = self._engine.collective_rpc(function, args=arguments)
        return answers

    def _reset_prefix_cache(self) -> None:
        done = self._engine.reset_prefix_cache()
        assert done, "vLLM did not reset its prefix cache: a request still holds blocks"


class WorkerParts:
    """``Parts`` that are vLLM's worker processes. ``ask``: calls a function of this module on each."""

    def __init__(self, ask: Callable[..., list[Any]]) -> None:
        self._ask = ask
        self._ask(_set_channels, (), False)

    def join(self, meetings: Sequence[Rendezvous], *, on_gpu: bool) -> None:
        self._ask(_set_channels, tuple(meetings), on_gpu)

    def load(self, parcels: Sequence[Announced]) -> None:
        self._ask(_load_parcel, tuple(parcels))

    def checksum(self) -> str:
        return " ".join(dict.fromkeys(self._ask(_checksum)))


def _set_environment() -> None:
    """Set the variables that vLLM reads at its import. Those that the user has set stay, except multiprocessing."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # it gives no processed log-probs, so no request can take it, and to build it takes nvcc
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # this process has threads, of Ray and its own: a fork would copy locks that they hold
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def engine_arguments(settings: EngineSettings, on_cpu: bool) -> dict[str, object]:
    """The arguments of vLLM's ``EngineArgs``. ``OWN_ARGUMENTS`` has all names but those that ``--vllm_args`` may replace."""
    shared = {name: value for name, value in asdict(settings).items() if name not in NOT_SHARED} | {
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else "mp",
    }
    if not on_cpu:
        return shared | {
            # vLLM's "fp8" is for weights that are stored in it
            "quantization": "fp8_per_tensor" if settings.quantization == "fp8" else settings.quantization,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enable_sleep_mode": settings.enable_sleep_mode,
            **settings.extra,
        }
    # Chunked prefill with a seed fails on CPUs ("CPU Generator does not use offset"), so it is off. An explicit cache size with
    # eager execution skips the warm-up. Prompts share only whole blocks, without their last token: with vLLM's default blocks of
    # 128, short prompts would share nothing.
    return shared | {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
        "enable_chunked_prefill": False,
        "block_size": BLOCK_ON_CPU,
        "max_num_batched_tokens": max(settings.max_model_len, MIN_BATCHED_TOKENS),
        **settings.extra,
    }


def _parameters(**sampling: object) -> SamplingParams:
    """vLLM's parameters of one request, of which only the whole result is wanted: token ids and log-probs, no text."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(flat_logprobs=True, detokenize=False, output_kind=kind, **sampling)


def _skip_token_ranks(_: object = None) -> None:
    """Make vLLM, here or on a worker, return zeros as the ranks of sampled tokens.

    It computes them with every log-prob, and Togi never reads them. vLLM compiles the original with ``torch.compile``: its first
    call takes up to 27 s, and each call a pass over [sequences, vocabulary].
    """
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = _no_ranks


def _no_ranks(logprobs_NV: Tensor, _: Tensor) -> Tensor:
    return torch.zeros(logprobs_NV.shape[0], dtype=torch.int64, device=logprobs_NV.device)


def _result(output: RequestOutput) -> Generation | list[float]:
    """What a request was for: the log-probs of its prompt, or an answer."""
    scores = output.prompt_logprobs
    return generation_of(output) if scores is None else list(scores.logprobs)


def generation_of(output: RequestOutput) -> Generation:
    """A finished request of vLLM. Raises RunError if vLLM does not say which weights sampled each token."""
    (completion,) = output.outputs
    tokens, logprobs = tuple(completion.token_ids), tuple(completion.logprobs.logprobs)
    versions: list[int] = []
    for span in completion.weight_versions or ():
        if span.start == len(versions):
            versions += [int(span.version)] * (span.end - span.start)
    if len(versions) != len(tokens):
        raise RunError(f"vLLM says of {len(versions)} of {len(tokens)} tokens which weights sampled them: {completion}")
    return Generation(tokens, logprobs, FinishReason(completion.finish_reason), tuple(versions))


# The functions below run on vLLM's worker; their first argument is its Worker object.


def _start_reload(worker: Worker) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.platforms import current_platform

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        # the layers of an abandoned update
        if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
            finalize_layerwise_reload(model, worker.model_config)
        # the kernels of experts, which would keep the old packed weights
        if current_platform.is_cpu():
            for method in (getattr(layer, "quant_method", None) for layer in model.modules()):
                if method is not None and getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        initialize_layerwise_reload(model)


def _load(worker: Worker, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The reload keeps references to the tensors until a layer is complete."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.model_runner.get_model().load_weights(tensors)


def _set_channels(worker: Worker, meetings: tuple[Rendezvous, ...], on_gpu: bool) -> None:
    device = worker.device if on_gpu else torch.device("cpu")
    worker.channels = [Channel.join(meetings[worker.rank], device)] if meetings else []


def _open_inbox(worker: Worker) -> None:
    worker.inbox = Inbox(worker.channels)


def _load_parcel(worker: Worker, parcels: tuple[Announced, ...]) -> None:
    parcel = parcels[worker.rank] if len(parcels) > 1 else parcels[0]
    _load(worker, worker.inbox.open(parcel).own().unpack())


def _checksum(worker: Worker) -> str:
    checksum: str = worker.inbox.checksum()
    return checksum


def _load_shared(
    worker: Worker, name: str, tensors: tuple[TensorSpec, ...], offsets: tuple[int, ...], nbytes: int
) -> None:
    segment = SharedMemory(name)
    try:
        _load(worker, Bucket(tensors, offsets, _bytes_of(segment, nbytes)).own().unpack())
    finally:
        segment.close()


def _bytes_of(segment: SharedMemory, nbytes: int) -> NDArray[np.uint8]:
    """The first bytes of a segment. No reference to them may exist when the segment is closed."""
    assert segment.buf is not None
    return np.frombuffer(segment.buf, np.uint8, nbytes)


def _watch_routers(worker: Worker) -> None:
    """Record the outputs of every router until ``_routers_seen``."""
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    gates = [layer for layer in worker.model_runner.get_model().modules() if isinstance(layer, GateLinear)]
    worker.router_logits = [[] for _ in gates]
    worker.router_hooks = [
        gate.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[0]))
        for gate, kept in zip(gates, worker.router_logits, strict=True)
    ]


def _routers_seen(worker: Worker) -> NDArray[np.int64]:
    """The experts chosen since ``_watch_routers``: [tokens, layers, choices]. Removes the hooks."""
    for hook in worker.router_hooks:
        hook.remove()
    logits_TE, worker.router_logits = [torch.cat(parts) for parts in worker.router_logits], []
    return chosen_experts(logits_TE, worker.model_config.hf_text_config.num_experts_per_tok).cpu().numpy()


def _finish_reload(worker: Worker) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(model, worker.model_config)
        for layer in model.modules():
            # a tied head has its own packed copy of the embedding
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _release_kv_pages(worker: Worker) -> Released:
    """Return the pages of the KV cache to the system (``madvise``). vLLM's own sleep frees nothing on CPUs."""
    before = resident_bytes()
    nbytes = sum(release_pages(storage.data_ptr(), storage.nbytes()) for storage in _kv_storages(worker))
    return_freed()
    return Released(nbytes, before, resident_bytes())


def _cache_and_memory(worker: Worker) -> tuple[int, int]:
    """Bytes of the KV cache, and bytes in use on the worker's GPU."""
    free, total = torch.cuda.mem_get_info()
    return sum(storage.nbytes() for storage in _kv_storages(worker)), total - free


def _kv_storages(worker: Worker) -> list[torch.UntypedStorage]:
    """The storages of the KV cache, each once."""
    storages = [kv.untyped_storage() for kv in worker.model_runner.kv_caches]
    return list({storage.data_ptr(): storage for storage in storages}.values())


def _added_up(parts: Iterable[Released]) -> Released:
    """The sum over all workers of an engine."""
    return Released(sum(p.nbytes for p in parts), sum(p.before for p in parts), sum(p.after for p in parts))
