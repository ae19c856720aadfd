"""What the ranks of `test_ranks.py` do: `torchrun -m tests.ranks_at_work FOLDER SCENARIO ...`.

A scenario is a function that every rank calls; what it returns goes to FOLDER/SCENARIO-RANK.pt.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from global_kd import Distiller, GlobalKnowledgeLoss, PrototypeGenerator, Schedule, Targets
from global_kd.losses import CWD, FGD
from global_kd.ranks import MeanGradients, Ranks

CLASSES, LEVELS, CS, CT = 5, 2, 3, 4
BATCHES, STEPS, IMAGES = 12, 6, 2


# --- prototypes --------------------------------------------------------------------------------


def stream(with_ids: bool = True):
    """Batches of rows of the whole job.

    Instances come again later, with other student rows. Class 4 is in the last batch only, class 3
    in none.
    """
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(LEVELS, 60, CT, generator=g)
    labels = torch.randint(0, 3, (60,), generator=g)
    labels[57:] = 4
    boxes = torch.rand(60, 4, generator=g) * 20
    boxes[:, 2:] += boxes[:, :2] + 40
    for number in range(BATCHES):
        last = number == BATCHES - 1
        members = torch.arange(60) if last else torch.randperm(57, generator=g)[:9]
        student = torch.randn(LEVELS, 60, CS, generator=g)
        ids = members + 100 if with_ids else None
        targets = Targets(boxes[members], labels[members], torch.zeros_like(members), ids)
        yield student[:, members], teacher[:, members], targets


def nothing():
    none = torch.zeros(0, dtype=torch.int64)
    boxes = torch.zeros(0, 4)
    return torch.zeros(LEVELS, 0, CS), torch.zeros(LEVELS, 0, CT), Targets(boxes, none, none)


def mine(number: int, rank: int, size: int) -> bool:
    """Rank 0 of several never sees a box; the others share the batches unevenly."""
    return size == 1 or rank == 1 + min(number // 2, size - 2)


def new_generator() -> PrototypeGenerator:
    return PrototypeGenerator(CLASSES, 3, max_instances=8, seed=5)


def collected(rank: int, size: int, with_ids: bool = True) -> PrototypeGenerator:
    generator = new_generator()
    for number, rows in enumerate(stream(with_ids)):
        generator.add(*(rows if mine(number, rank, size) else nothing()))
    return generator


def prototypes(rank, size):
    return collected(rank, size).generate().state_dict()


def prototypes_without_ids(rank, size):
    return collected(rank, size, with_ids=False).generate().state_dict()


def prototypes_of_instances_seen_by_all(rank, size):
    """As where a sampler pads the data set: one instance on several ranks in one call."""
    generator = new_generator()
    for rows in stream():
        generator.add(*rows)
    return generator.generate().state_dict()


def prototypes_after_a_checkpoint_of_rank_0(rank, size):
    """It is written in the middle of the stream and loaded by every rank."""
    generator = new_generator()
    for number, rows in enumerate(stream()):
        if number == 7:
            generator.gather()
            state = [generator.state_dict() if rank == 0 else None]
            if size > 1:
                dist.broadcast_object_list(state)
            generator = PrototypeGenerator(CLASSES, 3, max_instances=8)
            generator.load_state_dict(state[0])
        generator.add(*(rows if mine(number, rank, size) else nothing()))
    return generator.generate().state_dict()


def prototypes_after_a_checkpoint_of_all_ranks(rank, size):
    """`torch.distributed.checkpoint` keeps of equal names that of one rank, nobody knows which."""
    import torch.distributed.checkpoint as dcp

    generator = new_generator()
    generator.expect(LEVELS, CS, CT)
    for number, rows in enumerate(stream()):
        if number == 7 and size > 1:
            generator.gather()
            whole = Ranks().tell(len(generator))[0]
            # Names are dealt out among the ranks: after a large one the next is another rank's.
            saved = {"first": torch.zeros(1_000_000), "generator": generator.state_dict()}
            dcp.save(saved, checkpoint_id=FOLDER / "dcp")
            generator = new_generator()
            generator.expect(LEVELS, CS, CT)
            state = {"generator": generator.state_dict()}
            dcp.load(state, checkpoint_id=FOLDER / "dcp")
            generator.load_state_dict(state["generator"])
            assert len(generator) == whole > 0  # the last batch would bring all of them back
        generator.add(*(rows if mine(number, rank, size) else nothing()))
    return generator.generate().state_dict()


def traffic(rank, size):
    """How many whole rows a rank holds, and how many it sends."""
    sent, deal = [], Ranks.deal

    def counting(self, tables, to):
        sent.append((len(tables), len(to)))
        return deal(self, tables, to)

    generator = collected(rank, size)
    Ranks.deal = counting
    try:
        generator.generate()
    finally:
        Ranks.deal = deal
    return {"held": len(generator), "sent": [rows for tables, rows in sent if tables == 7]}


def nobody_has_a_row(rank, size):
    try:
        new_generator().generate()
    except RuntimeError as error:
        return {"said": str(error)}


def one_rank_fails(rank, size):
    """All hear of it, none waits, and the job may go on."""
    generator = collected(rank, size)
    if rank == size - 1:
        generator._pursue = lambda rows: 1 / 0
    try:
        generator.generate()
    except RuntimeError as error:
        said = str(error)
    generator.__dict__.pop("_pursue", None)
    return {"said": said, "valid": generator.generate().valid}


def ranks_do_not_fit(rank, size):
    """Another seed would be another sample."""
    generator = PrototypeGenerator(CLASSES, seed=rank)
    generator.add(*next(iter(stream())))
    try:
        generator.generate()
    except ValueError as error:
        return {"said": str(error)}


# --- training ----------------------------------------------------------------------------------


class Detector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU())
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, images):
        return self.head(self.body(images))


def batch(step: int, rank: int):
    """Rank 1 has a step without a box."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.rand(IMAGES, 3, 48, 48, generator=g)
    count = 0 if (step, rank) == (2, 1) else 4
    corner = torch.rand(count, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + 8 + 16 * torch.rand(count, 2, generator=g)], dim=1)
    labels, image = (torch.randint(0, n, (count,), generator=g) for n in (3, IMAGES))
    return images, Targets(boxes, labels, image, torch.arange(count) + 100 * step + 10_000 * rank)


def train(rank: int, size: int, wrap: str, ranks: int, others=(), frozen=()):
    """`ranks` batches a step; alone, one after another with the mean of their losses.

    In the steps named as frozen no adapter learns.
    """
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(8)
    model = student
    if wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        fully_shard(student.body, mesh=mesh)
        fully_shard(student, mesh=mesh)
    elif size > 1:
        model = DistributedDataParallel(student)
    alone = ranks if size == 1 else 1
    loss = GlobalKnowledgeLoss(
        3,
        refresh_every=2 * alone,
        num_prototypes=2,
        min_side=0,
        relation=20,
        schedule=Schedule("constant"),
        seed=7 + rank,  # of the adapters, too: rank 0's count
    )
    paths = {"student_path": "body", "teacher_path": "body"}
    kd = Distiller(student, teacher, [loss, *others], example_inputs=(batch(0, 0)[0],), **paths)
    module = kd
    if size > 1 and wrap in ("both", "views", "static"):
        views = {"gradient_as_bucket_view": wrap != "both", "static_graph": wrap == "static"}
        # A bucket for each parameter, so that some are on their way when the backward ends.
        module = DistributedDataParallel(kd, bucket_cap_mb=1e-4, **views)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
    for step in range(STEPS):
        kd.requires_grad_(step not in frozen)
        for part in range(alone):
            images, targets = batch(step, part if size == 1 else rank)
            own = model(images).square().mean()
            total = own + sum(module(images, targets).values())
            (total / alone).backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole(x):
        return x.full_tensor() if hasattr(x, "full_tensor") else x.detach()

    return {
        "student": {k: whole(v) for k, v in student.state_dict().items()},
        "adapters": {k: v.detach() for k, v in kd.named_parameters()},
        "bank": dict(loss.bank.named_buffers()),
    }


def training(rank, size, ranks=None):
    return train(rank, size, "student", ranks or size)


def training_with_several_losses(rank, size, ranks=None):
    """Each with parameters of its own; one is weighed by the prototypes of another."""
    others = [CWD(adapter="conv1x1", seed=rank), FGD(robust=True, seed=rank)]
    return train(rank, size, "student", ranks or size, others)


def training_with_frozen_adapters(rank, size, ranks=None):
    """At the start, and once more after they have learned."""
    return train(rank, size, "student", ranks or size, frozen=(0, 1, 4))


def training_with_the_loss_wrapped(rank, size):
    return train(rank, size, "both", size)


def training_with_gradients_in_buckets(rank, size):
    return train(rank, size, "views", size)


def training_with_a_static_graph(rank, size):
    return train(rank, size, "static", size)


def gradients_in_buckets(rank, size):
    """Many large parameters: whoever touches a bucket that is being summed is found out."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    joined = MeanGradients(layers.parameters(), Ranks())
    ddp = DistributedDataParallel(layers, gradient_as_bucket_view=True, bucket_cap_mb=0.1)
    found = []
    for step in range(6):
        joined.begin()
        g = torch.Generator().manual_seed(10 * step + rank)
        ddp(torch.randn(8, 256, generator=g)).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in layers.parameters()]))
        alone = 0
        for other in range(size):
            layers.zero_grad(set_to_none=False)
            g = torch.Generator().manual_seed(10 * step + other)
            x = torch.randn(8, 256, generator=g)
            total = layers(x).square().sum() / size
            alone = alone + torch.cat(
                [p.flatten() for p in torch.autograd.grad(total, list(layers.parameters()))]
            )
        found[-1] = torch.stack([found[-1], alone])
        layers.zero_grad(set_to_none=False)
    return {"found": torch.stack(found)}


def training_sharded(rank, size):
    return train(rank, size, "fsdp", size)


# --- accidents ---------------------------------------------------------------------------------


def killed_in_a_refresh(rank, size):
    """After a checkpoint; the last rank dies while the others wait for its rows."""
    generator = collected(rank, size)
    torch.save(generator.state_dict(), FOLDER / f"checkpoint-{rank}.pt")
    dist.barrier()
    if rank == size - 1:
        Ranks.deal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    generator.generate()
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    place = dist.get_rank(), dist.get_world_size()
    for name in sys.argv[2:]:
        torch.save(globals()[name](*place), FOLDER / f"{name}-{place[0]}.pt")
        dist.barrier()
    # Gloo may hang or abort while it, or the interpreter around it, is taken down.
    os._exit(0)
