"""A batch as a network saw it, and the same batch as another network takes it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..hooks import input_channels
from ..ops.transfer import numbers, sent


@dataclass(frozen=True)
class Pixels:
    """How a network's input is made from RGB in [0, 1]: ``x = (rgb * scale - mean) / std``.

    Any number of channels: grey and multispectral images, too.

    Args:
        mean: Per channel, in the network's own channel order; one number, or equal numbers, fit
            every number of channels.
        std: Likewise.
        scale: 1, or 255 where ``mean`` and ``std`` speak of bytes.
        bgr: Whether the network takes blue first; says nothing of a single channel.
        pad: Value of the network input where an image is padded.

    Example:
        >>> from global_kd import Pixels
        >>> detectron2_default = Pixels(mean=(103.53, 116.28, 123.675), scale=255, bgr=True)
        >>> imagenet = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        >>> zero_to_one = Pixels()
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1.0
    bgr: bool = False
    pad: float = 0.0

    def same_values(self, other: "Pixels") -> bool:
        """Whether both put the same numbers where the images are."""
        mine, theirs = (
            replace(x, mean=_shortest(x.mean), std=_shortest(x.std), pad=0.0) for x in (self, other)
        )
        return mine == theirs

    def convert(self, x: Tensor, to: "Pixels") -> Tensor:
        """Network input ``(B, C, H, W)`` in this format as one in another, in floating point.

        Raises:
            ValueError: Statistics of another number of channels, or more than three channels of
                which nobody knows how to reorder them.
        """
        x, channels = in_floating_point(x), x.shape[1]

        def column(name: str, pixels: Pixels) -> Tensor:
            values = _shortest(getattr(pixels, name))
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name}: expected {channels} numbers, one per channel of images "
                    f"{tuple(x.shape)}, but got {len(values)}: {values}; pass "
                    f"Pixels({name}=...) as student_pixels or teacher_pixels"
                )
            return numbers(values, x)[:, None, None]

        rgb = (x * column("std", self) + column("mean", self)) * (to.scale / self.scale)
        if self.bgr != to.bgr and channels > 1:
            if channels != 3:
                raise ValueError(
                    f"bgr: expected both detectors to take their {channels} channels in one order, "
                    "but one says BGR and the other RGB, which tells the order of 3 channels only; "
                    "pass Pixels(bgr=...) with the same value as student_pixels and teacher_pixels"
                )
            rgb = rgb.flip(1)
        return (rgb - column("mean", to)) / column("std", to)


def _shortest(values: Sequence[float]) -> tuple[float, ...]:
    """One number where all are equal: it stands for any number of channels."""
    return tuple(values)[:1] if len(set(values)) == 1 else tuple(values)


def in_floating_point(x: Tensor) -> Tensor:
    """Images of integers (bytes as they were loaded) with the same numbers in the default dtype."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


IMAGENET = Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class View:
    """A batch as a network saw it.

    Attributes:
        images: Network input ``(B, C, H, W)``, padded at the right and bottom.
        sizes: ``(height, width)`` of each image without its padding, as a sequence of pairs or an
            int tensor ``(B, 2)``; ``None``: the whole canvas.
    """

    images: Any
    sizes: Sequence[tuple[int, int]] | Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvas in pixels."""
        height, width = self.images.shape[-2:]
        return height, width

    def extents(self) -> Tensor:
        """Height and width of each image without its padding, on the device of the images.

        Integers ``(B, 2)``, or ``(1, 2)`` where all are as large as the canvas.
        """
        if isinstance(self.sizes, Tensor):
            return sent(self.sizes, self.images.device)
        sizes = [self.size] if self.sizes is None else self.sizes
        return sent(torch.tensor(sizes, device="cpu"), self.images.device)

    def inside(self) -> Tensor | None:
        """True where an image is, bool ``(B, H, W)``; ``None``: everywhere."""
        if self.sizes is None:
            return None
        (height, width), device = self.size, self.images.device
        sizes = self.extents()
        y = torch.arange(height, device=device) < sizes[:, :1]
        x = torch.arange(width, device=device) < sizes[:, 1:]
        return y[:, :, None] & x[:, None, :]


class Taker(Protocol):
    """What a detector takes: see :class:`global_kd.detectors.Detector`."""

    pixels: Pixels | None

    @property
    def divisor(self) -> int:
        """Its input is padded to multiples of this many pixels."""


def translate(view: View, source: Pixels | None, target: Taker, *, scale: float = 1.0) -> View:
    """A student's view as its teacher takes it.

    The values are converted from the student's pixel format to the teacher's (bytes stay bytes only
    where no value changes), the canvas is resized by ``scale``, and padded at the right and bottom
    to the teacher's ``divisor``; no box moves, but by the scale.

    Raises:
        ValueError: One side's pixel format is known and the other's is not.
    """
    convert = False
    if (source is None) != (target.pixels is None):
        unknown = "student" if source is None else "teacher"
        raise ValueError(
            f"{unknown}_pixels: expected the pixel format of the {unknown}'s input, since that of "
            f"the other detector is known ({source or target.pixels}); pass {unknown}_pixels="
            "Pixels(mean=..., std=...), or the other's if they are the same"
        )
    if source is not None and target.pixels is not None:
        convert = not source.same_values(target.pixels)
    x = view.images
    tensor = isinstance(x, Tensor) and x.dim() == 4
    if not tensor:
        if convert or scale != 1:
            raise ValueError(
                "images: expected a batch (B, C, H, W) to feed to a teacher with another pixel "
                f"format or scale, but got {type(x).__name__}"
            )
        return view
    pad = target.pixels.pad if target.pixels is not None else 0.0
    repaint = convert or (source is not None and source.pad != pad)
    down, right = (-side % target.divisor for side in (round(s * scale) for s in x.shape[-2:]))
    if convert or repaint or scale != 1 or ((down or right) and pad % 1):
        x = in_floating_point(x)
    if convert and source is not None and target.pixels is not None:
        x = source.convert(x, target.pixels)
    if repaint and (inside := view.inside()) is not None:
        x = torch.where(inside[:, None], x, pad)
    sizes = view.sizes
    if scale != 1:
        height, width = (round(side * scale) for side in view.size)
        x = functional.interpolate(
            x, (height, width), mode="bilinear", align_corners=False, antialias=scale < 1
        )
        if isinstance(sizes, Tensor):
            sizes = (sizes * scale).round().to(sizes.dtype)
        elif sizes is not None:
            sizes = [(round(h * scale), round(w * scale)) for h, w in sizes]
    if down or right:
        if sizes is None:
            sizes = [tuple(x.shape[-2:])] * len(x)
        x = functional.pad(x, (0, right, 0, down), value=pad)
    return view if x is view.images else View(x, sizes)


def in_colours(images: Any, model: nn.Module) -> Any:
    """Grey images in the three equal channels of a model that takes colours; all else as it is."""
    grey = isinstance(images, Tensor) and images.dim() == 4 and images.shape[1] == 1
    return images.expand(-1, 3, -1, -1) if grey and input_channels(model) == 3 else images


@contextmanager
def telling_channels(images: Any, model: nn.Module) -> Iterator[None]:
    """Context of a teacher's first look at a student's images: what fails may be their form."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if (
            isinstance(images, Tensor)
            and isinstance(error, RuntimeError)
            and not images.is_floating_point()
        ):
            raise ValueError(
                f"teacher: expected a detector that takes the student's {images.dtype} images, but "
                f"{type(model).__name__} does not ({error}); where they are bytes for the student "
                "and numbers in [0, 1] for the teacher, pass student_pixels=Pixels(scale=255) and "
                "teacher_pixels=Pixels(); else let a module convert them, as in self.net(x.float())"
            ) from error
        takes = input_channels(model)
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] in (1, takes):
            raise
        raise ValueError(
            f"teacher: expected a detector that takes the student's {images.shape[1]} channels, "
            f"but {type(model).__name__} takes {takes} ({error}); let a module make its images of "
            "the student's, as in self.net(x[:, :3]) (docs/own_detector.md)"
        ) from error


def fitting(images: Any, model: nn.Module) -> Any:
    """A tensor of images in the number type of a model's first parameter; all else as it is."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or not isinstance(images, Tensor) or not images.is_floating_point():
        return images
    return images.to(like.dtype)
