"""What the prefix tree saves in training on agents: tokens computed and time of a step, with and without it.

    python benchmarks/tree.py [--turns 8] [--prompts 2] [--episodes 4] [--json FILE]

Episodes of several turns, as a harness makes them that leaves the thoughts of earlier turns out: each request is the conversation
so far without them, so each turn forks. Episodes of one prompt share it, and prompts share a system prompt. A step is the policy
loss of all episodes, forward, backward and AdamW, on a small Llama with random weights. The same step in three layouts:

* rows: each request with its answer is a row of its own, and the loss of an episode is over all of its rows.
* episodes: a request continues what its own episode has in common with it (``share_prefix`` off).
* tree: and all that episodes have in common is there once.

Log-probs are compared too: the layouts differ in rounding only.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from togi.config.choices import Aggregation, Scheduler
from togi.data.packing import pack_all
from togi.data.prefix_tree import paths
from togi.env.trace import Trace
from togi.learn.learner import Learner
from togi.learn.objective import ADVANTAGES, PolicyObjective
from togi.learn.schedule import Schedule
from togi.methods.sft import SFT
from togi.model.attention import SEGMENTS
from togi.model.policy import PolicyModel
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.pump.experience import to_sample
from togi.sample import FinishReason, Generation, Prompt, Sample

VOCABULARY = 2048
SYSTEM, QUESTION, THOUGHTS, ANSWER, OBSERVATION = 96, 64, 48, 32, 32
"""Tokens of each part of a conversation."""


class Result(NamedTuple):
    layout: str
    packs: int
    tokens: int
    seconds: float
    logprobs: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8, help="requests of an episode")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=4, help="of each prompt")
    parser.add_argument("--max_tokens", type=int, default=16384, help="of a pack")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    samples = episodes(arguments.prompts, arguments.episodes, arguments.turns)
    results = measured(samples, arguments.max_tokens, arguments.steps)
    first = results[0]
    print("layout      packs    tokens   of rows  seconds a step  times rows   sum of log-probs")
    for result in results:
        share, speed = result.tokens / first.tokens, first.seconds / result.seconds
        print(
            f"{result.layout:10s} {result.packs:6d} {result.tokens:9d} {share:9.1%} {result.seconds:15.2f} {speed:11.2f}"
            f" {result.logprobs:18.3f}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")


def episodes(prompts: int, each: int, turns: int) -> list[Sample]:
    """Each turn thinks and answers; the next request has the answer without the thoughts, and an observation."""
    rng = np.random.default_rng(0)

    def draw(number: int) -> list[int]:
        return rng.integers(1, VOCABULARY, number).tolist()

    system, samples = draw(SYSTEM), []
    for group in range(prompts):
        prompt = Prompt(str(group), (*system, *draw(QUESTION)), "")
        for _ in range(each):
            trace, context = Trace(prompt), list(prompt.tokens)
            for _ in range(turns):
                thoughts, answer = draw(THOUGHTS), draw(ANSWER)
                tokens = (*thoughts, *answer)
                generation = Generation(tokens, (-9.0,) * len(tokens), FinishReason.STOP, (0,) * len(tokens))
                trace.add(context, generation)
                context += answer + draw(OBSERVATION)
            sample = to_sample(trace.rollout(str(group), "", FinishReason.STOP))
            advantages = np.full(len(sample.tokens), rng.normal(), dtype=np.float32)
            samples.append(replace(sample, streams={ADVANTAGES: advantages}))
    return samples


def rows_of(samples: Sequence[Sample]) -> list[Sample]:
    """Each request of each episode as a sample. A token is in the loss of the row that ends with its answer."""
    found = []
    for number, sample in enumerate(samples):
        seen = np.zeros(len(sample.tokens), dtype=np.bool_)
        for path in paths(sample):
            mask = sample.loss_mask[path] & ~seen[path]
            seen[path] = True
            streams = {name: stream[path] for name, stream in sample.streams.items()}
            found.append(Sample(sample.tokens[path], mask, 1, str(number), streams))
    return found


def measured(samples: Sequence[Sample], max_tokens: int, steps: int) -> list[Result]:
    """The median over ``steps`` of one optimizer step in each layout, taken in turn, as other processes may disturb them.

    Packing is outside of it. Log-probs are those of the first forward.
    """
    layouts = {"rows": rows_of(samples), "episodes": samples, "tree": samples}
    packs = {
        name: pack_all(given, max_tokens=max_tokens, max_sequences=None, share_prefix=name == "tree")
        for name, given in layouts.items()
    }
    learners = {name: make_learner() for name in layouts}
    first = {name: learners[name].update(packs[name]) for name in layouts}
    taken: dict[str, list[float]] = {name: [] for name in layouts}
    for name in [*layouts] * steps:
        start = time.perf_counter()
        learners[name].update(packs[name])
        taken[name].append(time.perf_counter() - start)
    return [
        Result(
            name,
            len(packs[name]),
            sum(batch.num_tokens for batch in packs[name]),
            median(taken[name]),
            float(sum(row.sum(dtype=np.float64) for row in first[name].logprobs)),
        )
        for name in layouts
    ]


def make_learner() -> Learner:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    hf = LlamaForCausalLM(config)
    hf.set_attn_implementation(SEGMENTS)
    backend = trainable(PolicyModel(hf), World.solo(torch.device("cpu")), BackendOptions(bf16=False))
    schedule = Schedule(SFT(lr_scheduler=Scheduler.CONSTANT, lr_warmup_ratio=0.0), 1e-6, 1)
    return Learner(backend, PolicyObjective(0.2, 0.2, Aggregation.TOKEN_MEAN), schedule, math.inf)


if __name__ == "__main__":
    main()
