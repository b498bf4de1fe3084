"""Tiny learners on random rollouts, for the tests of ``togi.parallel`` and ``togi.learn``."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.tiny import tiny_config, tiny_model
from togi.batch import Batch
from togi.config.choices import Aggregation, KLEstimator, Scheduler
from togi.data.packing import pack
from togi.learn.learner import Learner
from togi.learn.objective import PolicyObjective
from togi.learn.schedule import Schedule
from togi.methods.sft import SFT
from togi.model.attention import SEGMENTS
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel import trainable
from togi.parallel.backend import Backend, BackendOptions
from togi.parallel.process import World, open_store
from togi.sample import Sample
from togi.weights.carriers import Rendezvous

CPU = torch.device("cpu")
JOB_SECONDS = 900.0
# What jobs import, which takes a process several seconds. None of it starts a thread, so that it may be forked.
PRELOADED = [
    "tests.learn_tools",
    "tests.offline_world",
    "togi.parallel.deepspeed",
    "togi.model.adapters",
    "togi.run.offline",
]


def scheduled(kind: Scheduler, peak: float, total: int) -> Schedule:
    """A schedule without warm-up."""
    return Schedule(SFT(lr_scheduler=kind, lr_warmup_ratio=0.0), peak, total)


def policy(seed: int = 0, dtype: torch.dtype = torch.float32, arch: str = "llama") -> PolicyModel:
    hf = tiny_model(arch, seed=seed, tie_word_embeddings=True)
    hf.set_attn_implementation(SEGMENTS)
    return PolicyModel(hf).to(dtype)


def critic(seed: int = 0) -> ScalarModel:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(num_labels=1, initializer_range=0.1)
        hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    hf.set_attn_implementation(SEGMENTS)
    return ScalarModel(hf)


def rollouts(number: int, seed: int = 0) -> list[Sample]:
    """Samples of different lengths; what is masked is NaN."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        prompt, response = int(rng.integers(2, 5)), int(rng.integers(1, 7))
        length = prompt + response
        mask = np.arange(length) >= prompt

        def stream(low: float, high: float, mask: np.ndarray = mask) -> np.ndarray:
            return np.where(mask, rng.uniform(low, high, len(mask)), np.nan).astype(np.float32)

        streams = {
            "advantages": stream(-1, 1),
            "old_logprobs": stream(-6.5, -5.5),
            "ref_logprobs": stream(-6.5, -5.5),
            "old_values": stream(-1, 1),
            "returns": stream(-1, 1),
        }
        samples.append(Sample(rng.integers(0, 256, length), mask, prompt, str(i), streams, {"kl_coef": 0.1}))
    return samples


def packs(samples: Sequence[Sample], sizes: Sequence[int]) -> list[Batch]:
    """Consecutive samples as micro-batches of the given sizes."""
    assert sum(sizes) == len(samples)
    ends = np.cumsum(sizes)
    return [pack(samples[end - size : end], share_prefix=False) for size, end in zip(sizes, ends, strict=True)]


def objective(aggregation: Aggregation = Aggregation.TOKEN_MEAN) -> PolicyObjective:
    return PolicyObjective(0.2, 0.3, aggregation, dual_clip=3.0, constant=8.0, kl=KLEstimator.K3, temperature=0.7)


def learner(backend: Backend, lr: float = 1e-3, max_norm: float = 1.0) -> Learner:
    return Learner(backend, objective(), scheduled(Scheduler.LINEAR, lr, 10), max_norm)


def solo(dtype: torch.dtype = torch.float32, bf16: bool = False, **settings: float) -> Learner:
    options = BackendOptions(bf16=bf16, l2=0.1)
    return learner(trainable(policy(dtype=dtype), World.solo(CPU), options), **settings)


def weights(backend: Backend) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backend.full_parameters()}


def gradients(samples: Sequence[Sample], sizes: Sequence[int], aggregation: Aggregation) -> dict[str, Tensor]:
    """The gradient of one step in float64, seen before it is used."""
    backend = trainable(policy(dtype=torch.float64), World.solo(CPU), BackendOptions(bf16=False))
    seen: dict[str, Tensor] = {}

    def look(_: float) -> None:
        seen.update({name: p.grad.clone() for name, p in backend.module.named_parameters()})
        backend.drop_gradients()

    backend.step = look
    Learner(backend, objective(aggregation), scheduled(Scheduler.CONSTANT, 1.0, 1), math.inf).update(
        packs(samples, sizes)
    )
    return seen


def max_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_nearly_as_far(start: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Two ways from ``start`` that bfloat16 rounds differently end much closer together than they went.

    Adam makes full steps of gradients that are hardly more than that rounding, so a few weights end two ways apart, none further.
    """
    moved, apart = (
        torch.cat([(first[name] - other[name]).flatten().abs() for name in first]) for other in (start, second)
    )
    assert apart.mean() < moved.mean() / 4
    assert apart.max() < 2 * moved.max()


def share_apart(first: dict[str, Tensor], second: dict[str, Tensor], limit: float) -> float:
    """Share of all elements that differ by more than ``limit``."""
    assert first.keys() == second.keys()
    apart = sum(int(((first[name] - second[name]).abs() > limit).sum()) for name in first)
    return apart / sum(value.numel() for value in first.values())


def partition_small_weights() -> None:
    """All weights of a tiny model are small: without this DeepSpeed would keep them whole, and nothing would be gathered."""
    import togi.parallel.deepspeed

    togi.parallel.deepspeed.RESIDENT_ELEMENTS = 0


def run_ranks(job: Callable[[World, Path], None], size: int, folder: Path) -> None:
    """Run ``job`` on ``size`` gloo processes, each told where to leave its results.

    They are forked from one that only imports, and whose environment is that of the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = open_store("127.0.0.1", JOB_SECONDS)
    meetings = [Rendezvous(rank, size, "127.0.0.1", store.port, JOB_SECONDS) for rank in range(size)]
    processes = [context.Process(target=_enter, args=(job, meeting, folder)) for meeting in meetings]
    for process in processes:
        process.start()
    for process in processes:
        process.join(JOB_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, f"exit codes {codes}"


def _enter(job: Callable[[World, Path], None], meeting: Rendezvous, folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.join(meeting, CPU)
    job(world, folder)
    world.leave()
