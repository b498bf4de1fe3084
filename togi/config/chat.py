"""The settings of ``togi chat`` (established name: ``interactive_chat``)."""

from __future__ import annotations

from togi.config.fields import Count, PathText, Settings, flag
from togi.config.infer import RewardTextSettings
from togi.config.shared import PLAIN_TEMPLATE


class TalkSettings(Settings):
    """Chat"""

    pretrain: PathText = flag("", "Model folder or hub name. Required.")
    bf16: bool = flag(False, "Run in bfloat16.")
    max_len: Count = flag(1024, "At most this many new tokens per answer.")
    temperature: float = flag(0.2, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = flag(0.9, "Nucleus sampling.", gt=0, le=1)
    greedy_sampling: bool = flag(False, "Take the most likely token each time.")
    repetition_penalty: float = flag(1.0, "Make tokens that are already there less likely; 1 changes nothing.", gt=0)
    apply_chat_template: bool = flag(True, "Talk in the chat template; --no_apply_chat_template: one plain text.")
    input_template: str | None = flag(
        PLAIN_TEMPLATE, "Format string with one {} around each message, in plain text only."
    )
    tools: PathText | None = flag(
        None, "JSON file with a list of tools that the chat template shows to the model, as in a row's field tools."
    )
    ta_prompt: PathText | None = flag(None, "Text file that the conversation starts with, in plain text only.")
    enable_csft: bool = flag(False, "Put the reward text of --csft_prompt before each answer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja text that replaces the tokenizer's chat template.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model folder.")
    flash_attn: bool = flag(False, "Use FlashAttention where the device has it (CUDA); elsewhere attention is SDPA.")
    load_in_4bit: bool = flag(False, "Hold the weights in NF4.")
    disable_fast_tokenizer: bool = flag(
        False, "Accepted for established commands; changes nothing: Transformers has one tokenizer for each model."
    )
    use_ms: bool = flag(False, "Take names of models and data sets from ModelScope instead of the Hugging Face hub.")


class ChatConfig(TalkSettings, RewardTextSettings):
    """Talk to a model in the terminal. "clear" starts anew, "exit" ends."""
