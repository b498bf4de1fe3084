"""``togi chat``: a conversation in the terminal, streamed, with the model's chat template and the whole history."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from togi.cli.main import run as run_module
from togi.config.chat import ChatConfig
from togi.config.parse import parse
from togi.errors import ConfigError, UserError
from togi.recipes.preflight import check_model


def main(argv: Sequence[str]) -> None:
    """Read lines from standard input until "exit" or its end."""
    config = parse(ChatConfig, argv, "chat").config
    if not config.pretrain:
        raise ConfigError("--pretrain is required: the folder or hub name of the model to talk to.")
    check_model("pretrain", config.pretrain, adapters=True)
    from togi.recipes.chat import Chat

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
    """Print an answer as it comes. What cannot be answered ends the turn, not the conversation."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except UserError as error:
        print(f"togi: {error}", end="", file=sys.stderr)
    print()


if __name__ == "__main__":
    sys.exit(run_module(__spec__.name if __spec__ else __name__, sys.argv[1:]))
