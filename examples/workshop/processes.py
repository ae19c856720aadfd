"""This process among those of a job that `torchrun` started, or alone."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many, and its device. Methods are collective: all ranks call them."""

    rank: int
    size: int
    device: torch.device

    @property
    def device_name(self) -> str:
        """Of the GPU, or "cpu"."""
        gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if gpu else self.device.type

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DDP, which starts from rank 0's weights; alone, the model itself."""
        if self.size == 1:
            return model
        gpu = self.device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[self.device] if gpu else None)

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Rank 0's: where batch norm is trained, every rank has running statistics of its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def join() -> Iterator[Place]:
    """The place of this process; all ranks leave the block together, or `torchrun` ends them."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size == 1:
        yield Place(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # While rank 0 downloads weights or scores detections, the others wait.
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    yield Place(dist.get_rank(), size, device)
    dist.destroy_process_group()  # not after an error: it might wait for ranks that never come
