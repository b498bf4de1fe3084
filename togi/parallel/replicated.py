"""Every rank holds the whole model: one process, or ZeRO stage 0.

With bf16 the module's own parameters are bfloat16 working copies; float32 masters beside them collect the gradients
of all micro-batches and are what AdamW updates, so that a step smaller than bfloat16's spacing is kept instead of
rounded away. With ``adam_offload`` masters, gradients and moments are in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from togi.parallel.adamw import MOMENTS, clip_gradients, fill_missing_gradients, make_adamw, moments, take_step
from togi.parallel.backend import BackendOptions, cast, check_same_weights
from togi.parallel.process import World

BUCKET_ELEMENTS = 32 * 2**20


class Replicated:
    """The ``Backend`` of one process, and of several that hold a copy each."""

    def __init__(self, module: nn.Module, world: World, options: BackendOptions) -> None:
        check_same_weights(module, world)
        self.module = module.to(world.device)
        self.world = world
        self._names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        home = torch.device("cpu") if options.adam_offload else world.device
        if options.bf16 or home != world.device:
            self._masters = {name: self._split(p, home, options.bf16) for name, p in self._names.items()}
        else:
            self._masters = dict(self._names)
        if options.bf16:
            cast((p for p in module.parameters() if not p.requires_grad), torch.bfloat16)
        self._optimizer = make_adamw(self._masters, options)

    def backward(self, loss: Tensor, last: bool) -> None:
        torch.autograd.backward(loss)
        if last:
            fill_missing_gradients(self._masters)
            if self.world.size > 1:
                self._add_up_gradients()

    def clip(self, max_norm: float) -> float:
        return float(clip_gradients(self._masters, max_norm))

    def step(self, learning_rate: float) -> None:
        take_step(self._optimizer, learning_rate)
        self._refresh()

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad()

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if trained_only and name not in self._masters:
                continue
            # A working copy is its master rounded, so that nothing is lost by taking what is already there.
            best = parameter if dtype is parameter.dtype else self._masters.get(name, parameter)
            yield name, best.detach().to(self.world.device, best.dtype if dtype is None else dtype)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            yield f"master/{name}", master.detach()
            for moment in MOMENTS:
                yield f"{moment}/{name}", self._optimizer.state[master][moment]

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        for name, master in self._masters.items():
            state = self._optimizer.state[master]
            with torch.no_grad():
                master.copy_(read(f"master/{name}"))
            for moment in MOMENTS:
                state[moment].copy_(read(f"{moment}/{name}"))
            state["step"].fill_(steps)
        self._refresh()

    def at_rest(self) -> Iterable[Tensor]:
        masters = [master for name, master in self._masters.items() if master is not self._names[name]]
        return [*masters, *moments(self._optimizer)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(master.shape) for name, master in self._masters.items()}

    @staticmethod
    def _split(parameter: nn.Parameter, home: torch.device, bf16: bool) -> Tensor:
        """Make ``parameter`` a working copy of a new float32 master at ``home``, which from now on gets its gradients."""
        master = parameter.detach().to(home, torch.float32, copy=True)
        if bf16:
            parameter.data = parameter.data.to(torch.bfloat16)

        def hand_over(working: Tensor) -> None:
            assert working.grad is not None
            gradient = working.grad.to(master.device, master.dtype)
            if master.grad is None:
                master.grad = gradient
            else:
                master.grad.add_(gradient)
            working.grad = None

        parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return master

    @torch.no_grad()
    def _refresh(self) -> None:
        """Round the masters into the working copies, where they are not the same tensors."""
        pairs = [(p, self._masters[name]) for name, p in self._names.items() if p is not self._masters[name]]
        if pairs:
            torch._foreach_copy_([working for working, _ in pairs], [master for _, master in pairs])

    def _add_up_gradients(self) -> None:
        """Sum the gradients over ranks, a few large transfers in place of one for each parameter."""
        bucket: list[Tensor] = []
        for master in self._masters.values():
            assert master.grad is not None
            bucket.append(master.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
                self._add_up(bucket)
                bucket = []
        if bucket:
            self._add_up(bucket)

    def _add_up(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        self.world.add_up("gradients", flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
