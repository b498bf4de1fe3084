"""What a sequence gets from the Transformers engine does not depend on which others are there."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import save_tiny_model
from togi.rollout.engine import EngineSettings
from togi.rollout.transformers_engine import TransformersCore
from togi.sample import Generation, Sampling

PROMPTS = [tuple((7 * i + 3 * j) % 250 for j in range(length)) for i, length in enumerate([5, 21, 17, 64, 40, 3])]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> TransformersCore:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), num_attention_heads=4, num_key_value_heads=2)
    return TransformersCore(EngineSettings(str(folder), dtype="float32", max_model_len=200, max_num_seqs=8))


def answers(core: TransformersCore, places: list[int], *, steps_between: int = 0) -> dict[int, Generation]:
    """``steps_between``: of the engine after each request has come."""
    found: dict[int, Generation] = {}
    for place in places:
        core.add(place, PROMPTS[place], Sampling(max_tokens=30, seed=place, ignore_eos=True))
        for _ in range(steps_between):
            found |= core.step()
    while len(found) < len(places):
        found |= core.step()
    return found


def assert_same(one: Generation, other: Generation) -> None:
    """To the last bit where that has been seen; how products of other processors round may depend on their number of rows."""
    assert one.tokens == other.tokens
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert one.logprobs == other.logprobs
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_tokens_and_log_probs_are_the_same_alone_and_in_company(core: TransformersCore) -> None:
    together = answers(core, list(range(6)))
    late = answers(core, [3, 1, 0, 5, 2, 4], steps_between=4)
    for place in range(6):
        (alone,) = answers(core, [place]).values()
        assert_same(together[place], alone)
        assert_same(late[place], alone)
