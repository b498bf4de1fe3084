"""LoRA against PEFT on plain Transformers models: forward, merging, files, and the frozen base inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import save_tiny_model, tiny_tokenizer
from togi.batch import Batch
from togi.cli.main import main
from togi.config.shared import LoRA, Recompute
from togi.data.packing import pack_all
from togi.errors import ModelError
from togi.model.adapters import save_adapter, without_adapter
from togi.model.checkpoint import expected_manifest, whole_tensors
from togi.model.loading import ModelSource, check_causal_lm, load_causal_lm, load_scalar_model
from togi.model.policy import Needs, PolicyModel, ScalarModel
from togi.sample import Sample

LORA = LoRA(4, 12, 0.0, ("all-linear",), False)
IN_4BIT = LoRA(4, 12, 0.0, ("all-linear",), True)
IDS = list(range(10, 30))


def one_sequence() -> Batch:
    mask = np.ones(len(IDS), dtype=np.bool_)
    mask[0] = False
    sample = Sample(np.asarray(IDS, dtype=np.int64), mask, 0, "g")
    return pack_all([sample], max_tokens=64, max_sequences=None, share_prefix=False)[0]


def adapted(folder: Path, lora: LoRA = LORA) -> PolicyModel:
    """A language model whose adapter does something."""
    model = load_causal_lm(ModelSource(str(folder), torch.float32, lora=lora))
    stir(model)
    return model


def stir(model: PolicyModel | ScalarModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def parameters(
    model: PolicyModel | ScalarModel, dtype: torch.dtype | None = None, *, trained_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """What a backend's ``full_parameters`` gives."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            yield name, parameter.detach() if dtype is None else parameter.detach().to(dtype)


def logprobs(model: PolicyModel) -> Tensor:
    with torch.no_grad():
        return model(one_sequence(), Needs(logprobs=True)).logprobs_K


def plain_logprobs(hf: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        table = hf(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return torch.stack([table[i - 1, IDS[i]] for i in range(1, len(IDS))])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "mixtral", "gpt2"])
def test_merged_weights_are_a_plain_model_that_answers_alike(tmp_path: Path, arch: str) -> None:
    """Names, shapes and order are those that engines expect; values make plain Transformers give the same log-probs."""
    folder = save_tiny_model(tmp_path, arch=arch)
    model = adapted(folder)

    def full(dtype: torch.dtype | None = None, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        return parameters(model, dtype, trained_only=trained_only)

    tensors = dict(whole_tensors(model, full, torch.float32))
    expected = expected_manifest(str(folder), "float32")
    assert {spec.name: spec.shape for spec in expected} == {name: tuple(t.shape) for name, t in tensors.items()}
    plain = AutoModelForCausalLM.from_pretrained(folder, state_dict=None)
    before = plain_logprobs(plain)
    torch.testing.assert_close(logprobs_of_base(model), before, rtol=1e-4, atol=1e-5)
    merged_folder = tmp_path / "merged"
    plain.config.save_pretrained(merged_folder)
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, merged_folder / "model.safetensors", {"format": "pt"})
    after = plain_logprobs(AutoModelForCausalLM.from_pretrained(merged_folder))
    torch.testing.assert_close(logprobs(model), after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 0.05  # the adapter does something


def logprobs_of_base(model: PolicyModel) -> Tensor:
    with without_adapter(model):
        return logprobs(model)


def test_only_the_adapter_is_trained_and_the_base_is_inside(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    model = adapted(folder)
    base = load_causal_lm(ModelSource(str(folder), torch.float32))
    assert torch.equal(logprobs_of_base(model), logprobs(base))
    assert not torch.equal(logprobs(model), logprobs(base))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    # 2 layers x 7 linear layers, A [4, in] and B [out, 4]: q 64>64, k and v 64>32, o 64>64, gate and up 64>96, down 96>64
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 4 * (128 + 96 + 96 + 128 + 160 + 160 + 160)
    model(one_sequence(), Needs(logprobs=True)).logprobs_K.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    new = load_causal_lm(ModelSource(str(folder), torch.float32, lora=LORA))
    torch.testing.assert_close(logprobs(new), logprobs_of_base(new), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_recomputed_activations(tmp_path: Path, reentrant: bool) -> None:
    """The re-entrant kind would silently drop them all, since nothing before the first block is trained."""
    folder = save_tiny_model(tmp_path)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = load_causal_lm(
            ModelSource(str(folder), torch.float32, recompute=Recompute(reentrant) if recompute else None, lora=LORA)
        )
        stir(model)
        model(one_sequence(), Needs(logprobs=True)).logprobs_K.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_saved_adapter_is_peft_s(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base")
    model = adapted(folder)
    save_adapter(tmp_path / "adapter", model, parameters(model, trained_only=True), tiny_tokenizer())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(plain), logprobs(model), rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"], record["base_model_name_or_path"]) == (4, 12, str(folder))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_the_adapter_of_a_mixture_is_loaded_and_merged(tmp_path: Path, arch: str) -> None:
    folder = save_tiny_model(tmp_path / "base", arch)
    model = adapted(folder)
    save_adapter(tmp_path / "adapter", model, parameters(model, trained_only=True), tiny_tokenizer())
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (record["target_modules"], record["target_parameters"]) == (["k_proj", "o_proj", "q_proj", "v_proj"], [])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(plain), logprobs(model), rtol=1e-4, atol=1e-5)
    out = tmp_path / "merged"
    assert main(["merge-lora", "--lora_path", str(tmp_path / "adapter"), "--output_path", str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(plain_logprobs(merged), plain_logprobs(plain), rtol=1e-4, atol=1e-4)


def scalar_model(folder: Path, prefix: str = "score") -> ScalarModel:
    model = load_scalar_model(
        ModelSource(str(folder), torch.float32, lora=LORA), init_head=True, value_head_prefix=prefix
    )
    stir(model)
    return model


def scores(model: ScalarModel) -> Tensor:
    with torch.no_grad():
        return model(one_sequence(), Needs(scores=True)).scores_N


def test_a_reward_model_keeps_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is trained whole, saved with the adapter, and in the merged model: PEFT and a plain script score alike."""
    folder = save_tiny_model(tmp_path / "base")
    model = scalar_model(folder, "value_head")
    model.set_reward_statistics(0.25, 1.5)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {"hf.score.weight"}
    adapter = tmp_path / "adapter"
    save_adapter(adapter, model, parameters(model, trained_only=True), tiny_tokenizer())
    own = scores(model)
    with_peft = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1), adapter
    )
    with torch.no_grad():
        torch.testing.assert_close(with_peft(torch.tensor([IDS])).logits[0], own, rtol=1e-4, atol=1e-5)
    words = ["merge-lora", "--lora_path", str(adapter), "--output_path", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "add --is_rm" in capsys.readouterr().err
    assert main([*words, "--is_rm"]) == 0
    merged = load_scalar_model(ModelSource(str(tmp_path / "merged"), torch.float32))
    torch.testing.assert_close(scores(merged), own, rtol=1e-4, atol=1e-5)
    assert (merged.reward_mean, merged.reward_std, merged.value_head_prefix) == (0.25, 1.5, "value_head")
    assert "value_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")


def test_merge_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "base")
    model = adapted(folder)
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(adapter, model, parameters(model, trained_only=True), tiny_tokenizer())
    words = ["merge-lora", "--lora_path", str(adapter), "--model_path", str(folder), "--output_path", str(out)]
    assert main([*words, "--is_rm"]) == 2
    assert "leave --is_rm out" in capsys.readouterr().err
    assert main(words) == 0
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(plain_logprobs(plain), logprobs(model), rtol=1e-4, atol=1e-5)
    assert not hasattr(plain, "peft_config")
    other = save_tiny_model(tmp_path / "other", hidden_size=96)
    assert main([*words[:3], "--model_path", str(other), "--output_path", str(out)]) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert main(["merge-lora", "--lora_path", str(folder), "--output_path", str(out)]) == 2
    assert "is not an adapter" in capsys.readouterr().err
    assert main(["merge-lora", "--lora_path", str(adapter)]) == 2
    assert "--output_path is required" in capsys.readouterr().err


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a LoRA adapter, not a model: merge it into one with togi merge-lora"):
        check_causal_lm(str(tmp_path), flash_attn=False)


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens"])
def test_a_target_that_is_not_there(tmp_path: Path, target: str) -> None:
    folder = save_tiny_model(tmp_path)
    with pytest.raises(ModelError, match=f"--target_modules {target}: LlamaForCausalLM has no such .*k_proj, o_proj"):
        check_causal_lm(str(folder), flash_attn=False, lora=LoRA(4, 16, 0.0, ("q_proj", target), False))


def test_chosen_targets_only(tmp_path: Path) -> None:
    model = adapted(save_tiny_model(tmp_path), LoRA(2, 4, 0.0, ("q_proj", "down_proj"), False))
    layers = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "down_proj"}


def test_four_bits(tmp_path: Path) -> None:
    """The frozen weights are NF4; their merged form is what the model computes with: dequantised, plus the adapter."""
    folder = save_tiny_model(tmp_path / "base")
    model = adapted(folder, IN_4BIT)
    model.eval()
    logprobs(model)  # an evaluation must not change the layout of what is merged below
    model.train()
    stored = {type(p).__name__ for n, p in model.named_parameters() if "base_layer" in n}
    assert stored == {"Params4bit"}

    def full(dtype: torch.dtype | None = None, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        return parameters(model, dtype, trained_only=trained_only)

    tensors = dict(whole_tensors(model, full, torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    missing = plain.load_state_dict(tensors, strict=True)
    assert not missing.missing_keys
    torch.testing.assert_close(plain_logprobs(plain), logprobs(model), rtol=1e-3, atol=1e-3)
    exact = plain_logprobs(AutoModelForCausalLM.from_pretrained(folder))
    assert (logprobs_of_base(model) - exact).abs().max() > 1e-3  # four bits are not thirty-two
    model(one_sequence(), Needs(logprobs=True)).logprobs_K.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
