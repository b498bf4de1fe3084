"""Generation with Hugging Face Transformers alone: no extra package, one model, continuous batching.

Each step first prefills waiting prompts (equal prompts once), then decodes one token for every running sequence. A finished
sequence frees its row at once. Not supported: paged memory, prefix caching between requests, tensor parallelism.

A key/value cache with a row for every running sequence, filled from position 0 without left padding.

Shape letters: N rows in use, H key/value heads, G query heads, C capacity in tokens, Q new tokens, L keys, D head size.

The last row replaces a finished one. So the rows in use are always the first ones, and a decode step is one plain batch. The
layers plug into Transformers' ``Cache``. The caller makes masks and positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils.logging import disable_progress_bar

from togi.algo.policy import chosen_experts
from togi.cpu import pack_linears
from togi.device import default_device
from togi.errors import ConfigError, ModelError
from togi.model.checkpoint import expected_manifest
from togi.plan.machine import Released, resident_bytes, return_freed
from togi.rollout.engine import EngineSettings, Parts, end_token_ids
from togi.rollout.sampler import Choice, choose
from togi.sample import FinishReason, Generation, Sampling
from togi.weights.buckets import Bucket

ATTENTION = "togi_slots"
ROW_STEP = 16
TOKEN_STEP = 64
KEY_STEP = 32
"""Attention is over a multiple of this many keys. On a CPU, float32 sums round differently with another number of masked keys, and
the results of a sequence would depend on the other sequences.
"""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [N, H, C, D] each. Allocated and grown when tokens arrive."""

    is_sliding = False

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self._slots = slots
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values ([n, H, Q, D] each) in their rows. Returns the keys and values for attention to read."""
        slots, new = self._slots, (key_states, value_states)
        self._fit(new)
        if slots.prefilling:
            # prompts attend only to themselves: the cache is written, not read
            for buffer, states in zip(self.buffers, new, strict=True):
                buffer[slots.rows, :, : states.shape[2]] = states[slots.sources]
            return key_states, value_states
        # decode: one new token for each row, then attention over the rows and keys in use
        count, length = len(slots.rows), slots.length
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[slots.rows, :, slots.positions] = states[:, :, 0]
        keys, values = self.buffers
        return keys[:count, :, :length], values[:count, :, :length]

    def _fit(self, new: tuple[Tensor, Tensor]) -> None:
        rows, capacity = self._slots.size
        if self.buffers and (self.buffers[0].shape[0], self.buffers[0].shape[2]) == (rows, capacity):
            return
        old, self.buffers = self.buffers, []
        for i, states in enumerate(new):
            # zeros, not empty: masked values are multiplied by a softmax weight of 0, and 0 x NaN is NaN
            buffer = states.new_zeros(rows, states.shape[1], capacity, states.shape[3])
            if old:
                kept_rows, kept = min(rows, old[i].shape[0]), min(capacity, old[i].shape[2])
                buffer[:kept_rows, :, :kept] = old[i][:kept_rows, :, :kept]
            self.buffers.append(buffer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self._slots.prefilling else (self._slots.length, 0)

    def get_seq_length(self) -> int:
        return 0 if self._slots.prefilling else self._slots.length - 1

    def get_max_length(self) -> int:
        return -1


class SlotCache:
    """The cache layers of a model, and the rows and positions of the tokens of the next forward."""

    def __init__(self, num_layers: int) -> None:
        self._layers = [SlotLayer(self) for _ in range(num_layers)]
        self.cache = Cache(layers=self._layers)
        self.clear()

    def clear(self) -> None:
        """Free all memory."""
        for layer in self._layers:
            layer.buffers = []
        self.size = (0, 0)
        self.prefilling = True
        self.length = 0
        self.rows = self.sources = self.positions = torch.empty(0, dtype=torch.int64)

    def prefill(self, first_row: int, sources: list[int], width: int, device: torch.device) -> None:
        """Prepare a forward that reads prompts from their start, padded on the right to ``width`` tokens.

        Row ``first_row + i`` gets the states of prompt ``sources[i]``, so rows may share a prompt.
        """
        self.prefilling = True
        self.rows = torch.arange(first_row, first_row + len(sources), device=device)
        self.sources = torch.tensor(sources, device=device)
        self.length = max(width, self.length if first_row > 0 else 0)
        self._reserve(first_row + len(sources))

    def decode(self, positions_N: Tensor) -> None:
        """Prepare a forward that reads one token for each row in use, at these positions (0-based)."""
        self.prefilling = False
        self.rows = torch.arange(len(positions_N), device=positions_N.device)
        self.positions = positions_N
        self.length = _round_up(int(positions_N.max()) + 1, KEY_STEP)
        self._reserve(len(positions_N))

    def move(self, source: int, target: int) -> None:
        """Copy row ``source`` over row ``target``."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[target] = buffer[source]

    def _reserve(self, rows: int) -> None:
        if rows > self.size[0] or self.length > self.size[1]:
            self.size = (_round_up(rows, ROW_STEP), _round_up(self.length, TOKEN_STEP))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _grouped_attention(
    module: nn.Module,
    query_NGQD: Tensor,
    key_NHLD: Tensor,
    value_NHLD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """SDPA in which G query heads share H key heads. With a mask Transformers' own function would copy the cache G/H times.

    In a decode step (Q = 1) the query heads that share a key head become query positions.
    """
    heads = query_NGQD.shape[1]
    if query_NGQD.shape[2] == 1:
        query_NHgD = query_NGQD.view(len(query_NGQD), key_NHLD.shape[1], -1, query_NGQD.shape[3])
        out_NHgD = scaled_dot_product_attention(
            query_NHgD, key_NHLD, value_NHLD, attn_mask=attention_mask, scale=scaling
        )
        return out_NHgD.reshape(len(query_NGQD), 1, heads, -1), None
    # prefill: pad queries and keys to multiples of KEY_STEP, masked
    queries, keys = query_NGQD.shape[2], key_NHLD.shape[2]
    more_queries, more_keys = (_round_up(tokens, KEY_STEP) - tokens for tokens in (queries, keys))
    out_NGQD = scaled_dot_product_attention(
        pad(query_NGQD, (0, 0, 0, more_queries)),
        pad(key_NHLD, (0, 0, 0, more_keys)),
        pad(value_NHLD, (0, 0, 0, more_keys)),
        attn_mask=pad(attention_mask, (0, more_keys, 0, more_queries), value=False),
        scale=scaling,
        enable_gqa=True,
    )
    return out_NGQD[:, :, :queries].transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _grouped_attention)


PREFILL_TOKENS = 4096
MOST_SEQUENCES = 128
PREFILL_PROMPTS = 32
SCORED_AT_ONCE = 1024
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(slots=True, eq=False)
class _Sequence:
    key: int
    prompt: tuple[int, ...]
    sampling: Sampling
    ends: frozenset[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def read(self) -> tuple[int, ...]:
        """What is prefilled: the prompt, and after an update that computes keys and values again the tokens so far too."""
        return (*self.prompt, *self.tokens)

    @property
    def full_length(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    def choice(self) -> Choice:
        early = len(self.tokens) + 1 < min(self.sampling.min_tokens, self.sampling.max_tokens)
        forbidden = tuple(sorted(self.ends)) if early else ()
        penalty = self.sampling.repetition_penalty
        seen = frozenset() if penalty == 1.0 else frozenset(self.prompt).union(self.tokens)
        return Choice(self.sampling.temperature, self.sampling.top_p, forbidden, self.generator, penalty, seen)

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.tokens[-1] in self.ends:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) == self.sampling.max_tokens else None


class TransformersCore:
    """``Core`` over one Transformers model. All methods run on one thread.

    The constructor raises ModelError or ConfigError for a model that it cannot run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.expected = expected_manifest(settings.model, settings.dtype, settings.trust_remote_code)
        self._settings = settings
        self.parts: Parts | None = None
        self.facts: Mapping[str, str | bool] = {"transformers": __version__}
        self._most_sequences = settings.max_num_seqs or MOST_SEQUENCES
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
        self._version = 0

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
    def step(self) -> dict[int, Generation]:
        done: dict[int, Generation] = {}
        if admitted := self._admissible():
            done |= self._extend(admitted, self._prefill(admitted))
        if self._rows:
            done |= self._extend(self._rows, self._decode())
        return done

    def hold(self) -> dict[int, Generation]:
        return {}  # nothing is in flight between two steps

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
        logits_TE = self._model.base_model(**self._whole(tokens), output_router_logits=True).router_logits
        return chosen_experts(logits_TE, self._model.config.num_experts_per_tok).cpu().numpy()

    def _whole(self, tokens: tuple[int, ...]) -> dict[str, object]:
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

    def finish_update(self, version: int) -> None:
        """Load the tensors like a checkpoint, because in memory they may have another form (all experts in one tensor)."""
        if self._settings.recompute_kv or not self._rows:
            self._slots.clear()
            self._waiting.extendleft(reversed(self._rows))
            self._rows = []
        self._drop_model()  # old and new weights must not both be in memory; no request runs before this succeeds
        self._model = self._load(self._kind, None, config=self._config, state_dict=self._arriving)
        self._arriving, self._version = {}, version
        self._return_freed()

    def drop_weights(self) -> None:
        self._slots.clear()
        self._drop_model()

    def _drop_model(self) -> None:
        with suppress(AttributeError):  # dropped before
            del self._model
        self._return_freed()

    def _return_freed(self) -> None:
        if self._device.type == "cpu":  # the trainer uses the same memory, and the C library would keep freed pages
            return_freed()

    def sleep(self, *, keep_weights: bool) -> Released:
        before = resident_bytes()
        self._slots.clear()
        return_freed()
        return Released(0, before, resident_bytes())

    def wake(self) -> None:
        """Do nothing: the cache is allocated when tokens arrive."""

    def close(self) -> None:
        self._slots.clear()

    def _load(self, kind: type[PreTrainedModel], folder: str | None, **arguments: object) -> PreTrainedModel:
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
        # only now: Transformers refuses models that cannot use SDPA, as ours is
        model.set_attn_implementation(ATTENTION)
        loaded: PreTrainedModel = model.requires_grad_(False).eval().to(self._device)
        pack_linears(loaded)
        return loaded

    def _admissible(self) -> list[_Sequence]:
        """Take the waiting sequences that fit now, by rows, by memory of the cache (about), and by the size of one prefill."""
        admitted: list[_Sequence] = []
        prompts: set[tuple[int, ...]] = set()
        longest = max((sequence.full_length for sequence in self._rows), default=0)
        width = 0
        while self._waiting and len(self._rows) + len(admitted) < self._most_sequences:
            candidate = self._waiting[0]
            rows = len(self._rows) + len(admitted) + 1
            longest = max(longest, candidate.full_length)
            # every row has the capacity of the longest; a single sequence always runs
            if rows > 1 and rows * longest * self._token_bytes > self._settings.kv_cache_gb * 2**30:
                break
            width = max(width, len(candidate.read))
            # equal prompts are prefilled once
            distinct = len(prompts | {candidate.read})
            if admitted and (distinct > PREFILL_PROMPTS or distinct * width > PREFILL_TOKENS):
                break
            prompts.add(candidate.read)
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, sequences: list[_Sequence]) -> Tensor:
        """Read the prompts into new rows of the cache. Returns the logits after each prompt, [N, V]."""
        # each distinct prompt once, padded on the right
        prompts = list(dict.fromkeys(sequence.read for sequence in sequences))
        width = max(len(prompt) for prompt in prompts)
        ids_UP = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self._device)
        sources = [prompts.index(sequence.read) for sequence in sequences]
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
        after_NV: Tensor = logits_UKV[sources, [lasts.index(len(sequence.read) - 1) for sequence in sequences]]
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

    def _extend(self, sequences: list[_Sequence], logits_NV: Tensor) -> dict[int, Generation]:
        """Sample the next token of each sequence. Removes and returns the sequences that have ended."""
        tokens_N, logprobs_N = choose(logits_NV, [sequence.choice() for sequence in sequences])
        for sequence, token, logprob in zip(sequences, tokens_N.tolist(), logprobs_N.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.versions.append(self._version)
        done: dict[int, Generation] = {}
        # from the end: removing a row moves the last one into its place
        for row, sequence in reversed(list(enumerate(self._rows))):
            if (reason := sequence.finish_reason) is not None:
                tokens, versions = tuple(sequence.tokens), tuple(sequence.versions)
                done[sequence.key] = Generation(tokens, tuple(sequence.logprobs), reason, versions)
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
