"""The environments or the agent of a run: processes, checks before anything heavy, and which row acts in which environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from togi.config.fields import Hook
from togi.config.rl import RLConfig
from togi.data.chat import Tokenizer
from togi.data.prompts import ENVIRONMENT
from togi.env.agent import AgentEnvironment, AgentHost
from togi.env.episode import ClassEnvironment, EpisodeLimits
from togi.env.host import EnvironmentHost, HostLimits
from togi.env.hosted import Facts
from togi.env.proxy import Proxy
from togi.env.render import Renderer
from togi.env.session import Limits
from togi.errors import ConfigError, DataError
from togi.rollout.collect import Environment, Generate
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling

UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class ByRow:
    """Each prompt acts in the environment that its row names."""

    environments: Mapping[str, Environment]

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        return await self.environments[_named_in(prompt, self.environments)].run(prompt, group_id, generate)


class Worlds:
    """The environments or the agent of a run. Their processes start here; ``close`` ends them."""

    def __init__(self, config: RLConfig) -> None:
        limits = HostLimits(
            processes=config.episode_processes,
            tool_seconds=config.max_tool_seconds,
            observation_chars=config.max_observation_chars,
        )
        self._limits = EpisodeLimits(config.max_turns, config.context_length)
        self._longest = config.prompt_max_len
        self._hosts = {name: _host(hook, limits) for name, hook in (config.environment or {}).items()}
        self._agent = None if config.agent is None else AgentHost.of(config.agent, config.episode_processes)
        self._budget = Limits(config.max_turns * config.generate_max_len, config.max_turns, config.context_length)
        self._seconds = config.agent_timeout
        self._facts = dict[str, Facts]()
        self._renderer: Renderer | None = None
        self._proxy: Proxy | None = None
        self._open = AsyncExitStack()

    async def check(
        self, prompts: Sequence[Prompt], place: Callable[[Prompt], str], tokenizer: Tokenizer, ends: Sequence[int]
    ) -> None:
        """Load every class, and begin an episode of its first row in each; load the agent. Raises UserError."""
        renderer = self._renderer = self._renderer or Renderer(tokenizer, ends=ends)
        if self._agent is not None:
            await self._agent.check()
            if self._proxy is None:
                self._proxy = await self._open.enter_async_context(Proxy(renderer, renderer.tokenizer))
            return
        self._facts = {name: await host.facts() for name, host in self._hosts.items()}
        first = dict[str, Prompt]()
        for prompt in prompts:
            name = _named_in(prompt, self._hosts)
            if name not in self._hosts:
                said = f"names {name!r}" if ENVIRONMENT in prompt.row else f"has no column {ENVIRONMENT!r}"
                known = ", ".join(self._hosts)
                raise DataError(f"{place(prompt)} {said}, but --environment has {known}: name one of these.")
            first.setdefault(name, prompt)
        begun = self._acting(Sampling(1), EpisodeLimits(1, context=UNLIMITED))
        for name, prompt in first.items():
            rollout = await begun.run(prompt, "trial", _nothing)
            if rollout.score is not None and rollout.score.outcome is Outcome.ERROR:
                raise ConfigError(f"--environment {name}: {rollout.score.message}")
            if (length := len(rollout.prompt.tokens)) > self._longest:
                raise ConfigError(
                    f"--environment {name} begins with {length} tokens on {place(prompt)}, above --prompt_max_len "
                    f"{self._longest}: raise that, or begin with less."
                )

    def environment(self, sampling: Sampling) -> Environment:
        """All environments as one, or the agent; after ``check``."""
        if self._agent is not None and self._proxy is not None:
            return AgentEnvironment(self._proxy, self._agent, sampling, self._budget, self._seconds)
        return self._acting(sampling, self._limits)

    def _acting(self, sampling: Sampling, limits: EpisodeLimits) -> Environment:
        assert self._renderer is not None, "what has not been checked cannot begin"
        common = self._renderer, sampling, limits
        return ByRow({name: ClassEnvironment(host, self._facts[name], *common) for name, host in self._hosts.items()})

    async def close(self) -> None:
        await self._open.aclose()
        if self._agent is not None:
            self._agent.close()
        for host in self._hosts.values():
            await host.close()


def _host(hook: Hook, limits: HostLimits) -> EnvironmentHost:
    if hook.function is None:
        return EnvironmentHost.from_file(hook.path, hook.name, limits)
    if not isinstance(hook.function, type):
        raise ConfigError(
            f"environment is {hook.name}, which is no class: give a class with reset() and tools or step()."
        )
    return EnvironmentHost.from_class(hook.function, limits)


def _named_in(prompt: Prompt, environments: Mapping[str, object]) -> str:
    """The name of a prompt's environment. With one environment it is that one."""
    return next(iter(environments)) if len(environments) == 1 else str(prompt.row.get(ENVIRONMENT))


async def _nothing(context: Sequence[int], sampling: Sampling) -> Generation:
    """The answer in a trial."""
    return Generation((), (), FinishReason.STOP, ())
