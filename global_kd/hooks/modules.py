"""Modules of a model: without wrappers, by their path, in eval mode."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Of torch, timm and mmengine: an average of a model's weights over training.
_AVERAGES = (
    "AveragedModel",
    "ModelEmaV2",
    "ModelEmaV3",
    "ExponentialMovingAverage",
    "StochasticWeightAverage",
    "MomentumAnnealingEMA",
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", *_AVERAGES)  # and mmengine's MM...
WRAPPER_ATTRIBUTES = ("module", "_orig_mod")  # DataParallel, DDP; torch.compile


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside wrappers: ``DataParallel``, DDP, ``torch.compile``, averages."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__.endswith(_WRAPPERS):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def is_average(model: nn.Module) -> bool:
    """Whether a model is a wrapper that keeps an average of another, such as ``AveragedModel``."""
    return type(model).__name__.endswith(_AVERAGES) and "module" in model._modules


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a detector takes: 1 for grey ones, 4 with infrared.

    What its configuration says (transformers, Ultralytics), else its pixel statistics (Detectron2,
    MMDetection, torchvision), else its first convolution; 3 where there is none.
    """
    inner = unwrap(model)
    if isinstance(number := getattr(getattr(inner, "config", None), "num_channels", None), int):
        return number
    told = getattr(inner, "yaml", None)
    for key in ("channels", "ch"):
        if isinstance(told, dict) and isinstance(number := told.get(key), int):
            return number
    for owner, name in (
        (inner, "pixel_mean"),
        (getattr(inner, "data_preprocessor", None), "mean"),
        (getattr(inner, "transform", None), "image_mean"),
    ):
        mean = getattr(owner, name, None)
        if isinstance(mean, torch.Tensor) and mean.numel() > 1:
            return mean.numel()
        if isinstance(mean, (list, tuple)) and len(mean) > 1:
            return len(mean)
    cells = 1  # that were moved into channels in front of it
    for module in inner.modules():
        if isinstance(module, nn.PixelUnshuffle):
            cells = module.downscale_factor**2
        elif type(module).__name__.endswith("Focus"):  # YOLOX, early YOLOv5
            cells = 4
        number = getattr(module, "in_channels", None)
        if hasattr(module, "kernel_size") and isinstance(number, int) and number > 0:
            return number // cells
    return 3


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """What a detector calls its classes, in their order; ``None``: it does not say.

    Of transformers' configuration or an Ultralytics model.
    """
    inner = unwrap(model)
    told = getattr(getattr(inner, "config", None), "id2label", None)
    told = getattr(inner, "names", None) if told is None else told
    if isinstance(told, Mapping) and all(isinstance(i, int) for i in told):
        told = [told[i] for i in sorted(told)]
    if not isinstance(told, (list, tuple)) or not told:
        return None
    return tuple(str(name) for name in told)


def sharded_modules(model: nn.Module) -> list[Any]:
    """What FSDP2 (``fully_shard``) has taken over in a model, told by its methods."""
    return [m for m in model.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


def runs_whole(model: nn.Module) -> bool:
    """Whether a forward must run to its end: one that breaks off leaves parameters unsharded."""
    first = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    return first or bool(sharded_modules(model))


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path; wrapper prefixes (``module.``) are ignored.

    Raises:
        ValueError: No such module; the message lists the nearest names.
    """
    names = dict(unwrap(model).named_modules())
    parts = path.split(".")
    while parts[0] in WRAPPER_ATTRIBUTES and ".".join(parts) not in names:
        parts = parts[1:] or [""]
    if (plain := ".".join(parts)) in names:
        found: nn.Module = names[plain]
        return found
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or list(
        dict(unwrap(model).named_children())
    )
    raise ValueError(
        f"path: expected the name of a module of {type(unwrap(model)).__name__}, but got {path!r}; "
        f"nearest: {', '.join(near)}"
    )


def set_mode(model: nn.Module, training: bool) -> None:
    """``model.train(training)``, also where parts of it are exported, whose mode is fixed."""
    try:
        model.train(training)
    except NotImplementedError:  # what ExportedProgram.module() says
        for module in model.modules():
            module.training = training


def exported_in_train_mode(model: nn.Module) -> str | None:
    """The path of a part that was exported with batch norm or dropout in train mode."""
    # Which argument of an operation says so; torch 2.4 exports smaller operations.
    flags = {"batch_norm": 5, "dropout": 2, "native_dropout": 2}
    flags |= {"_native_batch_norm_legit": 5, "_native_batch_norm_legit_functional": 5}
    for path, module in model.named_modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
            place = flags.get(name)
            if place is not None and len(node.args) > place and node.args[place] is True:
                return str(path)
    return None


class evaluating:  # noqa: N801 - reads like a statement
    """Context in which models are in eval mode; every module's own mode comes back afterwards.

    What ran inside leaves no trace: modules compiled in place (``module.compile()``) run eagerly,
    or they would be traced with the hooks of a look around; and the casts of an autocast region
    that were made without gradient are forgotten, or (torch 2.4) the region's next forward would
    train nothing.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._models = models

    def __enter__(self) -> None:
        modules = [m for model in self._models for m in model.modules()]
        self._modes = [(m, m.training) for m in modules]
        self._compiled = [(m, call) for m in modules if (call := m._compiled_call_impl) is not None]
        for model in self._models:
            set_mode(model, False)
        for module, _ in self._compiled:
            module._compiled_call_impl = None

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
        for module, call in self._compiled:
            module._compiled_call_impl = call
        torch.clear_autocast_cache()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no part in the graph of what runs inside; its inputs do."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


@contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm in train mode normalises by its batch as ever, and does not remember it."""
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
