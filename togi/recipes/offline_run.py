"""The state of an offline run between its phases. Each method is one line of the recipe (``togi.recipes.offline.train``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from togi.data.packing import PackStats, pack_stats
from togi.data.records import Examples
from togi.learn.checkpoint import HF_FOLDER, Best, BestStore, Checkpoint, CheckpointStore, better
from togi.learn.learner import UpdateReport
from togi.learn.learner_state import expected_bytes, load_learner, save_learner
from togi.learn.scorer import Measured, conclude, measure
from togi.methods.method import Method
from togi.model.checkpoint import save_trained, written_aside
from togi.model.compiled_layers import clock
from togi.model.loading import dtype_of
from togi.model.policy import ScalarModel
from togi.obs import names
from togi.parallel.process import World
from togi.recipes.best_metric import offline_aim
from togi.recipes.held_out import Judged, ends, judge, worst_and_best
from togi.recipes.offline_data import Data
from togi.recipes.offline_journal import Journal
from togi.recipes.offline_plan import EpochPlan
from togi.recipes.offline_setup import Models, identity
from togi.sample import Sample

SMALLEST_STD = 1e-8


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out loss and metrics after ``step`` optimizer steps."""

    step: int
    loss: float
    metrics: Mapping[str, float]


class OfflineRun:
    """``step`` optimizer steps have been done. Every method is called by all ranks together."""

    def __init__(
        self,
        config: Method,
        command: str,
        data: Data,
        plan: EpochPlan,
        models: Models,
        world: World,
        journal: Journal,
    ) -> None:
        self.config, self.plan, self.data = config, plan, data
        self._command, self._models, self._world, self._journal = command, models, world, journal
        self.step = 0
        self._identity = identity(config, command, data)
        self._tokens_seen = 0.0
        self._values: dict[str, float] = {}
        self._store = CheckpointStore(Path(config.ckpt_path), config.max_ckpt_num, config.max_ckpt_mem)
        self._aim, self._bests = offline_aim(config), BestStore(Path(config.ckpt_path))
        self._best: Best | None = None

    def resume(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint: weights, moments, random generators; the step alone says which rows come next."""
        if found is None:
            return
        with self._journal.progress.phase(f"loading checkpoint of step {found.step}", expected_seconds=10):
            load_learner(self._models.learner, found.path, self._identity)
        self.step, self._tokens_seen = found.step, found.state["tokens_seen"]
        if self._aim is not None:
            best = self._bests.resumed(self._aim, found.state.get("best")) if self._world.is_first else None
            self._best = self._world.gather("best evaluation", best)[0]

    def next_samples(self) -> list[Sample]:
        """The rows of this optimizer step as samples, the same on every rank; some answered by the student if so asked."""
        samples = self._samples(self.data.train, self.plan.rows_of(self.step))
        for student in self._models.students:
            self._journal.beat()
            with self._journal.progress.phase("generating"):
                samples, metrics = student.answer(samples, self.step)
            self._values |= metrics
        return samples

    def prepare(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's share, with what the loss needs of other models."""
        self._journal.beat()
        with self._journal.progress.phase("preparing"):
            return self._models.prepare(samples, seed=self._seed(self.step))

    def update(self, samples: Sequence[Sample]) -> UpdateReport:
        """One optimizer step."""
        start = time.perf_counter()
        with self._journal.progress.phase("training"):
            batches = self._models.dealer.packs(samples).batches
            stats = sum((pack_stats(batch) for batch in batches), PackStats(0, 0))
            report = self._models.learner.update(batches)
            tokens, unshared = self._world.sum_shares("tokens", [stats.tokens, stats.unshared_tokens])
        self.step += 1
        self._tokens_seen += unshared
        self._values |= {
            **report.metrics,
            names.GRAD_NORM: report.grad_norm,
            names.LEARNING_RATE: report.learning_rate,
            names.TOKENS_STEP: unshared,
            names.TOKENS_SEEN: self._tokens_seen,
            names.SHARED_SHARE: PackStats(int(tokens), int(unshared)).saved_share,
            names.PADDING_SHARE: report.load.padding_share,
            names.RANK_IMBALANCE: report.load.imbalance,
            names.THROUGHPUT_TRAIN: unshared / (time.perf_counter() - start),
        }
        if self.config.torch_compile:
            self._values[names.COMPILE_SECONDS] = clock.take_seconds()
        return report

    @property
    def evaluation_is_due(self) -> bool:
        """Every ``--eval_steps`` steps and at the end of each epoch."""
        due = self.config.eval_steps > 0 and self.step % self.config.eval_steps == 0
        return bool(self.data.held_out) and (due or self.step % self.plan.steps_per_epoch == 0)

    def evaluate(self) -> list[Evaluation]:
        """Loss and metrics over all rows of the held-out set: one, or none without a set."""
        return [self._evaluate(examples) for examples in self.data.held_out]

    def _evaluate(self, examples: Examples) -> Evaluation:
        objective, parts, rows = self._models.learner.objective, list[Measured](), list[Judged]()
        with self._journal.progress.phase("evaluating"):
            for samples in self._in_parts(examples):
                mine = self._models.prepare(samples, seed=self._seed(0))
                packs = self._models.dealer.packs(mine)
                part = measure(self._models.learner.backend.module, objective, self._world, packs.batches)
                rows += judge(mine, packs.in_order(part.judged), self.config.badness)
                parts.append(replace(part, judged=()))
                self._journal.beat()
            rows = [row for share in self._world.gather_shares("held-out rows", ends(rows)) for row in share]
            loss, metrics = conclude(objective, self._world, Measured.merged(parts))
        values = {f"eval/{name}": value for name, value in metrics.items()} | {names.EVAL_LOSS: loss}
        self._values |= values
        if self._world.is_first:
            shown = worst_and_best(self.config.number, rows, examples, self.data.tokenizer)
            self._journal.write_rows(self.step, shown)
        self._keep_if_best(values)
        if self.step == 0:
            self._journal.write(0, values, "")
            self._values = {}
        else:
            self._models.learner.schedule.observe(loss)
        return Evaluation(self.step, loss, metrics)

    def _keep_if_best(self, values: Mapping[str, float]) -> None:
        """Write the model beside the checkpoints if no evaluation before was as good."""
        aim, bests = self._aim, self._bests
        if aim is None or not better(aim, values[aim.metric], self._best):
            return
        self._best = Best(aim, values[aim.metric], self.step)
        with self._journal.progress.phase("writing the best model"), ExitStack() as stack:
            folder = stack.enter_context(bests.write(self._best)) if self._world.is_first else bests.folder
            self._write_model(folder)
        self._journal.announce(
            f"best so far: {aim.metric} {self._best.value:.5g} at step {self.step}, in {bests.folder}"
        )

    def log(self) -> None:
        """Metrics, every step."""
        self._journal.write(self.step, self._values, f"loss {self._values.get(names.LOSS, np.nan):.4f}")
        self._values = {}

    def checkpoint_if_due(self) -> None:
        """A resumable checkpoint and, if asked for, a model folder inside it. The first rank writes."""
        config, world = self.config, self._world
        if config.save_steps <= 0 or self.step % config.save_steps != 0:
            return
        resumable = not config.disable_ds_ckpt
        state = {
            "resumable": resumable,
            "identity": self._identity,
            "tokens_seen": self._tokens_seen,
            "best": self._best.to_json() if self._best is not None else None,
        }
        size = expected_bytes(self._models.learner) if resumable else 0
        with self._journal.progress.phase("writing a checkpoint"), ExitStack() as stack:
            folder = stack.enter_context(self._store.write(self.step, state, size)) if world.is_first else Path()
            folder = world.gather("checkpoint folder", folder)[0]
            if resumable:
                save_learner(self._models.learner, folder, self._identity)
            if config.save_hf_ckpt:
                self._write_model(folder / HF_FOLDER)

    def save(self) -> None:
        """The final model in plain Hugging Face format, written aside and renamed."""
        target = Path(self.config.save_path)
        with self._journal.progress.phase("saving the model", expected_seconds=5):
            if self._world.is_first:
                with written_aside(target) as aside:
                    self._write_model(aside)
            else:
                self._write_model(target)  # takes part in gathering, writes nothing
            self._world.barrier("model in place")

    def close(self) -> None:
        """Stop what runs beside the training."""
        for student in self._models.students:
            student.close()

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
        """Put mean and standard deviation (n - 1) of the scores of the held-out set, or else of the rows trained on,
        chosen and rejected, into the config.
        """
        examples = self.data.held_out[0] if self.data.held_out else self.data.train
        own = [np.empty(0, dtype=np.float32)]
        for samples in self._in_parts(examples):
            mine = self._models.dealer.packs(self._models.dealer.share(samples))
            own.append(self._models.policy.scores(mine.batches))
            self._journal.beat()
        scores = np.concatenate(self._world.gather_shares("scores", np.concatenate(own))).astype(np.float64)
        model.set_reward_statistics(float(scores.mean()), max(float(scores.std(ddof=1)), SMALLEST_STD))

    def _in_parts(self, examples: Examples) -> Iterator[list[Sample]]:
        """All rows, a bounded number at a time; at once where the loss looks at all of them together."""
        size = len(examples) if self.config.looks_at_all_rows else self.config.train_batch_size
        for start in range(0, len(examples), size):
            yield self._samples(examples, range(start, min(start + size, len(examples))))

    def _seed(self, step: int) -> int:
        return self.config.seed * 1_000_003 + step

    @staticmethod
    def _samples(examples: Examples, rows: Sequence[int]) -> list[Sample]:
        return [sample for row in rows for sample in examples[row]]
