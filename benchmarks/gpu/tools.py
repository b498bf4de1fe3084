"""What the parts share: how one says that it cannot run, its figures, clocks, memory, errors."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch import Tensor

Figures = Iterator[tuple[str, float | str]]
"""What a part yields, by name, as it is found: what was found before a failure or at the limit of time is kept."""


class Skip(Exception):
    """Something that a part needs is not there."""


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a GPU")


def need_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Skip(f"needs the package {name}")


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, call: Callable[[], object], repeats: int = 5) -> float:
    """The median of ``repeats`` calls after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken[1:])


def extra_gb(device: torch.device, call: Callable[[], object]) -> float:
    """The most memory that a call takes beside what is there before, in 10^9 bytes. 0 on a CPU, which does not count it."""
    if device.type != "cuda":
        return 0.0
    finish(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    finish(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest exact value. NaN where anything found is NaN."""
    wide = exact.detach().double()
    return float((found.detach().double() - wide).abs().max() / wide.abs().max())


class Bounds:
    """Errors against their bounds: all are looked at before the part fails."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._beyond: list[str] = []

    def hold(self, name: str, value: float, bound: float) -> None:
        self.worst = max(self.worst, value)
        if not value <= bound:  # NaN is beyond any bound
            self._beyond.append(f"{name} {value:.3g} > {bound:.3g}")

    def fail(self, name: str, problem: Exception) -> None:
        """Count a case that raised, and go on with the others."""
        first = next(iter(str(problem).strip().splitlines()), "")
        self._beyond.append(f"{name} raised {type(problem).__name__}: {first}")

    def check(self) -> None:
        """Raise AssertionError with what was beyond its bound, or raised."""
        assert not self._beyond, f"{len(self._beyond)} wrong: {'; '.join(self._beyond[:8])}"


def group(prompts: int, responses: int, prompt: int, response: int) -> list[tuple[int, list[int]]]:
    """Lengths for ``tests.packs.random_groups``: prompts of one length with responses of one length."""
    return [(prompt, [response] * responses)] * prompts


def tables(shapes: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    """Lengths and prefixes of the segments of prompts that are shared by their responses."""
    lengths, prefixes = list[int](), list[int]()
    for prompt, responses in shapes:
        place = len(lengths)
        lengths += [prompt, *responses]
        prefixes += [-1, *([place] * len(responses))]
    return lengths, prefixes
