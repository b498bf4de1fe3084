"""Weights between processes on one GPU, and NCCL where one GPU is enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from gpu.tools import Figures, finish, need_cuda

PATIENCE = 40.0


def ipc(device: torch.device, small: bool) -> Figures:
    """Buckets shared with a second process on the GPU; beside it the way through host memory."""
    need_cuda(device)
    from togi.weights.carriers import Exporter, Inbox, SameDevice

    size, count = (1, 4) if small else (64, 40)
    nbytes = size * 2**20
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(count):
            yield str(number), source + number % 256

    own, process = _second_process(_receive, device)
    sender = SameDevice if device.type == "cuda" else Exporter  # on a CPU: the same exchange, by copies
    exporter, held, used = sender(sends=True, device=device), list[int](), list[int]()
    try:
        for timed in (False, True):  # the first time opens the GPU in the child
            exporter.begin(tensors(), nbytes)
            start = time.perf_counter()
            for _ in range(count):
                _, parcel = exporter.next()
                own.send(parcel)
                used.append(_answer(own))
                held.append(_held(device))
            own.send(None)
            received, sent = _answer(own), exporter.finish()
            assert received == sent, "the checksum differs between the two processes"
            if timed:
                yield "ms a GB", 1e3 * (time.perf_counter() - start) / (count * nbytes / 1e9)
        own.send("end")
    finally:
        own.close()
        process.join(PATIENCE)
        process.kill()
    yield "GB held by the sender, first and most", f"{held[2] / 1e9:.2f}, {max(held) / 1e9:.2f}"
    yield "GB used on the GPU, first and last", f"{used[2] / 1e9:.2f}, {used[-1] / 1e9:.2f}"
    assert max(held) <= held[2] + 2 * nbytes, "the sender's memory grows with the number of buckets"
    assert used[-1] <= used[2] + 8 * nbytes, "memory on the GPU grows with the number of buckets"
    # through host memory: what the driver's way costs both ends, without the transport between them
    through, inbox = Exporter(sends=True), Inbox([])
    through.begin(tensors(), nbytes)
    start = time.perf_counter()
    for _ in range(count):
        _, parcel = through.next()
        assert parcel is not None
        inbox.open(parcel).as_tensor().to(device)
    finish(device)
    assert through.finish() == inbox.checksum()
    yield "through host memory: ms a GB", 1e3 * (time.perf_counter() - start) / (count * nbytes / 1e9)


def _receive(pipe: Connection, device: torch.device) -> None:
    """The second process: opens each parcel, copies it, and answers with the memory in use on the GPU."""
    from togi.weights.carriers import Inbox

    inbox = Inbox([])
    while (parcel := pipe.recv()) != "end":
        if parcel is None:
            pipe.send(inbox.checksum())
            inbox = Inbox([])
            continue
        copied = inbox.open(parcel).own()
        finish(device)
        pipe.send(_used(device))
        del parcel, copied


def _held(device: torch.device) -> int:
    """Bytes of this process's tensors on the GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _used(device: torch.device) -> int:
    """Bytes that all processes use of the GPU."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return total - free


def _second_process(job: Callable[..., None], *given: object) -> tuple[Connection, Any]:
    context = torch.multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=job, args=(other, *given), daemon=True)
    process.start()
    other.close()  # so that the end of the child is the end of the pipe
    return own, process


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE), f"the second process did not answer within {PATIENCE:.0f} s"
    try:
        return pipe.recv()
    except EOFError:
        raise AssertionError("the second process ended: see the log above") from None


def groups(device: torch.device, small: bool) -> Figures:
    """A channel and a process group of one; then two processes on one GPU, which NCCL refuses."""
    from togi.parallel.process import World, open_store
    from togi.weights.carriers import Channel, Rendezvous

    store = open_store("127.0.0.1", PATIENCE)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    channel = Channel.join(Rendezvous(0, 1, "127.0.0.1", store.port, PATIENCE), device)
    buffer = torch.arange(4096, device=device).to(torch.uint8)
    channel.send(buffer)
    channel.flush()
    assert torch.equal(buffer, torch.arange(4096, device=device).to(torch.uint8))
    yield "channel of one", "sent"
    world = World.solo(device)
    world.open_group()
    gathered: list[object] = [None]
    torch.distributed.all_gather_object(gathered, {"rank": 0})
    tensor = torch.ones(3, device=device)
    torch.distributed.all_reduce(tensor)
    assert gathered == [{"rank": 0}] and tensor.tolist() == [1.0, 1.0, 1.0]
    torch.distributed.destroy_process_group()
    yield "group of one", "objects over gloo, tensors on the device"
    yield "two processes on one device", _two_on_one(device)


def _two_on_one(device: torch.device) -> str:
    """The last line of the error, or what came out."""
    from togi.parallel.process import open_store

    store = open_store("127.0.0.1", PATIENCE)
    pairs = [_second_process(_join_and_add, rank, store.port, device) for rank in range(2)]
    try:
        answers = sorted({str(_answer(own)) for own, _ in pairs})
    finally:
        for _, process in pairs:
            process.kill()
    return "; ".join(answers)


def _join_and_add(pipe: Connection, rank: int, port: int, device: torch.device) -> None:
    from togi.parallel.process import World
    from togi.weights.carriers import Rendezvous

    try:
        world, total = (
            World.join(Rendezvous(rank, 2, "127.0.0.1", port, PATIENCE), device),
            torch.ones(1, device=device),
        )
        world.add_up("test", total)
        pipe.send(f"a sum of {float(total):.0f}")
    except Exception as error:  # noqa: BLE001  the error is the answer
        lines = [line for line in str(error).splitlines() if line.strip()]
        pipe.send(f"{type(error).__name__}: {lines[-1] if lines else ''}")
