"""Merging is proven: the folder that is written answers as the adapter beside its base does, or nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.tiny import STOP, VOCAB, save_tiny_model, tiny_model, tiny_tokenizer
from togi.cli.main import main
from togi.errors import ModelError
from togi.model import merge as merging
from togi.model.merge import check_equal, load_merged, probe

IDS = torch.tensor([[1, 5, VOCAB - 1, 100, 7, 6]])
QV = ["q_proj", "v_proj"]


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": QV, **more})


def adapter_of(base: Path, folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Tensor:
    """Write an adapter as PEFT does, with values that do something; its logits beside the base. Larger tokenizers enlarge it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokenizer is not None:
        torch.manual_seed(2)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    beside = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in beside.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
        logits: Tensor = beside.eval()(IDS).logits
    beside.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return logits


def merge(base: Path, adapter: Path, out: Path, *more: str) -> int:
    return main(
        ["merge-lora", "--model_path", str(base), "--lora_path", str(adapter), "--output_path", str(out), *more]
    )


def reread(out: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("config", "stays_tied"),
    [
        (lora(modules_to_save=["embed_tokens", "lm_head"]), False),
        (lora(modules_to_save=["lm_head"]), False),
        (lora(modules_to_save=["embed_tokens"]), False),
        (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
        (lora(target_modules=[*QV, "embed_tokens"]), False),
        (lora(target_modules=[*QV, "lm_head"]), False),
        (lora(target_modules=[*QV, "embed_tokens", "lm_head"]), False),
        (lora(trainable_token_indices=[5, VOCAB - 1]), True),
        (lora(use_dora=True), True),
        (lora(use_rslora=True), True),
        (lora(bias="all"), True),
        (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}), True),
        (lora(modules_to_save=["norm"]), True),
        (
            IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            True,
        ),
    ],
    ids=[
        "both",
        "head",
        "embed",
        "one",
        "A-embed",
        "A-head",
        "A-both",
        "tokens",
        "dora",
        "rslora",
        "bias",
        "some",
        "norm",
        "ia3",
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tied_embeddings(tmp_path: Path, config: Any, stays_tied: bool, precision: str) -> None:
    base = save_tiny_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    logits = adapter_of(base, tmp_path / "adapter", config)
    assert merge(base, tmp_path / "adapter", tmp_path / "out", *(["--bf16"] if precision == "bfloat16" else [])) == 0
    close = {"rtol": 0.0, "atol": 1e-4 if precision == "float32" else 0.1 * float(logits.abs().max())}
    torch.testing.assert_close(reread(tmp_path / "out"), logits, **close)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not stays_tied


def larger() -> PreTrainedTokenizerFast:
    """40 tokens over the 260 of the others fill up the embedding of 300 rows; three more do not fit."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB - len(tokenizer) + 3)], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_added_tokens(tmp_path: Path, tied: bool) -> None:
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    logits = adapter_of(base, tmp_path / "adapter", lora(modules_to_save=["embed_tokens", "lm_head"]), larger())
    assert logits.shape[-1] == 303
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    torch.testing.assert_close(reread(tmp_path / "out"), logits, rtol=0, atol=1e-4)


def without(folder: Path, *parts: str) -> None:
    """Take the tensors with these parts in their names out of an adapter."""
    file = folder / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not any(part in name for part in parts)}
    save_file(kept, file, {"format": "pt"})


def refusal(base: Path, adapter: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert merge(base, adapter, out) == 2
    assert not list(out.glob("*.safetensors"))
    return capsys.readouterr().err.splitlines()[-1].removeprefix("togi: ")


def test_added_tokens_of_which_the_adapter_holds_only_a_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, out = save_tiny_model(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, lora(modules_to_save=["embed_tokens"]), larger())
    without(adapter, "lm_head")
    assert refusal(base, adapter, out, capsys) == (
        f"the adapter {adapter} was trained beside an embedding of 303 rows and does not hold all of them, and the model {base} "
        "has 300: give the model with the added tokens as --model_path."
    )
    without(adapter, "lm_head", "embed_tokens")
    (adapter / "adapter_config.json").write_text(
        json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": None})
    )
    assert refusal(base, adapter, out, capsys) == (
        f"the tokenizer of the adapter {adapter} has 303 tokens and the model {base} has 300 rows in its embedding, and the "
        "adapter does not hold the others: give the model with the added tokens as --model_path."
    )


def test_a_tokenizer_that_was_larger_from_the_start_is_no_fault(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    larger().save_pretrained(base)
    adapter_of(base, tmp_path / "adapter", lora())
    larger().save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0


def test_what_does_not_fit_is_told_with_names_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, out = save_tiny_model(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, lora())
    wide = save_tiny_model(tmp_path / "wide", hidden_size=96)
    q = "model.layers.0.self_attn.q_proj"
    start = f"the adapter {adapter} does not fit the model"
    assert refusal(wide, adapter, out, capsys) == (
        f"{start} {wide}: {q}.lora_A.weight is [4, 64] in the adapter and [4, 96] for this model."
    )
    short = save_tiny_model(tmp_path / "short", num_hidden_layers=1)
    assert refusal(short, adapter, out, capsys) == (
        f"{start} {short}: the model has no place for model.layers.1.self_attn.q_proj.lora_A.weight."
    )
    long = save_tiny_model(tmp_path / "long", num_hidden_layers=3)
    assert refusal(long, adapter, out, capsys) == (
        f"{start} {long}: the adapter has no model.layers.2.self_attn.q_proj.lora_A.weight."
    )


def test_kinds_that_have_no_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, out = save_tiny_model(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    told = refusal(base, adapter, out, capsys)
    assert told.startswith(f"the adapter {adapter} is of the kind PROMPT_TUNING, which PEFT cannot merge (")
    assert told.endswith("): use it with PEFT.")


def test_a_sum_that_is_not_the_adapters_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_model(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", lora())
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(ModelError, match=r"beside .*base and the merged model give other outputs \(difference 0\.\d+"):
        load_merged(str(tmp_path / "adapter"), str(base), scalar=False)


def test_files_that_are_not_the_sum_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a head of its own is left out as if it were the embedding: nothing is left behind."""
    base, adapter, out = save_tiny_model(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    adapter_of(base, adapter, lora())
    save: Callable[..., None] = merging.save_hf

    def damaged(directory: Path, *rest: Any) -> None:
        save(directory, *rest)
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merging, "save_hf", damaged)
    assert "the merged model and its files give other outputs" in refusal(base, adapter, out, capsys)


def test_a_reward_models_adapter_with_its_embedding(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    beside = get_peft_model(model, lora(task_type="SEQ_CLS", modules_to_save=["score", "embed_tokens"]))
    with torch.no_grad():
        for parameter in beside.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
        score = beside.eval()(IDS).logits
    beside.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out", "--is_rm") == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(IDS).logits, score, rtol=1e-4, atol=1e-5)


def test_the_probe_has_the_last_tokens_and_no_more_than_the_positions() -> None:
    tokens = probe(tiny_model())
    assert tokens.shape == (1, 32)
    assert set(range(VOCAB - 8, VOCAB)) <= set(tokens[0].tolist())
    assert probe(tiny_model("gpt2", max_position_embeddings=16)).shape == (1, 16)


def test_the_difference_by_hand() -> None:
    """|(3, 4) - (3, 4.5)| = 0.5 of 5 is a tenth."""
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    check_equal(one, other, 0.11, "a", "b")
    with pytest.raises(ModelError) as error:
        check_equal(one, other, 0.05, "a", "b")
    assert str(error.value) == (
        "a and b give other outputs (difference 0.1, at most 0.05 is rounding): this adapter cannot be merged, and nothing was "
        "written."
    )
    for broken in (torch.tensor([float("nan"), 4.0]), torch.tensor([3.0])):
        with pytest.raises(ModelError):
            check_equal(one, broken, 0.1, "a", "b")


def test_conv1d_layers(tmp_path: Path) -> None:
    """GPT-2's weights lie as [in, out]; all its linear layers get an adapter, and PEFT's adapters of it are merged as well."""
    base = save_tiny_model(tmp_path / "base", "gpt2")
    layers = ["c_attn", "c_proj", "c_fc"]
    logits = adapter_of(base, tmp_path / "adapter", lora(target_modules=layers, fan_in_fan_out=True))
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    torch.testing.assert_close(reread(tmp_path / "out"), logits, rtol=0, atol=1e-4)


def test_the_ends_of_answers_go_with_the_merged_model(tmp_path: Path) -> None:
    """Tokens that the adapter was trained to end with are in its generation config, and not in that of the base."""
    base = save_tiny_model(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", lora())
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [7, 9, STOP]


def test_nothing_that_is_merged_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = save_tiny_model(tmp_path / "base"), tmp_path / "adapter"
    adapter_of(base, adapter, lora())
    for out, flag, source in (
        (adapter, "lora_path", adapter),
        (base, "model_path", base),
        (tmp_path, "lora_path", adapter),
        (tmp_path / "base" / ".." / "base", "model_path", base),
    ):
        assert merge(base, adapter, out) == 2
        sentence = f"togi: --output_path {out} would replace --{flag} {source}: give another folder.\n"
        assert capsys.readouterr().err.endswith(sentence)
    # the base that only the adapter names
    assert main(["merge-lora", "--lora_path", str(adapter), "--output_path", str(base)]) == 2
    sentence = f"togi: --output_path {base} would replace --model_path {base}: give another folder.\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert (adapter / "adapter_model.safetensors").is_file() and (base / "model.safetensors").is_file()


def _named(adapter: Path, base: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda a: _named(a, None), "the adapter {} does not name its base model: give it as --model_path."),
        (
            lambda a: _named(a, "/gone/base"),
            "the adapter {} was trained beside /gone/base, which is not there: give the base as --model_path.",
        ),
        (
            lambda a: (a / "adapter_config.json").write_text("[]"),
            "--lora_path {} is not an adapter: its adapter_config.json holds no settings.",
        ),
        (
            lambda a: (a / "adapter_model.safetensors").write_bytes(b"version https://git-lfs"),
            "{}/adapter_model.safetensors cannot be read (",
        ),
    ],
    ids=["no base", "base gone", "no settings", "no weights"],
)
def test_folders_that_are_no_whole_adapter(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter_of(save_tiny_model(tmp_path / "base"), adapter, lora())
    spoil(adapter)
    assert main(["merge-lora", "--lora_path", str(adapter), "--output_path", str(tmp_path / "out")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("togi: ")]
    assert said.startswith(f"togi: {sentence.format(adapter)}")
