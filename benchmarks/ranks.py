"""What a refresh of the prototypes costs on several ranks: `python -m benchmarks ranks`.

Processes of one machine, Gloo, one thread each: the bytes are what any machine would send, the
seconds are those of processes that share its cores. *Epoch*: the job sees the same
instances however many ranks there are; *full*: every rank holds a full sample of its own, the most
that it can hold.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from global_kd import PrototypeGenerator, Targets
from global_kd.ranks import Ranks

from .measure import say
from .suite import described

LEVELS, CHANNELS, PER_CLASS = 5, 256, 100


def run(
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> dict[str, Any]:
    sizes, kinds = ((1, 2), (3,)) if quick else ((1, 2, 4), (10, 40))
    channels, turns = (8, 1) if quick else (CHANNELS, 3)
    points, same = [], True
    for classes in kinds:
        for full in (False, True):
            banks = []
            for size in sizes:
                say(f"{size} ranks, {classes} classes, {'full samples' if full else 'one epoch'}")
                told = launch(size, classes, channels, full, turns)
                banks.append(told[0].pop("bank"))
                points.append({"ranks": size, "classes": classes, "full": full, **worst(told)})
            # One epoch is the same on any number of ranks; full samples hold more of it.
            same &= full or all(torch.equal(bank, banks[0]) for bank in banks)
    return {
        "size": f"{LEVELS} levels, {channels} channels in both spaces, {PER_CLASS} instances and "
        "10 prototypes a class",
        "points": points,
        "passed": same,
    }


def worst(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks."""
    return {name: max(each[name] for each in told) for name in told[0]}


def launch(size: int, classes: int, channels: int, full: bool, turns: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, classes, channels, full, turns, folder)
        mp.spawn(work, arguments, nprocs=size)  # type: ignore[no-untyped-call]
        files = [Path(folder) / f"{rank}.pt" for rank in range(size)]
        return [torch.load(file, weights_only=True) for file in files]


def work(
    rank: int, size: int, classes: int, channels: int, full: bool, turns: int, folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    sent: list[int] = []
    Ranks.deal = counted(Ranks.deal, sent, rank)  # type: ignore[method-assign]
    Ranks.add = summed(Ranks.add, sent, size)  # type: ignore[method-assign]
    seconds = []
    for turn in range(turns + 1):
        generator = PrototypeGenerator(classes, min_side=0, max_instances=PER_CLASS)
        fill(generator, channels, rank, size, full)
        len(generator)  # what is cut back in training is not the refresh's
        dist.barrier()
        started = time.perf_counter()
        bank = generator.generate()
        if turn:  # the first warms up
            seconds.append(time.perf_counter() - started)
    result = {"seconds": median(seconds), "sent": sum(sent) // (turns + 1), "bank": bank.teacher}
    torch.save(result | {"held": len(generator)}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    # With torch 2.4 Gloo's threads may hang while an interpreter is taken down.
    os._exit(0)


def fill(generator: PrototypeGenerator, channels: int, rank: int, size: int, full: bool) -> None:
    """Twice as many instances as a sample takes: shared out, or for each rank its own."""
    classes = generator.num_classes
    count = 2 * classes * PER_CLASS
    for start in range(0, count, 1000):
        ids = torch.arange(start, min(start + 1000, count)) + full * rank * count
        g = torch.Generator().manual_seed(int(ids[0]))
        rows = [torch.randn(LEVELS, len(ids), channels, generator=g) for _ in range(2)]
        mine = (ids // classes % size == rank) | full
        ids = ids[mine]
        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(len(ids), 1)
        targets = Targets(boxes, ids % classes, torch.zeros_like(ids), ids)
        generator.add(rows[0][:, mine], rows[1][:, mine], targets)


def counted(deal: Any, sent: list[int], rank: int) -> Any:
    def inner(self: Ranks, tables: Any, to: torch.Tensor) -> Any:
        away = int((to != rank).sum())
        sent.append(sum(away * (x[:1].nbytes if len(x) else 0) for x in tables))
        return deal(self, tables, to)

    return inner


def summed(add: Any, sent: list[int], size: int) -> Any:
    """A ring sends each tensor twice, but for its own part."""

    def inner(self: Ranks, *tensors: torch.Tensor) -> None:
        sent.append(sum(2 * x.nbytes * (size - 1) // size for x in tensors))
        add(self, *tensors)

    return inner


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"]), results["size"], ""]
    lines.append(f"{'classes':>7} {'samples':>9} {'ranks':>5} {'held':>7} {'sent MB':>8} {'s':>6}")
    for p in results["points"]:
        lines.append(
            f"{p['classes']:>7} {'full' if p['full'] else 'epoch':>9} {p['ranks']:>5} "
            f"{p['held']:>7} {p['sent'] / 1e6:>8.3g} {p['seconds']:>6.3g}"
        )
    return "\n".join(lines)
