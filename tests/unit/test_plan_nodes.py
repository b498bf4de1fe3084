"""Which nodes a group over several of them gets, and what is refused before Ray is asked."""

from __future__ import annotations

import pytest

from togi.errors import ConfigError
from togi.plan.placement import Group, Role, check_spread, spread

ACTOR, CRITIC = (Role.ACTOR,), (Role.CRITIC,)


def test_slots_of_a_node_stand_together_and_nodes_fill_up() -> None:
    groups = [Group(ACTOR, 2, 2), Group((Role.ENGINE,), 1, 3), Group(CRITIC, 2, 2)]
    assert spread(groups, {"a": 4, "b": 1, "c": 2, "d": 2}) == [["a", "a", "c", "c"], [], ["a", "a", "d", "d"]]


def test_without_gpus_every_node_has_room() -> None:
    assert spread([Group(ACTOR, 2, 5)] * 2, {"a": 0, "b": 0}) == [["a"] * 5 + ["b"] * 5] * 2


def test_nodes_that_are_missing_or_full_are_refused() -> None:
    groups = (Group(ACTOR, 1, 8), Group((Role.ENGINE, Role.CRITIC), 2, 3))
    with pytest.raises(ConfigError, match=r"^--critic_num_nodes 2 needs 2 nodes, but there is 1: start Ray on more"):
        check_spread(groups, 1)
    check_spread(groups, 2)
    with pytest.raises(ConfigError, match=r"2 nodes with 3 free GPUs each, but the nodes have 8, 2: lower one of them"):
        spread(groups, {"a": 8, "b": 2})
