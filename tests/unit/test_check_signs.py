"""What sampled groups say about learning, on groups that are written down."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from togi.config.rl import RLConfig
from togi.pump.experience import ScoredGroup
from togi.run.plan import StepPlan
from togi.run.signs import Sign, Verdict, drift, reward_signs, setting_signs, template_signs
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

ERROR = Score(Outcome.ERROR, message="reward_func raised.")
ABSTAIN = Score(Outcome.ABSTAIN)


def config(**settings: object) -> RLConfig:
    values = {"advantage_estimator": "group_norm", "n_samples_per_prompt": 4, "reward_func": "f.py", **settings}
    return RLConfig(**values)  # type: ignore[arg-type]


def number(value: float, **parts: float) -> Score:
    return Score(Outcome.SCORE, value, {"function": value, **parts})


def group(*scores: Score, prompt: Sequence[int] = (65,), text: str = "A", answer: Sequence[int] = (66,)) -> ScoredGroup:
    answers = tuple(answer)
    rollout = Rollout(
        Prompt("p", tuple(prompt), text),
        "g",
        answers,
        (True,) * len(answers),
        (0.0,) * len(answers),
        "B",
        FinishReason.STOP,
        (0,) * len(answers),
    )
    return ScoredGroup((rollout,) * len(scores), scores)


def of(verdict: Verdict, signs: Sequence[Sign]) -> list[str]:
    return [sign.sentence for sign in signs if sign.verdict is verdict]


@pytest.mark.parametrize(
    ("flags", "updates", "verdict", "sentence"),
    [
        (
            {},
            1,
            Verdict.STOPS,
            "The run has 1 updates, and --lr_scheduler cosine_with_min_lr with --lr_warmup_ratio 0.03 gives them learning "
            "rate 0, which changes no weight: plan more updates, or take --lr_scheduler constant.",
        ),
        ({"lr_scheduler": "constant"}, 1, Verdict.FINE, "1 updates of the actor at a learning rate of up to 1e-06."),
        ({}, 2, Verdict.FINE, "2 updates of the actor at a learning rate of up to 1e-06."),
        # a warm-up over the whole run ends before its peak: steps 0, 1, 2, 3 of 4
        ({"lr_warmup_ratio": 1.0}, 4, Verdict.FINE, "4 updates of the actor at a learning rate of up to 7.5e-07."),
    ],
)
def test_the_rate_is_that_of_the_planned_updates(
    flags: dict[str, object], updates: int, verdict: Verdict, sentence: str
) -> None:
    plan = StepPlan((4,), updates, updates, updates)
    signs = list(setting_signs(config(actor_learning_rate=1e-6, **flags), plan))
    assert signs == [Sign(verdict, sentence)]


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        ({"max_staleness": 2, "workers": "ray"}, []),
        ({"max_staleness": 3, "workers": "ray"}, ["lets the prompts of all 4 rollouts start with the first weights"]),
        ({"max_restarts": 5, "workers": "ray"}, []),
        (
            {"max_restarts": 5, "engine_timeout": 9.0, "workers": "local"},
            [
                "--max_restarts does nothing, as engine and models",
                "--engine_timeout does nothing, as engine and models",
            ],
        ),
    ],
)
def test_settings_that_do_nothing_in_this_run_are_said(flags: dict[str, object], sentences: list[str]) -> None:
    signs = [*setting_signs(config(**flags), StepPlan((4,), 4, 4, 4))]
    for found, expected in zip(of(Verdict.WARNING, signs), sentences, strict=True):
        assert expected in found


def test_some_failures_are_a_warning_and_any_is_the_end_where_none_is_allowed() -> None:
    groups = [group(number(1), number(0), number(1), ERROR), group(*[number(1), number(0)] * 2)]
    (warning,) = of(Verdict.WARNING, [*reward_signs(config(max_reward_errors=0.2), groups)])
    assert warning == (
        "The reward of 1 of 8 answers failed, and the run stops above a share of 0.2 of a rollout; the first: "
        "reward_func raised."
    )
    assert len(of(Verdict.STOPS, [*reward_signs(config(on_reward_error="stop"), groups)])) == 1


def test_some_abstentions_are_a_warning() -> None:
    signs = [*reward_signs(config(), [group(number(1), number(0), ABSTAIN, number(0))])]
    assert of(Verdict.WARNING, signs) == [
        "The reward abstained on 1 of 4 answers, which are not trained on: return a number for each answer that is to count."
    ]
    assert of(Verdict.FINE, signs) == ["1 of 1 groups have answers that differ in reward (0 to 1)."]


def test_a_few_equal_answers_prove_nothing() -> None:
    """Seven answers are a warning, eight the end."""
    assert of(Verdict.STOPS, [*reward_signs(config(), [group(*[number(0)] * 7)])]) == []
    assert len(of(Verdict.STOPS, [*reward_signs(config(), [group(*[number(0)] * 8)])])) == 1


def test_groups_that_all_or_none_solve_are_counted_at_their_ends() -> None:
    flat = [group(*[number(0)] * 4)] * 2 + [group(*[number(1)] * 4)]
    signs = [*reward_signs(config(), [*flat, group(number(0), number(1), number(1), number(1))])]
    assert of(Verdict.WARNING, signs) == [
        "Only 1 of 4 groups have answers that differ in reward (0 to 1); in 2 of the others all are at 0, in 1 all at 1: take "
        "prompts that are solved sometimes, or raise --n_samples_per_prompt."
    ]


def test_a_baseline_over_all_answers_learns_from_groups_that_differ() -> None:
    groups = [group(*[number(0)] * 4), group(*[number(1)] * 4)]
    signs = [*reward_signs(config(advantage_estimator="reinforce"), groups)]
    assert of(Verdict.FINE, signs) == ["Rewards differ: 0 to 1 over 8 answers."]
    assert len(of(Verdict.STOPS, [*reward_signs(config(), groups)])) == 1


@pytest.mark.parametrize(("parts", "said"), [((0, 0), True), ((0, 0.5), False)])
def test_a_part_counts_as_reached_when_one_answer_has_it(parts: tuple[float, float], said: bool) -> None:
    groups = [group(*[number(i % 2, form=parts[i % 2]) for i in range(8)])]
    assert any("'form'" in text for text in of(Verdict.NOTE, [*reward_signs(config(), groups)])) == said
    several = config(reward_func="right.py,form.py")  # a reward of its own always counts
    assert any("'form'" in text for text in of(Verdict.WARNING, [*reward_signs(several, groups)])) == said


@pytest.mark.parametrize(
    ("opening", "before", "how"),
    [
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>", "<|im_start|>assistant\n", "it begins otherwise"),
        (
            "<|im_start|>assistant\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "it puts '<think>\\n\\n</think>' before the answer",
        ),
    ],
)
def test_a_template_that_departs_from_its_own_prompt(opening: str, before: str, how: str) -> None:
    """Templates that open the reasoning of a new answer, or write an empty one before an old answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{% else %}"
        + before
        + "{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"
    )
    assert drift(" 4 ", tokenizer) == how
    assert drift("", tokenizer) == "", "nothing can be said of an empty answer"


def test_a_prompt_that_ends_in_the_space_of_the_next_word() -> None:
    """' 1' is a token, so that in ordinary text no token is a space before a 1."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**alphabet, "Ġ1": len(alphabet)}, merges=[("Ġ", "1")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    space, one = alphabet["Ġ"], alphabet["1"]
    split = [group(number(0), prompt=(alphabet["A"], space), text="A ", answer=(one,))]
    joined = [group(number(0), prompt=(alphabet["A"],), text="A", answer=(len(alphabet),))]
    assert of(Verdict.WARNING, [*template_signs(config(), split, tokenizer, ())]) == [
        "In 1 of 1 answers the tokenizer would join the end of the prompt with the start of the answer, so that the model never "
        "saw such a beginning: end the prompt without a space (--input_template)."
    ]
    assert of(Verdict.FINE, [*template_signs(config(), joined, tokenizer, ())]) == [
        "The text of 1 of 1 answers becomes the sampled tokens again."
    ]
