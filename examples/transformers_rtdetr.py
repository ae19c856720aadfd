"""Distil an RT-DETR of transformers: python examples/transformers_rtdetr.py

Twice: in a plain loop, and with transformers' own `Trainer`. By default two tiny detectors of
random weights and drawn pictures, so that it runs anywhere in seconds; names of trained ones go to
`--student` and `--teacher` (PekingU/rtdetr_r18vd, PekingU/rtdetr_r101vd). Both must know the same
classes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    TrainingArguments,
)

from global_kd import Distiller
from global_kd.losses import FRS, PKD
from global_kd.trainers.transformers import DistillationTrainer


def tiny(layers: int) -> nn.Module:
    """An RT-DETR of random weights, two classes."""
    backbone = RTDetrResNetConfig(  # type: ignore[call-arg]
        embedding_size=16,
        hidden_sizes=[16, 16, 32, 32],
        depths=[layers] * 4,
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(  # type: ignore[call-arg]
        backbone_config=backbone,
        encoder_in_channels=[16, 32, 32],
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        feat_strides=[8, 16, 32],
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_queries=20,
        num_denoising=0,
        num_labels=2,
    )
    return RTDetrForObjectDetection(config)


def scenes(number: int, side: int) -> list[dict[str, Any]]:
    """Pictures with one bright rectangle; yours come from a data set and an image processor."""
    random, items = torch.Generator().manual_seed(0), []
    for index in range(number):
        centre = torch.rand(2, generator=random) * 0.4 + 0.3
        pixels = torch.rand(3, side, side, generator=random) * 0.3
        low, high = ((centre - 0.2) * side).long().tolist(), ((centre + 0.2) * side).long().tolist()
        pixels[index % 2, low[1] : high[1], low[0] : high[0]] += 0.6
        box = torch.cat([centre, torch.full((2,), 0.4)])  # centre and size, in parts of the picture
        labels = {"class_labels": torch.tensor([index % 2]), "boxes": box[None]}
        items.append({"pixel_values": pixels, "labels": labels})
    return items


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as the detector takes it."""
    pixels = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": pixels, "labels": [dict(item["labels"]) for item in items]}


def plain_loop(
    student: nn.Module, teacher: nn.Module, data: list[dict[str, Any]], steps: int
) -> dict[str, float]:
    """The calls in a loop of your own; returns the terms of the last step."""
    kd = Distiller(student, teacher, [FRS(total_steps=steps, warmup_steps=0), PKD()])
    optimizer = torch.optim.AdamW([*student.parameters(), *kd.parameters()], lr=1e-4)
    loader: Any = DataLoader(data, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    terms: dict[str, Tensor] = {}
    student.train()
    for _, batch in zip(range(steps), itertools.cycle(loader), strict=False):
        loss = student(**batch).loss
        terms = kd(batch)
        loss = loss + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        optimizer.step()
    kd.detach()
    return {name: float(term.detach()) for name, term in terms.items()}


def with_trainer(
    student: nn.Module, teacher: nn.Module, data: list[dict[str, Any]], steps: int, output: Path
) -> float:
    """The same with transformers' `Trainer`; returns the detection loss on the pictures."""
    settings = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_grad_norm=0.1,
        remove_unused_columns=False,  # as for any detector
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    trainer = DistillationTrainer(
        student,
        settings,
        teacher=teacher,
        losses=[FRS(warmup_steps=0), PKD()],  # left out: global knowledge
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model(str(output))  # the student alone, for `from_pretrained`
    return float(trainer.evaluate(ignore_keys=[])["eval_loss"])


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], float]:
    """Read the command line and train both ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", help="name or folder; default: tiny, of random weights")
    parser.add_argument("--teacher", help="likewise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/transformers_rtdetr"))
    args = parser.parse_args(arguments)

    def detector(name: str | None, layers: int) -> nn.Module:
        return RTDetrForObjectDetection.from_pretrained(name) if name else tiny(layers)

    torch.manual_seed(0)
    teacher = detector(args.teacher, 2)
    data = scenes(16, side=128 if args.student is None else 640)
    terms = plain_loop(detector(args.student, 1), teacher, data, args.steps)
    print("plain loop:", ", ".join(f"{name} {value:.3f}" for name, value in terms.items()))
    loss = with_trainer(detector(args.student, 1), teacher, data, args.steps, args.output)
    print(f"Trainer: detection loss {loss:.3f}; the student is in {args.output}.")
    return terms, loss


if __name__ == "__main__":
    main()
