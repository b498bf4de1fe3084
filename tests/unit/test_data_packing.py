"""Packs derived by hand, and properties of every split: nothing lost, nothing twice, budgets kept."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from togi.batch import NO_PREFIX, NO_SEQUENCE, NO_SOURCE
from togi.data.packing import PackStats, micro_batches, pack, pack_stats, split_ranks
from togi.sample import Sample


def sample(prompt, response, group="g", mask=None, reward=0.0):
    tokens = np.array([*prompt, *response])
    loss = np.array([False] * len(prompt) + (mask if mask is not None else [True] * len(response)), dtype=bool)
    stream = np.where(loss, tokens / 2, np.nan).astype(np.float32)
    return Sample(tokens, loss, len(prompt), group, {"old": stream}, {"reward": reward})


A = sample([1, 2, 3], [10, 11], "a", reward=1.0)
B = sample([7], [20, 21, 22], "b", mask=[True, False, True], reward=2.0)
C = sample([1, 2, 3], [30], "a", reward=3.0)


def test_plain_layout():
    batch = pack([A, B, C], share_prefix=False)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 7, 20, 21, 22, 1, 2, 3, 30]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.sources_T.tolist() == [NO_SOURCE, 0, 1, 2, 3, NO_SOURCE, 5, 6, 7, NO_SOURCE, 9, 10, 11]
    assert batch.sequences_T.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert batch.targets_K.tolist() == [3, 4, 6, 8, 12]
    assert batch.segments.starts_S == (0, 5, 9)
    assert batch.segments.lengths_S == (5, 4, 4)
    assert batch.segments.is_plain
    assert batch.order_N == (0, 1, 2)
    assert batch.select("old").tolist() == [5.0, 5.5, 10.0, 11.0, 15.0]
    assert batch.streams["old"].dtype == torch.float32
    assert batch.values["reward"].tolist() == [1.0, 2.0, 3.0]
    assert pack_stats(batch) == PackStats(13, 13)


def test_shared_layout():
    batch = pack([A, B, C], share_prefix=True)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 30, 7, 20, 21, 22]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert batch.sources_T.tolist() == [NO_SOURCE, 0, 1, 2, 3, 2, NO_SOURCE, 6, 7, 8]
    assert batch.sequences_T.tolist() == [NO_SEQUENCE] * 3 + [0, 0, 1] + [2] * 4
    assert batch.targets_K.tolist() == [3, 4, 5, 7, 9]
    assert batch.segments.starts_S == (0, 3, 5, 6)
    assert batch.segments.lengths_S == (3, 2, 1, 4)
    assert batch.segments.prefixes_S == (NO_PREFIX, 0, 0, NO_PREFIX)
    assert batch.order_N == (0, 2, 1)
    assert batch.select("old").tolist() == [5.0, 5.5, 15.0, 10.0, 11.0]
    assert batch.values["reward"].tolist() == [1.0, 3.0, 2.0]
    assert batch.tokens_per_sequence_N().tolist() == [2, 1, 2]
    assert pack_stats(batch) == PackStats(10, 13)
    assert pack_stats(batch).saved_share == pytest.approx(3 / 13)
    assert pack_stats(batch) + PackStats(3, 3) == PackStats(13, 16)


def test_only_equal_prompts_of_one_group_are_shared():
    other_group = sample([1, 2, 3], [40], "c")
    other_tokens = sample([1, 2, 4], [50], "a")
    shorter = sample([1, 2], [3, 60], "a")
    batch = pack([A, other_group, other_tokens, shorter], share_prefix=True)
    assert batch.segments.is_plain and batch.num_tokens == 5 + 4 + 4 + 4


def test_a_sample_without_a_response_keeps_its_prompt():
    batch = pack([A, sample([1, 2, 3], [], "a"), C], share_prefix=True)
    assert batch.order_N == (0, 2, 1)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 30, 1, 2, 3]
    assert batch.tokens_per_sequence_N().tolist() == [2, 1, 0]
    assert batch.sequences_T.tolist() == [NO_SEQUENCE] * 3 + [0, 0, 1, 2, 2, 2]


def test_no_prompt():
    batch = pack([Sample(np.array([5, 6]), np.array([False, True]), 0, "x")] * 2, share_prefix=True)
    assert batch.tokens_T.tolist() == [5, 6, 5, 6] and batch.segments.is_plain


def test_loss_on_a_prompt_is_our_mistake():
    with pytest.raises(AssertionError, match="prompt is in the loss"):
        pack([Sample(np.array([5, 6, 7]), np.array([False, True, True]), 2, "x")], share_prefix=False)
    with pytest.raises(AssertionError, match="different streams or values"):
        pack([A, Sample(np.array([5, 6]), np.array([False, True]), 1, "x")], share_prefix=False)


def test_micro_batches_by_hand():
    samples = [A, B, C]  # 5, 4 and 4 tokens; a and c share 3
    both = {"max_sequences": None, "share_prefix": True}
    assert micro_batches(samples, max_tokens=10, **both) == [[0, 1, 2]]
    assert micro_batches(samples, max_tokens=9, **both) == [[0, 2], [1]]
    assert micro_batches(samples, max_tokens=5, **both) == [[0], [1], [2]]
    assert micro_batches(samples, max_tokens=5, whole_groups=True, **both) == [[0, 2], [1]]
    assert micro_batches(samples, max_tokens=2, **both) == [[0], [1], [2]]
    assert micro_batches(samples, max_tokens=9, max_sequences=None, share_prefix=False) == [[0, 2], [1]]
    assert micro_batches(samples, max_tokens=8, max_sequences=None, share_prefix=False) == [[0], [1, 2]]
    assert micro_batches(samples, max_tokens=99, max_sequences=2, share_prefix=True) == [[0, 2], [1]]
    assert micro_batches(samples, max_tokens=99, max_sequences=1, share_prefix=True) == [[0], [1], [2]]
    assert micro_batches([], max_tokens=9, **both) == []


def test_split_ranks_by_hand():
    samples = [A, B, C]
    # Groups of 6 (prompt shared) and 4 tokens, mean 5: dividing {A, C} into 5 and 4 could only give 5 and 8.
    assert split_ranks(samples, 2) == [[0, 2], [1]]
    assert split_ranks(samples, 1) == [[0, 1, 2]]
    assert split_ranks(samples, 3) == [[0], [1], [2]]
    assert split_ranks(samples, 3, whole_groups=True) == [[0, 2], [1], []]
    four = [sample([1], [i], "one") for i in range(4)]
    assert split_ranks(four, 2) == [[0, 1], [2, 3]]
    assert split_ranks(four, 4) == [[0], [1], [2], [3]]
    assert split_ranks(four[:1], 2) == [[0], []]


@st.composite
def sample_lists(draw):
    samples = []
    for group in range(draw(st.integers(1, 5))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
        for length in draw(st.lists(st.integers(0, 8), min_size=1, max_size=5)):
            name = f"g{group % 3}"
            samples.append(sample(prompt, [len(samples) + 100] * length, name, reward=float(len(samples))))
    order = draw(st.permutations(range(len(samples))))
    return [samples[i] for i in order]


@settings(deadline=None, max_examples=80)
@given(sample_lists(), st.integers(1, 30), st.one_of(st.none(), st.integers(1, 6)), st.booleans(), st.booleans())
def test_micro_batches_keep_the_budget_and_lose_nothing(samples, max_tokens, max_sequences, share, whole):
    parts = micro_batches(
        samples, max_tokens=max_tokens, max_sequences=max_sequences, share_prefix=share, whole_groups=whole
    )
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    for part in parts:
        batch = pack([samples[i] for i in part], share_prefix=share)
        groups = {samples[i].group_id for i in part}
        alone = len(part) == 1 or (whole and len(groups) == 1)
        assert alone or batch.num_tokens <= max_tokens
        assert alone or max_sequences is None or len(part) <= max_sequences
    if whole:
        for group in {s.group_id for s in samples}:
            assert sum(any(samples[i].group_id == group for i in part) for part in parts) == 1


@settings(deadline=None, max_examples=80)
@given(sample_lists(), st.integers(1, 6), st.booleans(), st.booleans())
def test_split_ranks_loses_nothing(samples, ranks, share, whole):
    parts = split_ranks(samples, ranks, share_prefix=share, whole_groups=whole)
    assert len(parts) == ranks
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    if not whole and len(samples) >= ranks:
        assert all(parts)


@settings(deadline=None, max_examples=80)
@given(sample_lists())
def test_shared_layout_describes_the_same_sequences(samples):
    shared, plain = pack(samples, share_prefix=True), pack(samples, share_prefix=False)
    assert plain.order_N == tuple(range(len(samples)))
    assert sorted(shared.order_N) == list(plain.order_N)
    assert pack_stats(shared) == PackStats(shared.num_tokens, plain.num_tokens)
    prefixes = set(shared.segments.prefixes_S)
    leaves = [s for s in range(len(shared.segments)) if s not in prefixes]
    for n, leaf in enumerate(leaves):
        original = samples[shared.order_N[n]]
        index = [
            t
            for s in shared.segments.chain(leaf)
            for t in range(shared.segments.starts_S[s], shared.segments.starts_S[s] + shared.segments.lengths_S[s])
        ]
        assert shared.tokens_T[index].tolist() == original.tokens.tolist()
        assert shared.positions_T[index].tolist() == list(range(len(index)))
        assert shared.sources_T[index].tolist() == [NO_SOURCE, *index[:-1]]
        assert torch.isin(torch.tensor(index), shared.targets_K).tolist() == original.loss_mask.tolist()
        assert shared.values["reward"][n] == original.values["reward"]
        own = [t for t in index if shared.sequences_T[t] == n]
        assert own == index[len(index) - len(own) :]
        assert (
            np.isnan(shared.streams["old"][own].numpy()).tolist()
            == np.isnan(original.streams["old"][-len(own) :]).tolist()
        )


def test_large_steps_are_split_fast_and_evenly():
    rng = np.random.default_rng(0)
    samples = []
    for group in range(1024):
        prompt = rng.integers(0, 9, rng.integers(50, 400)).tolist()
        samples += [sample(prompt, [1] * int(rng.integers(1, 1000)), f"g{group}") for _ in range(8)]
    start = time.perf_counter()
    parts = micro_batches(samples, max_tokens=16384, max_sequences=None, share_prefix=True)
    ranks = split_ranks(samples, 8)
    batches = [pack([samples[i] for i in part], share_prefix=True) for part in parts]
    seconds = time.perf_counter() - start
    tokens = sum(batch.num_tokens for batch in batches)
    # Best fit fills the batches: at most 5 % more of them than the tokens need.
    assert len(parts) <= math.ceil(tokens / 16384 * 1.05)
    loads = [pack_stats(pack([samples[i] for i in rank], share_prefix=True)).tokens for rank in ranks]
    assert max(loads) <= 1.01 * min(loads)
    assert all(len({samples[i].group_id for i in rank}) == len(rank) / 8 for rank in ranks)
    assert seconds < 20, seconds  # about 1 s on an idle core
