"""Check that a model's embedding has a row for the tokens that its tokenizer makes.

A tokenizer may have more tokens than the model has rows: some published models do, with tokens that no text contains. So only
tokens that occur are checked: first those of the chat template and of text ends, later those of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

from togi.data.chat import Tokenizer
from togi.errors import ModelError


def check_vocabulary(tokenizer: Tokenizer, path: str, rows: int, *, apply_chat_template: bool = False) -> None:
    """Raise ModelError if BOS, EOS or a token of the template is beyond the ``rows`` of the embedding of ``path``."""
    texts = _without_row(tokenizer, rows)
    template = (tokenizer.chat_template or "") if apply_chat_template else ""
    for token, text in texts.items():
        if token in (tokenizer.bos_token_id, tokenizer.eos_token_id) or text in str(template):
            raise _refused(texts, path, rows, token)


def check_tokens(tokenizer: Tokenizer, path: str, rows: int, largest: Callable[[], int]) -> None:
    """Raise ModelError if the ``largest`` occurring token has no row. ``largest`` is called only if that is possible."""
    texts = _without_row(tokenizer, rows)
    if texts and (token := largest()) >= rows:
        raise _refused(texts, path, rows, token)


def _without_row(tokenizer: Tokenizer, rows: int) -> dict[int, str]:
    return dict(sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= rows))


def _refused(texts: dict[int, str], path: str, rows: int, token: int) -> ModelError:
    total = max(texts) + 1
    return ModelError(
        f"The tokenizer has {total} tokens and the embedding of {path} has {rows} rows, none for {texts[token]!r} ({token}): "
        f"use the tokenizer that the model was made with, or enlarge the embedding (model.resize_token_embeddings({total}) in "
        "Transformers) and save the model."
    )
