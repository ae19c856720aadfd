"""What the ranks of `test_coco_torchvision.py` do: `torchrun coco_ranks.py FOLDER DATA TEACHERS`.

Every rank trains two detectors and writes what it ends with to FOLDER/ARCH-RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

import coco_torchvision  # noqa: E402
from coco_options import parse  # noqa: E402
from processes import join  # noqa: E402

RUNS = {"fasterrcnn": "stream", "retinanet": "refresh"}


def options(arch, data, teachers, output):
    return [
        *("--quick", "--arch", arch, "--prototypes", RUNS[arch], "--data", str(data)),
        *("--teacher", str(Path(teachers) / f"{arch}.pt"), "--output", str(output / arch)),
    ]


def main(folder, data, teachers):
    with join() as place:
        for arch in RUNS:
            args = parse(options(arch, data, teachers, folder))
            training = coco_torchvision.run(args, place)
            ends = {
                "student": dict(training.student.named_parameters()),
                "adapters": training.kd.loss.adapters.state_dict(),
                "bank": dict(training.kd.loss.bank.named_buffers()),
                "steps": training.kd.loss.step,
                "detections": training.detections(),
            }
            torch.save(ends, folder / f"{arch}-{place.rank}.pt")
        dist.barrier()
        os._exit(0)  # with torch 2.4 Gloo may hang when its process group is destroyed


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
