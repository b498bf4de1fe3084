"""The reward settings of ``togi rl``: the sources, how they are combined, and what happens when one fails."""

from __future__ import annotations

from togi.config.choices import BUILTIN, LengthShape, OnRewardError, RemoteMode, RewardCombination, Verifier
from togi.config.fields import Count, Int, PathText, Settings, flag


class RewardSettings(Settings):
    """Reward"""

    reward_func: PathText | None = flag(
        None,
        "Python files that define reward_func(queries, prompts, labels), comma-separated; builtin:NAME for one that "
        f"comes with Togi ({', '.join(Verifier)}).",
    )
    format_regex: str | None = flag(
        None, "What builtin:format wants a whole response to match, a Python regular expression."
    )
    length_target: Count | None = flag(None, "The length of a response that builtin:length rewards most, in tokens.")
    length_shape: LengthShape = flag(
        LengthShape.LINEAR, "How builtin:length falls off: linear, or cosine, which is flat near the target."
    )
    remote_rm_url: PathText | None = flag(
        None, "Reward servers, comma-separated http(s) URLs; a .py path among them is a --reward_func."
    )
    reward_pretrain: PathText | None = flag(
        None, "Local reward models with a scalar head, comma-separated; each has its own worker processes."
    )
    remote_rm_mode: RemoteMode = flag(
        RemoteMode.BALANCE,
        "Several URLs. balance: equal servers, each group goes to the least busy one (as established). "
        "ensemble: different rewards, each URL scores every sample.",
    )
    reward_combine: RewardCombination = flag(
        RewardCombination.SUM,
        "How several rewards become one: their weighted sum, or that divided by the sum of weights.",
    )
    reward_weights: tuple[float, ...] | None = flag(
        None, "One weight per reward: reward models, then servers, then functions, as given; default 1 for each."
    )
    normalize_reward: bool = flag(
        False, "Standardise each reward model's output with the mean and std of its own config."
    )
    reward_timeout: float = flag(60.0, "Seconds one call of a reward function or server may take.", gt=0)
    reward_workers: Count = flag(2, "Processes that run a reward function.")
    reward_retries: Int = flag(
        1,
        "How often a call is repeated that failed for a passing reason: a timeout, a killed process, an I/O error.",
        ge=0,
    )
    remote_rm_concurrency: Count = flag(64, "Requests at the same time to one reward server.")
    remote_rm_max_pause: float = flag(
        3600.0, "Seconds the run waits for a reward server that is down, before it stops.", gt=0
    )
    on_reward_error: OnRewardError = flag(
        OnRewardError.DROP_GROUP,
        "Samples whose reward failed: leave out their group, leave out only them, or stop the run.",
    )
    max_reward_errors: float = flag(
        0.1, "Largest share of a rollout's samples whose reward may fail; above it the run stops.", ge=0, le=1
    )
    ref_reward_offload: bool = flag(
        False,
        "Keep reference and reward models in host memory while they do not compute; without a GPU they are there anyway.",
    )

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Folders or hub names of the local reward models."""
        return _listed(self.reward_pretrain)

    @property
    def reward_urls(self) -> tuple[str, ...]:
        """URLs of the reward servers."""
        return tuple(item for item in _listed(self.remote_rm_url) if not item.endswith(".py"))

    @property
    def reward_files(self) -> tuple[str, ...]:
        """Paths of the reward function files, given under either name, and names of built-in functions."""
        remote = tuple(item for item in _listed(self.remote_rm_url) if item.endswith(".py"))
        return _listed(self.reward_func) + remote

    def verifier_settings(self, verifier: Verifier) -> dict[str, str]:
        """The keyword arguments of a built-in function, from its own flags."""
        if verifier is Verifier.FORMAT and self.format_regex is not None:
            return {"format_regex": self.format_regex}
        if verifier is Verifier.LENGTH:
            return {"length_target": str(self.length_target), "length_shape": self.length_shape}
        return {}

    @property
    def allowed_reward_errors(self) -> float:
        """The largest share of a rollout's samples whose reward may fail."""
        return 0.0 if self.on_reward_error is OnRewardError.STOP else self.max_reward_errors

    @property
    def remote_sources(self) -> int:
        """The number of rewards from servers: servers that share the samples count as one."""
        return len(self.reward_urls) if self.remote_rm_mode is RemoteMode.ENSEMBLE else min(1, len(self.reward_urls))


def verifier_of(item: str) -> Verifier | None:
    """The built-in function named by an item of ``--reward_func``; None for a file. Raises ValueError for an unknown name."""
    return Verifier(item.removeprefix(BUILTIN)) if item.startswith(BUILTIN) else None


def _listed(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(item.strip() for item in text.split(",") if item.strip())
