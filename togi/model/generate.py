"""Streamed text generation for a conversation (``togi chat``). Rollouts are in ``togi.rollout``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, generation
from transformers.utils import logging as hf_logging

from togi.config.model_facts import position_limit
from togi.device import default_device
from togi.errors import ModelError
from togi.model.loading import check_package, dtype_of, keep_layout, nf4


@dataclass(frozen=True, slots=True)
class Answering:
    """How an answer is sampled. ``temperature`` 0 is greedy and ignores ``top_p``."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0


def load_generator(path: str, *, bf16: bool, trust_remote_code: bool, in_4bit: bool = False) -> PreTrainedModel:
    """Load a causal language model for generation, on the accelerator if there is one. Raises ModelError if that fails."""
    hf_logging.disable_progress_bar()
    dtype = dtype_of(bf16)
    if in_4bit:
        check_package("load_in_4bit", "bitsandbytes")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quantization_config=nf4(dtype) if in_4bit else None,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"No language model can be loaded from {path}: {' '.join(str(error).split())}") from None
    if in_4bit:
        keep_layout(model)
    return model.eval().to(default_device())


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], how: Answering
) -> Iterator[str]:
    """Yield pieces of text as they are generated, without special tokens.

    Raises ModelError before the first piece if ``tokens`` leave no position for an answer. An answer ends at the model's last
    position.
    """
    room = positions(model) - len(tokens)
    if room < 1:
        raise ModelError(f"The conversation has {len(tokens)} tokens, all that the model can see: start anew.")
    streamer = generation.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([list(tokens)], device=model.device)
    # What a model folder sets for sampling (top_k and the like) stays, except where it would contradict greedy.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": min(how.max_new_tokens, room),
        "eos_token_id": list(how.stop_token_ids),
        "pad_token_id": how.stop_token_ids[0],
        "repetition_penalty": how.repetition_penalty,
        **({"do_sample": True, "temperature": how.temperature, "top_p": how.top_p} if how.temperature > 0 else greedy),
    }
    # generate in a thread, so that this generator can yield text while the model runs
    stop = _Stop()
    with ThreadPoolExecutor(1, thread_name_prefix="generate") as threads:
        done = threads.submit(
            _generate, model, streamer, arguments | {"stopping_criteria": generation.StoppingCriteriaList([stop])}
        )
        try:
            yield from streamer
        finally:
            stop.asked.set()  # the reader may stop early, by Ctrl-C
        done.result()


def positions(model: PreTrainedModel) -> int:
    """The longest sequence that the model was made for, in tokens. 2^31 if its configuration sets no limit."""
    found = position_limit(model.config.to_dict())
    if found is None:  # rotary scaling stretches the limit, but the configuration still has a number
        found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else 2**31


def _generate(model: PreTrainedModel, streamer: generation.TextIteratorStreamer, arguments: dict[str, object]) -> None:
    try:
        model.generate(streamer=streamer, **arguments)
    except BaseException:
        streamer.end()  # otherwise the reader would wait for ever
        raise


class _Stop(generation.StoppingCriteria):  # type: ignore[misc]
    """Ends the generation at its next token once the event ``asked`` is set."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)
