"""The names of the standard metrics, with one sentence about each (``explain``).

Recipes log under these names, the report plots them, trackers show them as ``train/<name>`` (``eval/...`` stays). Names
with a part chosen at run time (a reward component, a phase, a process) are made by the functions below.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from togi.errors import RewardError

REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
REWARD_GROUP_STD = "reward/group_std"
REWARD_ABSTAINED = "reward/abstained_share"
REWARD_ERRORS = "reward/error_share"
REWARD_PAUSED = "reward/paused_seconds"
REWARD_CHOSEN = "reward/chosen"
REWARD_REJECTED = "reward/rejected"
REWARD_MARGIN = "reward/margin"

EVAL_REWARD = "eval/reward"
EVAL_REWARD_STDERR = "eval/reward_stderr"
EVAL_LENGTH = "eval/length"
EVAL_TRUNCATED = "eval/truncated_share"
EVAL_LOSS = "eval/loss"
EVAL_ACCURACY = "eval/accuracy"

LENGTH_RESPONSE = "length/response"
LENGTH_PROMPT = "length/prompt"
LENGTH_TRUNCATED = "length/truncated_share"

KL_REFERENCE = "kl/reference"
KL_TEACHER = "kl/teacher"
KL_TEACHER_GENERATED = "kl/teacher_generated"
KL_ESTIMATE = "kl/estimate"
ENTROPY = "entropy"

LOSS = "loss"
CROSS_ENTROPY = "cross_entropy"
PERPLEXITY = "perplexity"
CHOSEN_NLL = "chosen_nll"
ACCURACY = "accuracy"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "lr"
AUX_LOSS = "aux_loss"

PTX_LOSS = "ptx/loss"
PTX_PERPLEXITY = "ptx/perplexity"
POLICY_LOSS = "policy/loss"
POLICY_TOTAL_LOSS = "policy/total_loss"
POLICY_CLIP_FRACTION = "policy/clip_fraction"
POLICY_PPO_KL = "policy/ppo_kl"
POLICY_GRAD_NORM = "policy/grad_norm"
POLICY_LR = "policy/lr"
VALUE_LOSS = "value/loss"
VALUE_MEAN = "value/mean"
VALUE_GRAD_NORM = "value/grad_norm"
VALUE_LR = "value/lr"
VALUE_AUX_LOSS = "value/aux_loss"

MISMATCH_MEAN_ABS = "mismatch/mean_abs"
MISMATCH_MEAN_RATIO = "mismatch/mean_ratio"
MISMATCH_P99_RATIO = "mismatch/p99_ratio"
MISMATCH_MAX_RATIO = "mismatch/max_ratio"
MISMATCH_K3 = "mismatch/k3"
MISMATCH_PROBE_MEAN_ABS = "mismatch/probe_mean_abs"
MISMATCH_PROBE_ROUTER = "mismatch/probe_router_disagreement"
MISMATCH_CORRECTED_SHARE = "mismatch/corrected_share"
MISMATCH_MASKED_SHARE = "mismatch/masked_share"
MISMATCH_MEAN_WEIGHT = "mismatch/mean_weight"

GROUPS_ZERO_VARIANCE = "groups/zero_variance_share"
GROUPS_DROPPED = "groups/dropped_share"
GROUPS_GENERATIONS = "groups/generations"

TOKENS_STEP = "tokens/step"
TOKENS_SEEN = "tokens/seen"
PADDING_SHARE = "tokens/padding_share"
RANK_IMBALANCE = "tokens/rank_imbalance"
SHARED_SHARE = "tokens/shared_share"

THROUGHPUT_GENERATE = "throughput/generated_tokens_per_second"
THROUGHPUT_SCORE = "throughput/scored_tokens_per_second"
THROUGHPUT_TRAIN = "throughput/trained_tokens_per_second"
COMPILE_SECONDS = "compile/seconds"
WEIGHT_SYNC_SECONDS = "weights/sync_seconds"
WEIGHT_SYNC_BYTES = "weights/sync_bytes"
WEIGHT_SYNC_RATE = "throughput/weight_sync_gb_per_second"

EXPLANATIONS: dict[str, str] = {
    REWARD_MEAN: "Mean reward of the step's rollouts, before any KL penalty; the number that should rise.",
    REWARD_STD: "Standard deviation of the reward over all rollouts of the step.",
    REWARD_GROUP_STD: "Standard deviation of the reward inside a group, averaged; near 0 there is nothing to learn.",
    REWARD_ABSTAINED: "Share of rollouts for which the reward source gave no opinion; they are left out of the means.",
    REWARD_ERRORS: "Share of rollouts for which the reward source failed; should be 0.",
    REWARD_PAUSED: "Seconds of the step in which a reward server was down and the run waited for it.",
    REWARD_CHOSEN: "Mean (implicit) reward of the preferred responses.",
    REWARD_REJECTED: "Mean (implicit) reward of the rejected responses.",
    REWARD_MARGIN: "Mean difference between the rewards of the preferred and the rejected response.",
    EVAL_REWARD: "Mean reward on the evaluation prompts.",
    EVAL_REWARD_STDERR: "Standard error of the evaluation reward: differences below twice this are noise.",
    EVAL_LENGTH: "Mean response length on the evaluation prompts, in tokens.",
    EVAL_TRUNCATED: "Share of evaluation responses cut off by the token limit.",
    EVAL_LOSS: "Loss on the evaluation data.",
    EVAL_ACCURACY: "Share of evaluation rows that are ranked or classified correctly.",
    LENGTH_RESPONSE: "Mean response length in tokens; growth without reward is a sign of a length bias.",
    LENGTH_PROMPT: "Mean prompt length in tokens.",
    LENGTH_TRUNCATED: "Share of responses cut off by the token limit instead of ending by themselves.",
    KL_REFERENCE: "KL of the policy from the reference model, in nats a token: how far training has moved the model.",
    KL_TEACHER: "KL between teacher and student on the data, in nats a token, in the direction trained; it should fall.",
    KL_TEACHER_GENERATED: "kl/teacher on the student's own responses, where the student really goes; it should fall.",
    KL_ESTIMATE: "KTO's estimate of the policy's KL from the reference over mismatched rows, in nats a row, at least 0.",
    ENTROPY: "Entropy of the policy in nats a token; a fall to 0 means that it no longer explores.",
    LOSS: "The objective that is minimised, averaged over the step.",
    CROSS_ENTROPY: "Mean negative log-probability of the tokens in the loss, in nats a token.",
    PERPLEXITY: "exp of the mean negative log-probability a token: among how many equal tokens the model seems to choose.",
    CHOSEN_NLL: "Mean negative log-probability a token of the preferred responses, in nats; should not rise much.",
    ACCURACY: "Share of rows or tokens that are ranked or predicted correctly.",
    GRAD_NORM: "Norm of the gradient before clipping.",
    LEARNING_RATE: "Learning rate of the step.",
    AUX_LOSS: "Load-balancing loss of a mixture of experts, before its coefficient; at best the experts used by a token.",
    PTX_LOSS: "Mean negative log-probability of the mixed-in supervised rows, in nats a token, before its weight.",
    PTX_PERPLEXITY: "exp of ptx/loss.",
    POLICY_LOSS: "Policy objective; starts each step near 0 by construction, so watch the reward instead.",
    POLICY_TOTAL_LOSS: "What is minimised: the policy objective with entropy bonus and KL, as one number by --loss_aggregation.",
    POLICY_CLIP_FRACTION: "Share of tokens whose probability ratio was clipped; above 0.3 the updates are too large.",
    POLICY_PPO_KL: "KL between the policy before and during the step's updates, in nats a token.",
    POLICY_GRAD_NORM: "Norm of the policy's gradient before clipping.",
    POLICY_LR: "Learning rate of the policy.",
    VALUE_LOSS: "Squared error of the critic against the returns.",
    VALUE_MEAN: "Mean value that the critic predicts.",
    VALUE_GRAD_NORM: "Norm of the critic's gradient before clipping.",
    VALUE_LR: "Learning rate of the critic.",
    VALUE_AUX_LOSS: "Load-balancing loss of the critic, if it is a mixture of experts.",
    MISMATCH_MEAN_ABS: "Mean absolute difference of the engine's and the trainer's log-prob of a token, in nats.",
    MISMATCH_MEAN_RATIO: "Mean of trainer probability / engine probability, before any correction; 1 is perfect.",
    MISMATCH_P99_RATIO: "99th percentile of trainer / engine probability, before any correction; 1 is perfect.",
    MISMATCH_MAX_RATIO: "Largest trainer probability / engine probability of the step, before any correction.",
    MISMATCH_K3: "KL of engine and trainer (k3), in nats a token; rises when weights or sampling disagree.",
    MISMATCH_PROBE_MEAN_ABS: "mismatch/mean_abs on fixed probes at fresh weights: numerical noise, no staleness.",
    MISMATCH_PROBE_ROUTER: "Share of expert choices on the probe that engine and trainer do not share, over tokens and layers.",
    MISMATCH_CORRECTED_SHARE: "Share of tokens whose weight the mismatch correction truncated or masked.",
    MISMATCH_MASKED_SHARE: "Share of tokens that the mismatch correction left out of the loss.",
    MISMATCH_MEAN_WEIGHT: "Mean weight that the mismatch correction gave to a token, 0 where it was left out.",
    GROUPS_ZERO_VARIANCE: "Share of groups whose rewards are all equal: they give no gradient.",
    GROUPS_DROPPED: "Share of generated groups that filtering left out of training.",
    GROUPS_GENERATIONS: "Groups generated / prompts of a rollout: 1 when filtering left none out, 2 when one in two was.",
    TOKENS_STEP: "Tokens processed by the trainer in this step.",
    TOKENS_SEEN: "Tokens processed by the trainer since the start of the run.",
    PADDING_SHARE: "Share of computed positions that carry no token: what ranks without work compute to keep in step.",
    RANK_IMBALANCE: "Tokens of the busiest rank / mean over ranks; 1 is even, at 2 half of the time is spent waiting.",
    SHARED_SHARE: "Share of all tokens that were not computed, because their prompt is shared: 1 - computed / all.",
    THROUGHPUT_GENERATE: "Tokens generated a second by all engines together.",
    THROUGHPUT_SCORE: "Tokens a second in scoring: sequence tokens x models that scored them / seconds.",
    WEIGHT_SYNC_SECONDS: "Seconds from asking for a weight update to the last engine's confirmation.",
    WEIGHT_SYNC_BYTES: "Bytes that each engine was sent: all weights, or with --lora_rank the adapter alone (--lora_sync).",
    COMPILE_SECONDS: "Seconds that torch.compile took on the first rank of the trained model (--torch_compile).",
    THROUGHPUT_TRAIN: "Tokens trained on a second by all ranks together.",
    WEIGHT_SYNC_RATE: "Speed of the weight transfer from trainer to engines, in GB a second.",
}

# Metrics of a single training method; their sentences are in its file.
_OF_METHODS: dict[str, str] = {}

RESERVED_COMPONENTS = {name.removeprefix("reward/") for name in EXPLANATIONS if name.startswith("reward/")}


def reward_component(component: str) -> str:
    """Metric name of a named part of the reward. Raises ``RewardError`` if it would hide a standard metric."""
    if component in RESERVED_COMPONENTS:
        raise RewardError(f"a reward component is called {component!r}, which is a metric of Togi's own; rename it")
    return f"reward/{component}"


def phase_time(phase: str) -> str:
    """Metric name of the seconds of one phase of a step."""
    return f"time/{phase}"


class Holder(StrEnum):
    """Kinds of processes whose memory is measured together."""

    ENGINES = "engines"
    LEARNERS = "learners"
    SCORERS = "scorers"
    ALL = "processes"
    """A single process that is all of them."""


def phase_memory(phase: str, kind: Holder) -> str:
    """Metric name of the peak memory in one phase of a step, over all processes of a kind, in GB."""
    return f"peak_memory/{phase}/{kind}"


def released_memory(kind: Holder) -> str:
    """Metric name of the memory that all processes of a kind released at their last sleep, in GB."""
    return f"released_memory/{kind}"


def process_memory(process: str) -> str:
    """Metric name of the peak memory of one process, in GB."""
    return f"memory/{process}"


def eval_of(source: str, key: str) -> str:
    """Metric name of ``key`` ("pass1", "pass1_stderr", "pass4", "length", ...) on one evaluation data source."""
    return f"eval/{source}/{key}"


def add_explanations(explanations: Mapping[str, str]) -> None:
    """Add sentences about metrics of a single method; called once, when the methods are imported."""
    _OF_METHODS.update(explanations)


def of_methods() -> tuple[str, ...]:
    """The metrics of single training methods."""
    return tuple(_OF_METHODS)


def explain(name: str) -> str:
    """One sentence about a metric; a name that is not Togi's gets a sentence that says so."""
    known = EXPLANATIONS | _OF_METHODS
    if name in known:
        return known[name]
    family, _, rest = name.partition("/")
    if family == "reward" and rest:
        return f"Mean of the reward component {rest!r} over the step's rollouts."
    if family == "time" and rest:
        return f"Seconds of the step spent in {rest!r}."
    if family in ("memory", "peak_memory", "released_memory") and rest:
        return _explain_memory(family, rest)
    if family == "eval" and (rest in known or "/" in rest):
        return _explain_eval(rest)
    return f"{name!r} is not one of Togi's standard metrics; it comes from the recipe, reward function or environment."


def _explain_memory(family: str, rest: str) -> str:
    if family == "released_memory":
        return f"What the {rest} let go of when they last went to sleep, in GB."
    phase, _, kind = rest.partition("/")
    if kind:
        return f"Peak memory during {phase!r} in GB, the sum over all {kind}; memory that they share counts in each."
    return f"Peak memory of {rest!r} in GB."


def _explain_eval(rest: str) -> str:
    known = EXPLANATIONS | _OF_METHODS
    if rest in known:
        return f"On the evaluation data: {known[rest]}"
    source, _, key = rest.rpartition("/")
    if key == "pass1":
        return f"Mean reward over all samples of the evaluation set {source!r}."
    if key.removeprefix("pass").isdigit():
        best = f"Expected best reward among {key.removeprefix('pass')} responses to a prompt of {source!r}"
        return f"{best}, unbiased; pass@k where rewards are 0 or 1."
    if key.endswith("_stderr"):
        return f"Standard error of {key.removesuffix('_stderr')!r} on the evaluation set {source!r}, over prompts."
    return f"{key!r} on the evaluation set {source!r}."
