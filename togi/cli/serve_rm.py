"""``togi serve-rm``, also ``python -m togi.cli.serve_rm``: a reward model or function over HTTP, until SIGTERM or SIGINT."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from togi.cli.main import main as run_togi
from togi.config.parse import parse
from togi.config.tools import ServeRMConfig, check_serve_rm
from togi.errors import ConfigError
from togi.run.modelscope import with_local_names
from togi.run.preflight import check_model, check_reward_file
from togi.run.start import say_ignored


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    parsed = parse(ServeRMConfig, argv, "serve-rm")
    token = _token(parsed.config)
    check_serve_rm(parsed.config, has_token=bool(token))
    config = with_local_names(parsed).config
    say_ignored(config, print)
    if config.reward_pretrain:
        check_model("reward_pretrain", config.reward_pretrain)
    else:
        check_reward_file(Path(config.reward_func))
    from togi.run.serve_rm import serve

    serve(config, token, lambda line: print(line, flush=True))


def _token(config: ServeRMConfig) -> str:
    """The bearer token, "" if there is none. Raises ConfigError."""
    if config.token_file is None:
        return os.environ.get("TOGI_REWARD_TOKEN", "")
    try:
        token = Path(config.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"--token_file {config.token_file} cannot be read ({error.strerror}): give another."
        ) from None
    if not token:
        raise ConfigError(f"--token_file {config.token_file} is empty: write the token into it.")
    return token


if __name__ == "__main__":
    sys.exit(run_togi(["serve-rm", *sys.argv[1:]]))
