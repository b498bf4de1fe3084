"""The carrier of weights from the actor to the engines, chosen by flags and by where the processes are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from togi.config.choices import SyncBackend
from togi.config.rl import RLConfig


class Carrier(StrEnum):
    """The four carriers.

    host: Ray's object store, which processes of one host read without a copy. gloo, nccl: a process group of the actor's
    rank 0 and the engines. ipc: each engine reads the memory of its own actor rank on the GPU that both use.
    """

    HOST = "host memory"
    GLOO = "gloo"
    NCCL = "nccl"
    IPC = "CUDA IPC"

    @property
    def is_group(self) -> bool:
        return self in (Carrier.GLOO, Carrier.NCCL)


@dataclass(frozen=True, slots=True)
class Route:
    """The carrier, and why it differs from the configured one ("" if it does not)."""

    carrier: Carrier
    reason: str = ""

    def describe(self) -> str:
        return f"weights travel by {self.carrier}" + (f": {self.reason}" if self.reason else "")


def choose(config: RLConfig, *, on_gpu: bool, one_host: bool) -> Route:
    """The carrier of weights. ``on_gpu``: the actor computes on a GPU; ``one_host``: it shares its host with all engines."""
    asked = config.vllm_sync_backend
    if config.vllm_sync_with_ray:
        ignored = asked is not SyncBackend.AUTO
        reason = f"with --vllm_sync_with_ray the object store takes the place of --vllm_sync_backend {asked}"
        return Route(Carrier.HOST, reason if ignored else "")
    if asked is SyncBackend.GLOO:
        return Route(Carrier.GLOO)
    if asked is SyncBackend.AUTO and one_host:
        return Route(Carrier.HOST)
    # What remains needs NCCL, or has a fallback.
    problem = _nccl_problem(config, on_gpu)
    if asked is SyncBackend.AUTO:
        return Route(Carrier.GLOO if problem or config.colocate_all_models else Carrier.NCCL)
    if problem:
        return Route(Carrier.GLOO, f"--vllm_sync_backend nccl needs {problem}")
    shared = Route(Carrier.IPC, "nccl cannot connect two processes on one GPU")
    return shared if config.colocate_all_models else Route(Carrier.NCCL)


def _nccl_problem(config: RLConfig, on_gpu: bool) -> str:
    """What prevents sending GPU memory; "" if nothing does."""
    if not on_gpu:
        return "GPUs, and the actor computes on the CPU"
    # A tensor-parallel engine receives its weights in a process without a GPU of its own.
    return "--vllm_tensor_parallel_size 1" if config.vllm_tensor_parallel_size > 1 else ""
