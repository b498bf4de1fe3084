"""Single-player games of TextArena: GuessTheNumber, Mastermind, TowerOfHanoi, Sudoku, 2048 and more (``pip install textarena``).

    togi rl --environment examples/environments/textarena_games.py:Game --prompt_data games.jsonl --apply_chat_template ...

A row has the id of a game and a seed: {"game": "Mastermind-v0", "seed": 3}. Rows of one or more games:

    python examples/environments/textarena_games.py 1000 GuessTheNumber-v0 Mastermind-v0 > games.jsonl

Rules, observations and rewards are the game's own: 1 for a game that was won, at its end; most games pay a part for one that was
not. The second faulty move in a row loses. Games with words (Wordle, Hangman and others) download lists of them, and games for two
need a second player: neither can be played with this file.
"""

from __future__ import annotations

import json
import sys

try:
    import textarena
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"TextArena's games need the package ({missing}): pip install textarena") from None


class Game:
    """One game of TextArena."""

    def reset(self, game: str, seed: int = 0, **row: object) -> str:
        """Begin. ``game``: its id, such as Mastermind-v0-hard."""
        # Other variants repeat the whole game in each observation; the conversation has it already.
        self._game = textarena.make(f"{game.removesuffix('-raw')}-raw")
        try:
            self._game.reset(num_players=1, seed=seed)
        except AssertionError as error:
            raise ValueError(f"{game} cannot be played alone ({error}): choose a game for one player") from None
        return self._seen()

    def step(self, action: str) -> tuple[str, float | None, bool]:
        """The game itself looks for its move in the text, mostly in square brackets."""
        is_over, _ = self._game.step(action)
        if not is_over:
            return self._seen(), None, False
        rewards, facts = self._game.close()
        return f"{self._seen()}\n{facts[0]['reason']}".strip(), float(rewards[0]), True

    def _seen(self) -> str:
        """What has happened since the last turn, without the player's own words."""
        _, messages = self._game.get_observation()
        own = textarena.ObservationType.PLAYER_ACTION
        return "\n".join(text for _, text, kind in messages if kind is not own).strip()


def main(count: str, *games: str) -> None:
    """Print rows, as many of each game."""
    for seed in range(int(count)):
        for game in games:
            print(json.dumps({"game": game, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
