"""Best-of-n loops: rejection sampling, iterative DPO, conditional SFT. ``run`` is the loop.

A round generates outputs with the newest model, scores them, selects training rows and trains. Each step is a command in its
own process (``iterate_steps``), so its memory is free before the next step. Each step is done once (``IterateState``), so an
interrupted iteration resumes where it stopped. Imports no torch.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from togi.config.choices import IterateMethod
from togi.config.iterate import IterateConfig, check_iterate
from togi.config.model_facts import check_length
from togi.config.parse import Parsed, parse
from togi.config.rl import verifier_of
from togi.data.precheck import asked_reward
from togi.data.row_log import digest
from togi.errors import CheckpointError
from togi.methods import METHODS, check_method
from togi.obs.way_out import write_atomically
from togi.plan.machine import this_machine, usable_precision
from togi.run import preflight
from togi.run.iterate_scores import try_rewards
from togi.run.iterate_steps import Facts, Launch, Steps, subprocess_step

# Settings that may change on resume: the number of rounds, and how the steps are run, also after failures.
FREE = frozenset(
    {
        *("rounds", "run_dir", "save_steps", "max_num_seqs", "reward_workers", "reward_timeout", "reward_retries"),
        *("remote_rm_concurrency", "remote_rm_max_pause", "on_reward_error", "max_reward_errors"),
    }
)
STATE = "iterate.json"
SUMMARY = "summary.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """The output paths of a finished iteration. ``rounds``: the facts of each round; round 0 is before training."""

    model: Path
    summary: Path
    rounds: tuple[Mapping[str, object], ...]


def start_iterate(
    parsed: Parsed[IterateConfig], *, announce: Callable[[str], None] = logger.info, launch: Launch = subprocess_step
) -> Result:
    """Check the settings, then run all rounds. ``launch`` runs the command of one step. Raises UserError."""
    ready, notice = usable_precision(parsed, this_machine())
    check(ready)
    if notice is not None:
        announce(notice)
    return run(ready.config, announce, launch)


def check(parsed: Parsed[IterateConfig]) -> None:
    """Raise the first UserError. Loads no model and reads only the head of the data."""
    check_iterate(parsed)
    config = parsed.config
    # Models and lengths.
    preflight.check_engine(config.rollout_engine, config, config.pretrain, config.bf16, this_machine())
    preflight.check_model("pretrain", config.pretrain)
    for path in config.reward_models:
        preflight.check_model("reward_pretrain", path)
        # An output that was cut off gets an end token, at which it is scored.
        asked, longest = f"{config.asked_context} + 1 end token", config.context_length + 1
        check_length(asked, longest, path, preflight.model_settings(path))
    facts = preflight.model_settings(config.pretrain)
    check_length(config.asked_context, config.context_length, config.pretrain, facts)
    check_length(f"--max_len {config.max_len}", config.max_len, config.pretrain, facts)
    if config.method is IterateMethod.CSFT:
        asked_reward(config.csft_prompt, config.reward_template)
    # Data: both sets must have the columns that the steps read.
    preflight.check_prompts(config)
    # The reward files, the output folder, and the command that every round trains with.
    for item in config.reward_files:
        preflight.check_reward(item)
    preflight.check_writable("run_dir", Path(config.run_dir))
    models = [("pretrain", config.pretrain), *(("reward_pretrain", path) for path in config.reward_models)]
    preflight.check_target("run_dir", config.run_dir, models)
    command, argv = Steps(config, Path(config.run_dir), subprocess_step).training_command(1, config.pretrain)
    check_method(parse(METHODS[command], argv, command))


def run(config: IterateConfig, announce: Callable[[str], None], launch: Launch) -> Result:
    """Run all rounds that are not done yet. Call it through ``start_iterate``, which checks the settings."""
    root = Path(config.run_dir)
    steps = Steps(config, root, launch)
    state = IterateState(root, identity(config))
    if (done := state.open()) > 0:
        announce(f"going on in {root}: {done} steps are done")
    if config.reward_files or config.reward_urls:
        asyncio.run(try_rewards(config))
    rounds: list[Facts] = []
    model = config.pretrain
    # Round 0 is the held-out reward of the initial model, the baseline of the others.
    if config.eval_dataset is not None:
        rounds.append({"round": 0, **state.once(0, "evaluate", lambda: steps.evaluate(0, config.pretrain))})
        announce(describe(rounds[-1]))
    for number in range(1, config.rounds + 1):
        # Each step is given to `once`, which calls it at once or not at all.
        facts: Facts = {"round": number}
        facts |= state.once(number, "generate", partial(steps.generate, number, model))
        facts |= state.once(number, "score", partial(steps.score, number))
        facts |= state.once(number, "select", partial(steps.select, number))
        facts |= state.once(number, "train", partial(steps.train, number, model))
        model = str(steps.model(number))
        if config.eval_dataset is not None:
            facts |= state.once(number, "evaluate", partial(steps.evaluate, number, model))
        rounds.append(facts)
        state.summarize(rounds)
        announce(describe(facts))
    return Result(Path(model), state.summarize(rounds), tuple(rounds))


def identity(config: IterateConfig) -> dict[str, str]:
    """Every setting that the results depend on, and a hash of each reward function's file."""
    settings = {f"--{name}": str(value) for name, value in config.model_dump(mode="json").items() if name not in FREE}
    files = [item for item in config.reward_files if verifier_of(item) is None]
    return settings | {f"the content of {file}": digest(Path(file).read_bytes()) for file in files}


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


class IterateState:
    """Which steps are done, kept in a file. ``identity``: the settings that every step depends on, text by flag."""

    def __init__(self, root: Path, identity: Mapping[str, str]) -> None:
        self.root = root
        self._identity = dict(identity)
        self._done: dict[str, Facts] = {}

    def open(self) -> int:
        """Make the folder, or read the steps that were done in it. Returns the number of finished steps.

        Raises CheckpointError if they were done with other settings.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / STATE
        # A new iteration must not write into a folder that holds something else.
        if not file.is_file():
            if any(self.root.iterdir()):
                raise CheckpointError(
                    f"--run_dir {self.root} is not empty and holds no iteration: choose another folder."
                )
            self._write()
            return 0
        # Resuming with other settings would mix rounds that cannot be compared.
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["identity"]
        different = [name for name in {**before, **self._identity} if before.get(name) != self._identity.get(name)]
        if different:
            changes = "; ".join(f"{name} was {before.get(name)}, is {self._identity.get(name)}" for name in different)
            raise CheckpointError(
                f"--run_dir {self.root} holds an iteration with other settings ({changes}): go on with the same, or choose "
                "another folder."
            )
        self._done = record["done"]
        return len(self._done)

    def once(self, round_number: int, step: str, work: Callable[[], Facts]) -> Facts:
        """The facts of a step: as recorded if it was done before, else those that ``work`` returns."""
        name = f"round {round_number}: {step}"
        if name not in self._done:
            self._done[name] = work()
            self._write()
        return self._done[name]

    def summarize(self, rounds: list[Facts]) -> Path:
        """Write the facts of every round as JSON. Returns the path."""
        path = self.root / SUMMARY
        write_atomically(path, json.dumps({"rounds": rounds}, indent=2, ensure_ascii=False) + "\n")
        return path

    def _write(self) -> None:
        record = {"identity": self._identity, "done": self._done}
        write_atomically(self.root / STATE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
