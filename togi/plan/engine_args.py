"""``--vllm_args``: more arguments of vLLM's engine, checked against the installed vLLM without importing it.

Its ``EngineArgs`` is read from the source, as an import takes seconds.
"""

import ast
import difflib
import re
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
STRUCTURE = re.compile(
    r"_|(data|pipeline|prefill_context|decode_context)_parallel_|master_|nnodes|node_rank|device_ids|runner|convert|tokenizer"
    r"|model_weights|hf_config_path|worker_|scheduler_cls|enable_elastic_ep|enable_dbo|.*lora"
)
"""The arguments for other processes, devices, tokens, outputs or adapters than those that Togi arranges."""
KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "null"}


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
    """Raise ConfigError for arguments that Togi sets or arranges itself, or that the installed vLLM does not have, and for
    values of another type than its own.
    """
    for name, value in extra_arguments(words).items():
        if name in OWN_ARGUMENTS:
            flag = OWN_ARGUMENTS[name]
            way_out = f"use --{flag}" if flag else "leave it out"
            raise ConfigError(f"--vllm_args {name} is set by Togi itself: {way_out}.")
        if name not in engine_fields():
            near = difflib.get_close_matches(name, engine_fields(), n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise ConfigError(f"--vllm_args {name} is not an argument of the installed vLLM's engine: {hint}")
        if STRUCTURE.match(name):
            raise ConfigError(
                f"--vllm_args {name} changes processes, devices, tokens, outputs or adapters, which Togi arranges itself: leave "
                "it out."
            )
        types = engine_fields()[name].split(" | ")
        if not any(_takes(kind, value) for kind in types):
            wanted = " or ".join(filter(None, map(_in_words, types)))
            way_out = (
                f"must be {wanted}." if wanted not in ("", "null") else "takes more than a single value: leave it out."
            )
            raise ConfigError(f"--vllm_args {name}={value}: {way_out}")


def _takes(kind: str, value: Scalar) -> bool:
    """Whether a value is of a type as vLLM writes it. Of vLLM's own words and enumerations it is left to vLLM which."""
    if kind in KINDS:
        return type(value).__name__.removesuffix("Type") == kind or (kind == "float" and type(value) is int)
    if kind.startswith("Literal["):
        return value in ast.literal_eval(kind.removeprefix("Literal"))
    return _in_words(kind) != "" and type(value) in (str, int)


def _in_words(kind: str) -> str:
    """A type for the user; "" for lists, mappings and whole configurations."""
    if kind.startswith("Literal["):
        return " or ".join(map(str, ast.literal_eval(kind.removeprefix("Literal"))))
    is_own = kind.isidentifier() and kind[0].isupper() and not kind.endswith(("Config", "Args"))
    return KINDS.get(kind) or ("a word of vLLM's" if is_own else "")


@cache
def engine_fields() -> Mapping[str, str]:
    """The names of vLLM's ``EngineArgs`` with their types. vLLM must be installed."""
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in _class("engine/arg_utils.py", "EngineArgs").body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def check_head_size(path: str, facts: Mapping[str, object]) -> None:
    """Raise ConfigError if vLLM's attention on CPUs does not take the heads of the model at ``path``, by its config.json."""
    hidden, heads = facts.get("hidden_size"), facts.get("num_attention_heads")
    size = facts.get("head_dim") or (hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None)
    sizes = _head_sizes()
    if size is not None and sizes and size not in sizes:
        raise ConfigError(
            f"--pretrain {path} has attention heads of size {size}, but on a CPU vLLM has only {', '.join(map(str, sizes))}: "
            "generate with Transformers (--rollout_engine transformers; togi infer: --eval_task generate)."
        )


def _head_sizes() -> Sequence[int]:
    for node in ast.walk(_class("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend")):
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            return [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, int)
            ]
    return ()


def _class(file: str, name: str) -> ast.ClassDef:
    """A class of the installed vLLM."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / file
    body = ast.parse(source.read_text(encoding="utf-8")).body
    (made,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    return made
