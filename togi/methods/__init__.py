"""The methods of training on fixed data, one file each, and their table. Imports no torch until an objective is used."""

from __future__ import annotations

from collections.abc import Mapping

from togi.methods.dpo import DPO
from togi.methods.kd import KD
from togi.methods.kto import KTO
from togi.methods.method import Method
from togi.methods.orpo import ORPO
from togi.methods.prm import PRM
from togi.methods.rm import RM
from togi.methods.sft import SFT
from togi.methods.simpo import SimPO
from togi.obs import names

METHODS: Mapping[str, type[Method]] = {method.command: method for method in (SFT, RM, DPO, SimPO, ORPO, KTO, PRM, KD)}
"""The methods by the name of their command, in the order of ``togi --help``."""

names.add_explanations(
    {each.name: each.explanation for method in METHODS.values() for each in method.measures if each.explanation}
)
