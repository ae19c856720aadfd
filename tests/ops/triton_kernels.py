"""Every Triton kernel, forward and backward, against float64. `test_triton.py` runs this file.

By hand: `TRITON_INTERPRET=1 pytest tests/ops/triton_kernels.py`, without the variable on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("triton", reason="needs triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from global_kd.ops._triton import cosine as twin_cosine
from global_kd.ops._triton import imitation as twin_imitation
from global_kd.ops._triton import logits as twin_logits
from global_kd.ops._triton import pool_boxes as twin_pool
from global_kd.ops._triton import relation as twin_relation
from global_kd.ops._triton.pool_boxes import _parts as twin_parts
from global_kd.ops.dispatch import force
from global_kd.ops.relation import own_class, relate
from tests.watch import Graphs, NoFloat64, NoHostSync

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "sliced", "transposed"]
SHAPES = [
    pytest.param((1, 1, 1, 1), id="one cell"),
    pytest.param((2, 3, 5, 7), id="odd sizes, two images, less than a tile"),
    pytest.param((2, 16, 8, 8), id="powers of two: nothing is masked"),
    pytest.param((3, 2, 1, 70), id="one row, more cells than a tile of the backward"),
    pytest.param((1, 130, 3, 11), id="more channels than the widest tile"),
    pytest.param((1, 2, 26, 40), id="more cells than the widest tile"),
    pytest.param((2, 3, 9, 1), id="one column: boxes of one row next to each other in memory"),
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in memory of another order."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        b, c, h, w = x.shape
        y = torch.full((b + 1, c + 2, h + 1, w + 3), float("nan"), dtype=x.dtype, device=x.device)
        y[:b, 1 : c + 1, :h, 2 : w + 2] = x
        return y[:b, 1 : c + 1, :h, 2 : w + 2]
    return x


def boxes_on(size: tuple[int, int, int], count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cell ranges that overlap, in random order of images; the last image has none where it can."""
    batch, height, width = size
    g = torch.Generator().manual_seed(seed)
    x1, y1 = (torch.randint(0, n, (count,), generator=g) for n in (width, height))
    w, h = (1 + torch.randint(0, n, (count,), generator=g) for n in (width, height))
    cells = torch.stack([x1, y1, (x1 + w).clamp(max=width), (y1 + h).clamp(max=height)], dim=1)
    if count:
        cells[0] = torch.tensor([0, 0, width, height])  # the whole map
        cells[-1] = torch.tensor([width - 1, height - 1, width, height])  # its last cell
    image_index = torch.randint(0, max(1, batch - 1), (count,), generator=g)
    return cells.to(DEVICE), image_index.to(DEVICE)


def close(actual: Tensor, exact: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Within float32 rounding of the float64 value, then within two steps of its own dtype.

    Two, because a gradient is rounded again when it is scaled, and the interpreter cuts bfloat16
    off where a GPU rounds it.
    """
    if actual.dtype in (torch.bfloat16, torch.float16):
        rtol = rtol + 2 * torch.finfo(actual.dtype).eps
        atol = atol + torch.finfo(actual.dtype).smallest_normal
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


# --- paint -------------------------------------------------------------------------------------


def painted(weights: Tensor, cells: Tensor, image_index: Tensor, size) -> Tensor:
    canvas = torch.zeros(size, device=weights.device)
    for w, (x1, y1, x2, y2), i in zip(weights.float(), cells.tolist(), image_index.tolist()):
        canvas[i, y1:y2, x1:x2] = canvas[i, y1:y2, x1:x2].maximum(w)
    return canvas


@pytest.mark.parametrize("count", [0, 1, 5, 40], ids="none one some {40:more-than-a-block}".split())
@pytest.mark.parametrize("shape", SHAPES)
def test_paint_takes_the_largest_weight(shape, count):
    size = (shape[0], *shape[2:])
    cells, image_index = boxes_on(size, count)
    weights = random(count).abs()
    exact = painted(weights, cells, image_index, size)
    assert torch.equal(twin_imitation.paint_boxes(weights, cells, image_index, size), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_paint_of_any_dtype(dtype):
    cells, image_index = boxes_on((2, 6, 5), 4)
    weights = random(8, dtype=dtype).abs()[::2]
    canvas = twin_imitation.paint_boxes(weights, cells, image_index, (2, 6, 5))
    assert canvas.dtype == torch.float32
    assert torch.equal(canvas, painted(weights, cells, image_index, (2, 6, 5)))


def test_paint_of_no_images():
    none = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    assert twin_imitation.paint_boxes(random(0), none, none[:, 0], (0, 4, 4)).shape == (0, 4, 4)


# --- imitation ---------------------------------------------------------------------------------

SCALES = (0.37, 1.9)


def cell_maps(size, seed: int = 5) -> tuple[Tensor, Tensor]:
    """(weight, member): a weight of 0 inside is not background, none outside."""
    member = (random(*size, seed=seed) > 0).float()
    weight = member * random(*size, seed=seed + 1).clamp(min=0)
    return weight, member


def scales(values=SCALES) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, device=DEVICE) for v in values)


def exact_imitation(student, teacher, weight, member, above, values=SCALES):
    """Both terms and the student's gradient, float64."""
    weight, outside = weight.double()[:, None], 1 - member.double()[:, None]
    d = student.detach().double() - teacher.double()
    terms = values[0] * (weight * d * d).sum(), values[1] * (outside * d * d).sum()
    return terms, 2 * d * (above[0] * values[0] * weight + above[1] * values[1] * outside)


def imitate(student, teacher, weight, member, above, values=SCALES, **kwargs):
    terms = twin_imitation.imitation_terms(student, teacher, weight, member, *scales(values))
    loss = sum(a * x for a, x in zip(above, terms))
    return terms, torch.autograd.grad(loss, student, **kwargs)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_imitation(shape, dtype, layout):
    student = laid_out(random(*shape, dtype=dtype), layout).requires_grad_()
    teacher = laid_out(random(*shape, seed=1, dtype=dtype), layout)
    weight, member = cell_maps((shape[0], *shape[2:]))
    above = (-1.3, 0.6)  # a random upstream gradient
    terms, grad = imitate(student, teacher, weight, member, above)
    exact, exact_grad = exact_imitation(student, teacher, weight, member, above)
    for term, value in zip(terms, exact):
        assert term.dtype == torch.float32 and term.shape == ()
        close(term, value)
    assert grad.dtype == dtype
    close(grad, exact_grad)


def test_imitation_of_maps_that_differ_in_dtype_and_layout():
    student = random(2, 5, 4, 6, dtype=torch.bfloat16).requires_grad_()
    teacher = laid_out(random(2, 5, 4, 6, seed=1), "channels last")
    weight, member = cell_maps((2, 4, 6))
    terms, grad = imitate(student, teacher, weight, member, (1.0, 2.0))
    exact, exact_grad = exact_imitation(student, teacher, weight, member, (1.0, 2.0))
    close(torch.stack(terms), torch.stack(exact))
    close(grad, exact_grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_imitation_with_many_blocks_of_channels_for_each_program(layout, monkeypatch):
    """As on maps so large that tiles alone keep a GPU busy; the last block is not full."""
    monkeypatch.setattr(twin_imitation, "_PROGRAMS", 1)
    monkeypatch.setattr(twin_imitation, "_TILE", 64)
    student = laid_out(random(2, 70, 4, 6), layout).requires_grad_()
    teacher, (weight, member) = random(2, 70, 4, 6, seed=1), cell_maps((2, 4, 6))
    terms, grad = imitate(student, teacher, weight, member, (1.0, 2.0))
    exact, exact_grad = exact_imitation(student, teacher, weight, member, (1.0, 2.0))
    close(torch.stack(terms), torch.stack(exact))
    close(grad, exact_grad)


@settings(max_examples=10)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 99),
    st.sampled_from(LAYOUTS),
)
def test_imitation_of_any_size(shape, seed, layout):
    student = laid_out(random(*shape, seed=seed), layout).requires_grad_()
    teacher = random(*shape, seed=seed + 1)
    weight, member = cell_maps((shape[0], *shape[2:]), seed)
    above = random(2, seed=seed).tolist()
    terms, grad = imitate(student, teacher, weight, member, above)
    exact, exact_grad = exact_imitation(student, teacher, weight, member, above)
    close(torch.stack(terms), torch.stack(exact), atol=1e-5)
    close(grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_imitation_backward_twice(dtype):
    """The second backward, with other upstream gradients, sees what the first saw."""
    student = random(2, 3, 4, 5, dtype=dtype).requires_grad_()
    teacher = random(2, 3, 4, 5, seed=1, dtype=dtype)
    weight, member = cell_maps((2, 4, 5))
    terms = twin_imitation.imitation_terms(student, teacher, weight, member, *scales())
    for above, keep in (
        ((2.0, 3.0), True),
        ((0.0, 5.0), True),
        ((1.0, 1.0), True),
        ((7, 0), False),
    ):
        loss = above[0] * terms[0] + above[1] * terms[1]
        (grad,) = torch.autograd.grad(loss, student, retain_graph=keep)
        close(grad, exact_imitation(student, teacher, weight, member, above)[1])


def kept_by(loss_of) -> tuple[Tensor, list[Tensor]]:
    """The loss and what its graph keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        return loss_of(), kept


@pytest.mark.parametrize("above", [1.0, 3.0])
def test_imitation_backward_makes_no_second_map(above):
    """The one gradient of the map's size is written in the forward, and scaled in place at most."""
    if not hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"):
        pytest.skip("needs torch 2.5")
    student = random(2, 3, 4, 5).requires_grad_()
    arguments = (random(2, 3, 4, 5, seed=1), *cell_maps((2, 4, 5)), *scales())
    loss, kept = kept_by(lambda: sum(twin_imitation.imitation_terms(student, *arguments)))
    (map_,) = (x for x in kept if x.shape == student.shape)
    (grad,) = torch.autograd.grad(loss, student, torch.tensor(above, device=DEVICE))
    assert grad.data_ptr() == map_.data_ptr()
    assert grad.grad_fn is None and not grad.requires_grad


def test_imitation_adds_up_in_grad():
    """Two losses on one map: the engine adds gradients, none of which may be another's memory."""
    student = random(2, 3, 4, 5).requires_grad_()
    arguments = (random(2, 3, 4, 5, seed=1), *cell_maps((2, 4, 5)), *scales())
    for factor in (1, 2):
        sum(twin_imitation.imitation_terms(factor * student, *arguments)).backward()
    first = student.grad.clone()
    student.grad = None
    sum(sum(twin_imitation.imitation_terms(f * student, *arguments)) for f in (1, 2)).backward()
    torch.testing.assert_close(student.grad, first)


def test_imitation_in_float16_survives_a_loss_scaler():
    """A mean over many cells, times 65 536: neither factor alone fits the gradient's dtype."""
    student = random(1, 2, 4, 4, dtype=torch.float16).requires_grad_()
    teacher = random(1, 2, 4, 4, seed=1, dtype=torch.float16)
    weight, member = cell_maps((1, 4, 4))
    values, above = (1e-9, 2e-9), (2.0**24, 2.0**24)
    _, grad = imitate(student, teacher, weight, member, above, values)
    exact = exact_imitation(student, teacher, weight, member, above, values)[1]
    torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=1e-7)


def test_imitation_without_a_gradient_writes_no_map():
    student, teacher = random(1, 2, 3, 4), random(1, 2, 3, 4, seed=1)
    weight, member = cell_maps((1, 3, 4))
    terms = twin_imitation.imitation_terms(student, teacher, weight, member, *scales())
    exact, _ = exact_imitation(student, teacher, weight, member, (1, 1))
    close(torch.stack(terms), torch.stack(exact))
    assert not terms[0].requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3)], ids=["no images", "no channels"])
def test_imitation_of_nothing(shape):
    student = random(*shape).requires_grad_()
    cells = random(shape[0], 3, 3)
    terms, grad = imitate(student, random(*shape), cells, cells, (1.0, 1.0))
    assert [x.item() for x in terms] == [0, 0] and grad.shape == shape


def test_imitation_is_deterministic():
    student, teacher = random(2, 20, 40, 40).requires_grad_(), random(2, 20, 40, 40, seed=1)
    maps = cell_maps((2, 40, 40))
    first, second = (imitate(student, teacher, *maps, (1.0, 1.0)) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_second_derivatives_are_refused():
    student = random(1, 2, 3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        imitate(student, random(1, 2, 3, 4), *cell_maps((1, 3, 4)), (1.0, 1.0), create_graph=True)
    logits = random(3, 4).requires_grad_()
    rows = [
        twin_logits.logit_rows(logits, random(3, 4, seed=1), 2.0),
        twin_cosine.unit_rows(logits),
        twin_relation.relation_rows(logits, random(3, 4), None, None, None, False, 1.0)[0],
    ]
    for out in rows:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), logits, create_graph=True)


# --- pooling -----------------------------------------------------------------------------------


def exact_pool(features: Tensor, cells: Tensor, image_index: Tensor) -> Tensor:
    rows = [
        features[i, :, y1:y2, x1:x2].double().mean(dim=(1, 2))
        for i, (x1, y1, x2, y2) in zip(image_index.tolist(), cells.tolist())
    ]
    return torch.stack(rows) if rows else random(0, features.shape[1]).double()


def exact_spread(above: Tensor, cells: Tensor, image_index: Tensor, size) -> Tensor:
    grad = torch.zeros(size, dtype=torch.float64, device=above.device)
    for g, i, (x1, y1, x2, y2) in zip(above.double(), image_index.tolist(), cells.tolist()):
        grad[i, :, y1:y2, x1:x2] += g[:, None, None] / ((x2 - x1) * (y2 - y1))
    return grad


def check_pool(features: Tensor, cells: Tensor, image_index: Tensor, seed: int = 9) -> None:
    features.requires_grad_()
    pooled = twin_pool.pool_cells(features, cells, image_index)
    assert pooled.dtype == torch.float32
    # float32 though the input is half precision: it is read exactly.
    torch.testing.assert_close(
        pooled.double(), exact_pool(features.detach(), cells, image_index), rtol=1e-5, atol=1e-6
    )
    above = random(*reversed(pooled.shape), seed=seed).T  # not contiguous
    for _ in range(2):
        (grad,) = torch.autograd.grad(pooled, features, above, retain_graph=True)
        assert grad.dtype == features.dtype
        close(grad, exact_spread(above, cells, image_index, features.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pool(shape, dtype, layout):
    cells, image_index = boxes_on((shape[0], *shape[2:]), 7)
    check_pool(laid_out(random(*shape, dtype=dtype), layout), cells, image_index)


@pytest.mark.parametrize("count", [0, 1, 33], ids=["none", "one", "more than a block"])
def test_pool_of_any_number_of_boxes(count):
    cells, image_index = boxes_on((3, 6, 7), count)
    check_pool(random(3, 4, 6, 7), cells, image_index)


def test_pool_of_many_boxes_takes_the_large_tiles():
    cells, image_index = boxes_on((2, 6, 7), twin_pool._MANY + 1)
    check_pool(random(2, 3, 6, 7), cells, image_index)


def test_pool_with_long_stretches_for_each_program(monkeypatch):
    """As where there are many boxes: a program sums over more than one block of cells."""
    monkeypatch.setattr(twin_pool, "_PROGRAMS", 2)
    cells, image_index = boxes_on((2, 13, 11), 9)
    check_pool(random(2, 3, 13, 11), cells, image_index)


@triton.jit
def _parts_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    high, middle, low = twin_parts(tl.load(x + o))
    tl.store(out + o, high)
    tl.store(out + N + o, middle)
    tl.store(out + 2 * N + o, low)


def test_parts_are_exact_on_tensor_cores():
    """They read the leading 11 bits of a float32, which the interpreter does not imitate."""
    x = random(256) * 10 ** random(256, seed=1)
    parts = torch.empty(3, 256, device=DEVICE)
    _parts_kernel[(1,)](x, parts, N=256)
    assert torch.equal(parts.double().sum(dim=0), x.double())
    assert (parts.view(torch.int32) & 0x1FFF == 0).all()


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 40)),
    st.integers(0, 20),
    st.integers(0, 99),
)
def test_pool_of_any_size(shape, count, seed):
    cells, image_index = boxes_on((shape[0], *shape[2:]), count, seed)
    check_pool(random(*shape, seed=seed), cells, image_index, seed)


@pytest.mark.parametrize("sign", [1, -1])
def test_pool_of_a_mean_that_is_large_beside_the_spread(sign):
    features = sign * 1000 + random(2, 3, 40, 64)
    cells = torch.tensor([[0, 0, 64, 40], [62, 38, 64, 40], [5, 6, 7, 40], [0, 39, 64, 40]])
    cells, image_index = cells.to(DEVICE), torch.tensor([1, 1, 0, 0], device=DEVICE)
    pooled = twin_pool.pool_cells(features, cells, image_index)
    exact = exact_pool(features, cells, image_index)
    # 1e-5 is asked for; a fresh float32 sum, as here, is better by far.
    assert ((pooled.double() - exact).abs() / exact.abs()).max() < 5e-7
    torch.testing.assert_close(pooled.double(), exact, rtol=0, atol=3e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_pool_keeps_images_apart(value):
    """An overflow in one image stays there, in a block of boxes of several images too."""
    features = random(3, 2, 6, 6)
    cells, image_index = boxes_on((4, 6, 6), 9)
    clean = twin_pool.pool_cells(features, cells, image_index)
    features[1] = value
    pooled = twin_pool.pool_cells(features, cells, image_index)
    others = image_index != 1
    assert others.any() and torch.equal(pooled[others], clean[others])
    assert not torch.isfinite(pooled[~others]).any()


def test_pool_is_deterministic():
    features, (cells, image_index) = random(2, 20, 20, 20), boxes_on((2, 20, 20), 40)
    features.requires_grad_()
    first, second = (twin_pool.pool_cells(features, cells, image_index) for _ in range(2))
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(x.square().sum(), features)[0] for x in (first, second)]
    assert torch.equal(*grads)


def test_pool_has_every_derivative():
    """It is linear: the gradient of its gradient is itself."""
    features, (cells, image_index) = random(2, 3, 4, 5).requires_grad_(), boxes_on((2, 4, 5), 6)
    pooled = twin_pool.pool_cells(features, cells, image_index)
    (grad,) = torch.autograd.grad(pooled.square().sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), features)
    spread = exact_spread(2 * pooled.detach(), cells, image_index, features.shape)
    pooled_again = exact_pool(2 * spread, cells, image_index)
    close(second, exact_spread(2 * pooled_again, cells, image_index, features.shape))


# --- logits ------------------------------------------------------------------------------------


def exact_rows(student: Tensor, teacher: Tensor, temperature: float, activation: str) -> Tensor:
    z_s, z_t = student / temperature, teacher.double() / temperature
    if activation == "softmax":
        log_s, log_t = z_s.log_softmax(1), z_t.log_softmax(1)
        return (log_t.exp() * (log_t - log_s)).sum(1)
    ls = torch.nn.functional.logsigmoid
    there, not_there = z_t.sigmoid() * (ls(z_t) - ls(z_s)), (-z_t).sigmoid() * (ls(-z_t) - ls(-z_s))
    return (there + not_there).sum(1)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        pytest.param(1, 1, id="one class"),
        pytest.param(7, 5, id="odd"),
        pytest.param(40, 81, id="more rows than a tile holds"),
        pytest.param(2, 1203, id="more classes than a tile holds"),
        pytest.param(0, 4, id="no rows"),
        pytest.param(3, 0, id="no classes"),
    ],
)
def test_logit_rows(rows, classes, dtype, activation):
    student = (5 * random(rows, classes, dtype=dtype)).requires_grad_()
    teacher = 5 * random(classes, rows, seed=1, dtype=dtype).T  # not contiguous
    divergence = twin_logits.logit_rows(student, teacher, 1.7, activation)
    assert divergence.dtype == torch.float32
    z = student.detach().double().requires_grad_()
    exact = exact_rows(z, teacher, 1.7, activation)
    torch.testing.assert_close(divergence.double(), exact, rtol=1e-5, atol=1e-5)
    above = random(rows, seed=2)
    for _ in range(2):
        (grad,) = torch.autograd.grad(divergence, student, above, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(exact, z, above.double(), retain_graph=True)
        assert grad.dtype == dtype
        close(grad, exact_grad)


@pytest.mark.parametrize("falling", [True, False])
def test_logit_rows_with_a_running_maximum(falling):
    """Over several tiles of classes the largest logit so far stays, or grows."""
    ramp = torch.arange(2.5 * twin_logits._TILE, device=DEVICE)[None] / 400
    student = (random(1, ramp.shape[1]) + (-ramp if falling else ramp)).requires_grad_()
    teacher = student.detach() + random(1, ramp.shape[1], seed=1)
    divergence = twin_logits.logit_rows(student, teacher, 1.0)
    close(divergence, exact_rows(student.detach().double(), teacher, 1.0, "softmax"))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logit_rows_of_extreme_logits(activation):
    """Saturated probabilities: nothing overflows, and a vanishing one keeps its weight."""
    student = torch.tensor([[100.0, -100, 0], [-30.0, 20, 5]], device=DEVICE).requires_grad_()
    teacher = torch.tensor([[-100.0, 100, 0], [25.0, -25, 5]], device=DEVICE)
    divergence = twin_logits.logit_rows(student, teacher, 1.0, activation)
    z = student.detach().double().requires_grad_()
    exact = exact_rows(z, teacher, 1.0, activation)
    close(divergence, exact)
    (grad,) = torch.autograd.grad(divergence.sum(), student)
    (exact_grad,) = torch.autograd.grad(exact.sum(), z)
    close(grad, exact_grad)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_equal_logits_diverge_by_nothing(activation):
    logits = (9 * random(4, 6)).requires_grad_()
    divergence = twin_logits.logit_rows(logits, logits.detach(), 2.0, activation)
    assert (divergence == 0).all()
    assert (torch.autograd.grad(divergence.sum(), logits)[0] == 0).all()


# --- relation ----------------------------------------------------------------------------------


def exact_units(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length == 0, 0, x / torch.where(length == 0, 1, length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 64), (2, 2100), (0, 4), (3, 0)], ids=str)
def test_unit_rows(shape, dtype):
    x = random(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]  # not contiguous
    if len(x) > 1:
        x[1] = 0
    x.requires_grad_()
    z = x.detach().double().requires_grad_()
    unit, exact = twin_cosine.unit_rows(x), exact_units(z)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.double(), exact, rtol=1e-5, atol=1e-6)
    above = random(*reversed(shape), seed=3).permute(*reversed(range(len(shape))))
    (grad,) = torch.autograd.grad(unit, x, above)
    (exact_grad,) = torch.autograd.grad(exact, z, above.double())
    assert grad.dtype == dtype
    alive = (z != 0).any(dim=-1)
    close(grad[alive], exact_grad[alive], atol=1e-5)
    assert (grad[~alive] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_unit_rows_of_any_length(scale):
    x = random(3, 9)
    torch.testing.assert_close(twin_cosine.unit_rows(scale * x), twin_cosine.unit_rows(x))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_unit_rows_do_not_hide_what_is_not_finite(value):
    x = random(2, 70)
    x[0, 3] = value
    unit = twin_cosine.unit_rows(x)
    assert unit[0].isnan().any() and unit[1].isfinite().all()


def exact_relation(q_s, q_t, pairs, own, weights, robust, beta):
    """Rows and robust weights, float64, one row after another."""
    shape = q_s.shape[:-1]
    omega, weight = torch.ones(shape).double(), torch.ones(shape).double()
    for at in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        at = tuple(at)
        if own is not None and own.expand_as(q_s)[at].any():
            mine = own.expand_as(q_s)[at]
            omega[at] = (1 - abs(q_s[at][mine].max() - q_t[at][mine].max())).clamp(0, 1).detach()
    omega = omega.to(q_s.device)
    weight = omega if robust else weight.to(q_s.device)
    weight = weights.double() if weights is not None else weight
    each = torch.nn.functional.smooth_l1_loss(
        weight[..., None] * q_s, weight[..., None] * q_t, reduction="none", beta=beta
    )
    counted = torch.ones_like(each) if pairs is None else pairs.expand_as(each)
    return (each * counted).sum(dim=-1), omega


def check_relation(shape, masks, seed=0, beta=0.3, dtype=torch.float32):
    levels, rows, prototypes = shape
    q_s, q_t = (random(*shape, seed=seed + i, dtype=dtype).clamp(-1, 1) for i in (0, 1))
    q_s.requires_grad_()
    own = random(*shape, seed=seed + 2) > 0.8 if "own" in masks else None
    pairs = random(levels, 1, prototypes, seed=seed + 3) > 0 if "pairs" in masks else None
    weights = random(rows, levels, seed=seed + 4).abs().T if "weights" in masks else None
    options = pairs, own, weights, "robust" in masks, beta
    total, omega = twin_relation.relation_rows(q_s, q_t, *options)
    z = q_s.detach().double().requires_grad_()
    exact, exact_omega = exact_relation(z, q_t.double(), *options)
    assert total.dtype == omega.dtype == torch.float32
    close(total, exact, atol=1e-5)
    close(omega, exact_omega)
    assert not omega.requires_grad
    above = random(*reversed(shape[:2]), seed=seed + 5).T  # not contiguous
    for _ in range(2):
        (grad,) = torch.autograd.grad(total, q_s, above, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(exact, z, above.double(), retain_graph=True)
        assert grad.dtype == dtype
        close(grad, exact_grad)


MASKS = [(), ("own",), ("own", "robust"), ("pairs", "own", "robust"), ("pairs", "weights")]


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: " ".join(masks) or "nothing")
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1), id="one pair"),
        pytest.param((2, 5, 7), id="odd"),
        pytest.param((3, 2, 64), id="a full tile"),
        pytest.param((1, 2, 2500), id="more prototypes than a tile holds"),
        pytest.param((2, 0, 4), id="no rows"),
        pytest.param((2, 3, 0), id="no prototypes"),
    ],
)
def test_relation_rows(shape, masks):
    check_relation(shape, masks)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_relation_rows_of_half_precision(dtype):
    check_relation((2, 5, 7), ("pairs", "own", "robust"), dtype=dtype)


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40)),
    st.sampled_from(MASKS),
    st.integers(0, 99),
    st.sampled_from([0.1, 1.0]),
)
def test_relation_rows_of_any_size(shape, masks, seed, beta):
    check_relation(shape, masks, seed, beta)


def test_uncounted_pairs_may_hold_anything():
    q_s, q_t, pairs = random(1, 2, 5), random(1, 2, 5, seed=1), torch.ones(1, 1, 5).bool()
    pairs[..., 3] = False
    pairs = pairs.to(DEVICE)
    clean, _ = twin_relation.relation_rows(q_s, q_t, pairs, None, None, False, 1.0)
    q_s[..., 3] = float("nan")
    dirty, _ = twin_relation.relation_rows(q_s, q_t, pairs, None, None, False, 1.0)
    assert torch.equal(clean, dirty) and clean.isfinite().all()


@pytest.mark.parametrize("own_only", [False, True])
def test_the_whole_relation_equals_its_definition(own_only):
    """Rows, matrix products and twins together, on levels of unlike channels."""
    rows, theirs = random(2, 5, 9), random(2, 5, 6, seed=1)
    g_s, g_t = random(2, 8, 9, seed=2), random(2, 8, 6, seed=3)
    own = own_class(
        torch.arange(16, device=DEVICE).view(2, 8) % 4 - 1, torch.arange(5, device=DEVICE) % 3
    )
    results = []
    for form in ("triton", "definition"):
        x = rows.clone().requires_grad_()
        with force(form):
            pairs = own if own_only else None
            loss, omega = relate(x, theirs, g_s, g_t, pairs=pairs, beta=0.2, own=own, robust=True)
        results.append((loss, omega, torch.autograd.grad(3 * loss, x)[0]))
    torch.testing.assert_close(*results)


# --- all of them -------------------------------------------------------------------------------


def library_calls():
    cells, image_index = boxes_on((2, 4, 6), 5)
    maps, teacher = random(2, 5, 4, 6).requires_grad_(), random(2, 5, 4, 6, seed=1)
    weight, member = cell_maps((2, 4, 6))
    logits = random(4, 7).requires_grad_()
    rows = random(5, 3).requires_grad_()
    small = (weight, member, *scales())
    yield "paint", twin_imitation._paint, (random(5).abs(), cells, image_index, 2, 4, 6)
    yield "terms", twin_imitation._terms, (maps, teacher, *small, True)
    yield "terms, no gradient", twin_imitation._terms, (maps.detach(), teacher, *small, False)
    yield "scale", twin_imitation._scale_, (random(2, 5, 4, 6), member, random(2))
    yield "pool", twin_pool._pool, (maps, cells, image_index)
    spread = (rows, cells, image_index, 2, 4, 6)
    yield "spread", twin_pool._spread, (*spread, torch.float32, False)
    yield "spread, half", twin_pool._spread, (*spread, torch.bfloat16, True)
    q_s, q_t = random(2, 3, 5).requires_grad_(), random(2, 3, 5, seed=1)
    own = random(2, 3, 5, seed=2) > 0
    yield "unit rows", twin_cosine._unit, (logits,)
    yield "relation", twin_relation._rows, (q_s, q_t, own, own, None, True, 0.5, True)
    yield (
        "relation, weights",
        twin_relation._rows,
        (q_s, q_t, None, None, q_t[..., 0], False, 1.0, True),
    )
    yield "rows", twin_logits._rows, (logits, random(4, 7, seed=1), 2.0, True, True)


@pytest.mark.parametrize("call", [pytest.param(c[1:], id=c[0]) for c in library_calls()])
def test_opcheck(call):
    """Schema, fake tensors, autograd registration, and the same under AOT dispatch."""
    torch.library.opcheck(*call)


def step(features: Tensor, teacher: Tensor, boxes, logits) -> Tensor:
    """Every twin in one scalar."""
    weights, cells, image_index = boxes
    size = (features.shape[0], *features.shape[2:])
    weight = twin_imitation.paint_boxes(weights, cells, image_index, size)
    member = twin_imitation.paint_boxes(torch.ones_like(weights), cells, image_index, size)
    scale = 1 / weight.sum().clamp(min=1)
    terms = twin_imitation.imitation_terms(features, teacher, weight, member, scale, scale)
    rows = twin_pool.pool_cells(features, cells, image_index)
    q = twin_cosine.unit_rows(rows)
    related, omega = twin_relation.relation_rows(
        q, q.detach().flip(1), None, q > 0, None, True, 0.5
    )
    divergence = twin_logits.logit_rows(*logits, 2.0, "sigmoid")
    both = rows.square().sum() + (omega * related).sum()
    return terms[0] + 4 * terms[1] + both + divergence.sum()


def step_inputs(count: int, layout: str = "contiguous"):
    features = laid_out(random(2, 3, 5, 7), layout).requires_grad_()
    boxes = (random(count).abs(), *boxes_on((2, 5, 7), count))
    logits = random(4, 6).requires_grad_(), random(4, 6, seed=1)
    return features, random(2, 3, 5, 7, seed=2), boxes, logits


def gradients(loss: Tensor, inputs):
    return torch.autograd.grad(loss, (inputs[0], inputs[3][0]))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_compiles_once_for_every_number_of_boxes(layout):
    torch._dynamo.reset()
    graphs = Graphs()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graphs(graph, _)))
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for count in (11, 13, 9):  # none of the other sizes: equal ones would share a symbol
        inputs = step_inputs(count, layout)
        loss, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, inputs), gradients(expected, inputs))
    assert graphs.count == 2  # a forward and a backward


@pytest.mark.parametrize("watch", [NoFloat64, NoHostSync])
def test_hot_path(watch):
    inputs = step_inputs(5)
    with watch():
        gradients(step(*inputs), inputs)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_cuda_graph_replays_the_step():
    inputs = step_inputs(5)
    for _ in range(2):  # compiles the kernels
        gradients(step(*inputs), inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*inputs)
        grads = gradients(loss, inputs)
    other = step_inputs(5)
    with torch.no_grad():
        inputs[0].copy_(3 * other[0])
        inputs[2][1].copy_(boxes_on((2, 5, 7), 5, seed=3)[0])
    graph.replay()
    expected = step(*inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, gradients(expected, inputs))


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        pytest.param((2, 1, 2, 3), (2**31 + 16, 6, 3, 1), id="image"),
        pytest.param((1, 3, 2, 3), (6, 2**30 + 16, 3, 1), id="channel"),
        pytest.param((1, 2, 1, 3), (6, 1, 1, 2**30 + 16), id="cell"),
    ],
)
def test_addresses_beyond_two_to_the_31(size, stride):
    """A map in 4 GiB of which only the cells of interest are ever touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    student = memory.as_strided(size, stride)
    student.copy_(random(*size, dtype=torch.float16))
    student.requires_grad_()
    teacher = random(*size, seed=1, dtype=torch.float16)
    weight, member = cell_maps((size[0], *size[2:]))
    terms, grad = imitate(student, teacher, weight, member, (1.0, 1.0))
    exact, exact_grad = exact_imitation(student, teacher, weight, member, (1.0, 1.0))
    close(torch.stack(terms), torch.stack(exact))
    close(grad, exact_grad)
    cells, image_index = boxes_on((size[0] + 1, *size[2:]), 4)
    check_pool(student.detach(), cells, image_index)


def test_float64_is_refused():
    x = random(1, 1, 2, 2).double()
    cells, image_index = boxes_on((1, 2, 2), 1)
    with pytest.raises(TypeError, match=r"features: .* float32.* got torch.float64"):
        twin_pool.pool_cells(x, cells, image_index)
