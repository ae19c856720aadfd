"""Feature maps in what a module puts out: in containers, as tokens; their strides."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, MutableSequence, Sequence, ValuesView
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .record import attributes_of


def feature_maps(output: Any) -> list[Tensor]:
    """The 4-D tensors ``(B, C, H, W)`` of a module's output, in its own order, each once.

    Understands a tensor, a list, tuple or deque, a mapping, a data class, an object with a
    ``feature_maps`` or ``tensors`` attribute (backbone outputs, nested tensors) or with maps as
    attributes, and any nesting of these, such as lists of pairs of a map and its mask
    ``(B, H, W)``.
    """
    return [x for x in tensors_in(output) if x.dim() == 4]


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order, each once."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, MutableSequence, ValuesView)):  # a deque is one, too
        inner = list(value)
    elif isinstance(value, (type, nn.Module)):
        return []
    elif hasattr(value, "feature_maps"):
        inner = [value.feature_maps]
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif isinstance(tensors := getattr(value, "tensors", None), Tensor):
        return [tensors]
    else:  # attributes of an object of somebody's own; not objects within that object
        held = () if callable(value) else attributes_of(value).values()
        inner = [x for x in held if isinstance(x, (Tensor, Mapping, list, tuple))]
    found = [x for item in inner for x in tensors_in(item)]
    if not torch.compiler.is_compiling():
        return list({id(x): x for x in found}.values())
    once: list[Tensor] = []
    for x in found:  # torch.compile would trace each id() anew, for every batch
        if not any(x is y for y in once):
            once.append(x)
    return once


def plain(x: Tensor) -> Tensor:
    """A tensor without the class that a user's tensors or parameters bring along.

    Distributed tensors are gathered; the gradient flows on. Others that are made of tensors stay.
    """
    if type(x) is Tensor:
        return x
    whole: Any = getattr(x, "full_tensor", None)
    if callable(whole):
        return cast(Tensor, whole())
    return x if is_traceable_wrapper_subclass(x) else x.as_subclass(Tensor)


def tokens_to_maps(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Turn the sequence of a multi-scale encoder back into maps.

    Args:
        tokens: ``(B, N, C)``, the cells of all levels one level after another, each row by row.
        shapes: ``(H_l, W_l)`` of each level in that order; ``N`` is the sum of ``H_l * W_l``.

    Returns:
        Views ``(B, C, H_l, W_l)`` into ``tokens``.

    Raises:
        ValueError: The sequence is not as long as the levels together.

    Example:
        >>> import torch
        >>> from global_kd.hooks import level_shapes, tokens_to_maps
        >>> shapes = level_shapes((100, 150), (8.0, 16.0, 32.0))
        >>> [tuple(x.shape) for x in tokens_to_maps(torch.zeros(1, 337, 6), shapes)]
        [(1, 6, 13, 19), (1, 6, 7, 10), (1, 6, 4, 5)]
    """
    cells = [height * width for height, width in shapes]
    if tokens.dim() != 3 or tokens.shape[1] != sum(cells):
        raise ValueError(
            f"tokens: expected (B, {sum(cells)}, C), the cells of levels {list(shapes)}, but got "
            f"{tuple(tokens.shape)}"
        )
    parts = tokens.transpose(1, 2).split(cells, dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def level_shapes(input_size: Sequence[int], strides: Sequence[float]) -> list[tuple[int, int]]:
    """``(H_l, W_l) = (⌈H / stride_l⌉, ⌈W / stride_l⌉)`` for a network input of ``(H, W)``."""
    height, width = input_size
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def finest_first(maps: Iterable[Tensor]) -> list[Tensor]:
    """Maps by the number of their cells."""
    return sorted(maps, key=lambda x: -x.shape[-1] * x.shape[-2])


def infer_strides(input_size: Sequence[int], sizes: Iterable[tuple[int, int]]) -> tuple[float, ...]:
    """Pixels of the network input per cell of each level, finest first.

    Twice the stride of the level before or the same, if that fits the map's size; small maps alone
    do not tell: 50 and 64 both explain two cells for 100 pixels. Else :func:`infer_stride`.
    """
    strides: list[float] = []
    for size in sizes:
        likely = [factor * stride for stride in strides[-1:] for factor in (2, 1)]
        fitting = [s for s in likely if level_shapes(input_size, [s]) == [size]]
        strides.append(fitting[0] if fitting else infer_stride(input_size, size))
    return tuple(strides)


def infer_stride(input_size: Sequence[int], map_size: Sequence[int]) -> float:
    """Pixels of the network input per cell.

    The exact ratio where the map divides the input; else the nearest power of two, if rounding (by
    less than two cells) or padding inside the network (to a multiple of 32, 64 or 128 pixels) made
    it uneven; else the whole number that patches without padding have: 14 for 18 cells of 256
    pixels; else, of sizes that nothing explains, the nearest power of two.
    """
    stride = explaining_stride(input_size, map_size)
    ratios = [i / m for i, m in zip(input_size, map_size, strict=True)]
    return 2.0 ** round(math.log2(max(ratios))) if stride is None else stride


def explaining_stride(input_size: Sequence[int], map_size: Sequence[int]) -> float | None:
    """As :func:`infer_stride`; ``None`` where neither division, rounding nor padding explains."""
    sides = list(zip(input_size, map_size, strict=True))
    ratios = [i / m for i, m in sides]
    if ratios[0] == ratios[1] and ratios[0].is_integer():
        return ratios[0]
    stride = 2 ** round(math.log2(max(ratios)))
    rounded = all(abs(i / stride - m) < 2 for i, m in sides)
    padded = any(all(-(-i // k) * k == m * stride for i, m in sides) for k in (32, 64, 128))
    if not rounded and not padded:
        patches = [s for s in range(1, math.ceil(min(ratios)) + 1)
                   if all(i // s == m for i, m in sides)]  # fmt: skip
        return float(patches[-1]) if patches else None
    return float(stride)
