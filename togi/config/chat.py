"""The settings of ``togi chat``."""

from __future__ import annotations

from togi.config.fields import Count, PathText, Settings, flag


class ChatConfig(Settings):
    """Talk to a model in the terminal. "clear" starts anew, "exit" ends."""

    pretrain: PathText = flag("", "Model folder or hub name. Required.")
    bf16: bool = flag(False, "Run in bfloat16.")
    max_len: Count = flag(1024, "At most this many new tokens per answer.")
    temperature: float = flag(0.2, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = flag(0.9, "Nucleus sampling.", gt=0, le=1)
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
