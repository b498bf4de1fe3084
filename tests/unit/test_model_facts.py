"""Lengths by config.json: under every name, in the part for text, and not where rotary scaling stretches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BloomConfig,
    DbrxConfig,
    Gemma3Config,
    GPT2Config,
    GPTBigCodeConfig,
    LlavaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

from tests.tiny import save_tiny_model
from togi.config.model_facts import check_length, position_limit
from togi.errors import ConfigError, ModelError
from togi.model.loading import check_causal_lm

FULL = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 64, "n_ctx": 64}, 64),
        ({"n_positions": 64, "max_position_embeddings": 2048}, 64),
        ({"n_ctx": 100}, 100),
        ({"max_seq_len": 100}, 100),
        ({"max_sequence_length": 100}, 100),
        ({"seq_length": 100}, 100),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": True, "n_positions": -1}, None),
        ({}, None),
        ({"max_position_embeddings": 9, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"max_position_embeddings": 9, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 9),
        ({"max_position_embeddings": 9, "rope_parameters": {"a": FULL, "b": FULL}}, 9),
        (
            {"max_position_embeddings": 9, "rope_parameters": {"a": {"rope_type": "linear", "factor": 8.0}, "b": FULL}},
            None,
        ),
        ({"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 64}}, 64),
        ({"vision_config": {"n_positions": 9}, "text_config": {"n_ctx": 64}}, 64),
        ({"thinker_config": {"text_config": {"max_position_embeddings": 64}}}, 64),
        ({"llm_config": {"max_position_embeddings": 64}}, 64),
    ],
)
def test_the_longest_sequence(settings: dict[str, Any], limit: int | None) -> None:
    assert position_limit(settings) == limit


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_positions=64),
        GPTBigCodeConfig(n_positions=64),
        MptConfig(max_seq_len=64),
        DbrxConfig(max_seq_len=64),
        BloomConfig(seq_length=64),
        Gemma3Config(text_config={"max_position_embeddings": 64}),
        LlavaConfig(text_config={"model_type": "llama", "max_position_embeddings": 64}),
        Qwen2_5_VLConfig(text_config={"max_position_embeddings": 64}),
    ],
    ids=lambda config: config.model_type,
)
def test_as_transformers_writes_them(config: PreTrainedConfig) -> None:
    assert position_limit(config.to_dict()) == 64
    check_length("--max_len 64", 64, "m", config.to_dict())
    with pytest.raises(ConfigError, match=r"^--max_len 65 is more than the 64 positions of m: lower it\.$"):
        check_length("--max_len 65", 65, "m", config.to_dict())


def test_a_default_that_is_not_in_the_file(tmp_path: Path) -> None:
    """GPT-2's file may leave out n_positions; the class knows it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"^--max_len 1025 is more than the 1024 positions of .*: lower it\.$"):
        check_causal_lm(str(tmp_path), flash_attn=False, asked="--max_len 1025", longest=1025)


@pytest.mark.parametrize(
    ("config", "alone"),
    [
        (Gemma3Config(), ", with the model_type gemma3_text in its config.json"),
        (LlavaConfig(), ", with the model_type llama in its config.json"),
        (Qwen2_5_VLConfig(), ""),
    ],
    ids=["gemma3", "llava", "qwen2_5_vl"],
)
def test_a_model_that_also_sees_is_refused(tmp_path: Path, config: PreTrainedConfig, alone: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        check_causal_lm(str(tmp_path), flash_attn=False)
    kind = config.model_type
    assert str(error.value) == (
        f"{kind} models take more than text, and Togi trains language models: give one without the other parts{alone}."
    )


def test_its_language_model_alone_is_taken(tmp_path: Path) -> None:
    """What the refusal advises."""
    check_causal_lm(str(save_tiny_model(tmp_path, "gemma3_text")), flash_attn=False, asked="--max_len 512", longest=512)
