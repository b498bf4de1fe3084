"""What the tests of rows share: a tokenizer that merges, chat templates, and the learned parts of a sample."""

import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, SPECIAL
from togi.data.chat import visible

SMOL = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser() / "smollm2-135m-instruct"
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def merging_tokenizer(*merges):
    """The tiny tokenizer with merges of two symbols of the byte-level alphabet ("Ġ" is a space)."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=CHAT_TEMPLATE
    )


def parts(sample, tokenizer):
    """The text of each run of tokens, those learned in brackets."""
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(int))) + 1
    runs = np.split(np.arange(len(sample.tokens)), edges)
    texts = [(visible(tokenizer, sample.tokens[run].tolist()), bool(sample.loss_mask[run[0]])) for run in runs]
    return "".join(f"[{text}]" if learned else text for text, learned in texts)
