"""Merge an adapter of any PEFT kind into its base model. PEFT does the merge, in float32, and ``check_equal`` the result.

An adapter may hold the whole embedding or head (``modules_to_save``), with other values or more rows than the base has. If the
head then differs from the embedding, both are written, and config.json says that they are not tied.

Two forms of a model are compared by their outputs for a few tokens.
The adapter beside its base is compared with the merged model, and the merged model with the files written. So a loss on the way,
such as a head that is taken for the embedding, raises an error and does not yield a bad model.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from togi.config.model_facts import position_limit
from togi.config.shared import ADAPTER_CONFIG
from togi.errors import ModelError
from togi.model.adapters import ADAPTER, ADAPTER_WEIGHTS, HEAD_RECORD, adapter_name, merged
from togi.model.checkpoint import save_hf
from togi.model.deferred import quiet
from togi.model.loading import auto_class, check_complete, head_renames, read_config
from togi.model.policy import HEAD, PolicyModel, ScalarModel

PROBE_TOKENS = 32
# Both models have the same rounded weights.
READ_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
# One model has float32 weights, the other the same weights rounded.
ROUNDED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def probe(hf: PreTrainedModel) -> Tensor:
    """Token ids [1, length] spread over the vocabulary. Its last ids are among them, since added tokens are at its end."""
    rows = int(hf.get_input_embeddings().weight.shape[0])
    length = min(PROBE_TOKENS, position_limit(hf.config.to_dict()) or PROBE_TOKENS)
    spread = (torch.arange(length) * 7919 + 13) % rows
    last = min(length, rows) // 4
    return torch.cat([spread[: length - last], torch.arange(rows - last, rows)])[None]


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits in float32, or the score of a model with a scalar head."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def check_equal(one: Tensor, other: Tensor, tolerance: float, this: str, that: str) -> None:
    """Raise ModelError if the norm of the difference exceeds ``tolerance`` times the norm of ``one``."""
    same = one.shape == other.shape
    gap = float((one - other).norm() / one.norm()) if same else float("inf")
    if not gap <= tolerance:
        raise ModelError(
            f"{this} and {that} give other outputs (difference {gap:.2g}, at most {tolerance:g} is rounding): this adapter "
            "cannot be merged, and nothing was written."
        )


def save_proven(
    directory: Path,
    model: PolicyModel | ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
) -> None:
    """Write a model, an adapter merged into it (``save_hf``), and check the files against it. Raises ModelError.

    The model is unusable afterwards.
    """
    tensors: Iterable[tuple[str, Tensor]] = model.named_parameters()
    tolerance = READ_TOLERANCE[dtype]
    if model.is_adapted:
        tensors, tolerance = merged(model, tensors, dtype), ROUNDED_TOLERANCE[dtype]
    save_hf(directory, model, tensors, tokenizer, dtype)
    if model.is_adapted:
        # plain Transformers calls follow, which pass no segment table to Togi's attention
        model.hf.set_attn_implementation("sdpa" if model.hf._supports_sdpa else "eager")
    else:
        # round the weights as the files have them
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    tokens = probe(model.hf)
    expected = outputs(model.hf.eval(), tokens)
    more: dict[str, object] = {}
    if isinstance(model, ScalarModel):
        more = {"num_labels": 1, "key_mapping": head_renames(model.value_head_prefix)}
    model.to("meta")  # free its weights: two large models need not be in memory at once
    with quiet():
        hf, info = auto_class(scalar=bool(more)).from_pretrained(
            directory, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **more
        )
    check_complete(str(directory), info["missing_keys"])
    check_equal(expected, outputs(hf.eval(), tokens), tolerance, "the merged model", "its files")


SCALAR_TASK = "SEQ_CLS"
GENERATION = "generation_config.json"
MERGED_TOLERANCE = 1e-3
_PREFIX = "base_model.model."
_SIZES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


def load_merged(adapter: str, base: str, *, scalar: bool, trust_remote_code: bool = False) -> PolicyModel | ScalarModel:
    """The base model with the adapter merged into its weights, in float32.

    Raises ModelError if the folder has no adapter, if the adapter is for the other kind of model than ``scalar`` says, lacks the
    scalar head, or has layers or sizes that the base lacks, and if the merged model gives other outputs than the adapter beside
    the base.
    """
    record, shapes = _record(adapter), _shapes(adapter)
    # the kind of model, from the record and the names of the tensors
    is_scalar = record.get("task_type") == SCALAR_TASK or adapter_name(f"{HEAD}.weight") in shapes
    if is_scalar != scalar:
        advice = "add --is_rm" if is_scalar else "leave --is_rm out"
        raise ModelError(f"the adapter {adapter} is of a {'scalar' if is_scalar else 'language'} model: {advice}.")
    if scalar and adapter_name(f"{HEAD}.weight") not in shapes:
        raise ModelError(f"the adapter {adapter} has no {HEAD} head, and a new one would be random: train it again.")
    # the base in float32, so that the merge is rounded only once, when it is written
    config = read_config(base, trust_remote_code)
    if scalar:
        config.num_labels = 1
    with quiet():
        model, info = auto_class(scalar=scalar).from_pretrained(
            base, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    check_complete(base, info["missing_keys"], {f"{HEAD}.weight"} if scalar else frozenset())
    _grow(model, adapter, base, shapes)
    hf = _merge(model, adapter, base, shapes)
    if not scalar:
        policy, generation = PolicyModel(hf), Path(adapter) / GENERATION
        # the end tokens of the adapter's generation config, added to those of the model
        ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
        if ends is not None:
            policy.end_answers_with(ends if isinstance(ends, list) else [ends])
        return policy
    # a scalar model also gets the name of its head and the reward statistics
    file = Path(adapter) / HEAD_RECORD
    # an adapter that PEFT wrote has no such file
    head = json.loads(file.read_text(encoding="utf-8") if file.is_file() else "{}")
    result = ScalarModel(hf, head.get("value_head_prefix", HEAD))
    hf.config.value_head_prefix = result.value_head_prefix
    if "mean" in head:
        result.set_reward_statistics(head["mean"], head["std"])
    return result


def named_base(adapter: str) -> str:
    """The base that the adapter names. Raises ModelError if it names none, or a folder that does not exist."""
    path = _record(adapter).get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise ModelError(f"the adapter {adapter} does not name its base model: give it as --model_path.")
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"the adapter {adapter} was trained beside {path}, which is not there: give the base as --model_path."
        )
    return path


def _merge(model: PreTrainedModel, adapter: str, path: str, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """The merged model. Raises ModelError unless it gives the same outputs as the adapter beside the base."""
    is_tied = bool(model.config.get_text_config().tie_word_embeddings)
    _part_head(model, shapes)
    with warnings.catch_warnings():
        # PEFT warns of tied weights, which _part_head and _settle_head handle
        warnings.simplefilter("ignore")
        try:
            beside = PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(f"the adapter {adapter} does not fit the model {path}: {_reason(error)}.") from error
        _check_names(beside, adapter, path, shapes)
        tokens = probe(model)
        before = outputs(beside.eval(), tokens)
        try:
            hf: PreTrainedModel = beside.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            if "NaN" in str(error):
                raise ModelError(
                    f"the adapter {adapter} has weights that are not numbers (NaN): train it again."
                ) from error
            kind = beside.peft_config[ADAPTER].peft_type.value
            raise ModelError(
                f"the adapter {adapter} is of the kind {kind}, which PEFT cannot merge ({_reason(error)}): use it with PEFT."
            ) from error
    _settle_head(hf, is_tied=is_tied)
    check_equal(
        before, outputs(hf, tokens), MERGED_TOLERANCE, f"the adapter {adapter} beside {path}", "the merged model"
    )
    return hf


def _part_head(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a tied head its own copy if the embedding or the head is adapted: a merge in place would change both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = tuple(f"{_PREFIX}{name}.lora_" for name, part in model.named_modules() if part is head or part is embedding)
    if any(name.startswith(names) for name in shapes):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _settle_head(hf: PreTrainedModel, *, is_tied: bool) -> None:
    """Set in the configuration whether embedding and head are tied after the merge. ``is_tied``: whether they were before.

    Saving and loading follow the configuration: a tied head is not written.
    """
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if not is_tied or head is None:
        return
    ours, theirs = head.weight, embedding.weight
    is_one = ours.shape == theirs.shape and torch.equal(ours, theirs)
    if is_one:
        head.weight = theirs
    else:
        name = next(name for name, part in hf.named_modules() if part is head)
        # no longer tied: take the head off Transformers' list, and give it memory of its own
        hf.all_tied_weights_keys.pop(f"{name}.weight", None)
        if ours is theirs or ours.data_ptr() == theirs.data_ptr():
            head.weight = torch.nn.Parameter(ours.detach().clone())
    for config in (hf.config, hf.config.get_text_config()):
        config.tie_word_embeddings = is_one


def _grow(model: PreTrainedModel, adapter: str, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Resize the base's embedding to the rows that it had in training, if the adapter holds the whole embedding."""
    parts = {part: name for name, part in model.named_modules()}
    ends = [parts[part] for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    held = {name: [shape[0] for full, shape in shapes.items() if _is_whole(full, name)] for name in ends}
    rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = {size for sizes in held.values() for size in sizes} | _low_rank_rows(ends, shapes)
    if wanted <= {rows}:
        return
    # low-rank matrices alone cannot give the rows that were added
    if len(wanted) > 1 or not all(held.values()):
        raise ModelError(
            f"the adapter {adapter} was trained beside an embedding of {max(wanted - {rows})} rows and does not hold all of them, "
            f"and the model {path} has {rows}: give the model with the added tokens as --model_path."
        )
    model.resize_token_embeddings(wanted.pop(), mean_resizing=False)


def _is_whole(full: str, name: str) -> bool:
    """Whether a tensor of the adapter is the whole weight of the module ``name``."""
    plain = full.removeprefix(_PREFIX)
    for inner in (".modules_to_save", ".original_module", ".base_layer"):
        plain = plain.replace(inner, "")
    return plain == f"{name}.weight"


def _low_rank_rows(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The numbers of rows that the low-rank matrices of the embedding (A: [rank, rows]) and the head (B: [rows, rank]) fit."""
    embedding, *head = names
    rows = {shape[1] for full, shape in shapes.items() if full == f"{_PREFIX}{embedding}.lora_embedding_A"}
    return rows | {shape[0] for full, shape in shapes.items() if head and full == f"{_PREFIX}{head[0]}.lora_B.weight"}


def _check_names(beside: PeftModel, adapter: str, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the adapter's tensors and the places in the model match one to one. PEFT silently skips both."""
    inside = f".{ADAPTER}"
    places = {name.replace(f"{inside}.", ".").removesuffix(inside) for name in beside.state_dict()}
    needed = set(get_peft_model_state_dict(beside, save_embedding_layers=False))
    strange = sorted(name for name in shapes.keys() - needed if name not in places)
    lacking = sorted(needed - shapes.keys())
    if strange or lacking:
        what = f"the model has no place for {strange[0]}" if strange else f"the adapter has no {lacking[0]}"
        raise ModelError(f"the adapter {adapter} does not fit the model {path}: {what.replace(_PREFIX, '')}.")


def _reason(error: Exception) -> str:
    """The first line of an error, or the sizes that differ in it, without a full stop."""
    sizes = _SIZES.search(str(error))
    if sizes is None:
        return str(error).splitlines()[0].rstrip(".:")
    name, theirs, ours = sizes.groups()
    name = name.removeprefix(_PREFIX).replace(f".{ADAPTER}.", ".")
    return f"{name} is {theirs} in the adapter and {ours} for this model"


def _record(adapter: str) -> dict[str, object]:
    try:
        record = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--lora_path {adapter} is not an adapter: its {ADAPTER_CONFIG} cannot be read.") from error
    if not isinstance(record, dict):
        raise ModelError(f"--lora_path {adapter} is not an adapter: its {ADAPTER_CONFIG} holds no settings.")
    return record


def _shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    path = Path(adapter) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ModelError(f"--lora_path {adapter} has no {ADAPTER_WEIGHTS}: save the adapter in safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read ({error}): copy or download it again, whole.") from error
