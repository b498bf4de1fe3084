"""Episodes in the user's environment classes: the policy answers, its calls of tools are made, their results are appended.

Not here: the processes of the classes (``host``), text to tokens (``render``), the formats of calls (``tool_calls``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from togi.data.chat import decode
from togi.data.messages import USER, Message
from togi.data.prompts import ENVIRONMENT
from togi.env.host import EnvironmentHost, Episode, Observation
from togi.env.hosted import Facts
from togi.env.render import TOKENS, Renderer
from togi.env.tool_calls import ToolCall
from togi.env.trace import Trace
from togi.errors import EpisodeFailed
from togi.rollout.collect import Generate
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling, Score


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """``turns``: answers of the policy. ``context``: tokens of a conversation."""

    turns: int
    context: int


@dataclass(frozen=True, slots=True)
class ClassEnvironment:
    """An ``Environment`` over the processes of one class."""

    host: EnvironmentHost
    facts: Facts
    renderer: Renderer
    sampling: Sampling
    limits: EpisodeLimits

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        """One episode. A failure of the environment is a rollout with an error as its score, never a reward."""
        talk = _Talk(self, Trace(prompt), generate)
        try:
            async with self.host.episode(prompt.id) as episode:
                await talk.play(episode)
                score = await talk.judged(episode)
        except EpisodeFailed as failure:
            score = Score(Outcome.ERROR, message=str(failure))
        return talk.rollout(group_id, score)


@dataclass(slots=True)
class _Talk:
    """One episode on its way."""

    world: ClassEnvironment
    trace: Trace
    generate: Generate
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    finish: FinishReason = FinishReason.STOP
    counts: Counter[str] = field(default_factory=Counter)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    async def play(self, episode: Episode) -> None:
        """From the first message to the end, for whatever reason it comes."""
        renderer, tools, limits = self.world.renderer, self.world.facts.tools, self.world.limits
        self.messages += await self._beginning(episode)
        context = renderer.first(self.messages, tools)
        while True:
            room = limits.context - len(context)
            if room <= 0:
                self.finish = FinishReason.LENGTH
                return
            said = await self._answer(context, room)
            self.counts["turns"] += 1
            # A tool may be called in the last turn too: what it does counts, though nobody answers its result.
            is_over = await self._act(episode, said)
            if is_over or self.finish is not FinishReason.STOP:
                return
            if self.counts["turns"] == limits.turns:
                self.finish = FinishReason.LENGTH
                return
            context = renderer.after((*context, *said.tokens), self.messages, tools)

    async def judged(self, episode: Episode) -> Score:
        """The environment's own reward; of a game without one the sum of its turns. What was given in turns is part of it."""
        given = sum(reward for _, reward in self.rewards)
        if not self.world.facts.has_reward:
            if not self.rewards:
                return Score(Outcome.ABSTAIN, message="The environment gave no reward.")
            return Score(Outcome.SCORE, given, {ENVIRONMENT: given}, turns=tuple(self.rewards))
        with self._timed():
            score = await episode.reward(self.said[-1] if self.said else "")
        if score.outcome is not Outcome.SCORE:
            return score
        parts = {ENVIRONMENT: score.value + given, **score.components}
        return replace(score, value=score.value + given, components=parts, turns=tuple(self.rewards))

    def rollout(self, group_id: str, score: Score) -> Rollout:
        failed = float(score.outcome is Outcome.ERROR)
        counts = {**self.counts, "forks": self.trace.forks, "tool_seconds": self.seconds, "failed": failed}
        rollout = self.trace.rollout(group_id, "\n".join(self.said), self.finish, score)
        shown = tuple({key: value for key, value in message.items() if key != TOKENS} for message in self.messages)
        return replace(rollout, messages=shown, counts={name: float(n) for name, n in counts.items()})

    async def _beginning(self, episode: Episode) -> Sequence[Message]:
        prompt = self.trace.prompt
        with self._timed():
            first = await episode.reset(prompt.row)
        if isinstance(first, str):
            return [*prompt.messages, {"role": USER, "content": first}]
        messages = first or prompt.messages
        if not messages:
            shown, row = self.world.host.shown_as, f"prompt {prompt.id!r}"
            raise EpisodeFailed(
                f"{shown} returned nothing from reset(), and the row has no prompt ({row}); return the first message."
            )
        return messages

    async def _answer(self, context: tuple[int, ...], room: int) -> Generation:
        sampling = self.world.sampling
        generation = await self.generate(context, replace(sampling, max_tokens=min(sampling.max_tokens, room)))
        self.trace.add(context, generation)
        self.said.append(decode(self.world.renderer.tokenizer, generation.tokens))
        self.messages.append(self.world.renderer.said(generation.tokens, self.world.facts.tools))
        self.finish = generation.finish_reason
        return generation

    async def _act(self, episode: Episode, said: Generation) -> bool:
        """What the answer does in the environment, whose observations are appended. Returns whether the episode is over."""
        renderer = self.world.renderer
        parsed = renderer.parsed(said.tokens, self.world.facts.tools)
        if self.world.facts.is_game:
            with self._timed():
                observed = await episode.step(parsed.content)
            if observed.reward is not None:
                self.rewards.append((self.trace.last, observed.reward))
            self._observe({"role": USER, "content": observed.text}, observed)
            return observed.done
        for problem in parsed.problems:
            self.counts["tool_errors"] += 1
            self.messages.append(renderer.observation(problem))
        is_over = False
        for call in parsed.calls:
            is_over |= await self._call(episode, call)
        return is_over or not (parsed.calls or parsed.problems)

    async def _call(self, episode: Episode, call: ToolCall) -> bool:
        self.counts["tool_calls"] += 1
        with self._timed():
            observed = await episode.call(call.name, call.arguments)
        self._observe(self.world.renderer.observation(observed.text, call), observed)
        return observed.done

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def _observe(self, message: Message, observed: Observation) -> None:
        self.counts["tool_errors"] += bool(observed.error)
        self.counts["cut_observations"] += observed.left_out > 0
        self.messages.append(message)
