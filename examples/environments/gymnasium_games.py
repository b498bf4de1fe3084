"""Games of gymnasium with a small number of actions, as text: FrozenLake, CliffWalking, Blackjack (``pip install gymnasium``).

    togi rl --environment examples/environments/gymnasium_games.py:Game --prompt_data games.jsonl --apply_chat_template ...

A row names the game and its seed, and may have options of ``gymnasium.make``. Rows of a game, to begin with:

    python examples/environments/gymnasium_games.py FrozenLake-v1 1000 '{"is_slippery": false}' > games.jsonl

A game that is not in ``WORDS`` is played with the numbers of its actions. Give it words, and a model can know what it does.

The rewards are the game's own, turn by turn. A turn without an action gets none, and the game stands still. Mind games that
cost something for each step, such as CliffWalking: where an episode ends early, at --max_turns or so, it has cost less.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    import gymnasium
except ModuleNotFoundError:
    raise ModuleNotFoundError("The games of gymnasium need the package: pip install gymnasium") from None


@dataclass(frozen=True)
class Words:
    """What a game is about, its actions in gymnasium's order, and an observation as text. Without ``seen`` the map is shown."""

    rules: str
    actions: tuple[str, ...]
    seen: Callable[[Any], str] | None = None


def hand(observation: tuple[int, int, int]) -> str:
    """An observation of Blackjack."""
    own, dealer, ace = observation
    return f"You have {own}{', with an ace that counts 11' if ace else ''}. The dealer shows {dealer}."


WORDS = {
    "FrozenLake": Words(
        "Walk over the ice from S to the goal G. F is ice, and H a hole, in which the game is lost. You are where the "
        "brackets are. If the ice is slippery, you may slide to the side.",
        ("left", "down", "right", "up"),
    ),
    "CliffWalking": Words(
        "Walk from the start to the target T. Each step costs 1. C is a cliff, which costs 100 and puts you back to the "
        "start. You are x.",
        ("up", "right", "down", "left"),
    ),
    "Blackjack": Words("Come nearer to 21 than the dealer, but not over it.", ("stick", "hit"), hand),
}
# In the map of FrozenLake the place of the player is coloured, and nothing else tells it.
COLOURED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0m")
PUNCTUATION = " \t.,:;!*\"'`[]()<>"


class Game:
    """One game of gymnasium, whose actions are ``Discrete``."""

    def reset(self, game: str, seed: int = 0, options: dict[str, Any] | None = None, **row: object) -> str:
        """Begin. ``game``: its name in gymnasium; ``options``: those of ``gymnasium.make``."""
        self._words = WORDS.get(game.partition("-")[0], Words(f"This is {game}.", (), str))
        mode = None if self._words.seen else "ansi"
        # The checker is for authors of games, and warns about what is no fault here.
        self._game = gymnasium.make(game, render_mode=mode, disable_env_checker=True, **(options or {}))
        space = self._game.action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise ValueError(f"{game} has actions that are no list ({space}): choose a game with discrete actions")
        first = int(space.start)
        names = self._words.actions or tuple(map(str, range(first, first + int(space.n))))
        self._actions = {name: number for number, name in enumerate(names, first)}
        self._choices = f"{', '.join(names[:-1])} or {names[-1]}"
        observation, _ = self._game.reset(seed=seed)
        return (
            f"{self._words.rules}\n\n{self._seen(observation)}\n\n"
            f"In each turn you may think first. The last line of your answer is your action, and nothing else: {self._choices}."
        )

    def step(self, action: str) -> tuple[str, float | None, bool]:
        """The last line of the answer, as it is but for case and punctuation, is the action; anything else is none."""
        lines = action.strip().splitlines()
        name = lines[-1].strip(PUNCTUATION).lower() if lines else ""
        if name not in self._actions:
            return f"That is no action. End your answer with a line that is {self._choices}.", None, False
        observation, reward, is_over, is_cut, _ = self._game.step(self._actions[name])
        return self._seen(observation), float(reward), bool(is_over or is_cut)

    def close(self) -> None:
        self._game.close()

    def _seen(self, observation: Any) -> str:
        if self._words.seen is not None:
            return self._words.seen(observation)
        # Colours become brackets. A line in brackets above the map is the action before, which the player knows.
        shown = COLOURED.sub(r"[\1]", str(self._game.render()))
        return "\n".join(line for line in shown.splitlines() if line.strip() and not line.strip().startswith("("))


def main(game: str, count: str, options: str = "{}") -> None:
    """Print rows of one game."""
    for seed in range(int(count)):
        print(json.dumps({"game": game, "seed": seed, "options": json.loads(options)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
