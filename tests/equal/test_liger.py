"""``--use_liger_kernel``: Liger's kernels = Transformers' layers, in outputs and gradients, on Triton's interpreter."""

import json
import subprocess
import sys

import pytest
import torch

from tests.tiny import save_tiny_model
from togi.config.architectures import WITH_LIGER
from togi.config.choices import Layers
from togi.errors import ModelError
from togi.model.loading import ModelSource, load_causal_lm


def test_the_kernels_equal_the_layers_they_replace():
    done = subprocess.run(
        [sys.executable, "-m", "tests.equal.liger_job", *WITH_LIGER], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    assert found.keys() == set(WITH_LIGER)
    for arch, gaps in found.items():
        # two layers of two norms and an MLP each, and the last norm; Qwen3 has norms of queries and keys too
        assert gaps["layers"] == (11 if arch == "qwen3" else 7), arch
        assert gaps["logprobs"] < 1e-5 and gaps["entropy"] < 1e-5 and gaps["gradients"] < 1e-4, (arch, gaps)


def test_an_architecture_it_was_not_tested_with_is_refused(tmp_path):
    save_tiny_model(tmp_path, arch="mixtral")
    with pytest.raises(ModelError, match="--use_liger_kernel is tested with llama, mistral, qwen2, qwen3 models"):
        load_causal_lm(ModelSource(str(tmp_path), torch.float32, layers=Layers.LIGER))
