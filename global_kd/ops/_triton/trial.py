"""A small trial of every twin on a device, forward and backward, against its definition."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..dispatch import force
from ..imitation import imitation
from ..logits import divergences
from ..pool_boxes import pool_boxes
from ..relation import own_class, relate

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Boxes, channels, height, width, prototypes: small tiles, and the largest that a kernel takes.
_SIZES = {"small tiles": (9, 37, 13, 21, 11), "large tiles": (256, 65, 13, 21, 520)}


def trial(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``RuntimeError`` if a twin does not do its work.

    ``torch.cuda.OutOfMemoryError`` says nothing about the twins.

    Args:
        device: Where to try.
        dtype: Of the maps: float32, bfloat16 or float16.
    """
    for name, sizes in _SIZES.items():
        try:
            with _undisturbed():
                _try(device, dtype, *sizes)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of a class whose constructor may take anything
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Context without what the caller has asked for of ops and of tensors kept for a backward.

    The twins are deterministic, not all of the definitions are on a GPU; under checkpointing a
    backward would begin to recompute what the caller has only half done.
    """
    told = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield
    finally:
        torch.use_deterministic_algorithms(told, warn_only=only_warns)


def _try(
    device: torch.device,
    dtype: torch.dtype,
    count: int,
    channels: int,
    height: int,
    width: int,
    number: int,
) -> None:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Whatever the default dtype and device are.
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    corner = random(count, 2) * 60
    boxes = torch.cat([corner, corner + random(count, 2) * 60], dim=1)
    image, weights = torch.arange(count, device=device) % 2, random(count)
    prototypes = random(number, channels) - 0.5, random(number, channels) - 0.5
    own = own_class(torch.arange(number, device=device) % 3, torch.arange(count, device=device) % 4)
    tolerance = _TOLERANCES[dtype]
    student, teacher = (random(2, channels, height, width).to(dtype) for _ in range(2))
    rows = random(2, 2, number).to(dtype)
    results = []
    for form in ("triton", "definition"):
        x, y = student.clone().requires_grad_(), rows[0].clone().requires_grad_()
        off = torch.autocast(device.type, enabled=False)
        with force(form), torch.enable_grad(), off:
            fg, bg = imitation(x, teacher, boxes, image, 8.0, weights, "weights")
            pooled = pool_boxes(x, boxes, image, 8.0)
            soft = [divergences(8 * y, 8 * rows[1], 2.0, kind) for kind in ("softmax", "sigmoid")]
            related, omega = relate(
                pooled - 0.5,
                pooled.detach().roll(1, dims=1) - 0.5,
                *prototypes,
                pairs=~own,
                beta=0.2,
                own=own,
                robust=True,
            )
            total = 3 * fg + bg + 1e-3 * pooled.square().sum() + torch.stack(soft).sum() + related
            total.backward()
        gradients = [z.new_zeros(0) if z.grad is None else z.grad for z in (x, y)]
        results.append([fg, bg, pooled, *soft, related, omega, *gradients])
    names = ("foreground", "background", "pooled", "softmax", "sigmoid", "relation", "omega",
             "gradient", "gradient of logits")  # fmt: skip
    for name, twin, defined in zip(names, *results, strict=True):
        torch.testing.assert_close(
            twin,
            defined,
            rtol=tolerance,
            atol=tolerance * float(defined.detach().abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )
