"""The names of the standard metrics, with one sentence about each (``explain``).

Recipes log under these names, the report plots them, trackers show them as ``train/<name>`` (``eval/...`` stays). Names
with a part chosen at run time (a reward component, a phase, a process) are made by the functions below.
"""

import re
from enum import StrEnum
from functools import cache
from importlib.resources import files

import yaml

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

STALENESS_TOKEN = "staleness/token"
STALENESS_TOKEN_MAX = "staleness/token_max"
STALENESS_RESPONSE = "staleness/response"
STALENESS_GROUP = "staleness/group"
STALENESS_SPREAD = "staleness/versions_of_a_response"
STALENESS_MASKED = "staleness/masked_share"
STALENESS_DROPPED = "staleness/dropped_groups"
STALENESS_LENGTH = "staleness/trained_length"
PUMP_OCCUPANCY = "pump/occupancy"
PUMP_ENGINES_IDLE = "pump/engines_idle_share"
PUMP_TRAINER_IDLE = "pump/trainer_idle_share"

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
RESTARTS_ENGINES = "restarts/engines"
RESTARTS_RUN = "restarts/run"
WEIGHT_SYNC_RATE = "throughput/weight_sync_gb_per_second"

_EPISODES = {
    "turns": "turns of the policy",
    "tool_calls": "calls of tools",
    "tool_errors": "calls that were malformed, refused or raised",
    "cut_observations": "observations that were cut, as they were too long",
    "forks": "requests that did not continue the tokens before them",
    "requests": "requests of an agent",
    "redrawn": "requests that continue an answer whose tokens could not be continued",
    "retries": "requests that came again and got the same answer",
    "tool_seconds": "seconds in tools and environment",
    "failed": "episodes that failed, which are not trained on",
}
# Sentences about names that are made at run time, the first that matches.
_PATTERNS = {
    r"reward/(.+)": "Mean of the reward component {0!r} over the step's rollouts.",
    r"time/(.+)": "Seconds of the step spent in {0!r}.",
    r"released_memory/(.+)": "What the {0} let go of when they last went to sleep, in GB.",
    r"(?:peak_)?memory/([^/]+)/(.+)": "Peak memory during {0!r} in GB, the sum over all {1}; memory that they share counts in "
    "each.",
    r"(?:peak_)?memory/(.+)": "Peak memory of {0!r} in GB.",
    r"eval/(.+)/pass1": "Mean reward over all samples of the evaluation set {0!r}.",
    r"eval/(.+)/pass(\d+)": "Expected best reward among {1} responses to a prompt of {0!r}, unbiased; pass@k where rewards are "
    "0 or 1.",
    r"eval/(.+)/([^/]+)_stderr": "Standard error of {1!r} on the evaluation set {0!r}, over prompts.",
    r"eval/(.+)/([^/]+)": "{1!r} on the evaluation set {0!r}.",
}
# A sentence about each metric of a single training method; ``togi.methods`` adds those in the methods' files.
OF_METHODS: dict[str, str] = {}

_REWARDS = (REWARD_MEAN, REWARD_STD, REWARD_GROUP_STD, REWARD_ABSTAINED, REWARD_ERRORS, REWARD_PAUSED, REWARD_CHOSEN)
RESERVED_COMPONENTS = {name.removeprefix("reward/") for name in (*_REWARDS, REWARD_REJECTED, REWARD_MARGIN)}


@cache
def explanations() -> dict[str, str]:
    """A sentence about each of the names above (``page/metrics.yaml``)."""
    sentences: dict[str, str] = yaml.safe_load(part_of_page("metrics.yaml"))
    return sentences


def part_of_page(name: str) -> str:
    """The text of a file in ``page/``."""
    return files("togi.obs").joinpath("page", name).read_text(encoding="utf-8")


def reward_component(component: str) -> str:
    """Metric name of a named part of the reward. Raises ``RewardError`` if it would hide a standard metric."""
    if component in RESERVED_COMPONENTS:
        raise RewardError(f"The reward has a part named {component!r}, as a metric of Togi's own is: use another name.")
    return f"reward/{component}"


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


def episode(count: str, source: str = "") -> str:
    """Metric name of what is counted in each episode with an environment, over all or one data source."""
    return f"episode/{source}/{count}" if source else f"episode/{count}"


def eval_of(source: str, key: str) -> str:
    """Metric name of ``key`` ("pass1", "pass1_stderr", "pass4", "length", ...) on one evaluation data source."""
    return f"eval/{source}/{key}"


def explain(name: str) -> str:
    """One sentence about a metric; a name that is not Togi's gets a sentence that says so."""
    known = explanations() | OF_METHODS
    if name in known:
        return known[name]
    if name.startswith("eval/") and (trained := name.removeprefix("eval/")) in known:
        return f"On the evaluation data: {known[trained]}"
    if name.startswith("episode/"):
        _, *source, count = name.split("/")
        where = f" of {'/'.join(source)!r}" if source else ""
        return f"Mean number per episode{where}: {_EPISODES.get(count, count)}."
    for pattern, sentence in _PATTERNS.items():
        if found := re.fullmatch(pattern, name):
            return sentence.format(*found.groups())
    return f"{name!r} is not one of Togi's standard metrics; it comes from the recipe, reward function or environment."
