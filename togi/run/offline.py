"""Training on a fixed data set, the same for every method (``togi.methods``). ``train`` is the loop.

One process, or several that a launcher started (``torchrun -m togi.cli.train_sft``); no Ray.

The phases of a run on fixed data, and its state between them. ``togi.run.offline.train`` calls each in one line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from togi.config.parse import Parsed
from togi.data.packing import PackStats, in_order
from togi.data.records import Examples
from togi.errors import CheckpointError
from togi.learn.checkpoint import HF_FOLDER, Checkpoint
from togi.learn.learner import Divergence
from togi.learn.learner_state import check_adapter, expected_bytes, load_learner, save_learner
from togi.learn.schedule import standing_still
from togi.learn.scorer import Measured, conclude, measure
from togi.methods.method import Method
from togi.model.checkpoint import save_trained, written_aside
from togi.model.layers import clock
from togi.model.loading import dtype_of
from togi.model.policy import ScalarModel
from togi.obs import names
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.parallel.process import World
from togi.run.journal import Evaluation, Journal, Judged, ends, judge, open_journal, worst_and_best
from togi.run.keep import Keep, check_room, every, newest_checkpoint, offline_writing, size_of
from togi.run.offline_setup import (
    Data,
    Models,
    check_plan,
    check_ranks,
    load_data,
    load_models,
    offload_notice,
)
from togi.run.plan import EpochPlan, offline_aim
from togi.run.start import NO_CUDA_FOR_FLASH, NO_CUDA_FOR_LIGER, asks_for_flash
from togi.sample import Sample
from togi.weights.files import stamp

NOT_SET = {"--lr_scheduler": "not one that follows a loss"}


@dataclass(frozen=True, slots=True)
class Result:
    """The output of a finished run. ``evaluations`` are in the order of training. ``is_first``: whether this rank logs."""

    run_dir: Path
    model: Path
    steps: int
    evaluations: tuple[Evaluation, ...]
    is_first: bool

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


@contextmanager
def launched(local_rank: int) -> Iterator[World]:
    """Join the processes that a launcher started. Ranks other than the first log errors only."""
    world = World.from_environment(local_rank)
    if not world.is_first:
        logging.getLogger("togi").setLevel(logging.ERROR)
    yield world
    world.leave()  # not after an error, when others may still wait in a collective


def run(
    world: World, parsed: Parsed[Method], command: str, *, argv: Sequence[str], announce: Callable[[str], None]
) -> Result:
    """Train with settings from ``start.offline_door``, in a process group that is already set up."""
    config, first = parsed.config, world.is_first
    world = world.in_teams(config.ring_attn_size, config.ds_tensor_parallel_size)
    with Progress(quiet=not first) as progress, ExitStack() as stack:
        journal = Journal(progress)
        if first and asks_for_flash(parsed) and world.device.type != "cuda":
            announce(NO_CUDA_FOR_FLASH)
        # Data, plan and checkpoint first: a user's mistake ends the run before a model is loaded.
        data, plan, found = opening(config, command, world, progress, announce if first else journal.announce)
        if first and (still := standing_still(config, config.learning_rate, plan.steps)):
            announce(f"warning: {still}")
        if first:
            folder = open_journal(parsed, command, argv, progress, announce, data.reports, found)
            journal = world.in_turn("run folder", lambda: stack.enter_context(folder))
        else:
            journal = world.in_turn("run folder", lambda: Journal(progress))
        with progress.phase("loading models", expected_seconds=10):
            models = load_models(config, data, plan, world, journal)
        # From here on the loop owns the models and closes them.
        state = OfflineRun(config, command, plan, models, world, journal)
        stack.callback(state.close)
        evaluations = train(state, found)
    return Result(journal.root, Path(config.save_path), plan.steps, tuple(evaluations), first)


def opening(
    config: Method, command: str, world: World, progress: Progress, announce: Callable[[str], None]
) -> tuple[Data, EpochPlan, Checkpoint | None]:
    """Everything that comes before a model or a folder: notices, rows, the step plan, room on the disk, the checkpoint.

    Raises UserError.
    """
    # Notices about flags that this machine or these settings change.
    if config.use_liger_kernel and world.device.type != "cuda":
        announce(NO_CUDA_FOR_LIGER)
    if notice := offload_notice(config, world):
        announce(notice)
    check_ranks(config, world)
    if config.eval_steps > 0 and config.eval_dataset is None:
        announce("--eval_steps: there is no --eval_dataset, so nothing is evaluated")
    # Rows and the number of steps.
    data = load_data(config, world, progress)
    plan = EpochPlan(len(data.train), config.train_batch_size, config.max_epochs, config.seed)
    check_plan(config, plan, data)
    announce(plan.describe())
    writing = offline_writing(config, plan.steps, size_of(config))
    world.in_turn("disk", lambda: check_room(config, writing) if world.is_first else "")
    return data, plan, find_checkpoint(config, command, data, world)


def train(run: OfflineRun, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The training loop: a batch of rows, one optimizer step, and at intervals an evaluation and a checkpoint.

    ``metrics``: the measurements of each phase of a step.
    """
    evaluations = list[Evaluation]()
    run.resume(checkpoint)
    if run.config.eval_at_start and run.step == 0 and run.data.held_out:
        evaluations.append(run.evaluate())
        run.log(evaluations[-1].metrics)
    while run.step < run.plan.steps:
        samples, metrics = run.next_samples()
        metrics |= run.update(run.prepare(samples))
        if run.evaluation_is_due:
            evaluations.append(run.evaluate())
            metrics |= evaluations[-1].metrics
        run.log(metrics)
        run.checkpoint_if_due()
    run.save()
    return evaluations


def find_checkpoint(config: Method, command: str, data: Data, world: World) -> Checkpoint | None:
    """The checkpoint to resume from. Raises CheckpointError if it is of another run or has no resumable state."""
    found = newest_checkpoint(config, world) if config.load_checkpoint else None
    if found is None:
        return None
    check_adapter(found, "", config)
    saved, now = found.state["identity"], identity(config, command, data)
    # Other rows or another batch size would train some rows twice and others never.
    if saved != now:
        pairs = {
            name: [each.get(name, NOT_SET.get(name, "none")) for each in (saved, now)] for name in {**now, **saved}
        }
        different = "; ".join(f"{name} was {a}, is {b}" for name, (a, b) in pairs.items() if a != b)
        raise CheckpointError(
            f"The checkpoint {found.path} belongs to another run ({different}): resume with the same rows and settings, "
            "or choose another --ckpt_path."
        )
    return found


SMALLEST_STD = 1e-8


class OfflineRun:
    """A run after ``step`` optimizer steps. All ranks call every method together. A phase returns metrics by name."""

    def __init__(
        self, config: Method, command: str, plan: EpochPlan, models: Models, world: World, journal: Journal
    ) -> None:
        self.config, self.plan, self.data = config, plan, models.data
        self._models, self._world, self._journal = models, world, journal
        self.step = 0
        self._identity = identity(config, command, models.data)
        self._tokens_seen = 0.0
        self._divergence = Divergence("--learning_rate")
        self._keep = Keep(config, offline_aim(config), world, journal)

    def close(self) -> None:
        """Stop what runs beside the training, such as the engines of a student."""
        with way_out("ending what runs beside the training"):
            for student in self._models.students:
                student.close()

    def resume(self, found: Checkpoint | None) -> None:
        """Resume from a checkpoint: weights, moments, random generators. The step alone determines which rows come next."""
        if found is not None:
            with self._journal.progress.phase(f"loading checkpoint of step {found.step}", expected_seconds=10):
                load_learner(self._models.learner, found.path, self._identity)
            self.step, self._tokens_seen = found.step, found.state["tokens_seen"]
            self._keep.resume(found)
        self._journal.progress.start_steps(self.plan.steps, done=self.step)

    def next_samples(self) -> tuple[list[Sample], dict[str, float]]:
        """The rows of this optimizer step as samples, the same on every rank. A student answers some of them if configured."""
        samples, measured = self._samples(self.data.train, self.plan.rows_of(self.step)), dict[str, float]()
        for student in self._models.students:
            self._journal.beat()
            with self._journal.progress.phase("generating"):
                samples, metrics = student.answer(samples, self.step)
            measured |= metrics
        return samples, measured

    def prepare(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's share of the samples, with the values that the loss needs from other models."""
        self._journal.beat()
        with self._journal.progress.phase("preparing"):
            return self._models.prepare(samples, seed=self._seed(self.step))

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step."""
        start = time.perf_counter()
        with self._journal.progress.phase("training"):
            report = self._models.learner.update(self._models.dealer.packs(samples))
            # Tokens are summed over ranks: each rank has seen its share only.
            tokens, unshared = self._world.sum_shares("tokens", [report.packed.tokens, report.packed.unshared_tokens])
        self.step += 1
        self._divergence.watch(self.step, [report])
        self._tokens_seen += unshared
        compiling = {names.COMPILE_SECONDS: clock.take_seconds()} if self.config.torch_compile else {}
        return compiling | {
            **report.metrics,
            names.GRAD_NORM: report.grad_norm,
            names.LEARNING_RATE: report.learning_rate,
            names.TOKENS_STEP: unshared,
            names.TOKENS_SEEN: self._tokens_seen,
            names.SHARED_SHARE: PackStats(int(tokens), int(unshared)).saved_share,
            names.PADDING_SHARE: report.padding_share,
            names.RANK_IMBALANCE: report.imbalance,
            names.THROUGHPUT_TRAIN: unshared / (time.perf_counter() - start),
        }

    @property
    def evaluation_is_due(self) -> bool:
        """True every ``--eval_steps`` steps and at the end of each epoch."""
        due = every(self.config.eval_steps, self.step) or every(self.plan.steps_per_epoch, self.step)
        return bool(self.data.held_out) and due

    def evaluate(self) -> Evaluation:
        """Loss and metrics over all held-out rows. The model is written if it is the best so far."""
        (examples,) = self.data.held_out
        objective, parts, rows = self._models.learner.objective, list[Measured](), list[Judged]()
        with self._journal.progress.phase("evaluating"):
            # Stage 1: every rank measures its share, part by part, so that memory is bounded.
            for samples in self._in_parts(examples):
                mine = self._models.prepare(samples, seed=self._seed(0))
                packs = self._models.dealer.packs(mine)
                part = measure(self._models.learner.backend.module, objective, self._world, packs)
                rows += judge(mine, in_order(packs, part.judged), self.config.badness)
                parts.append(replace(part, judged=()))
                self._journal.beat()
            # Stage 2: merge the ranks. Only the worst and best rows of each rank are gathered.
            rows = [row for share in self._world.gather_shares("held-out rows", ends(rows)) for row in share]
            loss, metrics = conclude(objective, self._world, Measured.merged(parts))
        if self._world.is_first:
            shown = worst_and_best(self.config.number, rows, examples, self.data.tokenizer)
            self._journal.write_rows(self.step, shown)
        values = {names.EVAL_LOSS: loss, **{f"eval/{name}": value for name, value in metrics.items()}}
        # Stage 3: keep the best model, and report the loss to a schedule that follows it.
        if self._keep.is_best(values):
            with self._keep.best(self.step, values) as folder:
                self._write_model(folder)
        if self.step > 0:
            self._models.learner.schedule.observe(loss)
        return Evaluation(self.step, values)

    def log(self, values: Mapping[str, float]) -> None:
        """Write the metrics of a step; step 0 is an evaluation before training."""
        self._journal.write(self.step, values, f"loss {values.get(names.LOSS, np.nan):.4f}")

    def checkpoint_if_due(self) -> None:
        """Write a resumable checkpoint and, with --save_hf_ckpt, a model folder inside it. The first rank writes."""
        config = self.config
        if not self._keep.checkpoint_is_due(self.step, [self._divergence]):
            return
        state = {"identity": self._identity, "tokens_seen": self._tokens_seen, "lora_alpha": config.lora_alpha}
        with self._keep.checkpoint(self.step, state, expected_bytes(self._models.learner)) as folder:
            if not config.disable_ds_ckpt:
                save_learner(self._models.learner, folder, self._identity)
            if config.save_hf_ckpt:
                self._write_model(folder / HF_FOLDER)

    def save(self) -> None:
        """Write the final model in plain Hugging Face format, to a folder aside that is then renamed."""
        target = Path(self.config.save_path)
        with self._journal.progress.phase("saving the model", expected_seconds=5):
            # The other ranks take part in gathering and write nothing.
            with written_aside(target) if self._world.is_first else nullcontext(target) as folder:
                self._write_model(folder)
                self._journal.sign(folder)
            self._world.barrier("model in place")

    def _write_model(self, folder: Path) -> None:
        model, dtype = self._models.model, dtype_of(self.config.bf16)
        if isinstance(model, ScalarModel):
            self._measure_rewards(model)
        else:
            model.end_answers_with(self.data.stop_token_ids)
        target = folder if self._world.is_first else None
        save_trained(target, model, self._models.learner.backend.full_parameters, self.data.tokenizer, dtype)
        self._world.barrier("model written")

    def _measure_rewards(self, model: ScalarModel) -> None:
        """Set mean and standard deviation (n - 1) of the scores in the model's config. Scored: the held-out set, or else the
        training rows, chosen and rejected.
        """
        examples = self.data.held_out[0] if self.data.held_out else self.data.train
        # A rank may have no row, and `concatenate` needs at least one array.
        own = [np.empty(0, dtype=np.float32)]
        for samples in self._in_parts(examples):
            mine = self._models.dealer.packs(self._models.dealer.share(samples))
            own.append(self._models.policy.scores(mine))
            self._journal.beat()
        scores = np.concatenate(self._world.gather_shares("scores", np.concatenate(own))).astype(np.float64)
        model.set_reward_statistics(float(scores.mean()), max(float(scores.std(ddof=1)), SMALLEST_STD))

    def _in_parts(self, examples: Examples) -> Iterator[list[Sample]]:
        """All rows, a bounded number at a time; all at once if the loss compares all of them."""
        size = len(examples) if self.config.looks_at_all_rows else self.config.train_batch_size
        for start in range(0, len(examples), size):
            yield self._samples(examples, range(start, min(start + size, len(examples))))

    def _seed(self, step: int) -> int:
        return self.config.seed * 1_000_003 + step

    @staticmethod
    def _samples(examples: Examples, rows: Sequence[int]) -> list[Sample]:
        return [sample for row in rows for sample in examples[row]]


def identity(config: Method, command: str, data: Data) -> dict[str, str]:
    """What must be equal for a resumed run to go on as an uninterrupted one: the rows and their order, and all frozen weights."""
    same = {
        "command": f"togi {command}",
        "--dataset": data.train.fingerprint(),
        "--seed": str(config.seed),
        "--train_batch_size": str(config.train_batch_size),
    }
    # A checkpoint holds trained weights only; those of a frozen model come from its folder.
    base = {"--pretrain (the base of the adapter)": config.pretrain if config.lora is not None else ""}
    others = {"--ref_pretrain (by default --pretrain)": config.reference, "--teacher_model": config.teacher}
    same |= {f"the weights of {flag}": stamp(path) for flag, path in (base | others).items() if path}
    # The state of a schedule that follows a loss is in the checkpoint; the other schedules need only the step.
    return same | ({"--lr_scheduler": config.lr_scheduler.value} if config.lr_scheduler.follows_a_loss else {})
