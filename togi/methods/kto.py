"""Kahneman-Tversky optimisation on single labelled responses. The loss and its KL estimate are in ``kto_objective``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from togi.config.fields import FromZero, PathText, Positive, flag
from togi.errors import ConfigError
from togi.methods.method import REWARD_MEASURES, HeldToReference, Measure, PromptAndResponse
from togi.obs import names

if TYPE_CHECKING:
    from togi.data.chat import Tokenizer
    from togi.data.precheck import RecordSpec
    from togi.data.records import Examples
    from togi.learn.objective import Objective
    from togi.learn.scorer import Scorer
    from togi.methods.training import Dealer, Material, Preparation
    from togi.sample import Sample

# The labels that an evaluation needs for each metric: 1 desirable, 0 undesirable.
_LABELS_OF: Mapping[str, frozenset[float]] = {
    names.REWARD_CHOSEN: frozenset({1.0}),
    names.REWARD_REJECTED: frozenset({0.0}),
    names.REWARD_MARGIN: frozenset({0.0, 1.0}),
}


class KTO(PromptAndResponse, HeldToReference):
    """Kahneman-Tversky optimisation on single responses labelled desirable (1) or undesirable (0)."""

    command = "kto"
    summary = "preference training from single labelled answers"
    title = "Kahneman-Tversky optimisation"
    measures = (*REWARD_MEASURES, Measure(names.KL_ESTIMATE))
    number = "reward"
    looks_at_all_rows = True

    label_key: str = flag("label", "Field with the label: 1 desirable, 0 undesirable.")
    beta: Positive = flag(0.01, "Temperature: how strongly the policy is held to the reference.")
    desirable_loss_weight: FromZero = flag(1.0, "Weight of desirable rows.")
    undesirable_loss_weight: FromZero = flag(1.0, "Weight of undesirable rows.")
    learning_rate: FromZero = flag(1e-5, "Peak learning rate.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_kto", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_kto", "Weights & Biases project.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        yield from super().problems(template_given=template_given)
        if self.train_batch_size < 2:
            yield "--train_batch_size 1 gives the KL estimate no mismatched pairs: KTO needs two rows or more."
        if self.precompute_ref:
            # The KL estimate scores other pairs of prompt and answer in every step.
            yield "--precompute_ref cannot free the reference, which togi kto needs in every step: use --ref_offload instead."
        if self.desirable_loss_weight == 0 and self.undesirable_loss_weight == 0:
            yield "--desirable_loss_weight and --undesirable_loss_weight are both 0: raise one of them."
        if self.output_key is None and not self.apply_chat_template:
            yield "--output_key is required without --apply_chat_template: name the field with the response."

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {**super().row_fields, "label_key": self.label_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_unpaired

        return load_unpaired(spec, tokenizer)

    def check_rows(self, train: Examples, held_out: Sequence[Examples], steps: Iterable[Sequence[int]]) -> None:
        """The KL estimate needs two prompts in every step, and the best metric needs rows to measure it. Raises ConfigError."""
        for examples in held_out:
            self._check_best(examples)
        why = "and KTO pairs each prompt with the answer to another"
        for step, rows in enumerate(steps, 1):
            if not _two_prompts(train, rows):
                raise ConfigError(
                    f"--train_batch_size {self.train_batch_size}: step {step} would get {len(rows)} of the {len(train)} rows, "
                    f"with only one distinct prompt, {why}: choose another size, another --seed, or mix the data."
                )
        for examples in held_out:
            if not _two_prompts(examples, range(len(examples))):
                raise ConfigError(f"--eval_dataset has only one distinct prompt, {why}: add rows, or leave it out.")

    def _check_best(self, held_out: Examples) -> None:
        """Check that the held-out set has rows for the best metric. Raises ConfigError."""
        needed = _LABELS_OF.get(self.best_metric_key.removeprefix("eval/"), frozenset())
        found = set[float]()
        for (sample,) in held_out:
            found.add(sample.values["desirable"])
            if found >= needed:
                return
        missing = "desirable" if 1.0 in needed - found else "undesirable"
        raise ConfigError(
            f"--best_metric_key {self.best_metric_key} needs {missing} rows in --eval_dataset, which has none: choose "
            "another metric, such as eval/loss, or add rows."
        )

    def objective(self, material: Material) -> Objective:
        from togi.methods.kto_objective import KTOObjective

        return KTOObjective(self.beta, self.desirable_loss_weight, self.undesirable_loss_weight)

    def preparation(self, dealer: Dealer, policy: Scorer, reference: Scorer) -> Preparation:
        from togi.methods.kto_objective import WithKL

        return WithKL(dealer, reference, policy)

    def badness(self, sequences: Sequence[tuple[Sample, float]]) -> float:
        """A low reward of a desirable row, or a high reward of an undesirable row."""
        ((sample, reward),) = sequences
        return -reward if sample.values["desirable"] == 1 else reward


def _two_prompts(examples: Examples, rows: Sequence[int]) -> bool:
    """Whether these rows have more than one prompt."""
    first = examples.prompt(rows[0])
    return any(examples.prompt(row) != first for row in rows)
