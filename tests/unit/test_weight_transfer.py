"""Which way weights go, what a checksum notices, and buffers over a channel of processes."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import WeightSyncError
from togi.parallel.process import open_store
from togi.plan.placement import Carrier, choose
from togi.weights.buckets import Bucket, Checksum, TensorSpec, pack_buckets
from togi.weights.carriers import Announced, Channel, Exporter, Inbox, OverChannel, Rendezvous
from togi.workers.ray.weight_sync import _Progress, agreed_checksum

HOST, GLOO, NCCL, IPC = Carrier.HOST, Carrier.GLOO, Carrier.NCCL, Carrier.IPC


@pytest.mark.parametrize(
    ("flags", "on_gpu", "one_host", "carrier", "reason"),
    [
        ("", False, True, HOST, ""),
        ("", True, True, NCCL, ""),
        ("--vllm_tensor_parallel_size 4", True, True, NCCL, ""),
        ("--vllm_tensor_parallel_size 4 --colocate_all_models", True, False, IPC, ""),
        ("--vllm_tensor_parallel_size 2 --lora_rank 8", True, False, HOST, ""),
        ("--vllm_tensor_parallel_size 2 --lora_rank 8 --vllm_sync_backend nccl", True, False, HOST, "merges adapters"),
        ("--vllm_tensor_parallel_size 2 --lora_rank 8 --lora_sync merged", True, False, NCCL, ""),
        ("", False, False, GLOO, ""),
        ("", True, False, NCCL, ""),
        ("--colocate_all_models", True, False, IPC, ""),
        ("--colocate_all_models --lora_rank 8", True, True, IPC, ""),
        ("--colocate_all_models", False, True, HOST, ""),
        ("--vllm_sync_backend gloo", True, True, GLOO, ""),
        ("--vllm_sync_backend nccl", True, True, NCCL, ""),
        ("--vllm_sync_backend nccl", False, True, GLOO, "needs GPUs"),
        ("--vllm_sync_backend nccl --colocate_all_models", True, True, IPC, "two processes on one GPU"),
        ("--vllm_sync_with_ray", True, False, HOST, ""),
        ("--vllm_sync_with_ray --vllm_sync_backend nccl", True, False, HOST, "takes the place of"),
    ],
    ids=str,
)
def test_the_way_of_the_weights(flags: str, on_gpu: bool, one_host: bool, carrier: Carrier, reason: str) -> None:
    config = parse(RLConfig, ["--pretrain", "m", *flags.split()], "rl").config
    route = choose(config, on_gpu=on_gpu, one_host=one_host)
    assert route.carrier is carrier
    assert (reason in route.reason) if reason else not route.reason


def tensors() -> list[tuple[str, torch.Tensor]]:
    """Sizes that are no multiples of 8 bytes, and one of none."""
    torch.manual_seed(0)
    made = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0), "d": torch.randn(3).bfloat16()}
    return list(made.items())


def checksum(parts: list[Bucket]) -> str:
    result = Checksum()
    for bucket in parts:
        result.add(bucket.contents())
    return result.digest()


def test_a_checksum_depends_on_names_and_bytes_alone() -> None:
    whole = checksum(list(pack_buckets(tensors(), 10_000)))
    assert whole == checksum(list(pack_buckets(tensors(), 1))) == checksum(list(pack_buckets(tensors()[::-1], 100)))
    as_tensors = [replace(bucket, data=bucket.as_tensor()) for bucket in pack_buckets(tensors(), 100)]
    assert whole == checksum(as_tensors)  # those of a GPU take the other way
    for name, tensor in tensors():
        for place in range(tensor.numel()):
            changed = dict(tensors())
            changed[name].view(-1)[place] += 1
            assert checksum(list(pack_buckets(changed.items(), 10_000))) != whole
    assert checksum(list(pack_buckets(tensors()[1:], 10_000))) != whole


def test_other_bytes_are_an_error_with_a_name() -> None:
    assert agreed_checksum(["x", "x"], {0: "x"}) == "x"
    with pytest.raises(WeightSyncError, match="actor 1, engine 2 and actor 0 have different weights"):
        agreed_checksum(["x", "y"], {0: "x", 2: "z"})


def test_a_deadline_says_who_is_behind() -> None:
    progress = _Progress({0: -1, 1: -1})
    assert progress.describe() == "the actor has not begun"
    progress.total = 9
    progress.engines[0] += 1
    assert progress.describe() == "engine 1 confirmed 0 of 9 tensors"
    progress.engines[1] += 1
    assert progress.describe() == "the actor has sent 0 of 9 tensors"
    progress.sent = 4
    progress.engines[1] += 4
    assert progress.describe() == "engine 0 confirmed 0 of 9 tensors"
    progress.sent = 9
    progress.engines = {0: 9, 1: 9}
    assert progress.describe() == "engine 0, engine 1 did not finish the update"


def receive(rank: int, port: int, parcels: list[Announced], results: multiprocessing.Queue[object]) -> None:
    """What an engine does with what the driver tells it."""
    torch.set_num_threads(1)
    channel = Channel.join(Rendezvous(rank, 3, "127.0.0.1", port, 60.0), torch.device("cpu"))
    inbox = Inbox([channel])
    buckets = [inbox.open(parcel) for parcel in parcels]  # all at once: none may lie over another
    content = {name: tensor.clone() for bucket in buckets for name, tensor in bucket.unpack()}
    results.put((inbox.checksum(), {name: tensor.float().numpy() for name, tensor in content.items()}))


def test_buckets_over_a_channel_to_two_receivers() -> None:
    """Every byte arrives at both, in buffers of their own, and all checksums are equal."""
    store = open_store("127.0.0.1", 60.0)
    parcels = [Announced(b.tensors, b.offsets, b.data.nbytes) for b in pack_buckets(tensors(), 50)]
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[object] = context.Queue()
    processes = [context.Process(target=receive, args=(rank, store.port, parcels, results)) for rank in (1, 2)]
    for process in processes:
        process.start()
    channel = Channel.join(Rendezvous(0, 3, "127.0.0.1", store.port, 60.0), torch.device("cpu"))
    exporter = OverChannel(channel)
    exporter.begin(tensors(), 50)
    sent = [exporter.next() for _ in parcels]
    assert [parcel for _, parcel in sent] == parcels
    assert len(parcels) > 2
    mine = exporter.finish()
    other = Exporter(sends=False)
    other.begin(tensors(), 10_000)
    assert other.next() == (4, None)
    assert other.finish() == mine
    for _ in processes:
        digest, content = results.get(timeout=60)
        assert digest == mine
        for name, tensor in tensors():
            assert np.array_equal(content[name], tensor.float().numpy())
    for process in processes:
        process.join(30)


def test_an_own_copy_cannot_be_written_into() -> None:
    (bucket,) = pack_buckets(tensors(), 10_000)
    for mine in (bucket.own(), replace(bucket, data=bucket.as_tensor()).own()):
        before = {name: tensor.clone() for name, tensor in bucket.unpack()}
        assert mine.tensors == tuple(TensorSpec.of(name, tensor) for name, tensor in tensors())
        bucket.data[:] = 255
        assert all(torch.equal(tensor, before[name]) for name, tensor in mine.unpack())
        bucket.data[:] = mine.as_tensor().numpy()
    locked = bucket.data.view()
    locked.flags.writeable = False
    shared = replace(bucket, data=locked)
    assert shared.own() is shared  # what Ray's store holds is not copied again
