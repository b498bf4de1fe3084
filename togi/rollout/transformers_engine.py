"""Generation with Hugging Face Transformers alone: no extra package, one model, continuous batching.

Each step first prefills waiting prompts (equal prompts once), then decodes one token for every running sequence. A finished
sequence frees its row at once. Not supported: paged memory, prefix caching between requests, tensor parallelism.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from togi.algo.mismatch import chosen_experts
from togi.cpu import pack_linears
from togi.errors import ConfigError, ModelError
from togi.model.checkpoint import expected_manifest
from togi.model.weights import Bucket
from togi.parallel.process import default_device
from togi.plan.memory import Released, resident_bytes, return_freed
from togi.rollout.engine import EngineSettings
from togi.rollout.sampler import Choice, choose
from togi.rollout.slot_cache import ATTENTION, SlotCache
from togi.rollout.stops import end_token_ids
from togi.rollout.threaded import Finished, ThreadedEngine
from togi.sample import FinishReason, Sampling

PREFILL_TOKENS = 4096
PREFILL_PROMPTS = 32
SCORED_AT_ONCE = 1024
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def start_transformers_engine(settings: EngineSettings) -> ThreadedEngine:
    """Load the model on its own thread and return when it is ready."""
    return ThreadedEngine(partial(TransformersCore, settings), settings)


@dataclass(slots=True, eq=False)
class _Sequence:
    key: int
    prompt: tuple[int, ...]
    sampling: Sampling
    ends: frozenset[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def full_length(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    def choice(self) -> Choice:
        early = len(self.tokens) + 1 < min(self.sampling.min_tokens, self.sampling.max_tokens)
        forbidden = tuple(sorted(self.ends)) if early else ()
        penalty = self.sampling.repetition_penalty
        seen = frozenset() if penalty == 1.0 else frozenset(self.prompt).union(self.tokens)
        return Choice(self.sampling.temperature, self.sampling.top_p, forbidden, self.generator, penalty, seen)

    def finished(self) -> list[Finished]:
        if self.tokens[-1] in self.ends:
            reason = FinishReason.STOP
        elif len(self.tokens) == self.sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return []
        return [Finished(self.key, tuple(self.tokens), tuple(self.logprobs), reason)]


class TransformersCore:
    """``Core`` over one Transformers model. All methods run on one thread.

    The constructor raises ModelError or ConfigError for a model that it cannot run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.expected = expected_manifest(settings.model, settings.dtype, settings.trust_remote_code)
        self._settings = settings
        self._device = default_device(settings.device_index)
        self._ends = end_token_ids(settings.model)
        disable_progress_bar()
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        self._model = self._load(AutoModelForCausalLM, settings.model, config=config)
        self._kind, self._config = type(self._model), self._model.config
        self._masks = Masks.of(config.get_text_config())
        # bytes of the KV cache for one token, over all layers
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token_bytes = 2 * config.num_hidden_layers * heads * head_size * self._model.dtype.itemsize
        self._slots = SlotCache(config.num_hidden_layers)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._arriving: dict[str, Tensor] = {}
        self._waiting: deque[_Sequence] = deque()
        self._rows: list[_Sequence] = []

    def add(self, key: int, prompt: tuple[int, ...], sampling: Sampling) -> None:
        ends = frozenset(sampling.stop_token_ids) if sampling.ignore_eos else self._ends.union(sampling.stop_token_ids)
        generator = self._generator
        if sampling.seed is not None:
            generator = torch.Generator().manual_seed(sampling.seed)
        self._waiting.append(_Sequence(key, prompt, sampling, ends, generator))

    @torch.inference_mode()
    def abort(self, key: int) -> None:
        self._waiting = deque(sequence for sequence in self._waiting if sequence.key != key)
        for row, sequence in enumerate(self._rows):
            if sequence.key == key:
                self._remove(row)
                break

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        done: list[Finished] = []
        if admitted := self._admissible():
            done += self._extend(admitted, self._prefill(admitted))
        if self._rows:
            done += self._extend(self._rows, self._decode())
        return done

    @torch.inference_mode()
    def score(self, tokens: tuple[int, ...]) -> list[float]:
        logits_TV = self._model(**self._whole(tokens)).logits[0, :-1]
        targets_T = torch.tensor(tokens[1:], device=self._device)
        scores: list[float] = []
        # some tokens at a time: the log-probs are float32, often twice the size of the logits
        for start in range(0, len(logits_TV), SCORED_AT_ONCE):
            part_tV = logits_TV[start : start + SCORED_AT_ONCE].float().log_softmax(dim=-1)
            targets_t = targets_T[start : start + len(part_tV)]
            scores += part_tV.gather(1, targets_t[:, None])[:, 0].tolist()
        return scores

    @torch.inference_mode()
    def routes(self, tokens: tuple[int, ...]) -> NDArray[np.int64]:
        config: Any = self._model.config
        logits_TE = self._model.base_model(**self._whole(tokens), output_router_logits=True).router_logits
        return chosen_experts(logits_TE, config.num_experts_per_tok).cpu().numpy()

    def _whole(self, tokens: tuple[int, ...]) -> dict[str, Any]:
        """The model's arguments for one whole sequence, without a cache."""
        positions_1T = torch.arange(len(tokens), device=self._device)[None]
        return {
            "input_ids": torch.tensor([tokens], device=self._device),
            "attention_mask": self._masks.build(positions_1T, len(tokens)),
            "position_ids": positions_1T,
            "use_cache": False,
        }

    def begin_update(self) -> None:
        self._arriving = {}

    def load(self, bucket: Bucket) -> None:
        self.load_tensors(bucket.own().unpack())

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._arriving.update(tensors)

    def finish_update(self) -> None:
        """Load the tensors like a checkpoint, because in memory they may have another form (all experts in one tensor)."""
        del self._model  # old and new weights must not both be in memory; no request runs before this succeeds
        self._model = self._load(self._kind, None, config=self._config, state_dict=self._arriving)
        self._arriving = {}

    def sleep(self) -> Released:
        before = resident_bytes()
        self._slots.clear()
        return_freed()
        return Released(0, before, resident_bytes())

    def wake(self) -> None:
        """Do nothing: the cache is allocated when tokens arrive."""

    def close(self) -> None:
        self._slots.clear()

    def _load(self, kind: Any, folder: str | None, **arguments: Any) -> PreTrainedModel:
        try:
            model, info = kind.from_pretrained(
                folder,
                dtype=getattr(torch, self._settings.dtype),
                attn_implementation="sdpa",
                trust_remote_code=self._settings.trust_remote_code,
                output_loading_info=True,
                **arguments,
            )
        except ValueError as error:  # an architecture without an attention interface, such as BLOOM
            reason = str(error).splitlines()[0]
            raise ModelError(f"the Transformers engine cannot generate with {folder!r}: {reason}") from error
        if info["missing_keys"]:
            raise ModelError(f"the checkpoint {folder!r} lacks {', '.join(sorted(info['missing_keys'])[:5])}")
        model.set_attn_implementation(
            ATTENTION
        )  # only now: Transformers refuses models that cannot use SDPA, as ours is
        loaded: PreTrainedModel = model.requires_grad_(False).eval().to(self._device)
        pack_linears(loaded)
        return loaded

    def _admissible(self) -> list[_Sequence]:
        """Take the waiting sequences that fit now, by rows, by memory of the cache (about), and by the size of one prefill."""
        admitted: list[_Sequence] = []
        prompts: set[tuple[int, ...]] = set()
        longest = max((sequence.full_length for sequence in self._rows), default=0)
        width = 0
        while self._waiting and len(self._rows) + len(admitted) < self._settings.max_num_seqs:
            candidate = self._waiting[0]
            rows = len(self._rows) + len(admitted) + 1
            longest = max(longest, candidate.full_length)
            # every row has the capacity of the longest; a single sequence always runs
            if rows > 1 and rows * longest * self._token_bytes > self._settings.kv_cache_gb * 2**30:
                break
            width = max(width, len(candidate.prompt))
            # equal prompts are prefilled once
            distinct = len(prompts | {candidate.prompt})
            if admitted and (distinct > PREFILL_PROMPTS or distinct * width > PREFILL_TOKENS):
                break
            prompts.add(candidate.prompt)
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, sequences: list[_Sequence]) -> Tensor:
        """Read the prompts into new rows of the cache. Returns the logits after each prompt, [N, V]."""
        # each distinct prompt once, padded on the right
        prompts = list(dict.fromkeys(sequence.prompt for sequence in sequences))
        width = max(len(prompt) for prompt in prompts)
        ids_UP = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self._device)
        sources = [prompts.index(sequence.prompt) for sequence in sequences]
        self._slots.prefill(len(self._rows), sources, width, self._device)
        self._rows.extend(sequences)
        positions_P = torch.arange(width, device=self._device)
        # logits only at the ends of prompts, not at every position
        lasts = sorted({len(prompt) - 1 for prompt in prompts})
        logits_UKV = self._model(
            input_ids=ids_UP,
            attention_mask=self._masks.build(positions_P[None], width),
            position_ids=positions_P.expand(len(prompts), -1),
            past_key_values=self._slots.cache,
            logits_to_keep=torch.tensor(lasts, device=self._device),
        ).logits
        after_NV: Tensor = logits_UKV[sources, [lasts.index(len(sequence.prompt) - 1) for sequence in sequences]]
        return after_NV

    def _decode(self) -> Tensor:
        """Read the newest token of every row. Returns the logits after it, [N, V]."""
        ids_N1 = torch.tensor([[sequence.tokens[-1]] for sequence in self._rows], device=self._device)
        places = [len(sequence.prompt) + len(sequence.tokens) - 1 for sequence in self._rows]
        positions_N = torch.tensor(places, device=self._device)
        self._slots.decode(positions_N)
        logits_N1V: Tensor = self._model(
            input_ids=ids_N1,
            attention_mask=self._masks.build(positions_N[:, None], self._slots.length),
            position_ids=positions_N[:, None],
            past_key_values=self._slots.cache,
        ).logits
        return logits_N1V[:, -1]

    def _extend(self, sequences: list[_Sequence], logits_NV: Tensor) -> list[Finished]:
        """Sample the next token of each sequence. Removes and returns the sequences that have ended."""
        tokens_N, logprobs_N = choose(logits_NV, [sequence.choice() for sequence in sequences])
        for sequence, token, logprob in zip(sequences, tokens_N.tolist(), logprobs_N.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        done: list[Finished] = []
        # from the end: removing a row moves the last one into its place
        for row in reversed(range(len(self._rows))):
            if ended := self._rows[row].finished():
                done += ended
                self._remove(row)
        return done

    def _remove(self, row: int) -> None:
        last = self._rows.pop()
        if row < len(self._rows):
            self._slots.move(len(self._rows), row)
            self._rows[row] = last


@dataclass(frozen=True, slots=True)
class Masks:
    """Which keys a query may see. ``window`` 0 is no window; ``mixed`` models need one mask for each kind of layer."""

    window: int
    mixed: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Masks:
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - KNOWN_LAYERS:
            raise ConfigError(
                f"--rollout_engine transformers cannot run layers of kind {', '.join(sorted(kinds - KNOWN_LAYERS))}: "
                "use --rollout_engine vllm"
            )
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise ConfigError("--rollout_engine transformers cannot cap attention logits: use --rollout_engine vllm")
        window = getattr(config, "sliding_window", None) or 0
        if kinds and "sliding_attention" not in kinds:
            return cls(0, mixed=False)
        return cls(window, mixed=bool(kinds))

    def build(self, positions_NQ: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """True where a query at ``positions_NQ`` sees one of the first ``length`` keys: bool, [N, 1, Q, length]."""
        behind = positions_NQ[:, None, :, None] - torch.arange(length, device=positions_NQ.device)
        full = behind >= 0
        if self.window == 0:
            return full
        near = full & (behind < self.window)
        return {"full_attention": full, "sliding_attention": near} if self.mixed else near
