"""Distil inside Ultralytics' own trainer.

    yolo detect train model=yolo11x.pt data=data.yaml  # the teacher: weights/best.pt
    python examples/ultralytics_trainer.py --data data.yaml --teacher best.pt

The student is trained, validated and saved by Ultralytics as always; its checkpoints load without
this package. Written for Ultralytics 8.4.
"""

from __future__ import annotations

import argparse

from ultralytics import YOLO

from global_kd.trainers.ultralytics import DistillationTrainer


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Ultralytics data set, a YAML file")
    parser.add_argument("--student", default="yolo11n.pt", help="checkpoint, or YAML")
    parser.add_argument("--teacher", required=True, help="checkpoint, trained on the same classes")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default=None)
    given = parser.parse_args(arguments)

    YOLO(given.student).train(
        # Global knowledge, each term as strong as YOLO's own loss; losses= names other methods.
        trainer=DistillationTrainer.of(given.teacher, share=1.0),
        data=given.data,
        epochs=given.epochs,
        imgsz=given.imgsz,
        batch=given.batch,
        device=given.device,
    )


if __name__ == "__main__":
    main()
