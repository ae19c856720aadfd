"""A small trial of every twin on a device, forward and backward, against its definition."""

import torch
from torch import Tensor

from ..dispatch import force
from ..imitation import imitation
from ..logits import divergences
from ..pool_boxes import pool_boxes
from ..relation import own_class, relate


def trial(device: torch.device) -> None:
    """Raise ``AssertionError``, or whatever a kernel raises, if a twin does not do its work."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Whatever the default dtype and device are.
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    corner = random(9, 2) * 60
    boxes = torch.cat([corner, corner + random(9, 2) * 60], dim=1)
    image, weights = torch.arange(9, device=device) % 2, random(9)
    prototypes = random(11, 37) - 0.5, random(11, 37) - 0.5
    own = own_class(torch.arange(11, device=device) % 3, torch.arange(9, device=device) % 4)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        student, teacher = random(2, 37, 13, 21).to(dtype), random(2, 37, 13, 21).to(dtype)
        results = []
        for form in ("triton", "definition"):
            x = student.clone().requires_grad_()
            off = torch.autocast(device.type, enabled=False)
            with force(form), torch.enable_grad(), off:
                fg, bg = imitation(x, teacher, boxes, image, 8.0, weights, "weights")
                pooled = pool_boxes(x, boxes, image, 8.0)
                logits = 8 * x[:, :, 3, 4], 8 * teacher[:, :, 3, 4]
                rows = [divergences(*logits, 2.0, kind) for kind in ("softmax", "sigmoid")]
                related, omega = relate(
                    pooled - 0.5,
                    pooled.detach().roll(1, dims=1) - 0.5,
                    *prototypes,
                    pairs=~own,
                    beta=0.2,
                    own=own,
                    robust=True,
                )
                total = (
                    3 * fg + bg + 1e-3 * pooled.square().sum() + torch.stack(rows).sum() + related
                )
                total.backward()
            gradient = x.new_zeros(0) if x.grad is None else x.grad
            results.append([fg, bg, pooled, *rows, related, omega, gradient])
        names = "foreground", "background", "pooled", "softmax", "sigmoid", "relation", "omega"
        for name, twin, defined in zip((*names, "gradient"), *results, strict=True):
            torch.testing.assert_close(
                twin,
                defined,
                rtol=tolerance,
                atol=tolerance * float(defined.abs().max()),
                msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
            )
