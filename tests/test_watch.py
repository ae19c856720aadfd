"""The witnesses of watch.py can fail: a check that cannot fail proves nothing."""

import pytest
import torch

from tests.watch import Graphs, NoFloat64, NoHostSync


def test_no_float64_sees_a_double_in_forward():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        x.double().sum().float()


def test_no_float64_sees_a_double_in_backward():
    class Sneaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return (grad.double() * 2).float()

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        Sneaky.apply(x).sum().backward()


def test_no_float64_lets_float32_pass():
    x = torch.ones(3, requires_grad=True)
    with NoFloat64():
        (x / 3.0 * 2.5).mean().backward()
    assert x.grad is not None


WAITS = {
    "reads a value": lambda x: x.sum().item(),
    "branches on a value": lambda x: bool(x.any()),
    "counts": lambda x: x.nonzero(),
    "masks": lambda x: x[x > 0],
    "selects under a mask": lambda x: x.masked_select(x > 0),
    "copies a literal": lambda x: torch.tensor([1.0, 2.0]),
    "copies a literal of its kind": lambda x: x.new_tensor([1.0, 2.0]),
    "repeats by value": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_no_host_sync_sees(wait):
    with pytest.raises(AssertionError, match="host wait"), NoHostSync():
        wait(torch.ones(3))


def test_no_host_sync_lets_ordinary_work_pass():
    x = torch.ones(3, requires_grad=True)
    with NoHostSync():
        y = torch.where(x > 0, x, -2.0) + torch.zeros(3) + torch.arange(3)
        y[torch.arange(2)].clamp(min=0).mean().backward()


def test_graphs_counts_a_graph_per_shape_when_the_code_depends_on_the_size():
    torch._dynamo.reset()
    graphs = Graphs()

    @torch.compile(fullgraph=True, backend=graphs, dynamic=False)
    def double(x):
        return x * 2

    for size in (2, 3, 4):
        double(torch.ones(size))
    assert graphs.count == 3
