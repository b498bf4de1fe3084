"""``togi chat``, also ``python -m togi.cli.interactive_chat``: a streamed conversation in the terminal with its history."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from togi.cli.main import main as run_togi
from togi.config.infer import ChatConfig, check_chat
from togi.config.parse import parse
from togi.data.precheck import asked_reward
from togi.errors import UserError
from togi.run.modelscope import with_local_names
from togi.run.preflight import check_model
from togi.run.start import say_ignored


def main(argv: Sequence[str]) -> None:
    """Read lines from standard input until "exit" or the end of input."""
    parsed = parse(ChatConfig, argv, "chat")
    # Everything that can be checked without the model.
    check_chat(parsed)
    config = with_local_names(parsed).config
    say_ignored(config, print)
    check_model("pretrain", config.pretrain, adapters=True)
    asked_reward(config.csft_prompt, config.reward_template)
    from togi.run.chat import Chat

    chat = Chat(config)
    print('Type a message; "clear" starts anew, "exit" ends.')
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "exit":
            return
        if line == "clear":
            chat.clear()
        elif line:
            _answer(chat.answer(line))


def _answer(pieces: Iterator[str]) -> None:
    """Stream an answer to the terminal. An error ends the turn, not the conversation."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except UserError as error:
        print(f"togi: {error}", end="", file=sys.stderr)
    print()


if __name__ == "__main__":
    sys.exit(run_togi(["chat", *sys.argv[1:]]))
