"""How often the compiled kernels are called: equal results alone do not tell that they were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from togi.cpu.kernels import HostKernels


def counted_calls(patch: pytest.MonkeyPatch, *names: str) -> Counter[str]:
    """From now on until ``patch`` is undone."""
    found = Counter[str]()
    for name in names:
        patch.setattr(HostKernels, name, _counting(getattr(HostKernels, name), name, found))
    return found


def _counting(kernel: Any, name: str, found: Counter[str]) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        found[name] += 1
        return kernel(*arguments, **named)

    return counted
