"""Every rank holds the whole model: one process, or ZeRO stage 0.

With bf16 the module's own parameters are bfloat16 working copies. Float32 masters beside them accumulate the gradients of all
micro-batches, and AdamW updates the masters, so that a step smaller than bfloat16's spacing is not rounded away. If a step has one
micro-batch, its gradients stay in bfloat16 until AdamW uses them: on a CPU in one kernel, elsewhere a few parameters at a time.
With ``adam_offload`` masters, gradients and moments are in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from togi.cpu import compiled, is_plain
from togi.parallel.backend import BackendOptions, cast, check_same_weights
from togi.parallel.optimizer import Stepped, fill_missing_gradients, make_adamw, take_host_step, take_step
from togi.parallel.process import World

BUCKET_ELEMENTS = 32 * 2**20
CLIP_EPSILON = 1e-6
"""PyTorch adds this to a norm before it divides by the norm."""


class Replicated(Stepped):
    """The ``Backend`` of one process, or of several that each hold a copy of the model."""

    def __init__(self, module: nn.Module, world: World, options: BackendOptions) -> None:
        check_same_weights(module, world)
        self.module = module.to(world.device)
        self.world = world
        self._names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # masters: separate tensors if they differ from the parameters in dtype or device
        home = torch.device("cpu") if options.adam_offload else world.device
        if options.bf16 or home != world.device:
            self._masters = {name: self._split(p, home, options.bf16) for name, p in self._names.items()}
        else:
            self._masters = dict(self._names)
        if options.bf16:
            cast((p for p in module.parameters() if not p.requires_grad), torch.bfloat16)
        self._optimizer = make_adamw(self._masters, options)
        self._factor = 1.0
        # the C kernel for AdamW, if all parameters fit it
        fits = all(_fits_kernels(master, working) for _, master, working in self._pairs())
        self._kernels = compiled() if fits else None
        # all ranks or none, so that the copies of the weights stay bitwise equal
        if not all(world.gather("kernels of AdamW", self._kernels is not None)):
            self._kernels = None

    def backward(self, loss: Tensor, last: bool) -> None:
        self._hand_over_all()  # gradients of the last micro-batch: autograd would add to them in bfloat16
        torch.autograd.backward(loss)
        if last and self.world.size > 1:
            self._hand_over_all()
            fill_missing_gradients(self._masters)
            self._add_up_gradients()

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Keep the clip factor for ``step``, which multiplies in float32: bfloat16 gradients would be rounded here."""
        norm = self._norm(list(self._gradients().values()))
        self._factor = min(1.0, float(max_norm / (norm + CLIP_EPSILON)))
        return float(norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        gradients, factor = self._gradients(), self._factor
        self.drop_gradients()
        if self._kernels is not None:
            parts = {master: (gradients.get(name), working) for name, master, working in self._pairs()}
            take_host_step(self._kernels, self._optimizer, learning_rate, factor, parts)
            return
        # some parameters at a time, so that few gradients exist in float32 at once
        for names in self._buckets():
            for name in names:
                master, gradient = self._masters[name], gradients.pop(name, None)
                if gradient is None:  # it had no part in the step: its moments decay
                    master.grad = torch.zeros_like(master)
                else:
                    master.grad = gradient.to(master.device, master.dtype)
                    del gradient
                    if factor < 1:
                        master.grad.mul_(factor)
            take_step(self._optimizer, learning_rate)
            self._refresh(names)

    def drop_gradients(self) -> None:
        for name, working in self._names.items():
            working.grad = self._masters[name].grad = None
        self._factor = 1.0

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        super().load_state(read, steps)
        self._refresh(self._names)

    def at_rest(self) -> Iterable[Tensor]:
        masters = [master for name, master in self._masters.items() if master is not self._names[name]]
        return [*masters, *super().at_rest()]

    @staticmethod
    def _split(parameter: nn.Parameter, home: torch.device, bf16: bool) -> Tensor:
        """Make a float32 master of ``parameter`` at ``home``, which gets the gradients of ``parameter`` from now on."""
        master = parameter.detach().to(home, torch.float32, copy=True)
        if bf16:
            parameter.data = parameter.data.to(torch.bfloat16)
        elsewhere = home != parameter.device

        def took_part(working: Tensor) -> None:
            # the first gradient of a step stays in place, unless the master is on another device
            if elsewhere or master.grad is not None:
                _hand_over(working, master)

        parameter.register_post_accumulate_grad_hook(took_part)  # type: ignore[no-untyped-call]
        return master

    def _hand_over_all(self) -> None:
        for name, working in self._names.items():
            master = self._masters[name]
            if working is not master and working.grad is not None:
                _hand_over(working, master)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if self._kernels is not None:
            return torch.tensor(math.sqrt(sum(map(self._kernels.square_sum, gradients))))
        norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in gradients]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients of this step by name, each at the working copy or at the master."""
        found = {name: master.grad if working.grad is None else working.grad for name, master, working in self._pairs()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, master and working copy. The last two may be the same tensor."""
        return ((name, self._masters[name], working) for name, working in self._names.items())

    def _buckets(self) -> Iterator[list[str]]:
        """Yield all names in buckets of about ``BUCKET_ELEMENTS`` elements."""
        some, elements = list[str](), 0
        for name, master in self._masters.items():
            some.append(name)
            elements += master.numel()
            if elements >= BUCKET_ELEMENTS:
                yield some
                some, elements = [], 0
        if some:
            yield some

    @torch.no_grad()
    def _refresh(self, names: Iterable[str]) -> None:
        """Round the masters into the working copies, unless they are the same tensors."""
        pairs = [(self._names[name], self._masters[name]) for name in names]
        pairs = [(working, master) for working, master in pairs if working is not master]
        if pairs:
            torch._foreach_copy_([working for working, _ in pairs], [master for _, master in pairs])

    def _add_up_gradients(self) -> None:
        """Sum the gradients over ranks, in a few large transfers."""
        for names in self._buckets():
            gradients = [gradient for name in names if (gradient := self._masters[name].grad) is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self.world.add_up("gradients", flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _fits_kernels(master: Tensor, working: Tensor) -> bool:
    """Whether the C kernel for CPUs can step these tensors."""
    plain = all(is_plain(x) and x.device.type == "cpu" and x.is_contiguous() for x in (master, working))
    return plain and (master.dtype, working.dtype) == (torch.float32, torch.bfloat16)


def _hand_over(working: Tensor, master: Tensor) -> None:
    """Add the gradient of a working copy to its master's."""
    assert working.grad is not None
    gradient = working.grad.to(master.device, master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    working.grad = None
