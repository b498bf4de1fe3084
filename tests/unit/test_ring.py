"""The parts of ring attention that need one process: joining, the plain kernel, the deal of tokens, what travels."""

from __future__ import annotations

import pytest
import torch

from tests.packs import make_segments
from tests.tiny import tiny_config
from togi.algo import partial_attention
from togi.algo.partial_attention import (
    Visibility,
    attend,
    attend_backward,
    attend_in_tiles,
    attend_in_tiles_backward,
    join,
)
from togi.batch import NO_PREFIX, Segments
from togi.errors import ConfigError, ModelError
from togi.model.ring_attention import plan, refuse_ring, travelling
from togi.model.ring_layout import Chunk, Shards, deal, packed_indices
from togi.parallel.process import World

CPU = torch.device("cpu")


def test_join_by_hand() -> None:
    """Weights 1, 1 and 2 on values 8, 4 and 1, split after the second: (8 + 4 + 2) / 4."""
    one, other = torch.tensor([[6.0]]), torch.tensor([[1.0]])
    out, lse = join(one, torch.tensor([2.0]).log(), other, torch.tensor([2.0]).log())
    assert out.item() == pytest.approx(3.5)
    assert lse.exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["all", "causal", "seen"])
def test_tiles_equal_the_fused_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the output and log-sum-exp of a softmax and, with those over more keys, the same part of the gradient."""
    monkeypatch.setattr(partial_attention, "TILE_BYTES", 4 * 2 * 4 * 9 * 2)  # two queries at a time
    torch.manual_seed(0)
    keys = 7 if kind == "causal" else 9
    q, k, v = (torch.randn(2, heads, n, 8, dtype=torch.float64) for heads, n in ((4, 7), (2, keys), (2, keys)))
    seen = torch.rand(7, keys) > 0.4
    seen[:, 0] = True
    visible = {
        "all": Visibility(),
        "causal": Visibility(causal=True),
        "seen": Visibility(seen_LM=seen),
    }[kind]
    mask = {"all": torch.ones(7, keys), "causal": torch.ones(7, keys).tril(), "seen": seen}[kind].bool()
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    exact = (scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1))
    for function in (attend, attend_in_tiles):
        torch.testing.assert_close(function(q, k, v, 0.3, visible), exact, rtol=1e-10, atol=1e-12)
    whole = join(*exact, torch.randn_like(exact[0]), torch.randn_like(exact[1]))
    up = torch.randn_like(exact[0])
    one = attend_backward(up, (q, k, v), *whole, 0.3, visible)
    other = attend_in_tiles_backward(up, (q, k, v), *whole, 0.3, visible)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def work(shards: Shards) -> tuple[list[int], list[int]]:
    ranks = range(len(shards.chunks))
    return [shards.tokens(r) for r in ranks], [shards.pairs(r) for r in ranks]


def test_a_long_sequence_is_dealt_in_zigzag() -> None:
    """Each rank takes an early and a late chunk. 16 tokens have 136 pairs: 1 + ... + 4 and 13 + ... + 16 are 68."""
    shards = deal(make_segments([16], [NO_PREFIX]), 2)
    assert shards.chunks == ((Chunk(0, 0, 4), Chunk(0, 12, 16)), (Chunk(0, 4, 12),))
    assert work(shards) == ([8, 8], [68, 68])


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [1000, 1024, 4097, 99991])
def test_work_of_a_single_sequence_is_even(size: int, length: int) -> None:
    """No rank has more than 1 + 4R/L times the mean of the pairs (bounds are rounded to tokens), nor 2 tokens more."""
    tokens, pairs = work(deal(make_segments([length], [NO_PREFIX]), size))
    assert sum(pairs) == length * (length + 1) // 2
    assert max(pairs) <= (1 + 4 * size / length) * sum(pairs) / size
    assert max(tokens) - min(tokens) <= 2


def test_sequences_are_cut_only_for_balance() -> None:
    """Eight equal ones go whole to two ranks. Of a long and many short ones the long one is cut."""
    even = deal(make_segments([16] * 8, [NO_PREFIX] * 8), 2)
    assert work(even) == ([64, 64], [544, 544])
    assert all(len(chunk) == 16 for chunks in even.chunks for chunk in chunks)
    assert travelling(even, 0) == travelling(even, 1) == []
    assert plan(even, 0, None, CPU).sizes == (0, 0)
    mixed = deal(make_segments([600, *[20] * 20], [NO_PREFIX] * 21), 2)
    tokens, pairs = work(mixed)
    assert tokens == [500, 500]
    assert max(pairs) <= 1.05 * sum(pairs) / 2
    assert {chunk.segment for chunks in mixed.chunks for chunk in chunks if len(chunk) < 20} == set()


TABLES = [
    make_segments([400, 30, 50, 20, 45, 35, 300, 120], [NO_PREFIX, 0, 0, 0, 0, 0, NO_PREFIX, 6]),
    make_segments([97, 1001, 13, 250, 7], [NO_PREFIX] * 5),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("table", TABLES)
def test_packs_and_shared_prompts_are_dealt_evenly(table: Segments, size: int) -> None:
    """Every token once; tokens and pairs of no rank above 1.05 times the mean."""
    shards = deal(table, size)
    indices = torch.cat([packed_indices(shards.segments, chunks) for chunks in shards.chunks])
    assert indices.sort().values.tolist() == list(range(sum(table.lengths_S)))
    for numbers in work(shards):
        assert max(numbers) <= 1.05 * sum(numbers) / size


def test_a_rank_without_tokens_gets_a_filler() -> None:
    shards = deal(make_segments([2], [NO_PREFIX]), 4)
    assert work(shards)[0] == [1, 1, 1, 1]
    assert shards.segments == make_segments([2, 1, 1], [NO_PREFIX] * 3)


def test_only_keys_that_another_rank_sees_travel() -> None:
    """Rank 1's middle chunk needs rank 0's early one, rank 0's late chunk the middle one; nobody needs the late one."""
    shards = deal(make_segments([16], [NO_PREFIX]), 2)
    assert travelling(shards, 0) == [Chunk(0, 0, 4)]
    assert travelling(shards, 1) == [Chunk(0, 4, 12)]
    todo = plan(shards, 0, None, CPU)
    assert todo.sent_b.tolist() == [0, 1, 2, 3]
    assert todo.sizes == (4, 8)
    own, visiting = todo.visits
    # both chunks on themselves in one call, then the late one on the early one; of the visitor the late one sees all
    assert [(c.queries_nL.tolist(), c.keys_nM.tolist(), c.count, c.causal) for c in own] == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], 2, True),
        ([4, 5, 6, 7], [0, 1, 2, 3], 1, False),
    ]
    assert [(c.queries_nL.tolist(), c.keys_nM.tolist()) for c in visiting] == [([4, 5, 6, 7], list(range(8)))]


def test_a_window_leaves_out_what_nobody_sees() -> None:
    """With 3 keys a query at 12 sees 10 and 11, one at 13 only 11: the other queries have no key in the visiting block."""
    todo = plan(deal(make_segments([16], [NO_PREFIX]), 2), 0, 3, CPU)
    (call,) = todo.visits[1]
    assert (call.queries_nL.tolist(), call.keys_nM.tolist()) == ([4, 5], [6, 7])
    assert call.visibility().seen_LM.tolist() == [[True, True], [False, True]]


def test_responses_to_one_prompt_read_it_in_one_call() -> None:
    table = make_segments([40, 10, 10, 10, 10], [NO_PREFIX, 0, 0, 0, 0])
    shards = Shards(table, ((Chunk(0, 0, 40),), tuple(Chunk(s, 0, 10) for s in (1, 2, 3, 4))))
    own, visiting = plan(shards, 1, None, CPU).visits
    assert [(call.count, call.causal) for call in own] == [(4, True)]
    assert [(len(call.queries_nL), len(call.keys_nM)) for call in visiting] == [(40, 40)]


def test_what_a_ring_cannot_do_is_refused() -> None:
    with pytest.raises(ModelError, match="--ring_head_stride 3 does not divide the 4 key/value heads"):
        refuse_ring(tiny_config(num_attention_heads=4, num_key_value_heads=4), 3)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=r"dynamic.*leave --ring_attn_size out"):
        refuse_ring(tiny_config(rope_parameters=rope), 1)
    with pytest.raises(ConfigError, match="--ring_attn_size 2 does not divide the number of processes, which is 3"):
        World(0, 3, CPU).in_teams(2)


def test_shares_of_data() -> None:
    """Four ranks in rings of two have two shares."""
    worlds = [World(rank, 4, CPU).in_teams(2) for rank in range(4)]
    assert [world.share for world in worlds] == [0, 0, 1, 1]
    assert {world.shares for world in worlds} == {2}
