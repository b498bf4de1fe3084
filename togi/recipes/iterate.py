"""Best-of-n loops in one screen: rejection sampling, iterative DPO, conditional SFT. See ``run`` for the order of things.

A round generates outputs with the newest model, scores them, selects what to learn and trains. Each step is a command of its
own in a process of its own (``iterate_steps``), so that its memory is free before the next begins, and is done once
(``iterate_state``), so that a stopped iteration goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from togi.config.iterate import IterateConfig
from togi.recipes.iterate_state import Facts, IterateState
from togi.recipes.iterate_steps import Launch, Steps

# Settings that may change while an iteration goes on: how long it is, and how its steps are run.
FREE = frozenset({"rounds", "run_dir", "save_steps", "reward_workers", "reward_timeout", "max_num_seqs"})


@dataclass(frozen=True, slots=True)
class Result:
    """Where a finished iteration left what. ``rounds``: the facts of each, round 0 being the start."""

    model: Path
    summary: Path
    rounds: tuple[Mapping[str, object], ...]


def run(config: IterateConfig, announce: Callable[[str], None], launch: Launch) -> Result:
    """All rounds that are not done yet. Settings come checked from ``iterate_start``."""
    root = Path(config.run_dir)
    steps = Steps(config, root, launch)
    state = IterateState(root, identity(config))
    if (done := state.open()) > 0:
        announce(f"going on in {root}: {done} steps are done")
    steps.try_reward()
    rounds: list[Facts] = []
    model = config.pretrain
    if config.eval_dataset is not None:
        rounds.append({"round": 0, **state.once(0, "evaluate", lambda: steps.evaluate(0, config.pretrain))})
        announce(describe(rounds[-1]))
    for number in range(1, config.rounds + 1):
        model, facts = one_round(number, model, config, steps, state)
        rounds.append(facts)
        state.summarize(rounds)
        announce(describe(facts))
    return Result(Path(model), state.summarize(rounds), tuple(rounds))


def one_round(number: int, model: str, config: IterateConfig, steps: Steps, state: IterateState) -> tuple[str, Facts]:
    """Generate, score, select, train, evaluate: the new model and what came of it."""
    facts: Facts = {"round": number}
    facts |= state.once(number, "generate", lambda: steps.generate(number, model))
    facts |= state.once(number, "score", lambda: steps.score(number))
    facts |= state.once(number, "select", lambda: steps.select(number))
    facts |= state.once(number, "train", lambda: steps.train(number, model))
    new = str(steps.model(number))
    if config.eval_dataset is not None:
        facts |= state.once(number, "evaluate", lambda: steps.evaluate(number, new))
    return new, facts


def identity(config: IterateConfig) -> dict[str, str]:
    """Every setting that the results depend on, and what the reward function says by now."""
    settings = {f"--{name}": str(value) for name, value in config.model_dump(mode="json").items() if name not in FREE}
    if config.reward_file is None:
        return settings
    code = hashlib.blake2b(Path(config.reward_file).read_bytes(), digest_size=16).hexdigest()
    return settings | {"the content of --reward_func": code}


def describe(facts: Facts) -> str:
    """A round in one line."""
    parts = []
    if "selected" in facts:
        parts.append(f"reward of outputs {facts['reward']:.4f}; {facts['selected']}")
    if "eval_reward" in facts:
        error = facts["eval_stderr"]
        spread = "" if error is None else f" +- {error:.4f} (standard error)"
        parts.append(f"held-out reward {facts['eval_reward']:.4f}{spread}")
    return f"round {facts['round']}: " + "; ".join(parts)
