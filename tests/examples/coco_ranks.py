"""What the ranks of `test_coco_torchvision.py` do: `torchrun coco_ranks.py FOLDER DATA TEACHERS`.

Every rank trains two detectors and writes what it ends with to FOLDER/ARCH-RANK.pt, and what it
ends with after an interruption to FOLDER/resumed/ARCH-RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

import coco_torchvision  # noqa: E402
from workshop.coco_options import parse  # noqa: E402
from workshop.processes import join  # noqa: E402

RUNS = {"fasterrcnn": "stream", "retinanet": "refresh"}


def options(arch, data, teachers, output):
    return [
        *("--quick", "--arch", arch, "--prototypes", RUNS[arch], "--data", str(data)),
        *("--teacher", str(Path(teachers) / f"{arch}.pt"), "--output", str(output / arch)),
    ]


def stop_in_the_second_epoch(arguments, place):
    """A run of which some of the second epoch is lost."""
    whole_epoch = coco_torchvision.Training.train_epoch

    def train_epoch(self, number):
        if number == 0:
            return whole_epoch(self, number)
        self.step(*next(self.batches(number, 0)))
        raise KeyboardInterrupt

    coco_torchvision.Training.train_epoch = train_epoch
    try:
        coco_torchvision.run(parse(arguments), place)
    except KeyboardInterrupt:
        return
    finally:
        coco_torchvision.Training.train_epoch = whole_epoch
    raise AssertionError("The run went on.")


def main(folder, data, teachers):
    (folder / "resumed").mkdir(exist_ok=True)
    with join() as place:
        for arch in RUNS:
            arguments = options(arch, data, teachers, folder)
            write(coco_torchvision.run(parse(arguments), place), folder)
            arguments = options(arch, data, teachers, folder / "resumed")
            stop_in_the_second_epoch(arguments, place)
            write(coco_torchvision.run(parse([*arguments, "--resume"]), place), folder / "resumed")
        dist.barrier()
        os._exit(0)  # with torch 2.4 Gloo may hang when its process group is destroyed


def write(training, folder):
    ends = {
        "student": dict(training.student.named_parameters()),
        "adapters": training.kd.loss.adapters.state_dict(),
        "bank": dict(training.kd.loss.bank.named_buffers()),
        "steps": training.kd.loss.step,
        "detections": training.detections(),
    }
    torch.save(ends, folder / f"{training.args.arch}-{training.place.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
