"""``togi chat``: a conversation in the terminal, streamed, with the model's chat template and the whole history."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.chat import ChatConfig
from togi.config.parse import parse
from togi.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Read lines from standard input until "exit" or its end."""
    config = parse(ChatConfig, argv, "chat").config
    if not config.pretrain:
        raise ConfigError("--pretrain is required: the folder or hub name of the model to talk to.")
    from togi.recipes.preflight import check_model

    check_model("pretrain", config.pretrain)
    from togi.recipes.chat import Chat

    chat = Chat(config)
    print('Type a message; "clear" starts anew, "exit" ends.')
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "exit":
            return
        if line == "clear":
            chat.clear()
        elif line:
            for piece in chat.answer(line):
                print(piece, end="", flush=True)
            print()
