"""Estimators and losses of the user's own: how they are named, what is refused and why, and that they are what is computed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.learn_tools import policy
from tests.offline_world import ROOT
from tests.policy_cases import objective, rollout_pairs
from togi.algo.advantages import baselined_rewards, discounted_returns, normalize, token_rewards
from togi.algo.policy import policy_loss
from togi.config.choices import AdvantageEstimator, Aggregation, CorrectionType, PolicyLossType
from togi.config.fields import Hook
from togi.config.parse import Source, build, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.data.packing import pack
from togi.errors import ConfigError, RunError
from togi.learn.hooks import check_estimator, check_policy_loss, load_estimator, load_policy_loss
from togi.pump.experience import Place, ScoredGroup, to_sample, with_advantages
from togi.run.preflight import check_hook_file
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Sample, Score, with_streams

NEEDED = ["--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "reward.py"]
MEDIAN = Hook(str(ROOT / "examples" / "hooks" / "median.py"), "median_baseline")
SPO = Hook(str(ROOT / "examples" / "hooks" / "spo.py"), "spo")


def config(*flags: str) -> RLConfig:
    return parse(RLConfig, [*NEEDED, *flags], "rl").config


def python(function: Callable[..., Any]) -> Hook:
    return Hook("python", function.__name__, function)


def test_a_flag_names_file_and_function() -> None:
    c = config("--advantage_estimator", "my/own.py:best", "--policy_loss_type", "C:/x.py:loss_2")
    assert (c.advantage_estimator, c.policy_loss_type) == (Hook("my/own.py", "best"), Hook("C:/x.py", "loss_2"))
    assert c.model_dump(mode="json")["advantage_estimator"] == "my/own.py:best"
    assert not c.uses_critic and c.aggregation is Aggregation.TOKEN_MEAN
    check_rl(c)


@pytest.mark.parametrize("value", ["nonsense", "own.py", "own.py:", "own.txt:f", "own.py:a-b", "own.py:a.b"])
def test_what_is_neither_a_name_nor_a_function_is_one_sentence(value: str) -> None:
    for flag, first in (("advantage_estimator", "gae"), ("policy_loss_type", "ppo")):
        with pytest.raises(
            ConfigError, match=f"^--{flag} {value}: must be {first}, .* or FILE.py:name of a function.$"
        ):
            config(f"--{flag}", value)


def test_a_callable_is_a_setting_that_can_be_logged_and_sent() -> None:
    parsed = build(RLConfig, {"advantage_estimator": torch.sum}, {"advantage_estimator": Source.PYTHON})
    hook = parsed.config.advantage_estimator
    assert isinstance(hook, Hook) and hook.function is torch.sum
    assert parsed.config.model_dump()["advantage_estimator"] == "python:sum"
    assert pickle.loads(pickle.dumps(parsed.config)).advantage_estimator.function is torch.sum


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gamma", "0.9"], ["--gamma has no effect with --advantage_estimator f.py:g"]),
        (["--reward_clip_range", "-1", "1"], ["--reward_clip_range has no effect"]),
        (["--no_advantage_std_norm"], ["--no_advantage_std_norm has no effect"]),
        (["--critic_pretrain", "m"], ["--critic_pretrain needs a critic but --advantage_estimator f.py:g has none"]),
        (
            ["--policy_loss_type", "f.py:l", "--dual_clip", "3"],
            ["--dual_clip has no effect with --policy_loss_type f.py:l"],
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rl(config("--advantage_estimator", "f.py:g", *flags))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_algorithm_has_its_own_estimator() -> None:
    with pytest.raises(ConfigError, match=r"--advantage_estimator f\.py:g contradicts --algo grpo"):
        config("--algo", "grpo", "--advantage_estimator", "f.py:g")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read (No such file or directory): give --policy_loss_type the path of a Python file."),
        ("def other(): pass", "the file defines no loss, but 'other': write one of those after the colon, or add it."),
        ("def loss(:", "has a syntax error in line 1: invalid syntax."),
    ],
)
def test_the_file_is_looked_at_before_torch_is_imported(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_hook_file("policy_loss_type", Hook(str(path), "loss"))
    assert str(caught.value).endswith(sentence)


def test_that_look_needs_no_torch() -> None:
    code = (
        "import sys; from togi.config.fields import Hook; from togi.run.preflight import check_hook_file;"
        f"check_hook_file('advantage_estimator', Hook({MEDIAN.path!r}, {MEDIAN.name!r})); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_the_example_estimator_by_hand() -> None:
    """Prompts of 3 and 2 answers: medians 0.5 and (the lower one) 0.2."""
    result_K = load_estimator(MEDIAN)(
        rewards_N=torch.tensor([0.5, 0.2, 2.0, 0.4, 0.0], dtype=torch.float64),
        groups_N=torch.tensor([7, 1, 7, 1, 7]),
        sequences_K=torch.tensor([0, 0, 2, 3, 4]),
        penalties_K=torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0], dtype=torch.float64),
    )
    assert result_K.tolist() == pytest.approx([0.0, -0.1, 1.5, 0.2, -0.5], abs=1e-12)


def test_the_example_loss_by_hand() -> None:
    """At ratio 1 the gradient is PPO's, -A; at ratio 2 and eps 0.2 it is -(A - |A| (r - 1) / eps) r = 8 for A = 1."""
    logprobs_K = torch.tensor([0.0, np.log(2.0)], requires_grad=True)
    loss_K = load_policy_loss(SPO)(
        logprobs_K=logprobs_K,
        old_logprobs_K=torch.zeros(2),
        advantages_K=torch.ones(2),
        sequences_K=torch.tensor([0, 0]),
        clip_low=0.1,
        clip_high=0.2,
    )
    assert loss_K.tolist() == pytest.approx([-1.0, -(2 - 1 / 0.4)])
    (gradient_K,) = torch.autograd.grad(loss_K.sum(), logprobs_K)
    assert gradient_K.tolist() == pytest.approx([-1.0, 8.0])


def test_both_examples_pass_the_trial() -> None:
    check_estimator(MEDIAN, penalised=True)
    check_policy_loss(SPO, 0.2, 0.2, clips=True)


def scalar(rewards_N: Tensor) -> Tensor:
    return rewards_N


def broken(rewards_N: Tensor) -> Tensor:
    raise ValueError("no luck")


def not_finite(sequences_K: Tensor) -> Tensor:
    return torch.full(sequences_K.shape, torch.nan)


def deviating(rewards_N: Tensor, groups_N: Tensor, sequences_K: Tensor) -> Tensor:
    """GRPO without the small number in its denominator."""
    advantages_N = torch.zeros_like(rewards_N)
    for group in groups_N.unique():
        of = rewards_N[groups_N == group]
        if len(of) > 1:
            advantages_N[groups_N == group] = (of - of.mean()) / of.std()
    return advantages_N[sequences_K]


def whole(groups_N: Tensor, sequences_K: Tensor) -> Tensor:
    return groups_N[sequences_K]


def greedy(rewards_N: Tensor, sequences_K: Tensor) -> Tensor:
    rewards_N -= rewards_N.mean()
    return rewards_N[sequences_K]


def no_penalty(rewards_N: Tensor, sequences_K: Tensor) -> Tensor:
    return rewards_N[sequences_K]


def wants_more(rewards_N: Tensor, values_K: Tensor) -> Tensor:
    return rewards_N


def a_list(rewards_N: Tensor) -> list[float]:
    return rewards_N.tolist()


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (scalar, "returned a tensor of shape (7,) for 14 tokens: it must return one number a token"),
        (broken, "failed on a made-up batch (ValueError: no luck)."),
        (not_finite, "every number must be finite, also"),
        (
            deviating,
            "returned 4 of 14 numbers that are not finite on a made-up batch: every number must be finite, also for one sample "
            "alone or equal rewards, which have no deviation.",
        ),
        (whole, "returned torch.int64 on a made-up batch: it must return floating-point numbers"),
        (greedy, "changes its argument rewards_N: work on a copy, rewards_N.clone()."),
        (
            no_penalty,
            "does not use penalties_K, so the KL that --init_kl_coef puts into the reward would have no effect",
        ),
        (
            wants_more,
            "asks for values_K, which it cannot have: it may take rewards_N, groups_N, sequences_K, penalties_K.",
        ),
        (a_list, "returned list, not a tensor"),
    ],
)
def test_an_estimator_that_cannot_be_right(function: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_estimator(python(function), penalised=True)
    message = str(caught.value)
    assert message.startswith(f"--advantage_estimator python:{function.__name__} ") and sentence in message


def test_without_a_kl_penalties_may_be_ignored() -> None:
    check_estimator(python(no_penalty), penalised=False)


def centered(logprobs_K: Tensor, advantages_K: Tensor) -> Tensor:
    return -logprobs_K * (advantages_K - advantages_K.mean())


def constant(advantages_K: Tensor) -> Tensor:
    return -advantages_K


def infinite(logprobs_K: Tensor, old_logprobs_K: Tensor) -> Tensor:
    return (logprobs_K - old_logprobs_K).abs().sqrt()


def plain(logprobs_K: Tensor, advantages_K: Tensor) -> Tensor:
    return -logprobs_K * advantages_K


def summed(logprobs_K: Tensor, advantages_K: Tensor) -> Tensor:
    return -(logprobs_K * advantages_K).sum()


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (centered, "gives a sequence another loss when other sequences are beside it"),
        (constant, "has no gradient: its result must be computed from logprobs_K."),
        (infinite, "has a gradient that is not finite"),
        (plain, "does not use clip_low and clip_high, so the clip range has no effect"),
        (summed, "returned a tensor of shape () for 5 tokens"),
    ],
)
def test_a_loss_that_cannot_be_right(function: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_policy_loss(python(function), 0.2, 0.2, clips=True)
    message = str(caught.value)
    assert message.startswith(f"--policy_loss_type python:{function.__name__} ") and sentence in message


def test_a_loss_without_a_clip_is_fine_where_none_was_asked_for() -> None:
    check_policy_loss(python(plain), 0.2, 0.2, clips=False)


def test_a_file_that_fails_names_its_error(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("import nowhere_to_be_found\ndef f(rewards_N): return rewards_N\n")
    with pytest.raises(ConfigError, match=r"own.py:f cannot be loaded \(ModuleNotFoundError: No module named"):
        load_estimator(Hook(str(path), "f"))


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_hook.py").write_text("SCALE = 3.0\n")
    (tmp_path / "own.py").write_text(
        "from neighbour_of_hook import SCALE\ndef f(rewards_N, sequences_K): return SCALE * rewards_N[sequences_K]\n"
    )
    found = load_estimator(Hook(str(tmp_path / "own.py"), "f"))
    given = {"groups_N": torch.tensor([0]), "penalties_K": torch.zeros(2)}
    assert found(rewards_N=torch.ones(1), sequences_K=torch.tensor([0, 0]), **given).tolist() == [3.0, 3.0]


def test_a_run_has_the_file_as_it_was_tried_and_the_next_one_as_it_is_then(tmp_path: Path) -> None:
    own = Hook(str(tmp_path / "own.py"), "f")
    one = {"rewards_N": torch.ones(1), "groups_N": torch.tensor([0]), "sequences_K": torch.tensor([0])}
    found = []
    for scale in (3, 4, 3):  # within a second and of equal size: Python would take its bytecode of the first
        (tmp_path / "own.py").write_text(f"def f(rewards_N, sequences_K): return {scale}.0 * rewards_N[sequences_K]\n")
        if scale == 4:
            found.append(load_estimator(own)(**one, penalties_K=torch.zeros(1)).item())  # still in the first run
        check_estimator(own, penalised=False)
        found.append(load_estimator(own)(**one, penalties_K=torch.zeros(1)).item())
    assert found == [3.0, 3.0, 4.0, 3.0]


def ppo_again(
    logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    return policy_loss(
        logprobs_K, old_logprobs_K, advantages_K, clip_low=clip_low, clip_high=clip_high, dual_clip=None
    )[0]


@pytest.mark.parametrize("correction", [None, CorrectionType.ICEPOP])
def test_ppo_as_a_hook_is_ppo(correction: CorrectionType | None) -> None:
    """Same loss, gradient and metrics, with entropy, KL and the correction for the engine around it."""
    batch, results = pack(rollout_pairs(), share_prefix=True), []
    for kind in (PolicyLossType.PPO, python(ppo_again)):
        made = replace(objective(PolicyLossType.PPO, correction=correction)(), kind=kind, dual_clip=None)
        model = policy()
        loss = made.loss(made.forward(model, batch), batch)
        loss.sum.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (built_in, expected), (own, found) = results
    assert torch.equal(built_in.sum, own.sum)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    keys = set(built_in.metrics) - {"policy/clip_fraction"}  # of a hook: beyond the range, on either side
    assert keys and all(built_in.metrics[key] == own.metrics[key] for key in keys)


def test_a_share_without_tokens_does_not_reach_the_function() -> None:
    sample = rollout_pairs()[0]
    nothing = replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
    made = replace(objective(PolicyLossType.PPO)(), kind=python(broken), dual_clip=None)
    batch = pack([nothing], share_prefix=False)
    assert made.loss(made.forward(policy(), batch), batch).sum.item() == 0.0


def rloo_again(rewards_N: Tensor, groups_N: Tensor, sequences_K: Tensor, penalties_K: Tensor) -> Tensor:
    shaped_N = baselined_rewards(AdvantageEstimator.RLOO, rewards_N, groups_N)
    returns_K = discounted_returns(token_rewards(shaped_N, None, 0.0, sequences_K) - penalties_K, sequences_K, 1.0)
    return normalize(returns_K, mean_only=False)


def made_up_step() -> tuple[list[ScoredGroup], list[Place], list[Sample]]:
    """Two groups of two samples, of 3, 1, 2 and 4 trained tokens."""
    rng, rollouts, scores, samples = np.random.default_rng(3), [], [], []
    for n, length in enumerate((3, 1, 2, 4)):
        prompt = Prompt(str(n // 2), (1, 2), "ab", None, "set")
        tokens = tuple(int(t) for t in rng.integers(0, 9, length))
        masks = (True,) * length
        rollout = Rollout(prompt, str(n // 2), tokens, masks, (-1.0,) * length, "x", FinishReason.STOP, (0,) * length)
        rollouts.append(rollout)
        scores.append(Score(Outcome.SCORE, float(rng.normal())))
        streams = {"old_logprobs": [rng.normal(size=length)], "ref_logprobs": [rng.normal(size=length)]}
        samples += with_streams([to_sample(rollout)], streams)
    groups = [ScoredGroup(tuple(rollouts[i : i + 2]), tuple(scores[i : i + 2])) for i in (0, 2)]
    return groups, [(0, 0), (0, 1), (1, 0), (1, 1)], samples


def test_rloo_as_a_hook_is_rloo() -> None:
    """The same streams on samples of different lengths, with a KL in the reward."""
    step = made_up_step()
    rloo = config("--advantage_estimator", "rloo", "--n_samples_per_prompt", "2")
    own = build(RLConfig, {"advantage_estimator": rloo_again}, {}).config
    expected, found = (with_advantages(*step, c, 0.3) for c in (rloo, own))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a.streams["advantages"], b.streams["advantages"], atol=1e-6)
        assert np.isnan(b.streams["advantages"][:2]).all()


@pytest.mark.parametrize(
    "cast", [lambda x_K: x_K.bfloat16(), lambda x_K: x_K.float().requires_grad_(), lambda x_K: x_K.half()]
)
def test_advantages_of_any_precision_are_constants(cast: Callable[[Tensor], Tensor]) -> None:
    def counting(sequences_K: Tensor) -> Tensor:
        return cast(sequences_K.double() + 1)

    check_estimator(python(counting), penalised=False)
    own = build(RLConfig, {"advantage_estimator": counting}, {}).config
    found = with_advantages(*made_up_step(), own, 0.0)
    values = [sample.streams["advantages"][2:].tolist() for sample in found]
    assert values == [[1.0] * 3, [2.0], [3.0] * 2, [4.0] * 4]


def late(result: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """An estimator that goes wrong on ten tokens, the number of a real step."""

    def own(sequences_K: Tensor) -> Any:
        return result(sequences_K) if len(sequences_K) == 10 else torch.ones(len(sequences_K))

    return own


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda x_K: 1 / 0, "failed (ZeroDivisionError: division by zero)."),
        (lambda x_K: None, "returned NoneType, not a tensor."),
        (
            lambda x_K: x_K[:3],
            "returned a tensor of shape (3,) for 10 tokens: it must return one number a token, shape (10,);",
        ),
        (lambda x_K: x_K, "returned torch.int64: it must return floating-point numbers, as x_K.double() makes them."),
        (lambda x_K: x_K / x_K, "returned 3 of 10 numbers that are not finite: every number must be finite, also for"),
    ],
)
def test_an_estimator_that_goes_wrong_in_a_step_is_named(result: Callable[[Tensor], Any], sentence: str) -> None:
    function = late(result)
    check_estimator(python(function), penalised=False)
    own = build(RLConfig, {"advantage_estimator": function}, {}).config
    with pytest.raises(RunError) as caught:
        with_advantages(*made_up_step(), own, 0.0)
    assert str(caught.value).startswith(f"--advantage_estimator python:own {sentence}")
    assert (caught.value.__cause__ is not None) == ("failed" in sentence)


def half(logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor) -> Tensor:
    return (-(logprobs_K - old_logprobs_K).exp() * advantages_K).bfloat16()


def test_a_loss_that_goes_wrong_in_a_step_is_named_and_one_of_few_digits_is_summed_in_many() -> None:
    batch = pack(rollout_pairs(), share_prefix=True)

    def loss_of(function: Callable[..., Any]) -> Tensor:
        made = replace(objective(PolicyLossType.PPO)(), kind=python(function), dual_clip=None)
        return made.loss(made.forward(policy(), batch), batch).sum

    check_policy_loss(python(half), 0.2, 0.2, clips=False)
    assert loss_of(half).dtype == torch.float32
    with pytest.raises(RunError, match=r"^--policy_loss_type python:broken_loss failed \(ValueError: no luck\)\.$"):
        loss_of(broken_loss)


def broken_loss(logprobs_K: Tensor) -> Tensor:
    raise ValueError("no luck")
