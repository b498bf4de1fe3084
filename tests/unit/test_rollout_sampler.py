"""The Transformers engine's sampler, and which ids end a sequence: numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from togi.errors import ConfigError, RunError
from togi.rollout.engine import end_token_ids
from togi.rollout.sampler import BLOCK, Choice, choose, distribution, invert_cdf, nucleus

LOG = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def choice(temperature: float = 1.0, top_p: float = 1.0, forbidden: tuple[int, ...] = (), seed: int = 0) -> Choice:
    return Choice(temperature, top_p, forbidden, torch.Generator().manual_seed(seed))


def test_temperature_half_squares_probabilities() -> None:
    # squares: 1/4, 1/16, 1/64, 1/64, sum 22/64
    probs = distribution(LOG, [choice(temperature=0.5)]).exp()
    assert torch.allclose(probs, torch.tensor([[16.0, 4.0, 1.0, 1.0]]) / 22)


def test_forbidden_ids_have_no_probability_and_the_input_is_left_alone() -> None:
    logits = LOG.clone()
    probs = distribution(logits, [choice(forbidden=(0,))]).exp()
    assert torch.allclose(probs, torch.tensor([[0.0, 0.5, 0.25, 0.25]]))
    assert torch.equal(logits, LOG)


def test_the_nucleus_is_the_fewest_ids_that_reach_top_p() -> None:
    kept = [nucleus(LOG, torch.tensor([p])).isfinite()[0].tolist() for p in (0.0, 0.5, 0.51, 0.75, 0.76)]
    assert [sum(row) for row in kept] == [1, 1, 2, 2, 3]
    assert kept[2] == [True, True, False, False]


def test_invert_cdf_by_hand_and_never_an_impossible_id() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(probs, uniform).tolist() == [1, 1, 3, 3]


def test_invert_cdf_over_several_blocks_agrees_with_one_cumulative_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, 3 * BLOCK + 7, generator=generator).log_softmax(-1).exp()
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    # a sum in another order may move a draw that lies on an edge
    assert (invert_cdf(probs, uniform) == expected).float().mean() > 0.99
    last_block_only = torch.zeros(1, 2 * BLOCK)
    last_block_only[0, BLOCK + 5] = 0.3
    assert invert_cdf(last_block_only, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [BLOCK + 5]


def test_rows_are_chosen_each_in_its_own_way() -> None:
    logits = LOG.expand(3, -1)
    tokens, logprobs = choose(logits, [choice(temperature=0.0), choice(top_p=0.5), choice(forbidden=(0, 1, 2))])
    assert tokens.tolist() == [0, 0, 3]
    assert logprobs.tolist() == pytest.approx([math.log(0.5), 0.0, 0.0])


def test_frequencies_follow_the_probabilities() -> None:
    count = 20_000
    shared = choice()
    tokens, _ = choose(LOG.expand(count, -1), [shared] * count)
    frequencies = torch.bincount(tokens, minlength=4) / count
    # three standard deviations of the largest: 3 * sqrt(0.25 / 20000) = 0.0106
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.011)


def test_a_seed_decides_its_own_row_only() -> None:
    logits = torch.zeros(2, 1000)
    alone = choose(logits[:1], [choice(seed=5)])[0].tolist()
    assert choose(logits, [choice(seed=6), choice(seed=5)])[0].tolist()[1:] == alone


def write(folder: Path, **files: object) -> str:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_end_ids_are_those_of_all_files(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config={"eos_token_id": 1, "pad_token_id": 9},
        generation_config={"eos_token_id": [2, 3]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"},
        tokenizer={"added_tokens": [{"id": 4, "content": "<|im_end|>"}, {"id": 9, "content": "<pad>"}]},
    )
    assert end_token_ids(folder) == {1, 2, 3, 4}


def test_a_pad_token_that_is_the_end_token_still_ends(tmp_path: Path) -> None:
    assert end_token_ids(write(tmp_path, config={"eos_token_id": 2, "pad_token_id": 2})) == {2}


def test_a_folder_without_ends_or_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        end_token_ids(str(tmp_path))
    assert end_token_ids(write(tmp_path, config={"eos_token_id": None})) == frozenset()


def test_probabilities_that_are_not_finite_are_an_error_in_words() -> None:
    logits = torch.zeros(2, 300)
    logits[1, 7] = torch.nan
    choices = [Choice(1.0, 1.0, (), torch.Generator().manual_seed(i)) for i in range(2)]
    with pytest.raises(RunError, match="not finite: its weights hold NaN"):
        choose(logits, choices)
