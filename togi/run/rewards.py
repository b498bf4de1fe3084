"""The rewards of a run as one: functions and servers, which need no worker of the run, and local models beside them.

``togi rl`` and ``togi iterate`` score with them alike. Imports no torch.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

from togi.config.choices import BUILTIN, RemoteMode
from togi.config.rl import RewardSettings, verifier_of
from togi.errors import RewardError
from togi.reward.function import CallLimits, FunctionReward
from togi.reward.remote import TOKEN_VARIABLE, ConnectionLimits, RemoteReward
from togi.reward.scores import CombinedReward, Reward, Term, distinct_names
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

logger = logging.getLogger(__name__)
SHOWN_CHARACTERS = 60
Decode = Callable[[Sequence[int]], str]
# The reward is tried on at most this many kinds of labels.
TRIALS = 8


class EarlyRewards:
    """The rewards that need no worker of the run. Function processes start here, servers with ``connect_servers``.

    ``names``: of all rewards in the order of ``--reward_weights``: models, servers, functions. Empty in a replay.
    ``functions`` and ``remotes`` (the clients of servers) are by name.
    """

    def __init__(self, config: RewardSettings, function: Callable[..., object] | None) -> None:
        self.names = reward_names(config, function_given=function is not None) if config.generates else []
        self.functions = dict[str, FunctionReward]()
        self.remotes = dict[str, RemoteReward]()
        self._readers: list[FunctionReward] = []  # the built-in functions that can check labels
        limits = CallLimits(config.reward_workers, config.reward_timeout, config.reward_retries)
        own = self.names[len(config.reward_models) + config.remote_sources : len(self.names) - config.acts]
        for item, name in zip(config.reward_files, own, strict=False):
            if (verifier := verifier_of(item)) is None:
                self.functions[name] = FunctionReward.from_file(item, limits, name)
            else:
                settings = config.verifier_settings(verifier)
                self.functions[name] = FunctionReward.from_verifier(verifier, settings, limits, name)
                self._readers += [self.functions[name]] * verifier.checks_labels
        if function is not None and own:
            self.functions[own[-1]] = FunctionReward.from_callable(function, limits, own[-1])

    def connect_servers(self, config: RewardSettings, visible: Decode) -> None:
        """Make the clients. ``visible`` decodes response tokens with special tokens kept."""
        token = os.environ.get(TOKEN_VARIABLE, "")
        most, timeout, pause = config.remote_rm_concurrency, config.reward_timeout, config.remote_rm_max_pause
        limits = ConnectionLimits(most, timeout, token, config.reward_retries, pause)

        def response(rollout: Rollout) -> str:
            return visible(rollout.response_tokens)

        for urls, name in zip(shared_urls(config), self.names[len(config.reward_models) :], strict=False):
            self.remotes[name] = RemoteReward(urls, limits, response, name)

    async def check_labels(self, prompts: Sequence[Prompt], place: Callable[[Prompt], str]) -> None:
        """Have the built-in functions check every label. Raises RewardError naming the first row whose label is of no use.

        ``place``: where the row of a prompt is, for the message.
        """
        for function in self._readers:
            await function.check_labels(prompts, place)

    async def check(self, prompts: Iterable[Prompt], samples: int) -> Mapping[str, Sequence[Score]]:
        """Call every reward on made-up answers to the first prompt of each kind. Returns the first scores by reward name.

        Raises RewardError for the first that fails, and for a built-in function that abstains on every group.
        """
        # Two answers suffice to show whether groups work.
        groups = [[example(prompt)] * min(2, samples) for prompt in trial_prompts(prompts)]
        first: dict[str, Sequence[Score]] = {}
        # Functions are tried first: they answer fastest, and a wrong --label_key shows here.
        for name, function in self.functions.items():
            scores = [await function.check(group) for group in groups]
            silent = all(score.outcome is Outcome.ABSTAIN for found in scores for score in found)
            if silent and not function.is_built_in:
                # it may look at the answer, and that of a trial is made up
                logger.warning(
                    "%s abstained on every trial answer: what it returns None for is not trained on", function.shown_as
                )
            elif silent:
                prompt = groups[0][0].prompt
                raise RewardError(
                    f"{function.shown_as} can use no label of those tried (the first: {shown_label(prompt.label)} of prompt "
                    f"{prompt.id!r}): point --label_key at the field that it is made for."
                )
            first[name] = scores[0]
        for name, remote in self.remotes.items():
            first[name], *_ = [await remote.check(group) for group in groups]
        return first

    def take_paused_seconds(self) -> float:
        """The longest time since the last call, in seconds, that the run waited for a server."""
        return max(remote.take_paused_seconds() for remote in self.remotes.values())

    async def close(self) -> None:
        """Stop processes and close connections."""
        sources: list[Reward] = [*self.functions.values(), *self.remotes.values()]
        async with AsyncExitStack() as stack:  # closes all of them, even if one fails
            for source in sources:
                stack.push_async_callback(source.close)


class OwnReward:
    """What environments and agents say of their own episodes."""

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        return [rollout.score or Score(Outcome.ABSTAIN, message="The environment has no reward.") for rollout in group]

    async def close(self) -> None:
        """Nothing to release."""


def combined(config: RewardSettings, early: EarlyRewards, models: Sequence[Reward]) -> CombinedReward:
    """All rewards as one. ``models``: the local reward models."""
    acting = [OwnReward()] if config.acts else []
    sources = [*models, *early.remotes.values(), *early.functions.values(), *acting]
    weights = config.reward_weights if config.reward_weights is not None else (1.0,) * len(sources)
    terms = [Term(name, source, weight) for name, source, weight in zip(early.names, sources, weights, strict=True)]
    return CombinedReward(terms, config.reward_combine)


def describe(config: RewardSettings, reward: CombinedReward) -> str:
    """One line on how rewards are combined and servers shared; "" if there is one reward and one server."""
    shared = config.remote_rm_mode is RemoteMode.BALANCE and len(config.reward_urls) > 1
    note = f"{len(config.reward_urls)} reward servers share the samples (--remote_rm_mode balance)" if shared else ""
    return "; ".join(part for part in (reward.formula if len(reward.terms) > 1 else "", note) if part)


def shared_urls(config: RewardSettings) -> list[tuple[str, ...]]:
    """The server URLs of each reward: all URLs for one reward, or in ensemble mode one URL each."""
    if config.remote_rm_mode is RemoteMode.ENSEMBLE:
        return [(url,) for url in config.reward_urls]
    return [config.reward_urls] if config.reward_urls else []


def reward_names(config: RewardSettings, *, function_given: bool) -> list[str]:
    """Distinct names of all rewards for the logs: the kind if there is one of it, else file, folder or host names."""
    models = [Path(path).name for path in config.reward_models]
    servers = [_host(urls[0]) for urls in shared_urls(config)]
    functions = [Path(path).stem.removeprefix(BUILTIN) for path in config.reward_files] + ["function"] * function_given
    kinds = ((models, "reward_model"), (servers, "remote"), (functions, "function"))
    named = [name for names, kind in kinds for name in (names if len(names) > 1 else [kind] * len(names))]
    return distinct_names([*named, *["environment"] * config.acts])


def shown_label(label: object) -> str:
    """The beginning of a label, for messages."""
    text = repr(label)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}_{parts.port}" if parts.port is not None else str(parts.hostname)


def trial_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each data source and kind of label, so that a label that a reward cannot read is found early."""
    found: dict[object, Prompt] = {}
    for prompt in prompts:
        found.setdefault((prompt.datasource, _kind(prompt.label)), prompt)
    return list(found.values())[:TRIALS]


def _kind(label: object) -> object:
    if isinstance(label, Mapping):
        return tuple(sorted(map(str, label)))
    if isinstance(label, list):
        return list, *(_kind(item) for item in label[:1])
    return type(label), isinstance(label, str) and not label.strip()


def example(prompt: Prompt) -> Rollout:
    """A made-up answer to a real prompt, to try the reward on."""
    return Rollout(prompt, "trial", (0,), (True,), (0.0,), "A trial answer: 42", FinishReason.STOP, (0,))
