"""Model folders: what is read, refused, written, and by which names; and the scalar model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.packs import plain_pack, random_groups, shared_pack
from tests.tiny import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from togi.errors import ModelError
from togi.model import support
from togi.model.attention import VARLEN
from togi.model.checkpoint import expected_manifest, save_hf
from togi.model.loading import ModelSource, check_causal_lm, load_causal_lm, load_scalar_model
from togi.model.policy import Needs, PolicyModel, checkpoint_tensors
from togi.model.support import logit_transform, verify_packing
from togi.weights.buckets import TensorSpec, differences

GROUPS = random_groups(3, [(4, [3, 5]), (2, [6])])
TOKENS = torch.tensor([GROUPS[0][0] + GROUPS[0][1][1]])


def load(path: Path, **keywords) -> PolicyModel:
    return load_causal_lm(ModelSource(str(path), torch.float32, **keywords))


def load_scalar(path: Path, **keywords):
    return load_scalar_model(ModelSource(str(path), torch.float32), **keywords)


def save(directory: Path, model, **keywords) -> Path:
    save_hf(directory, model, model.named_parameters(), tiny_tokenizer(), dtype=torch.float32, **keywords)
    return directory


@pytest.mark.parametrize(
    ("arch", "overrides"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma", {}), ("mixtral", {})]
)
def test_round_trip_loads_with_plain_transformers(tmp_path, arch, overrides):
    source = save_tiny_model(tmp_path / "source", arch, **overrides)
    model = load(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    saved = save(tmp_path / "saved", model, shard_bytes=50_000 if arch == "mixtral" else 10**9)
    again = AutoModelForCausalLM.from_pretrained(saved)
    model.hf.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.hf(TOKENS).logits)
    assert again.generation_config.eos_token_id == model.hf.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(saved).chat_template == tiny_tokenizer().chat_template


def test_shards_have_an_index_and_source_names(tmp_path):
    source = save_tiny_model(tmp_path / "source", "mixtral")
    saved = save(tmp_path / "saved", load(source), shard_bytes=200_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    with safe_open(source / "model.safetensors", "pt") as file:
        names = set(file.keys())
        total = sum(file.get_tensor(name).nbytes for name in names)
    assert set(index["weight_map"]) == names
    assert index["metadata"]["total_size"] == total
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) > 2
    assert max(path.stat().st_size for path in saved.glob("*.safetensors")) < 220_000


def test_saved_in_another_dtype(tmp_path):
    model = load(save_tiny_model(tmp_path / "source"))
    save_hf(tmp_path / "saved", model, model.named_parameters(), tiny_tokenizer(), dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.hf.lm_head.weight.bfloat16())
    assert model.hf.config.dtype == torch.float32


@pytest.mark.parametrize("arch", ["llama", "gemma", "qwen3", "mixtral"])
def test_expected_manifest_is_what_is_sent(tmp_path, arch):
    source = save_tiny_model(tmp_path, arch)
    model = load(source)
    for named in (model.named_parameters(), model.state_dict().items()):
        sent = tuple(TensorSpec.of(name, tensor) for name, tensor in checkpoint_tensors(model, named))
        expected = expected_manifest(str(source), "float32")
        assert differences(expected, sent) == []
        assert sent == expected
    with safe_open(source / "model.safetensors", "pt") as file:
        assert sorted(spec.name for spec in expected) == sorted(file.keys())


def test_tied_parameters_count_once(tmp_path):
    untied = load(save_tiny_model(tmp_path / "a"))
    tied = load(save_tiny_model(tmp_path / "b", tie_word_embeddings=True))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (untied, tied)]
    assert counts[0] - counts[1] == 300 * 64


def test_missing_weights_are_refused(tmp_path):
    source = save_tiny_model(tmp_path, tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"has no model\.layers\.2\..* use a complete checkpoint"):
        load(source)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot read a model config"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arch", "overrides", "words"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "caps its attention scores"),
        ("mamba", {"state_size": 4}, "carry a state"),
    ],
)
def test_architectures_that_cannot_be_packed_are_refused_before_weights_are_read(tmp_path, arch, overrides, words):
    tiny_config(arch, **overrides).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "olmo2"])
def test_with_flash_attention_a_model_loads_in_float32_on_the_host(tmp_path, arch):
    """Where every model is loaded, before it goes to its device: one outside the list is tested there."""
    model = load_causal_lm(ModelSource(str(save_tiny_model(tmp_path, arch)), torch.float32, flash_attn=True))
    assert model.hf.config._attn_implementation == VARLEN
    verify_packing(model)


def test_capped_scores_take_a_package(tmp_path, monkeypatch):
    tiny_config("gemma2", attn_logit_softcapping=50.0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pip install flash-attn"):
        check_causal_lm(str(tmp_path), flash_attn=True)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    check_causal_lm(str(tmp_path), flash_attn=True)
    with pytest.raises(ModelError, match="pip install flash-attn"):
        check_causal_lm(str(tmp_path), flash_attn=False)


@pytest.mark.parametrize("arch", ["granite", "cohere", "olmo2", "phi3"])
def test_an_architecture_not_in_the_list_is_tested_when_loaded(tmp_path, arch):
    extra = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}.get(arch, {})
    model = load(save_tiny_model(tmp_path, arch, **extra))
    assert model.transform.scale == (0.25 if extra else 1.0)


def test_the_test_at_loading_sees_a_wrong_head_and_a_leak():
    hf = tiny_model("llama")
    hf.set_attn_implementation("togi_segments")
    verify_packing(PolicyModel(hf))
    hf.config.logit_scale = 3.0
    with pytest.raises(ModelError, match="other results packed than alone"):
        verify_packing(PolicyModel(hf, logit_transform(hf.config)))
    hf.config.logit_scale = None
    hf.set_attn_implementation("sdpa")  # stands for a model that ignores the segment table
    with pytest.raises(ModelError, match="other results packed than alone"):
        verify_packing(PolicyModel(hf))


def test_a_missing_head_is_an_error_unless_a_new_one_is_wanted(tmp_path):
    source = save_tiny_model(tmp_path, hidden_size=64)
    with pytest.raises(ModelError, match=r"has no score\.weight, which would be random"):
        load_scalar(source)
    torch.manual_seed(0)
    head = load_scalar(source, init_head=True).hf.score.weight
    assert head.shape == (1, 64)
    assert 0.7 / 65 < float(head.detach().std()) < 1.3 / 65


def test_scores_equal_sequence_classification(tmp_path):
    model = load_scalar(save_tiny_model(tmp_path / "source"), init_head=True)
    model.set_reward_statistics(0.5, 2.0)
    saved = save(tmp_path / "saved", model)
    plain = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    again = load_scalar(saved)
    assert (again.reward_mean, again.reward_std) == (0.5, 2.0)
    with torch.no_grad():
        expected = torch.stack([plain(torch.tensor([p + r])).logits[0, 0] for p, rs in GROUPS for r in rs])
        for layout in (plain_pack, shared_pack):
            scores_N = again(layout(GROUPS), Needs(scores=True)).scores_N
            torch.testing.assert_close(scores_N, expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_another_name_is_kept(tmp_path):
    model = load_scalar(save_tiny_model(tmp_path / "source"), init_head=True, value_head_prefix="value_head")
    saved = save(tmp_path / "saved", model)
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert "value_head.weight" in file.keys()  # noqa: SIM118
        assert "score.weight" not in file.keys()  # noqa: SIM118
    again = load_scalar(saved)  # config.json says value_head, which wins over the default
    assert again.value_head_prefix == "value_head"
    assert torch.equal(again.hf.score.weight, model.hf.score.weight)
    twice = save(tmp_path / "twice", again)
    with safe_open(twice / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("value_head.weight"), model.hf.score.weight)


def test_values_are_of_the_state_in_which_a_token_is_chosen(tmp_path):
    model = load_scalar(save_tiny_model(tmp_path), init_head=True)
    prompt, responses = GROUPS[0]
    with torch.no_grad():
        shared = model(shared_pack([(prompt, responses)]), Needs(values=True)).values_K
        expected = []
        for response in responses:
            states = model.hf.base_model(
                input_ids=torch.tensor([prompt + response]), segments=plain_pack([(prompt, [response])]).segments
            ).last_hidden_state[0]
            expected.append(model.hf.score(states)[len(prompt) - 1 : -1, 0])
    torch.testing.assert_close(shared, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_last_tokens_by_hand():
    # plain: 4+3 and 4+5 and 2+6; shared: 4, 3, 5, 2, 6
    assert plain_pack(GROUPS).last_tokens_N().tolist() == [6, 15, 23]
    assert shared_pack(GROUPS).last_tokens_N().tolist() == [6, 11, 19]
