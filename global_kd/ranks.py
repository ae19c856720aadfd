"""What the processes of one training job tell each other, over ``torch.distributed``.

Every method is collective: all ranks call it, in the same order.
"""

from collections.abc import Callable, Iterable, Sequence
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

        self._backends = _by_device(dist.get_backend_config()) if self.size > 1 else {}

    def place(self, device: torch.device) -> torch.device:
        """Where a tensor of this device must lie to be sent: there, if it can be sent from there.

        NCCL sends from GPUs, Gloo from the processor; a job started without a backend has both.
        """
        if self.size == 1:
            return device
        backend = self._backends.get(device.type)
        if backend is not None and (device.type == "cpu" or backend != "gloo"):
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def common(self, devices: Iterable[str | None]) -> torch.device:
        """One place for all ranks, from the device types of each (``None``: any)."""
        wanted = [x for x in devices if x not in (None, "cpu")]
        if not wanted or wanted[0] != "cuda":
            return self.place(torch.device("cpu"))
        return self.place(torch.device("cuda", torch.cuda.current_device()))

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
        there = self.place(where)
        sent = torch.bincount(to, minlength=self.size).to(there)
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent)
        splits = due.tolist(), sent.tolist()
        came = []
        for table in tables:
            flat = table.to(there, torch.uint8 if table.dtype == torch.bool else table.dtype)
            out = flat.new_empty(sum(splits[0]), *table.shape[1:])
            dist.all_to_all_single(out, flat.contiguous(), *splits)
            came.append(out.to(where, table.dtype))
        return came, torch.arange(self.size, device=where).repeat_interleave(due.to(where))

    def add(self, *tensors: Tensor) -> None:
        """Sum over ranks, in place."""
        for x in tensors if self.size > 1 else ():
            total = x.to(self.place(x.device))
            dist.all_reduce(total)
            x.copy_(total)

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks; gradients of all ranks flow back to each."""
        return x if self.size == 1 else _Total.apply(x, self)

    def same(self, *tensors: Tensor) -> None:
        """The values of rank 0, in place."""
        for x in tensors if self.size > 1 else ():
            first = x.to(self.place(x.device))
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


def _by_device(config: str) -> dict[str, str]:
    """From ``"cpu:gloo,cuda:nccl"`` the backend of each type of device."""
    pairs = (part.partition(":") for part in str(config).lower().split(",") if ":" in part)
    return {device.strip(): backend.strip() for device, _, backend in pairs}


class MeanGradients:
    """Averages the gradients of some parameters over the ranks, once at the end of every backward.

    Harmless beside ``DistributedDataParallel``: it comes after what that does at the end of a
    backward, and the mean of equal gradients is the same gradient.
    With several backwards before a step every one ends with the mean of what was summed so far.
    What is frozen, on all ranks at once, is left alone until it learns again.

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
        self._hooked: set[int] = set()  # by identity: copies of this have none on their parameters
        self.begin()

    def begin(self) -> None:
        """A new forward: forget a backward that broke off, hear of what learns from now on."""
        self._queued = False
        for p in self.parameters:
            if p.requires_grad and id(p) not in self._hooked:  # frozen ones take no hook
                p.register_post_accumulate_grad_hook(self._arrived)
                self._hooked.add(id(p))

    def _arrived(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # As DistributedDataParallel does: called when the whole backward is done, so that the
            # order in which gradients arrive may differ from rank to rank.
            self._queue(self._after_all)

    def _queue(self, callback: Callable[[], None]) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _after_all(self) -> None:
        """Go to the end of the queue once more.

        ``DistributedDataParallel`` queues its own wait when its last gradient has arrived, which is
        after our first. Until then gradients that are views of its buckets are being summed.
        """
        self._queue(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        gradients = []
        for p in self.parameters:
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        dtypes = [torch.promote_types(g.dtype, torch.float32) for g in gradients]
        flat = torch.cat([g.to(d).flatten() for g, d in zip(gradients, dtypes, strict=True)])
        self._ranks.add(flat)
        parts = (flat / self._ranks.size).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
