"""What is said at the start about flags that are accepted and change nothing here."""

from __future__ import annotations

from collections.abc import Callable

from togi.config.chat import ChatConfig
from togi.config.infer import InferConfig
from togi.config.serve_rm import ServeRMConfig
from togi.config.shared import ModelSettings

ONE_TOKENIZER = "--disable_fast_tokenizer: Transformers has one tokenizer for each model, which is used"

NO_CUDA_FOR_LIGER = "--use_liger_kernel: there is no CUDA device here, Transformers' own layers compute instead"


def say_ignored(config: ModelSettings | InferConfig | ChatConfig | ServeRMConfig, say: Callable[[str], None]) -> None:
    """Say it, a line a flag."""
    if config.disable_fast_tokenizer:
        say(ONE_TOKENIZER)
