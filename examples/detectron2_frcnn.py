"""Distil a Detectron2 detector with Detectron2's own trainer: python examples/detectron2_frcnn.py

Without arguments a large Faster R-CNN learns to find handwritten digits, then a small one twice,
from the same start and the same batches: alone, and with the large one as its teacher. This takes
about ten minutes on one core. With `--config` and `--teacher-config` any two configs of its
model zoo take their places; data come from Detectron2's registry, everything else from the
configs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import nn

import global_kd
from global_kd.trainers.detectron2 import DistillationTrainer, num_classes
from workshop import storage
from workshop.coco_eval import METRICS
from workshop.detection_data import COCO_AREAS
from workshop.digit_scenes import CLASS_NAMES, DigitScenes, SceneSettings, make_scenes
from workshop.distillation import STUDIED, Knowledge
from workshop.report import row_name, table

ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

# Objects of 12 to 56 px in pictures of 96 px, on the processor. Everything else is the zoo's.
DIGITS: dict[str, Any] = {
    "DATASETS.TRAIN": ("digits_train",),
    "DATASETS.TEST": ("digits_validation",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.RANDOM_FLIP": "none",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "build_small_resnet_fpn_backbone",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[9, 13], [18, 25], [32, 40]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0, 1.8]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 48,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 150,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 150,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 1,
    "TEST.DETECTIONS_PER_IMAGE": 30,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.BASE_LR": 0.04,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
    "SOLVER.WARMUP_ITERS": 50,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",  # of each parameter
    "SOLVER.CHECKPOINT_PERIOD": 200,
    "SEED": 0,
}
# One block a stage, or two of four times the width. RES2_OUT_CHANNELS doubles with every stage.
STUDENT = {
    "MODEL.RESNETS.DEPTH": 8,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
}
TEACHER = {
    "MODEL.RESNETS.DEPTH": 14,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 48,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 128,
}

Distil = Callable[[nn.Module], global_kd.Distiller]


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_small_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A pyramid p2, p3, p4 on narrow residual stages, of Detectron2's parts.

    Its own builder knows ResNet-18 in full width only, and puts p5 and p6 on top.
    """
    resnet = cfg.MODEL.RESNETS
    width, blocks = resnet.RES2_OUT_CHANNELS, (resnet.DEPTH - 2) // 6
    before, stages = resnet.STEM_OUT_CHANNELS, []
    for stage in range(3):
        strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
        after = width * 2**stage
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=strides,
                in_channels=before,
                out_channels=after,
                norm=resnet.NORM,
            )
        )
        before = after
    names = ["res2", "res3", "res4"]
    stem = BasicStem(input_shape.channels, resnet.STEM_OUT_CHANNELS, norm=resnet.NORM)
    return FPN(ResNet(stem, stages, out_features=names), names, cfg.MODEL.FPN.OUT_CHANNELS)


class Trainer(DistillationTrainer):
    """The library's trainer with Detectron2's own COCO metrics, and a clock."""

    seconds = 0.0

    def run_step(self) -> None:
        """A step, timed."""
        began = time.perf_counter()
        super().run_step()
        self.seconds += time.perf_counter() - began

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Of what `train` evaluates at its end."""
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


def register_digits(settings: SceneSettings, cache: Path) -> None:
    """Digit scenes as pictures and COCO annotations, in Detectron2's registry."""
    for split in ("train", "validation"):
        folder = cache / "detectron2" / f"{split}-{settings.fingerprint()}"
        if not folder.is_dir():
            write_scenes(make_scenes(split, settings), folder)
        name = f"digits_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, str(folder / "annotations.json"), str(folder))


def write_scenes(scenes: DigitScenes, folder: Path) -> None:
    """A folder that is complete as soon as it exists."""
    storage.require_disk(folder.parent, 8192 * len(scenes), "the pictures")
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(len(scenes)):
        pixels, target = scenes.images[number].permute(1, 2, 0).numpy(), scenes.target(number)
        file = f"{number:05}.jpg"
        Image.fromarray(pixels).save(unfinished / file, quality=95)
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for (x1, y1, x2, y2), label in zip(
            target["boxes"].tolist(), target["labels"].tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": n, "name": name} for n, name in enumerate(CLASS_NAMES) if n]
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (unfinished / "annotations.json").write_text(json.dumps(content))
    unfinished.rename(folder)


def load_config(name: str, options: Sequence[Any]) -> CfgNode:
    """A config of the model zoo or of a file, with KEY VALUE options merged into it."""
    if Path(name).is_file():
        from detectron2.config import get_cfg

        cfg = get_cfg()
        cfg.merge_from_file(name)
    else:
        cfg = model_zoo.get_config(name)
    cfg.merge_from_list(list(options))
    return cfg


def flat(options: dict[str, Any]) -> list[Any]:
    """KEY VALUE pairs as Detectron2 takes them."""
    return [x for pair in options.items() for x in pair]


def train(
    cfg: CfgNode, label: str, distil: Distil | None = None, *, resume: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Train by the config; the model and its row of the table."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)  # the same start, the same batches
    trainer = Trainer(cfg, distiller=distil)
    trainer.resume_or_load(resume)
    steps = trainer.max_iter - trainer.start_iter
    trainer.train()  # evaluates at its end
    scores = trainer._last_eval_results["bbox"]
    percent = {name: scores.get(name, math.nan) for name in METRICS}
    row = {
        **{name: 0.0 if math.isnan(x) else x / 100 for name, x in percent.items()},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": round(trainer.seconds, 2) if steps else None,
        "iterations": cfg.SOLVER.MAX_ITER,
    }
    print(f"{label}: AP {100 * row['AP']:.1f} after {cfg.SOLVER.MAX_ITER} iterations", flush=True)
    return trainer.model, row


def distil_digits(args: argparse.Namespace) -> dict[str, Any]:
    """Teacher, student, student with its teacher; what `--json` gets."""
    torch.set_num_threads(1)  # small maps keep one busy; more would wait for each other
    settings = SceneSettings(*((64, 16) if args.quick else (4000, 300)))
    register_digits(settings, args.cache)
    iterations = {"teacher": 1200, "student": 1000}
    if args.quick:
        iterations = dict.fromkeys(iterations, 4)

    def config(role: str, folder: str) -> CfgNode:
        own, opts = (TEACHER, args.teacher_opts) if role == "teacher" else (STUDENT, args.opts)
        steps = {"SOLVER.MAX_ITER": iterations[role], "OUTPUT_DIR": str(args.output / folder)}
        return load_config(ZOO, [*flat({**DIGITS, **own, **steps}), *opts])

    teacher, row = train(config("teacher", "teacher"), "teacher", resume=args.resume)
    rows = {"teacher": row}
    terms = dataclasses.replace(STUDIED, refresh_every=2) if args.quick else STUDIED

    def distil(student: nn.Module) -> global_kd.Distiller:
        cfg = config("student", "student_gk")
        return terms.distiller(student, teacher, num_classes(cfg), cfg.SOLVER.MAX_ITER, cfg.SEED)

    for arm, way in (("none", None), ("gk", distil)):
        cfg = config("student", f"student_{arm}")
        _, rows[row_name(arm)] = train(cfg, row_name(arm), way, resume=args.resume)
    plain, slow = (rows[row_name(arm)]["seconds"] for arm in ("none", "gk"))
    small, medium = COCO_AREAS
    metrics = {
        "models": rows,
        "overhead": slow / plain - 1 if slow and plain else None,
        "areas": {"small": [0, small], "medium": [small, medium], "large": [medium, None]},
        "knowledge": dataclasses.asdict(terms),
        "scenes": dataclasses.asdict(settings),
        "options": {
            "digits": DIGITS,
            "teacher": TEACHER,
            "student": STUDENT,
            "teacher_opts": args.teacher_opts,
            "opts": args.opts,
        },
        "environment": {
            "global_kd": getattr(global_kd, "__version__", "unknown"),
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }
    print(table(metrics))
    print(
        f"One seed, {iterations['student']} iterations from random weights: this shows that the "
        "parts work together, not what distillation is worth."
    )
    return metrics


def distil_configs(args: argparse.Namespace) -> dict[str, Any]:
    """One student of a config, with the teacher of another; what `--json` gets."""
    cfg = load_config(args.config, args.opts)
    cfg.OUTPUT_DIR = str(args.output)
    if args.student_weights is not None:
        cfg.MODEL.WEIGHTS = args.student_weights
    teacher_cfg = load_config(args.teacher_config, args.teacher_opts)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    weights = args.teacher_weights
    if weights is None:
        if Path(args.teacher_config).is_file():
            raise SystemExit("--teacher-config is a file: give --teacher-weights, too.")
        weights = model_zoo.get_checkpoint_url(args.teacher_config)
    teacher = build_model(teacher_cfg)
    DetectionCheckpointer(teacher).load(weights)
    # Objects as large as COCO's: the paper's sizes.
    terms = Knowledge(finest_scale=None, min_side=30.0, refresh_every=1000)

    def distil(student: nn.Module) -> global_kd.Distiller:
        steps = cfg.SOLVER.MAX_ITER
        return terms.distiller(student, teacher, num_classes(cfg), steps, max(0, cfg.SEED))

    _, row = train(cfg, row_name("gk"), distil, resume=args.resume)
    return {"models": {row_name("gk"): row}, "knowledge": dataclasses.asdict(terms)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Distil a Detectron2 detector; without options, a small one on digit scenes."
    )
    parser.add_argument("--config", help=f"student: of the model zoo ({ZOO}) or a file")
    parser.add_argument("--teacher-config", help="likewise")
    parser.add_argument("--teacher-weights", help="file or URL; default: the zoo's trained model")
    parser.add_argument("--student-weights", help="file or URL; default: MODEL.WEIGHTS")
    parser.add_argument("--teacher-opts", nargs="+", default=[], metavar="KEY VALUE")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="of the student")
    parser.add_argument("--output", type=Path, default=Path("runs/detectron2_frcnn"))
    parser.add_argument("--cache", type=Path, default=storage.cache_folder(), help="for pictures")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see it run")
    args = parser.parse_args(arguments)
    if (args.config is None) != (args.teacher_config is None):
        raise SystemExit("Give --config and --teacher-config, or neither.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    metrics = distil_digits(args) if args.config is None else distil_configs(args)
    if args.json is not None:
        args.json.write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"Weights and logs are in {args.output}.")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # --resume continues from the last checkpoint
        main()
