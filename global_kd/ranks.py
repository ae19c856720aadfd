"""What the processes of one training job tell each other, over ``torch.distributed``.

Every method is collective: all ranks call it, in the same order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The default process group, or one rank alone where there is none.

    Args:
        together: ``False``: this process is alone, whatever ``torch.distributed`` says.
    """

    def __init__(self, together: bool = True) -> None:
        here = together and dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size() if here else 1
        self.rank: int = dist.get_rank() if here else 0

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be sent: NCCL sends from GPUs, Gloo from the processor."""
        gpu = self.size > 1 and "nccl" in dist.get_backend()
        return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    def tell(self, value: Any, problem: Exception | None = None) -> list[Any]:
        """A small value of every rank, by rank.

        Args:
            value: Plain data.
            problem: What went wrong on this rank; then no rank goes on, and none waits for it.

        Raises:
            RuntimeError: On every rank, if any had a problem.
        """
        if self.size == 1:
            if problem is not None:
                raise problem
            return [value]
        told: list[Any] = [None] * self.size
        text = None if problem is None else f"{type(problem).__name__}: {problem}"
        dist.all_gather_object(told, (value, text))
        for rank, (_, said) in enumerate(told):
            if said is not None:
                raise RuntimeError(f"rank {rank} of {self.size} failed: {said}") from problem
        return [value for value, _ in told]

    def deal(self, tables: Sequence[Tensor], to: Tensor) -> tuple[list[Tensor], Tensor]:
        """Send row ``i`` of every table to rank ``to[i]``.

        Args:
            tables: ``(N, ...)`` each; number, dtype and further sizes are the same on all ranks.
            to: int64 ``(N,)``, in ascending order.

        Returns:
            The rows that came, by the rank they came from, and that rank, ``(N',)``.
        """
        if self.size == 1:
            return list(tables), torch.zeros_like(to)
        where = to.device
        sent = torch.bincount(to, minlength=self.size).to(self.device)
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent)
        splits = due.tolist(), sent.tolist()
        came = []
        for table in tables:
            flat = table.to(self.device, torch.uint8 if table.dtype == torch.bool else table.dtype)
            out = flat.new_empty(sum(splits[0]), *table.shape[1:])
            dist.all_to_all_single(out, flat.contiguous(), *splits)
            came.append(out.to(where, table.dtype))
        return came, torch.arange(self.size, device=where).repeat_interleave(due.to(where))

    def add(self, *tensors: Tensor) -> None:
        """Sum over ranks, in place."""
        for x in tensors if self.size > 1 else ():
            total = x.to(self.device)
            dist.all_reduce(total)
            x.copy_(total)

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks; gradients of all ranks flow back to each."""
        return x if self.size == 1 else _Total.apply(x, self)

    def same(self, *tensors: Tensor) -> None:
        """The values of rank 0, in place."""
        for x in tensors if self.size > 1 else ():
            first = x.to(self.device)
            dist.broadcast(first, src=0)
            x.copy_(first)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = x.clone()
        ranks.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        total = above[0].clone()
        ctx.ranks.add(total)
        return total, None


class MeanGradients:
    """Averages the gradients of some parameters over the ranks, once at the end of every backward.

    Harmless beside ``DistributedDataParallel``: the mean of equal gradients is the same gradient.
    With several backwards before a step every one ends with the mean of what was summed so far.

    Args:
        parameters: The same on all ranks; rank 0's values are taken over by all.
        ranks: Of the job.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], ranks: Ranks) -> None:
        self.parameters = list(parameters)
        self._ranks = ranks
        self._queued = False
        # `data`, so that this does not look like a step of the optimizer.
        ranks.same(*(p.data for p in self.parameters))
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def begin(self) -> None:
        """A new forward: forget a backward that broke off."""
        self._queued = False

    def _arrived(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # As DistributedDataParallel does: called when the whole backward is done, so that the
            # order in which gradients arrive may differ from rank to rank.
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        gradients = []
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        flat = torch.cat([g.float().flatten() for g in gradients])
        self._ranks.add(flat)
        parts = (flat / self._ranks.size).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
