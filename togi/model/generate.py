"""Text from a model, streamed, for a conversation. Rollouts do not come from here (``togi.rollout``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Thread

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer
from transformers.utils import logging as hf_logging


def load_generator(path: str, *, bf16: bool, trust_remote_code: bool) -> PreTrainedModel:
    """A causal language model for generation, on the accelerator if there is one."""
    hf_logging.disable_progress_bar()
    dtype = torch.bfloat16 if bf16 else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code
    )
    accelerator = torch.accelerator.current_accelerator()
    return model.eval() if accelerator is None else model.eval().to(accelerator)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Iterator[str]:
    """Pieces of text as they are generated. ``temperature`` 0 is greedy."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([list(tokens)], device=model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "streamer": streamer,
        "max_new_tokens": max_new_tokens,
        **sampling,
    }
    thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
