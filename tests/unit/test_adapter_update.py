"""A LoRA adapter on its way to an engine: names, what is refused, and whole weights that are those a trainer would merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import save_tiny_model
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.config.shared import LoRA
from togi.errors import ConfigError, ModelError, WeightSyncError
from togi.model.adapters import adapter_scale, as_sent, sent_specs
from togi.model.checkpoint import check_base_files, expected_manifest, whole_tensors
from togi.model.loading import ModelSource, load_causal_lm
from togi.model.policy import PolicyModel
from togi.weights import adapters
from togi.weights.adapters import Base, merge
from togi.weights.buckets import Manifest, TensorSpec
from togi.weights.updates import UpdateLog

RL = "--pretrain m --prompt_data d --rollout_batch_size 8 --train_batch_size 8 --remote_rm_url r.py"


def adapted(folder: Path, dtype: torch.dtype, targets: tuple[str, ...]) -> PolicyModel:
    """Adapters in float32 that do something, beside a base in ``dtype``, as in training."""
    model = load_causal_lm(ModelSource(str(folder), dtype, lora=LoRA(4, 12, 0.0, targets, load_in_4bit=False)))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


def sent(model: PolicyModel) -> dict[str, Tensor]:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = dict(as_sent(model, trained, trained.items()))
    shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    assert sent_specs(model, shapes) == tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    return tensors


def test_one_matrix_by_hand() -> None:
    """W + 0.5 B A with A = (1 0) and B = (1 2): the first column grows by 0.5 and 1."""
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
    assert merge(weight, a, b, 0.5).tolist() == [[1.5, 2.0], [4.0, 4.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", ("q_proj", "down_proj")),
        ("qwen3", ("all-linear",)),
        ("gemma", ("all-linear",)),
        ("mixtral", ("v_proj",)),
        ("gpt2", ("all-linear",)),
    ],
    ids=["llama", "qwen3", "gemma", "mixtral", "gpt2"],
)
def test_what_an_engine_makes_is_what_the_trainer_would_send(
    tmp_path: Path, arch: str, targets: tuple[str, ...], dtype: str
) -> None:
    """Bit for bit, in both dtypes, after a detour over another adapter."""
    folder, kind = save_tiny_model(tmp_path, arch=arch), getattr(torch, dtype)
    model = adapted(folder, kind, targets)

    def full(dtype: torch.dtype | None = None, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())

    expected = expected_manifest(str(folder), dtype)
    base, adapter = Base(str(folder), expected), sent(model)
    assert adapter_scale(model) == 3.0
    log = UpdateLog(expected)
    log.begin(Manifest(1, tuple(TensorSpec.of(name, tensor) for name, tensor in adapter.items()), 3.0))
    other = {name: tensor + 1 for name, tensor in adapter.items()}
    assert len(dict(base.with_adapter(other, 3.0))) == len(expected)
    made, merged = dict(base.with_adapter(adapter, 3.0)), dict(whole_tensors(model, full, kind))
    assert made.keys() == merged.keys()
    changed = [name for name, tensor in load_file(folder / "model.safetensors").items() if not same(made, name, tensor)]
    assert len(changed) == len(adapter) // 2
    for name, tensor in merged.items():
        assert torch.equal(made[name], tensor), name


@pytest.mark.parametrize(("gpu", "room", "times"), [(True, True, 1), (True, False, 3), (False, True, 3)])
def test_the_base_is_read_once_where_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, room: bool, times: int
) -> None:
    """Three updates of one engine: the tensors of the files are read once, or each time; the results are the same bits.

    Without a GPU a kept base would be one more model in the memory that holds the models.
    """
    folder = save_tiny_model(tmp_path)
    expected = expected_manifest(str(folder), "bfloat16")
    adapter = sent(adapted(folder, torch.bfloat16, ("all-linear",)))
    reads: list[str] = []

    class Counted:
        def __init__(self, file: Path, framework: str) -> None:
            self._file = safe_open(file, framework=framework)

        def __enter__(self) -> Counted:
            self._opened = self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._opened.keys())

        def get_tensor(self, name: str) -> Tensor:
            reads.append(name)
            return self._opened.get_tensor(name)

    monkeypatch.setattr(adapters, "safe_open", Counted)
    monkeypatch.setattr(adapters, "FREE_SHARE", 0.0 if room else 1.0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    base = Base(str(folder), expected)
    for scale in (1.0, 2.0, 3.0):
        made = {name: tensor.clone() for name, tensor in base.with_adapter(adapter, scale)}
        fresh = dict(Base(str(folder), expected).with_adapter(adapter, scale))
        assert all(torch.equal(made[name], fresh[name]) for name in fresh)
        assert made.keys() == fresh.keys()
    by_base = len(reads) - 3 * len(expected)  # less those of the fresh ones
    assert by_base == times * len(expected)
    assert len(base._kept) == (len(expected) if times == 1 else 0)


def same(made: dict[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name not in made or torch.equal(made[name], tensor.to(made[name].dtype))


def test_what_is_no_adapter_of_the_model() -> None:
    """Each is refused before a byte moves, and the engine keeps what it has."""
    log = UpdateLog((TensorSpec("x.weight", (5, 3), "bfloat16"), TensorSpec("n.weight", (3,), "bfloat16")))
    a, b = TensorSpec("x.lora_A.weight", (2, 3), "float32"), TensorSpec("x.lora_B.weight", (5, 2), "float32")
    wrong = {
        "x.lora_B.weight is missing": (a,),
        r"x.lora_B.weight is float32\[5, 3\], expected float32\[5, 2\]": (a, TensorSpec(b.name, (5, 3), "float32")),
        "y.weight is no matrix of the model": (a, b, TensorSpec("y.lora_A.weight", (2, 3), "float32")),
        "n.weight is no matrix of the model": (TensorSpec("n.lora_A.weight", (2, 3), "float32"),),
        "n.weight is not expected": (a, b, TensorSpec("n.weight", (3,), "bfloat16")),
        "twice": (a, b, a),
    }
    for message, tensors in wrong.items():
        with pytest.raises(WeightSyncError, match=message):
            log.begin(Manifest(1, tensors, 2.0))
    assert not log.open
    log.begin(Manifest(1, (a, b), 2.0))
    assert log.adapter_scale == 2.0


def test_files_with_other_names_are_refused_before_the_run(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    check_base_files(str(folder), "float32", trust_remote_code=False)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"have no tensor called model\.\S+: add --lora_sync merged\.$"):
        check_base_files(str(folder), "float32", trust_remote_code=False)


@pytest.mark.parametrize(
    ("flags", "sends", "problem"),
    [
        ("", False, ""),
        ("--lora_rank 4", True, ""),
        ("--lora_rank 4 --lora_sync adapters", True, ""),
        ("--lora_rank 4 --lora_sync merged", False, ""),
        ("--lora_rank 4 --load_in_4bit", False, ""),
        ("--lora_rank 4 --load_in_4bit --lora_sync merged", False, ""),
        ("--lora_rank 4 --load_in_4bit --lora_sync adapters", False, "--lora_sync adapters with --load_in_4bit"),
        ("--lora_sync merged", False, "--lora_sync merged has no effect without --lora_rank"),
    ],
)
def test_when_the_adapter_alone_is_sent(flags: str, sends: bool, problem: str) -> None:
    config = parse(RLConfig, [*RL.split(), *flags.split()], "rl").config
    assert config.sends_adapter is sends
    if problem:
        with pytest.raises(ConfigError, match=problem):
            check_rl(config, reward_given=False)
    else:
        check_rl(config, reward_given=False)
