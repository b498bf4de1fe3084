"""Memory that is measured: peaks that begin anew, pages given back, and a learner's state put away and brought back."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.learn_tools import CPU, max_difference
from togi.errors import RunError
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.optimizer import Parking
from togi.parallel.process import World
from togi.plan.machine import PeakMemory, Released, release_pages, resident_bytes, return_freed

MB = 10**6


def test_a_peak_begins_anew_each_time() -> None:
    memory = PeakMemory()
    memory.take()
    block = bytearray(b"x") * (200 * MB)
    del block
    return_freed()  # a test before this one may have made this process keep it
    with_block, without = memory.take(), memory.take()
    assert with_block - without > 150 * MB
    assert memory.highest >= with_block


def test_pages_are_given_back_and_read_as_zeros() -> None:
    size = 20_000 * mmap.PAGESIZE
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        tensor = torch.frombuffer(area, dtype=torch.uint8)
        tensor[: size // 2] = 7
        before = resident_bytes()
        # The first page is not whole, and half of the rest was never touched.
        assert release_pages(tensor.data_ptr() + 1, size - 1) == size // 2 - mmap.PAGESIZE
        assert before - resident_bytes() > 0.95 * size / 2
        assert (tensor[0], tensor[mmap.PAGESIZE], int(tensor[mmap.PAGESIZE :].sum())) == (7, 0, 0)
        del tensor


def test_who_went_to_sleep_must_have_become_smaller() -> None:
    Released(500 * MB, 900 * MB, 600 * MB).check("actor 0")
    Released(10 * MB, 900 * MB, 901 * MB).check("actor 0")  # within the noise
    with pytest.raises(RunError, match="actor 0 let go of 500 MB to sleep, but its memory went from 900 to 890 MB"):
        Released(500 * MB, 900 * MB, 890 * MB).check("actor 0")


@pytest.mark.parametrize("bf16", [True, False])
def test_a_learner_that_sleeps_is_smaller_and_wakes_as_it_was(bf16: bool) -> None:
    """With bfloat16 three float32 copies of every weight are put away (master, two moments), otherwise two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 4000), nn.Linear(4000, 100))
    count = sum(parameter.numel() for parameter in model.parameters())
    backend = trainable(model, World.solo(CPU), BackendOptions(bf16=bf16))
    kind = torch.bfloat16 if bf16 else torch.float32
    for number in range(2):
        backend.backward(model(torch.ones(1, 2000, dtype=kind)).square().sum(), last=True)
        backend.step(1e-3)
        before = {name: tensor.clone() for name, tensor in backend.state()}
        parking = Parking(backend.at_rest, CPU)
        released = parking.sleep()
        assert released.nbytes == (12 if bf16 else 8) * count
        assert released.before - released.after > 0.9 * released.nbytes, number
        assert parking.sleep().nbytes == released.nbytes  # a second time changes nothing
        parking.wake()
        assert resident_bytes() - released.after > 0.9 * released.nbytes
        assert max_difference(before, dict(backend.state())) == 0.0
        del before


KEEPING = """
import resource, sys
from togi.plan.machine import keep_freed, resident_bytes, return_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * SIZE  # writes every page
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

SIZE = 96 << 20
faults()
plain = faults()
keep_freed()
faults()
kept, before = faults(), resident_bytes()
return_freed()
print(plain, kept, before - resident_bytes())
"""


def test_freed_memory_is_kept_until_it_is_returned() -> None:
    """Without, each of 24,576 pages is fetched again; with it hardly any, and afterwards they can all be given back."""
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True)
    plain, kept, returned = map(int, done.stdout.split())
    assert plain > 20_000
    assert kept < 1_000
    assert returned > 90 << 20
