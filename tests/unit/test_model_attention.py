"""The segment table as attention sees it: runs, masks, keys of the varlen kernel; and what is refused."""

import sys
from types import ModuleType

import pytest
import torch

from tests.attention_cases import MODULE, TREE, dense_attention, dense_mask, random_qkv, run, varlen_stand_in
from tests.flash_stand_in import flash_on_cpu
from tests.packs import make_segments
from togi.algo.partial_attention import Run, visible_keys
from togi.batch import NO_PREFIX
from togi.errors import ModelError
from togi.model.attention import gathered, plan_runs, segment_attention, varlen_attention


def test_neighbours_of_equal_length_and_prefix_share_a_call():
    assert plan_runs(TREE) == (
        Run(1, 3, ()),
        Run(2, 2, (0,)),
        Run(1, 4, (0,)),
        Run(1, 5, ()),
        Run(1, 2, ()),
        Run(1, 3, (4,)),
        Run(2, 1, (4, 5)),
    )
    assert plan_runs(make_segments([6] * 5, [NO_PREFIX] * 5)) == (Run(5, 6, ()),)


def test_a_segment_that_others_continue_is_a_run_of_its_own():
    segments = make_segments([2, 2, 2, 2], [NO_PREFIX, NO_PREFIX, 1, NO_PREFIX])
    assert plan_runs(segments) == (Run(1, 2, ()), Run(1, 2, ()), Run(1, 2, (1,)), Run(1, 2, ()))


def test_visible_keys_by_hand():
    cpu = torch.device("cpu")
    assert visible_keys(3, 3, None, cpu) is None
    assert visible_keys(3, 3, 3, cpu) is None
    assert visible_keys(2, 4, None, cpu).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible_keys(2, 4, 2, cpu).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert visible_keys(3, 3, 1, cpu).tolist() == torch.eye(3, dtype=torch.bool).tolist()


def test_dense_mask_by_hand():
    segments = make_segments([2, 1, 2, 1], [NO_PREFIX, 0, 0, NO_PREFIX])
    rows = ["100000", "110000", "111000", "110100", "110110", "000001"]
    assert ["".join(str(int(x)) for x in row) for row in dense_mask(segments)] == rows
    windowed = ["100000", "110000", "011000", "010100", "000110", "000001"]
    assert ["".join(str(int(x)) for x in row) for row in dense_mask(segments, window=2)] == windowed


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_segments_equal_dense(window, scaling):
    one = run(segment_attention, TREE, sliding_window=window, scaling=scaling)
    other = run(dense_attention, TREE, sliding_window=window, scaling=scaling)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_short_bfloat16_segments_are_computed_in_float32():
    rounded = [x.detach().bfloat16().double() for x in random_qkv(sum(TREE.lengths_S))]
    exact, _ = dense_attention(MODULE, *rounded, None, segments=TREE)
    out, _ = segment_attention(MODULE, *(x.bfloat16() for x in rounded), None, segments=TREE)
    assert out.dtype == torch.bfloat16
    # one rounding to bf16 at the very end, and float32 before
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


PLAIN = make_segments([4, 1, 3], [NO_PREFIX] * 3)


# keys of TREE: its 23 tokens, and the two before each of the six segments that continue another
@pytest.mark.parametrize(("segments", "keys"), [(PLAIN, 8), (TREE, 23 + 2 * 6)])
def test_capped_scores_take_the_package_and_the_keys_within_the_window(monkeypatch, segments, keys):
    package = ModuleType("flash_attn")
    given: list[int] = []

    def stand_in(q, k, v, **keywords):
        given.append(len(k))
        return varlen_stand_in(q, k, v, **keywords)

    package.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    keywords = {"softcap": 1.5, "scaling": 0.4, "sliding_window": 3}
    with flash_on_cpu() as calls:
        one, other = run(varlen_attention, segments, **keywords), run(dense_attention, segments, **keywords)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert calls == []
    assert given == [keys]


@pytest.mark.parametrize(
    ("window", "cut", "keys", "starts_k"),
    [
        (None, None, [0, 1, 0, 1, 2, 0, 1, 3, 4, 5], [0, 2, 5, 9, 10]),
        (4, None, [0, 1, 0, 1, 2, 0, 1, 3, 4, 5], [0, 2, 5, 9, 10]),
        # the first token of a segment sees one key before it
        (2, 2, [0, 1, 1, 2, 1, 3, 4, 5], [0, 2, 4, 7, 8]),
        (1, 1, [0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 6]),
    ],
)
def test_keys_are_gathered_within_the_window(window, cut, keys, starts_k):
    segments = make_segments([2, 1, 2, 1], [NO_PREFIX, 0, 0, NO_PREFIX])
    level = gathered(segments, window, torch.device("cpu"))
    assert level.keys_U.tolist() == keys
    assert level.pieces.starts_q.tolist() == [0, 2, 3, 5, 6]
    assert level.pieces.starts_k.tolist() == starts_k
    assert (level.pieces.window, level.pieces.longest[0]) == (cut, 2)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dropout": 0.1}, "at a rate that is not in the model's config.json"),
        ({"softcap": 50.0}, "attn_logit_softcapping"),
        ({"s_aux": torch.zeros(4)}, "passes s_aux to attention"),
        ({"is_causal": False}, "not causal"),
        ({"segments": None}, "segment table"),
    ],
)
def test_what_cannot_be_honoured_is_refused(keywords, words):
    with pytest.raises(ModelError, match=words):
        segment_attention(MODULE, *random_qkv(3), None, **{"segments": make_segments([3], [NO_PREFIX]), **keywords})
