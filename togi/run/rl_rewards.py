"""The rewards of an RL run: functions and servers start before any model is loaded, then local models; all form one reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from togi.config.choices import BUILTIN, RemoteMode
from togi.config.reward import verifier_of
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.reward.combine import CombinedReward, Term, distinct_names
from togi.reward.function import FunctionReward
from togi.reward.local_model import LocalModelReward, Standardization
from togi.reward.pool import CallLimits
from togi.reward.remote import TOKEN_VARIABLE, ConnectionLimits, Patience, RemoteReward
from togi.reward.scores import Reward
from togi.sample import Outcome, Rollout, Score
from togi.workers.model_reward import ModelScores
from togi.workers.model_worker import ScorerWorker

if TYPE_CHECKING:  # the check of a run has no session
    from togi.workers.session import Session

SHOWN_CHARACTERS = 60
Visible = Callable[[Sequence[int]], str]


class EarlyRewards:
    """The rewards that need no worker of the run. Function processes start here, servers with ``connect_servers``.

    ``names``: of all rewards in the order of ``--reward_weights``: models, servers, functions. Empty in a replay.
    """

    def __init__(self, config: RLConfig, function: Callable[..., Any] | None) -> None:
        self.names: list[str] = []
        self.functions: list[FunctionReward] = []
        self.remotes: list[RemoteReward] = []
        if config.generates:
            self._start_functions(config, function)

    def _start_functions(self, config: RLConfig, function: Callable[..., Any] | None) -> None:
        self.names = reward_names(config, function_given=function is not None)
        limits = CallLimits(config.reward_workers, config.reward_timeout, config.reward_retries)
        # Names come in the order models, servers, functions: these are the names of the functions.
        own = self.names[len(config.reward_models) + config.remote_sources :]
        for item, name in zip(config.reward_files, own, strict=False):
            self.functions.append(from_item(item, config, limits, name))
        if function is not None:
            self.functions.append(FunctionReward.from_callable(function, limits, own[-1]))

    def connect_servers(self, config: RLConfig, visible: Visible) -> None:
        """Make the clients. ``visible`` decodes response tokens with special tokens kept."""
        token = os.environ.get(TOKEN_VARIABLE, "")
        limits = ConnectionLimits(config.remote_rm_concurrency, config.reward_timeout, token)
        patience = Patience(config.reward_retries, config.remote_rm_max_pause)
        own = self.names[len(config.reward_models) :]

        def response(rollout: Rollout) -> str:
            return visible(rollout.response_tokens)

        for urls, name in zip(shared_urls(config), own, strict=False):
            self.remotes.append(RemoteReward(urls, limits, patience, response, name))

    async def check(self, groups: Sequence[Sequence[Rollout]]) -> Mapping[str, Sequence[Score]]:
        """Call every reward once on each group. Returns the scores of the first group by reward name.

        Raises RewardError for the first that fails, and for a built-in function that abstains on every group.
        """
        end = len(self.names) - len(self.functions)
        first: dict[str, Sequence[Score]] = {}
        # Functions are tried first: they answer fastest, and a wrong --label_key shows here.
        for name, function in zip(self.names[end:], self.functions, strict=True):
            scores = [await function.check(group) for group in groups]
            if function.is_built_in and all(score.outcome is Outcome.ABSTAIN for found in scores for score in found):
                prompt = groups[0][0].prompt
                raise RewardError(
                    f"{function.shown_as} can use no label of those tried (the first: {shown_label(prompt.label)} of prompt "
                    f"{prompt.id!r}): point --label_key at the field that it is made for."
                )
            first[name] = scores[0]
        # Then the servers.
        for name, remote in zip(self.names[end - len(self.remotes) : end], self.remotes, strict=True):
            scores = [await remote.check(group) for group in groups]
            first[name] = scores[0]
        return first

    def take_paused_seconds(self) -> float:
        """The longest time since the last call, in seconds, that the run waited for a server."""
        return max(remote.take_paused_seconds() for remote in self.remotes)

    async def close(self) -> None:
        """Stop processes and close connections."""
        sources: list[Reward] = [*self.functions, *self.remotes]
        async with AsyncExitStack() as stack:  # closes all of them, even if one fails
            for source in sources:
                stack.push_async_callback(source.close)


async def connect(config: RLConfig, early: EarlyRewards, session: Session) -> CombinedReward:
    """All rewards as one. Each local model is standardised by its own statistics with ``--normalize_reward``."""
    if not config.generates:
        return CombinedReward(())
    models: list[Reward] = []
    for name, group in zip(early.names, session.reward_models, strict=False):
        mean, std = (await group.call_all(ScorerWorker.reward_statistics))[0]
        standardization = Standardization(mean, std) if config.normalize_reward else None
        models.append(LocalModelReward(ModelScores(group).score, standardization, name))
    return combined(config, early, models)


def combined(config: RLConfig, early: EarlyRewards, models: Sequence[Reward]) -> CombinedReward:
    """All rewards as one. ``models``: the local reward models."""
    sources = [*models, *early.remotes, *early.functions]
    weights = config.reward_weights if config.reward_weights is not None else (1.0,) * len(sources)
    terms = [Term(name, source, weight) for name, source, weight in zip(early.names, sources, weights, strict=True)]
    return CombinedReward(terms, config.reward_combine)


def describe(config: RLConfig, reward: CombinedReward) -> str:
    """One line on how rewards are combined and servers shared; "" if there is one reward and one server."""
    shared = config.remote_rm_mode is RemoteMode.BALANCE and len(config.reward_urls) > 1
    note = f"{len(config.reward_urls)} reward servers share the samples (--remote_rm_mode balance)" if shared else ""
    return "; ".join(part for part in (reward.formula if len(reward.terms) > 1 else "", note) if part)


def from_item(item: str, config: RLConfig, limits: CallLimits, name: str) -> FunctionReward:
    """The reward of one entry of ``--reward_func``: a built-in function or a file."""
    verifier = verifier_of(item)
    if verifier is None:
        return FunctionReward.from_file(item, limits, name)
    return FunctionReward.from_verifier(verifier, config.verifier_settings(verifier), limits, name)


def shared_urls(config: RLConfig) -> list[tuple[str, ...]]:
    """The server URLs of each reward: all URLs for one reward, or in ensemble mode one URL each."""
    if config.remote_rm_mode is RemoteMode.ENSEMBLE:
        return [(url,) for url in config.reward_urls]
    return [config.reward_urls] if config.reward_urls else []


def reward_names(config: RLConfig, *, function_given: bool) -> list[str]:
    """Distinct names of all rewards for the logs: the kind if there is one of it, else file, folder or host names."""
    models = [Path(path).name for path in config.reward_models]
    servers = [_host(urls[0]) for urls in shared_urls(config)]
    functions = [Path(path).stem.removeprefix(BUILTIN) for path in config.reward_files] + ["function"] * function_given
    kinds = ((models, "reward_model"), (servers, "remote"), (functions, "function"))
    return distinct_names(
        [name for names, kind in kinds for name in (names if len(names) > 1 else [kind] * len(names))]
    )


def shown_label(label: object) -> str:
    """The beginning of a label, for messages."""
    text = repr(label)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}_{parts.port}" if parts.port is not None else str(parts.hostname)
