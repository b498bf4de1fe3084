"""Join a group of processes, and the few collectives that the control flow needs.

``World`` holds this process's rank, its device and the size of the group. Every collective goes through it, except a backend's own
traffic of gradients and parameters. Each has a tag, so that a stalled or failed one can be named. Not here: sharding (``fsdp2``)
and sending weights to generation engines (``togi.workers``). A world of one opens no socket and no process group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from togi.device import default_device
from togi.errors import ConfigError, UserError
from togi.weights.carriers import Rendezvous

T = TypeVar("T")
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""The setting that makes cuBLAS deterministic. cuBLAS reads the environment at its first use; it costs a few MB."""

# Control messages go over gloo in host memory, tensors of an accelerator over its own library.
_LIBRARIES = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


def be_deterministic() -> None:
    """``--full_determinism``: allow only kernels whose result does not depend on the order of threads, and no TF32."""
    for name, value in CUBLAS.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")


def open_store(address: str, timeout_s: float) -> TCPStore:
    """Open a rendezvous store on a free port of this machine. The other processes connect to its ``port``.

    The port is bound before any process learns it, so two groups can never race for one.
    """
    return TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def _from_environment(name: str) -> int:
    """The whole number in an environment variable. Raises ConfigError if there is none."""
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', '')} but {name} is {text!r}: start with torchrun, or unset WORLD_SIZE."
        )
    return int(text)


def _open_group(
    device: torch.device, timeout: timedelta, store: Store | None = None, rank: int = -1, size: int = -1
) -> None:
    """Open torch's process group. Without ``store`` torch finds the others, ``rank`` and ``size`` by the environment."""
    own = None if device.type == "cpu" else device
    if own is not None:
        torch.accelerator.set_device_index(own)
    library = _LIBRARIES[device.type]
    dist.init_process_group(library, timeout=timeout, world_size=size, rank=rank, store=store, device_id=own)


class World:
    """The processes that train one model together. Collectives must be called by every rank in the same order.

    Consecutive ranks can form teams that compute the same batches together (``togi.parallel.groups``): rings of ``ring_size``
    split the tokens, groups of ``tensor_size`` the weights. Data is then split into ``shares``, one for each team.
    Without teams every rank has its own share.
    """

    def __init__(self, rank: int, size: int, device: torch.device, ring_size: int = 1, tensor_size: int = 1) -> None:
        assert 0 <= rank < size and size % (ring_size * tensor_size) == 0
        assert ring_size == 1 or tensor_size == 1, "teams of both kinds"
        self.rank, self.size, self.device = rank, size, device
        self.ring_size, self.tensor_size = ring_size, tensor_size
        # The tag of the running collective, for stall reports; "" outside of collectives.
        self.pending = ""

    @classmethod
    def solo(cls, device: torch.device | None = None) -> Self:
        """A world of one."""
        return cls(0, 1, default_device() if device is None else device)

    @classmethod
    def join(cls, meeting: Rendezvous, device: torch.device) -> Self:
        """Join the other ranks. Raises torch's ``DistStoreError`` if they do not join in time."""
        if meeting.size == 1:
            return cls.solo(device)
        timeout = timedelta(seconds=meeting.timeout_s)
        store = TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout)
        _open_group(device, timeout, store, meeting.rank, meeting.size)
        return cls(meeting.rank, meeting.size, device)

    @classmethod
    def from_environment(cls, local_rank: int = -1, timeout_s: float = 1800.0) -> Self:
        """The world that a launcher (torchrun, DeepSpeed) sets in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

        Without WORLD_SIZE a world of one. ``local_rank`` -1 takes LOCAL_RANK. Raises ConfigError if a variable is missing or
        not a whole number.
        """
        size = _from_environment("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
        if size == 1:
            return cls.solo()
        rank, timeout = _from_environment("RANK"), timedelta(seconds=timeout_s)
        device = default_device(local_rank if local_rank >= 0 else _from_environment("LOCAL_RANK"))
        # only checked here: torch itself reads it
        _from_environment("MASTER_PORT")
        # torch reads the address itself: under torchrun the store is the agent's, and torch knows how to join it
        _open_group(device, timeout)
        return cls(rank, size, device)

    def open_group(self) -> None:
        """Open a process group in a world of one too, for a library that needs one."""
        if not dist.is_initialized():
            _open_group(self.device, timedelta(minutes=30), HashStore(), rank=0, size=1)

    def leave(self) -> None:
        """Close the group. The world must not be used afterwards."""
        if self.size > 1:
            dist.destroy_process_group()

    def in_teams(self, ring_size: int = 1, tensor_size: int = 1) -> World:
        """The same processes in rings or in tensor-parallel groups, of which one has a size of 1.

        Raises ConfigError if the other one does not divide their number.
        """
        flag, size, lower = "--ring_attn_size", ring_size, "--ring_attn_size"
        if tensor_size > 1:
            flag, size, lower = "--ds_tensor_parallel_size", tensor_size, "it"
        if self.size % size != 0:
            raise ConfigError(
                f"{flag} {size} does not divide the number of processes, which is {self.size}: start a multiple of {size} "
                f"processes, or lower {lower}."
            )
        return World(self.rank, self.size, self.device, ring_size, tensor_size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def team_size(self) -> int:
        """The number of ranks that compute each batch together."""
        return self.ring_size * self.tensor_size

    @property
    def share(self) -> int:
        """The index of this rank's share of the data, the same on all ranks of a team."""
        return self.rank // self.team_size

    @property
    def shares(self) -> int:
        """The number of shares into which data is split."""
        return self.size // self.team_size

    def mesh(self, shard_size: int | None = None) -> DeviceMesh:
        """The ranks for sharding: all in one row, or a row for every ``shard_size`` consecutive ones, which shard one copy."""
        ranks = torch.arange(self.size)
        if shard_size in (None, self.size):
            return DeviceMesh(self.device.type, ranks, mesh_dim_names=("data",))
        return DeviceMesh(self.device.type, ranks.view(-1, shard_size), mesh_dim_names=("copies", "data"))

    @contextmanager
    def collective(self, tag: str) -> Iterator[None]:
        """Set the tag of the collective inside the block, for stall reports and for the error if it fails."""
        self.pending = tag
        try:
            yield
        except RuntimeError as error:
            error.add_note(f"in the collective '{tag}' on rank {self.rank} of {self.size}")
            raise
        self.pending = ""

    def sum(self, tag: str, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks in float64; the same on every rank."""
        return self._reduce(tag, values, dist.ReduceOp.SUM)

    def sum_shares(self, tag: str, values: Sequence[float]) -> list[float]:
        """``sum`` of numbers that are the same on all ranks of a team. Each team counts once."""
        counted = self.rank % self.team_size == 0
        return self.sum(tag, [value if counted else 0.0 for value in values])

    def max(self, tag: str, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over ranks in float64; the same on every rank."""
        return self._reduce(tag, values, dist.ReduceOp.MAX)

    def _reduce(self, tag: str, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        # on the CPU, over gloo: control flow must not wait for the device
        numbers = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            with self.collective(tag):
                dist.all_reduce(numbers, op=op)
        result: list[float] = numbers.tolist()
        return result

    def gather(self, tag: str, record: T) -> list[T]:
        """The record of every rank, in the order of ranks, on every rank. For small picklable records between Togi's processes."""
        if self.size == 1:
            return [record]
        records: list[T] = [record] * self.size
        with self.collective(tag):
            dist.all_gather_object(records, record)
        return records

    def gather_shares(self, tag: str, record: T) -> list[T]:
        """``gather`` of records that are the same on all ranks of a team: one for each team."""
        return self.gather(tag, record)[:: self.team_size]

    def add_up(self, tag: str, tensor: Tensor) -> None:
        """Replace ``tensor`` on every rank by its sum over ranks."""
        if self.size > 1:
            with self.collective(tag):
                dist.all_reduce(tensor)

    def barrier(self, tag: str) -> None:
        """Wait for every rank."""
        self.sum(tag, [0.0])

    def in_turn(self, tag: str, work: Callable[[], T]) -> T:
        """The result of ``work``, which the first rank does before the others. After a UserError on one rank no rank goes on:
        those without one exit with the same status and say nothing, so that it is said once.
        """
        done = list[T]()
        for turn in (True, False):
            mistake: UserError | None = None
            if self.is_first is turn:
                try:
                    done.append(work())
                except UserError as error:
                    mistake = error
            failed = any(self.gather(tag, mistake is not None))
            if mistake is not None:
                raise mistake
            if failed:
                time.sleep(1)  # a launcher ends all when one has ended: let the other rank speak first
                raise SystemExit(2)
        return done[0]
