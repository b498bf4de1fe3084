"""Packs derived by hand, and properties of every split: nothing lost, nothing twice, budgets kept."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from togi.batch import NO_PREFIX, NO_SOURCE
from togi.data.packing import PackStats, micro_batches, pack, pack_stats, split_ranks
from togi.data.prefix_tree import paths
from togi.sample import Fork, Sample


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
    assert batch.targets_K.tolist() == batch.targets_U.tolist() == [3, 4, 6, 8, 12]
    assert batch.target_sequences_K.tolist() == [0, 0, 1, 1, 2]
    assert batch.ends_N == ((0,), (1,), (2,)) and batch.last_tokens_N().tolist() == [4, 8, 12]
    assert batch.segments.starts_S == (0, 5, 9)
    assert batch.segments.lengths_S == (5, 4, 4)
    assert batch.segments.is_plain
    assert batch.order_N == (0, 1, 2)
    assert batch.streams["old"].tolist() == [5.0, 5.5, 10.0, 11.0, 15.0]
    assert batch.streams["old"].dtype == torch.float32
    assert batch.values["reward"].tolist() == [1.0, 2.0, 3.0]
    assert pack_stats(batch) == PackStats(13, 13)


def test_shared_layout():
    batch = pack([A, B, C], share_prefix=True)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 30, 7, 20, 21, 22]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert batch.sources_T.tolist() == [NO_SOURCE, 0, 1, 2, 3, 2, NO_SOURCE, 6, 7, 8]
    assert batch.targets_U.tolist() == [3, 4, 5, 7, 9]
    assert batch.targets_K.tolist() == [3, 4, 7, 9, 5], "sequences are in the order of the list, segments are not"
    assert batch.target_sequences_K.tolist() == [0, 0, 1, 1, 2]
    assert batch.ends_N == ((1,), (3,), (2,)) and batch.last_tokens_N().tolist() == [4, 9, 5]
    assert batch.segments.starts_S == (0, 3, 5, 6)
    assert batch.segments.lengths_S == (3, 2, 1, 4)
    assert batch.segments.prefixes_S == (NO_PREFIX, 0, 0, NO_PREFIX)
    assert batch.order_N == (0, 1, 2)
    assert batch.streams["old"].tolist() == [5.0, 5.5, 10.0, 11.0, 15.0]
    assert batch.values["reward"].tolist() == [1.0, 2.0, 3.0]
    assert batch.tokens_per_sequence_N().tolist() == [2, 2, 1]
    assert pack_stats(batch) == PackStats(10, 13)
    assert pack_stats(batch).saved_share == pytest.approx(3 / 13)
    assert pack_stats(batch) + PackStats(3, 3) == PackStats(13, 16)


def test_any_common_beginning_is_shared():
    """Of other groups, of other prompts, and inside of a response: five tokens and then what each row adds."""
    other_group = sample([1, 2, 3], [40], "c")
    other_tokens = sample([1, 2, 4], [50], "a")
    shorter = sample([1, 2], [3, 10, 60], "a")
    batch = pack([A, other_group, other_tokens, shorter], share_prefix=True)
    # (1 2) -> (3) -> (10) -> (11) and (60); (3) -> (40); (1 2) -> (4 50)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 60, 40, 4, 50]
    assert batch.segments.lengths_S == (2, 1, 1, 1, 1, 1, 2)
    assert batch.segments.prefixes_S == (NO_PREFIX, 0, 1, 2, 2, 1, 0)
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 4, 3, 2, 3]
    # A trains 10 and 11, the shorter prompt's response 3, 10 and 60: token 10 counts for both, with the numbers of each
    assert batch.targets_K.tolist() == [3, 4, 6, 8, 2, 3, 5] and batch.targets_U.tolist() == [2, 3, 4, 5, 6, 8]
    assert batch.target_sequences_K.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.streams["old"].tolist() == [5.0, 5.5, 20.0, 25.0, 1.5, 5.0, 30.0]
    assert batch.ends_N == ((3,), (5,), (6,), (4,))
    assert pack_stats(batch) == PackStats(9, 5 + 4 + 4 + 5)


def test_a_row_that_another_continues_ends_inside_of_it():
    batch = pack([A, sample([1, 2, 3], [], "a"), A, C], share_prefix=True)
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 11, 30]
    assert batch.segments.prefixes_S == (NO_PREFIX, 0, 0)
    assert batch.ends_N == ((1,), (0,), (1,), (2,)) and batch.last_tokens_N().tolist() == [4, 2, 4, 5]
    assert batch.tokens_per_sequence_N().tolist() == [2, 0, 2, 1]
    assert batch.targets_K.tolist() == [3, 4, 3, 4, 5] and batch.targets_U.tolist() == [3, 4, 5]


def test_a_short_beginning_of_long_rows_is_not_shared():
    """One token of rows of 64 is shared, one of rows of 65 is not: attention to a prefix costs a pass of its own."""
    for length, tokens in ((64, 64 + 63), (65, 65 + 65)):
        rows = [sample([1], [which] * (length - 1), which) for which in (5, 6)]
        assert pack(rows, share_prefix=True).num_tokens == tokens


FORKED = Sample(
    # a prompt of two, an answer, an observation, an answer; from the first answer on another one; a context of its own
    np.array([1, 2, 10, 11, 3, 12, 10, 4, 13, 9, 14]),
    np.array([False, False, True, True, False, True, True, False, True, False, True]),
    2,
    "f",
    {"old": np.arange(11, dtype=np.float32)},
    {"reward": 4.0},
    (Fork(6, 2), Fork(7, 3), Fork(9, -1)),
)


@pytest.mark.parametrize("share", [False, True])
def test_a_sample_with_forks_is_one_sequence_of_several_segments(share):
    """(1 2 10) -> (11) -> (3 12) and (4 13); (1 2 10) -> (10); (9 14). Every trained token is in the loss once."""
    batch = pack([FORKED], share_prefix=share)
    assert batch.tokens_T.tolist() == [1, 2, 10, 11, 3, 12, 4, 13, 10, 9, 14]
    assert batch.segments.lengths_S == (3, 1, 2, 2, 1, 2)
    assert batch.segments.prefixes_S == (NO_PREFIX, 0, 1, 1, 0, NO_PREFIX)
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 3, 0, 1]
    # in the order of the sample's tokens: 10 11 12 10 13 14
    assert batch.targets_K.tolist() == [2, 3, 5, 8, 7, 10]
    assert batch.sources_T[batch.targets_K].tolist() == [1, 2, 4, 2, 6, 9]
    assert batch.target_sequences_K.tolist() == [0] * 6 and batch.num_sequences == 1
    assert batch.streams["old"].tolist() == [2, 3, 5, 6, 8, 10]
    assert batch.ends_N == ((2, 4, 3, 5),) and batch.last_tokens_N().tolist() == [10]
    assert batch.chains_NS().tolist() == [[1, 1, 1, 1, 1, 1]]
    # rows of 6, 4, 6 and 2 tokens
    assert pack_stats(batch) == PackStats(11, 18)
    assert micro_batches([FORKED] * 2, max_tokens=11, max_sequences=None, share_prefix=False) == [[0], [1]]
    assert micro_batches([FORKED] * 2, max_tokens=11, max_sequences=None, share_prefix=True) == [[0, 1]]


def test_branches_of_one_sample_that_are_alike_stay_two():
    """Whatever counts the tokens of a sequence, as a router's balance does, counts as many as without sharing."""
    tokens, forks = np.array([1, 10, 10, 10, 11]), (Fork(2, 0), Fork(3, 0))
    twice = Sample(tokens, np.arange(5) > 0, 1, "t", forks=forks)
    once = Sample(np.array([1, 10, 12]), np.array([False, True, True]), 1, "t")
    for share in (True, False):
        alone = pack([twice], share_prefix=share)
        assert alone.tokens_T.tolist() == [1, 10, 10, 10, 11] and alone.targets_K.tolist() == [1, 2, 3, 4]
        assert alone.ends_N == ((1, 2, 3),)
    # another sample shares the first of them
    both = pack([twice, once], share_prefix=True)
    assert both.tokens_T.tolist() == [1, 10, 12, 10, 10, 11] and both.targets_K.tolist() == [1, 3, 4, 5, 1, 2]


def test_a_short_beginning_is_shared_inside_of_a_sample():
    """Rows of 100 tokens after one: other samples do not share it, and what is theirs between the branches changes nothing."""
    forked = Sample(np.array([1, *[2] * 100, *[4] * 100]), np.arange(201) > 0, 1, "f", forks=(Fork(101, 0),))
    other, third = (Sample(np.array([1] + [word] * 100), np.arange(101) > 0, 1, "o") for word in (3, 5))
    assert pack([forked], share_prefix=True).num_tokens == 201
    assert pack([other, third], share_prefix=True).num_tokens == 202
    assert pack([forked, other], share_prefix=True).num_tokens == 301
    limits = {"max_sequences": None, "share_prefix": True}
    assert micro_batches([forked, other], max_tokens=302, **limits) == [[0, 1]]
    assert micro_batches([forked, other], max_tokens=300, **limits) == [[0], [1]]


def test_forks_in_order():
    tokens, mask = np.arange(4), np.array([False, False, True, True])
    for forks, wrong in (
        ((Fork(2, 2),), "no earlier"),
        ((Fork(3, 0), Fork(2, 0)), "ascending"),
        ((Fork(2, -1),), "first token"),
    ):
        with pytest.raises(AssertionError, match=wrong):
            Sample(tokens, mask, 1, "g", forks=forks)


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


@st.composite
def forked_lists(draw):
    """Samples over two tokens, so that much is shared, most of them with forks anywhere."""
    samples = []
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 12))
        tokens = np.array(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
        starts = sorted(draw(st.sets(st.integers(1, 11), max_size=4)))
        forks = tuple(Fork(start, draw(st.integers(-1, start - 1))) for start in starts if start < length)
        mask = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        mask[[0, *(fork.start for fork in forks if fork.parent == -1)]] = False
        stream = np.where(mask, np.arange(length) + 100 * number, np.nan).astype(np.float32)
        samples.append(Sample(tokens, mask, 0, f"g{number % 3}", {"old": stream}, {"reward": float(number)}, forks))
    return samples


def contexts(given: Sample) -> dict[int, list[int]]:
    """The tokens that each token in the loss follows, and itself."""
    parents = {fork.start: fork.parent for fork in given.forks}
    found = {}
    for place in np.flatnonzero(given.loss_mask).tolist():
        links, at = [], place
        while at >= 0:
            links.append(int(given.tokens[at]))
            at = parents.get(at, at - 1)
        found[place] = links[::-1]
    return found


@settings(deadline=None, max_examples=150)
@given(forked_lists(), st.booleans())
def test_every_layout_describes_the_same_sequences(samples, share):
    batch = pack(samples, share_prefix=share)
    table, segments = batch.segments, batch.segments_T()
    wanted = [context for each in samples for context in contexts(each).values()]
    found = []
    for target in batch.targets_K.tolist():
        links, at = [], target
        while at != NO_SOURCE:
            links.append(int(batch.tokens_T[at]))
            at = int(batch.sources_T[at])
        found.append(links[::-1])
        assert int(batch.positions_T[target]) == len(links) - 1
    assert found == wanted
    owners = [n for n, each in enumerate(samples) for _ in range(int(each.loss_mask.sum()))]
    assert batch.target_sequences_K.tolist() == owners
    assert batch.streams["old"].tolist() == [
        v for each in samples for v in each.streams["old"][each.loss_mask].tolist()
    ]
    assert batch.chains_NS()[batch.target_sequences_K, segments[batch.targets_K]].all()
    # the last token of each sequence, and as many tokens as there are different beginnings of rows
    rows = [[each.tokens[path].tolist() for path in paths(each)] for each in samples]
    assert batch.tokens_T[batch.last_tokens_N()].tolist() == [each[-1][-1] for each in rows]
    assert pack_stats(batch).unshared_tokens == sum(len(row) for each in rows for row in each)
    beginnings = [{tuple(row[: n + 1]) for row in each for n in range(len(row))} for each in rows]
    alone = sum(len(each.tokens) for each in samples)
    if not share:
        assert batch.num_tokens == alone
    elif sum(map(len, beginnings)) == alone:  # no sample has branches that are alike
        assert batch.num_tokens == len(set().union(*beginnings))
    children = [p for p in table.prefixes_S if p != NO_PREFIX]
    assert all(prefix < s for s, prefix in enumerate(table.prefixes_S)) and len(children) < 2 * len(found) + 40
    # what a group costs in a plan is what is laid out
    group, limits = [replace(each, group_id="one") for each in samples], {"max_sequences": None, "share_prefix": share}
    assert micro_batches(group, max_tokens=batch.num_tokens, **limits) == [list(range(len(samples)))]
    if batch.num_tokens > 1 and len(samples) > 1:
        assert len(micro_batches(group, max_tokens=batch.num_tokens - 1, **limits)) > 1


@settings(deadline=None, max_examples=80)
@given(forked_lists(), st.integers(1, 30), st.booleans(), st.booleans())
def test_micro_batches_of_trees_keep_the_budget(samples, max_tokens, share, whole):
    parts = micro_batches(samples, max_tokens=max_tokens, max_sequences=None, share_prefix=share, whole_groups=whole)
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    for part in parts:
        alone = len(part) == 1 or (whole and len({samples[i].group_id for i in part}) == 1)
        assert alone or pack([samples[i] for i in part], share_prefix=share).num_tokens <= max_tokens


def test_groups_that_begin_alike_land_in_one_pack_and_on_one_rank():
    """Two system prompts of 100 tokens, three groups of each in turn, two samples of 20 more tokens in each group."""
    samples = [
        sample([group % 2] * 100, [group + 5] * 10 + [side] * 10, f"g{group}") for group in range(6) for side in (3, 4)
    ]
    one, other = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    # 100, and for each group 10 and twice 10
    assert pack([samples[i] for i in one], share_prefix=True).num_tokens == 190
    limits = {"max_sequences": None, "share_prefix": True}
    assert micro_batches(samples, max_tokens=190, **limits) == [one, other]
    assert micro_batches(samples, max_tokens=380, **limits) == [sorted([*one, *other])]
    # two groups of a kind are 160, one is 130, and one of each kind do not fit together
    assert [len(part) for part in micro_batches(samples, max_tokens=189, **limits)] == [4, 4, 2, 2]
    assert split_ranks(samples, 2) == [one, other]
    assert split_ranks(samples, 2, whole_groups=True) == [one, other]
    assert sorted(map(len, split_ranks(samples, 3))) == [4, 4, 4]
    # a single sample is all that may be longer than the budget
    assert micro_batches(samples, max_tokens=20, **limits) == [[i] for i in range(12)]


def test_ten_thousand_long_rows_are_planned_fast():
    rng, system = np.random.default_rng(0), np.arange(100)
    samples = []
    for group in range(1250):
        tokens = rng.integers(0, 50_000, (8, 1000))
        tokens[:, :100], tokens[:, 100:200] = system, tokens[0, 100:200]
        samples += [Sample(row, np.arange(1000) >= 200, 200, str(group)) for row in tokens]
    start = time.perf_counter()
    parts = micro_batches(samples, max_tokens=16384, max_sequences=None, share_prefix=True)
    ranks = split_ranks(samples, 8)
    seconds = time.perf_counter() - start
    # two groups: 100 and twice 100 + 8 x 800 tokens; a third does not fit
    assert len(parts) == 625 and all(len(part) == 16 for part in parts)
    assert max(map(len, ranks)) <= 1.05 * 1250
    assert seconds < 10, seconds  # about 0.6 s on an idle core


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
