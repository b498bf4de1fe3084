"""``--vllm_args``: more arguments of vLLM's engine, checked against the installed vLLM without importing it.

Its ``EngineArgs`` is read from the source, as an import takes seconds.
"""

import ast
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from togi.errors import ConfigError

Scalar = str | int | float | bool | None
OWN_ARGUMENTS: Mapping[str, str] = {
    "model": "pretrain",
    "dtype": "bf16",
    "max_model_len": "max_len",
    "seed": "seed",
    "enforce_eager": "enforce_eager",
    "enable_prefix_caching": "enable_prefix_caching",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "kv_cache_memory_bytes": "vllm_cpu_kv_cache_gb",
    "enable_sleep_mode": "vllm_enable_sleep",
    "quantization": "vllm_quantization",
    "kv_cache_dtype": "vllm_kv_cache_dtype",
    "max_num_seqs": "max_num_seqs",
    "trust_remote_code": "trust_remote_code",
    "skip_tokenizer_init": "",
    "logprobs_mode": "",
    "disable_log_stats": "",
    "use_tqdm_on_load": "",
    "distributed_executor_backend": "",
}
"""The arguments that Togi sets, with the flag of each; "" for those that its own code depends on."""


def extra_arguments(words: Sequence[str] | None) -> dict[str, Scalar]:
    """Arguments written as name=value, with the values of YAML scalars. Raises ConfigError for anything else."""
    found: dict[str, Scalar] = {}
    for word in words or ():
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError(f"--vllm_args {word}: write each as name=value, such as max_num_batched_tokens=8192.")
        if name in found:
            raise ConfigError(f"--vllm_args sets {name} twice: leave one of them out.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = [text]
        if not isinstance(value, Scalar):
            raise ConfigError(f"--vllm_args {word}: the value must be a single number, word, true, false or null.")
        found[name] = value
    return found


def check_extra_arguments(words: Sequence[str] | None) -> None:
    """Raise ConfigError for arguments that Togi sets itself, or that the installed vLLM does not have."""
    for name in extra_arguments(words):
        if name in OWN_ARGUMENTS:
            flag = OWN_ARGUMENTS[name]
            way_out = f"use --{flag}" if flag else "leave it out"
            raise ConfigError(f"--vllm_args {name} is set by Togi itself: {way_out}.")
        if name not in engine_fields():
            near = difflib.get_close_matches(name, engine_fields(), n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise ConfigError(f"--vllm_args {name} is not an argument of the installed vLLM's engine: {hint}")


@cache
def engine_fields() -> tuple[str, ...]:
    """The names of vLLM's ``EngineArgs``. vLLM must be installed."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    (made,) = (
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return tuple(
        node.target.id for node in made.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
