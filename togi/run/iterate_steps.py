"""The steps of a round. Each reads and writes files in the folder of the round. The loop is in ``iterate``.

Generating, scoring with a model and training are commands (``togi.cli``) in their own processes; scoring with functions and
servers and selecting run in this process. A step that is called again resumes from its own files.

Turn scored rows into training rows: the best output of each prompt, best and worst, or every output with its reward.

A scored row has "input" and "output" (texts), "reward" (a number, or null where the reward abstained), and any other columns
of the generation. Rows of one input form a group wherever they stand; inputs keep the order of their first appearance.
"""

import asyncio
import ctypes
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from togi.algo.best_of_n import best, best_and_worst, mean_with_error, standardized
from togi.config.choices import EngineName, EvalTask, IterateMethod, PostProcessor
from togi.config.fields import SEEDS
from togi.config.infer import GenerationSettings, RewardTextSettings
from togi.config.iterate import IterateConfig, PreferenceSettings
from togi.config.model_facts import position_limit
from togi.config.shared import TrainSettings
from togi.data.messages import FRAME, USER, dialogue_of, without_answers
from togi.data.precheck import with_reward
from togi.data.row_log import write_rows
from togi.data.source import DATASOURCE_COLUMNS, Mixture, load_mixture, read_rows
from togi.errors import DataError, RunError
from togi.run.iterate_scores import Row, plain_input, score_rows
from togi.run.preflight import model_settings
from togi.sample import FinishReason

Launch = Callable[[str, Sequence[str]], None]
Facts = dict[str, object]
"""The results of a step, as JSON."""

INFER = "togi.cli.batch_inference"
PROCESSORS = {
    IterateMethod.RS: PostProcessor.RS,
    IterateMethod.DPO: PostProcessor.ITER_DPO,
    IterateMethod.CSFT: PostProcessor.CSFT,
}
# The settings that are handed to the commands of the steps as they are: those that both have.
MODEL = ("bf16", "flash_attn", "tokenizer_chat_template", "trust_remote_code")
GENERATION = (
    *(name for name in GenerationSettings.model_fields if name not in ("greedy_sampling", "max_num_seqs")),
    "input_key",
    "label_key",
)
TRAINING = (*TrainSettings.model_fields, "gradient_checkpointing", "max_len", "save_steps")
PAIRS = tuple(name for name in PreferenceSettings.model_fields if name != "ref_previous_round")
REWARD_TEXT = tuple(RewardTextSettings.model_fields)
ON_BY_DEFAULT = {name for name, field in IterateConfig.model_fields.items() if field.default is True}
ON_HERE = ON_BY_DEFAULT | {"bf16"}
"""What may be on without a flag: on machines with GPUs --bf16 too."""
PR_SET_PDEATHSIG = 1


def subprocess_step(module: str, argv: Sequence[str]) -> None:
    """Run a command in a process that ends with this one. Raises RunError if it fails; it has printed the reason by then."""
    words = [sys.executable, "-m", module, *argv]
    # Otherwise the step of a killed iteration would keep writing beside the next one.
    end_with_parent = _die_with_parent if sys.platform == "linux" else None
    status = subprocess.run(words, check=False, preexec_fn=end_with_parent).returncode
    if status != 0:
        raise RunError(
            f"{module} ended with status {status}; what it said is above, and the same command goes on here."
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Steps:
    """Each step method returns its facts, which ``IterateState`` keeps."""

    def __init__(self, config: IterateConfig, root: Path, launch: Launch) -> None:
        assert config.method is not None
        self._config, self._root, self._launch, self._method = config, root, launch, config.method

    def folder(self, number: int) -> Path:
        return self._root / f"round_{number:03d}"

    def model(self, number: int) -> Path:
        return self.folder(number) / "model"

    def generate(self, number: int, model: str) -> Facts:
        """Generate outputs for the prompts of this round. From round 2 on, conditional SFT puts the reward into the prompt."""
        c, folder = self._config, self.folder(number)
        mixture = load_mixture(
            c.prompt_data, c.prompt_data_probs, split=c.prompt_split, seed=c.seed, max_samples=c.max_samples
        )
        rows = _rows(mixture)
        # Each round takes the next block of the shuffled prompts and starts over at their end.
        start = (number - 1) * c.rollout_batch_size
        chosen = [rows[(start + i) % len(rows)] for i in range(min(c.rollout_batch_size, len(rows)))]
        self._ask(folder, chosen, model, number, c.best_of_n, c.sampling_temperature, told=number > 1)
        return {"prompts": len(chosen), "outputs": len(read_rows(folder / "generated.jsonl"))}

    def score(self, number: int) -> Facts:
        """Score every output and return the mean reward."""
        rows = self._score(self.folder(number))
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        if not rewards:
            raise DataError(
                f"Round {number}: the reward abstained or failed on every output, so that there is nothing to learn."
            )
        return {"reward": sum(rewards) / len(rewards), "reward_errors": sum("reward_error" in row for row in rows)}

    def select(self, number: int) -> Facts:
        """Select the rows to train on. Dropped first: empty outputs, which cannot be learned, and truncated outputs, which
        would be learned with an end that they never had.
        """
        c, folder = self._config, self.folder(number)
        prompts = read_rows(folder / "prompts.jsonl")
        scored = [{**row, "input": plain_input(row)} for row in read_rows(folder / "scored.jsonl")]
        spoken = [row for row in scored if row["output"].strip()]
        usable = [row for row in spoken if c.keep_truncated or row["finish_reason"] != FinishReason.LENGTH]
        selection = select(
            usable, PROCESSORS[self._method], reward_template=c.reward_template, standardize=c.normalize_reward
        )
        # RS and DPO format the prompt again in training, so they need it as the data has it.
        rows: Sequence[Row] = selection.rows
        if self._method is not IterateMethod.CSFT:
            rows = [{**row, **_shown(prompts[_place(row)], c.input_key)} for row in rows]
        # One line for the log says how many rows were dropped and why.
        empty, cut = len(scored) - len(spoken), len(spoken) - len(usable)
        account = selection.describe() + (f"; {empty} empty outputs are left out" if empty > 0 else "")
        account += f"; {cut} outputs cut at --max_new_tokens are left out" if cut > 0 else ""
        if not rows:
            raise DataError(
                f"Round {number} has nothing to learn ({account}): raise --best_of_n or --max_new_tokens, or look at "
                f"{folder / 'scored.jsonl'}."
            )
        write_rows(folder / "train.jsonl", rows)
        counts = {"rows": len(rows), "ties": selection.ties, "empty": empty, "truncated": cut}
        return {**counts, "selected": account}

    def train(self, number: int, model: str) -> Facts:
        """Train a new model on the rows of this round, by ``togi sft`` or ``togi dpo``."""
        command, argv = self.training_command(number, model)
        folder = self.folder(number)
        # The folder exists if this step was interrupted before.
        if (folder / "train").exists():
            argv.append("--load_checkpoint")
        self._launch(f"togi.cli.train_{command}", argv)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {"model": str(self.model(number))}

    def training_command(self, number: int, model: str) -> tuple[str, list[str]]:
        """The name and the flags of the training command."""
        c, folder = self._config, self.folder(number)
        given = {
            **self._settings(*MODEL, *TRAINING),
            "pretrain": model,
            "dataset": folder / "train.jsonl",
            "save_path": self.model(number),
            "run_dir": folder / "train",
            "ckpt_path": folder / "checkpoints",
            "seed": (c.seed + number) % SEEDS,
            "learning_rate": c.peak_learning_rate,
        }
        if self._method is IterateMethod.DPO:
            reference = model if c.ref_previous_round else c.pretrain
            given |= {"prompt_key": "prompt", "ref_pretrain": reference, **self._settings(*PAIRS), **self._rendering()}
            return "dpo", _flags(given)
        if self._method is IterateMethod.RS:
            return "sft", _flags(given | {"input_key": "prompt", "output_key": "output", **self._rendering()})
        # The prompt of csft is already formatted text with the reward in it.
        plain = {"tokenizer_chat_template": None, "input_template": "{}"}
        return "sft", _flags(given | {"input_key": "input", "output_key": "output", **plain})

    def evaluate(self, number: int, model: str) -> Facts:
        """Mean reward on the held-out prompts, with the standard error over prompts (null for a single one)."""
        c, folder = self._config, self.folder(number) / "eval"
        assert c.eval_dataset is not None
        rows = _rows(load_mixture(c.eval_dataset, None, split=c.eval_split))
        self._ask(folder, rows, model, number, c.eval_n_samples_per_prompt, c.eval_temperature, told=number > 0)
        # Mean over the samples of each prompt first: the standard error is over prompts.
        of_prompt: dict[int, list[float]] = {}
        for row in self._score(folder):
            if row["reward"] is not None:
                of_prompt.setdefault(_place(row), []).append(row["reward"])
        if not of_prompt:
            raise DataError("The reward abstained or failed on every held-out output: leave --eval_dataset out.")
        estimate = mean_with_error([sum(rewards) / len(rewards) for rewards in of_prompt.values()])
        error = estimate.standard_error if estimate.count > 1 else None
        return {"eval_reward": estimate.mean, "eval_stderr": error, "eval_prompts": estimate.count}

    def _ask(
        self,
        folder: Path,
        rows: Sequence[Mapping[str, object]],
        model: str,
        number: int,
        samples: int,
        temperature: float,
        *,
        told: bool,
    ) -> None:
        """Write ``prompts.jsonl`` and run ``togi infer``, which writes ``generated.jsonl``, unless that was done before.

        ``told``: whether csft puts its reward into the prompt.
        """
        c = self._config
        if (folder / "generated.jsonl").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Only the columns that later steps read are kept.
        keys = [c.input_key, *FRAME, *DATASOURCE_COLUMNS] + ([c.label_key] if c.label_key is not None else [])
        kept = [{key: row[key] for key in keys if key in row} for row in rows]
        if c.apply_chat_template:
            kept = [{**row, c.input_key: _asked(row.get(c.input_key))} for row in kept]
        write_rows(folder / "prompts.jsonl", kept)
        # `togi infer` generates; samples, lengths and engine settings are passed through.
        by_vllm = c.rollout_engine is EngineName.VLLM
        asked = {
            **self._settings(*MODEL, *GENERATION),
            "eval_task": EvalTask.GENERATE_VLLM if by_vllm else EvalTask.GENERATE,
            "pretrain": model,
            "dataset": folder / "prompts.jsonl",
            "output_path": folder / "generated.jsonl",
            "best_of_n": samples,
            "temperature": temperature,
            "seed": (c.seed + number) % SEEDS,
            "max_num_seqs" if by_vllm else "micro_batch_size": c.max_num_seqs,
            "keep_tokens": True,
            **self._rendering(),
        }
        if self._method is IterateMethod.CSFT and told:
            asked |= {"enable_csft": True, **self._settings(*REWARD_TEXT)}
        self._launch(INFER, _flags(asked))

    def _score(self, folder: Path) -> list[Row]:
        """Score ``generated.jsonl`` by all rewards together, as ``togi rl`` does, and write ``scored.jsonl``."""
        path = folder / "scored.jsonl"
        if not path.exists():
            rows = [dict(row) for row in read_rows(folder / "generated.jsonl")]
            models = [self._model_scores(number, rows, folder) for number in range(len(self._config.reward_models))]
            asyncio.run(score_rows(self._config, rows, models, path))
        return [dict(row) for row in read_rows(path)]

    def _model_scores(self, number: int, rows: Sequence[Row], folder: Path) -> list[float]:
        """Score by a reward model, which formats the raw prompts with its own tokenizer and template."""
        c, model = self._config, self._config.reward_models[number]
        path = folder / f"model_scores_{number}.jsonl"
        prompts = read_rows(folder / "prompts.jsonl")
        whole = [{**_shown(prompts[_place(row)], c.input_key), "output": row["output"]} for row in rows]
        write_rows(folder / "to_score.jsonl", whole)
        # A row may be as long as the reward model and the token budget allow.
        positions = position_limit(model_settings(model))
        length = c.max_tokens_per_gpu if positions is None else min(c.max_tokens_per_gpu, positions)
        given = {
            **self._settings("max_tokens_per_gpu", "bf16", "flash_attn", "trust_remote_code"),
            "eval_task": EvalTask.RM,
            "pretrain": model,
            "dataset": folder / "to_score.jsonl",
            "output_path": path,
            "input_key": "prompt",
            "max_len": length,
            # csft standardises over the rows of the round instead, in `select`.
            "normalize_reward": c.normalize_reward and self._method is not IterateMethod.CSFT,
            **self._rendering(),
        }
        if not path.exists():
            self._launch(INFER, _flags(given))
        return [row["reward"] for row in read_rows(path)]

    def _rendering(self) -> dict[str, object]:
        """The settings for how a prompt is formatted, the same for every command."""
        if self._config.apply_chat_template:
            return {"apply_chat_template": True}
        return {"input_template": self._config.input_template or "{}"}

    def _settings(self, *names: str) -> dict[str, object]:
        return self._config.model_dump(mode="json", include=set(names))


def _flags(values: Mapping[str, object]) -> list[str]:
    """Settings as command line flags. Skips None, and flags that are on or off by default."""
    words = []
    for name, value in values.items():
        if value is True:
            words += [] if name in ON_BY_DEFAULT else [f"--{name}"]
        elif value is False:
            words += [f"--no_{name}"] if name in ON_HERE else []
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words


def _rows(mixture: Mixture) -> list[Mapping[str, object]]:
    """The rows of prompt sets, with their datasource where the sets tell them apart."""
    names = mixture.datasources
    whole = zip(mixture.picks, mixture.rows(), strict=True)
    return [
        row
        if len(names) == 1 or any(row.get(column) is not None for column in DATASOURCE_COLUMNS)
        else {**row, DATASOURCE_COLUMNS[0]: names[pick.source]}
        for pick, row in whole
    ]


def _place(row: Mapping[str, object]) -> int:
    """The row of ``prompts.jsonl`` that an output answers: ids are "source:row"."""
    return int(str(row["id"]).partition(":")[2])


def _asked(prompt: object) -> object:
    """The prompt without an assistant turn at its end, because every later step appends its own answer."""
    if isinstance(prompt, str) or not prompt:
        return prompt
    return list(without_answers(dialogue_of(prompt, USER, None)).messages)


def _shown(row: Mapping[str, object], key: str) -> dict[str, object]:
    """The parts of a row that make up the formatted prompt: prompt, tools and system turn."""
    return {name: row[name] for name in FRAME if row.get(name)} | {"prompt": row[key]}


@dataclass(frozen=True, slots=True)
class Selection:
    """``rows`` to train on. ``inputs``: distinct inputs that have a reward; ``ties``: inputs whose outputs all have the same
    reward, which make no pair; ``unscored``: rows without a reward.
    """

    rows: tuple[Row, ...]
    inputs: int
    ties: int
    unscored: int

    def describe(self) -> str:
        """The counts in words."""
        parts = [f"{len(self.rows)} rows from {self.inputs} inputs"]
        if self.ties > 0:
            parts.append(f"{self.ties} inputs make no pair, their outputs have equal rewards")
        if self.unscored > 0:
            parts.append(f"{self.unscored} outputs without a reward are left out")
        return "; ".join(parts)


def select(
    rows: Sequence[Row], processor: PostProcessor, *, reward_template: str, standardize: bool = False
) -> Selection:
    """Apply a post-processor. ``standardize``: z-score the rewards over all rows before they enter the input (csft only)."""
    scored = [row for row in rows if row["reward"] is not None]
    groups: dict[str, list[Row]] = {}
    for row in scored:
        # The identity of an input, which may be a list of messages.
        groups.setdefault(json.dumps(row["input"], sort_keys=True), []).append(row)
    match processor:
        case PostProcessor.RS:
            # The best output of each input, unchanged; the first one among equals.
            chosen = [dict(group[best(_rewards(group))]) for group in groups.values()]
        case PostProcessor.ITER_DPO:
            chosen = [pair for group in groups.values() if (pair := best_with_worst(group)) is not None]
        case PostProcessor.CSFT:
            rewards = standardized(_rewards(scored)) if standardize else _rewards(scored)
            chosen = [
                {**row, "input": with_reward(reward_template, row["input"], reward), "reward": reward}
                for row, reward in zip(scored, rewards, strict=True)
            ]
    ties = len(groups) - len(chosen) if processor is PostProcessor.ITER_DPO else 0
    return Selection(tuple(chosen), len(groups), ties, len(rows) - len(scored))


def best_with_worst(group: Sequence[Row]) -> Row | None:
    """Best and worst output as {prompt, chosen, chosen_reward, rejected, rejected_reward}; None for a tie."""
    places = best_and_worst(_rewards(group))
    if places is None:
        return None
    chosen, rejected = group[places[0]], group[places[1]]
    # Other columns come from the chosen output.
    row = {name: value for name, value in chosen.items() if name not in ("input", "output", "reward")}
    row |= {"prompt": chosen["input"], "chosen": chosen["output"], "chosen_reward": chosen["reward"]}
    return row | {"rejected": rejected["output"], "rejected_reward": rejected["reward"]}


def _rewards(rows: Sequence[Row]) -> list[float]:
    return [float(row["reward"]) for row in rows]
