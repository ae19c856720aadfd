"""What tells one trained detector from another, whatever its tensors are."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from global_kd.detectors import fingerprint


class Pair(torch.Tensor):
    """As torchao's quantised tensors: made of integers and a scale, with no bytes of its own."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["integers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(f"{function}")


def quantised(integers, scale):
    model = nn.Linear(2, 2, bias=False)
    pair = Pair(torch.tensor(integers, dtype=torch.int8), torch.tensor(scale))
    model.weight = nn.Parameter(pair, requires_grad=False)
    return model


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_is_the_hash_that_it_says():
    model = nn.Linear(2, 3, bias=False)
    text = b"weight torch.float32 (3, 2)\n" + model.weight.detach().numpy().tobytes()
    assert fingerprint(model) == hashlib.sha256(text).hexdigest()[:16]


def test_tensors_made_of_tensors_count_by_their_parts():
    one = fingerprint(quantised([[1, 2], [3, 4]], 0.5))
    assert one == fingerprint(quantised([[1, 2], [3, 4]], 0.5))
    assert one != fingerprint(quantised([[1, 2], [3, 5]], 0.5))
    assert one != fingerprint(quantised([[1, 2], [3, 4]], 0.25))


def test_a_sharded_model_is_the_model(alone):
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    whole = fingerprint(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert any(hasattr(p, "full_tensor") for p in model.parameters())
    assert fingerprint(model) == whole


@pytest.mark.filterwarnings("ignore")
def test_torch_quantisation():
    if torch.backends.quantized.engine == "none":
        pytest.skip("no engine")

    def model(scale):
        x = nn.Module()
        values = torch.tensor([[0.5, 1.0]])
        x.register_buffer("a", torch.quantize_per_tensor(values, scale, 0, torch.qint8))
        x.register_buffer(
            "b",
            torch.quantize_per_channel(
                values, torch.tensor([scale]), torch.tensor([0]), 0, torch.qint8
            ),
        )
        return x

    assert fingerprint(model(0.1)) == fingerprint(model(0.1)) != fingerprint(model(0.2))
    dynamic = nn.Sequential(nn.Linear(4, 4))
    kinds = {nn.Linear}
    first = torch.ao.quantization.quantize_dynamic(dynamic, kinds)
    same = fingerprint(torch.ao.quantization.quantize_dynamic(dynamic, kinds))
    with torch.no_grad():
        dynamic[0].weight.mul_(2)
    other = torch.ao.quantization.quantize_dynamic(dynamic, kinds)
    assert fingerprint(first) == same != fingerprint(other)


VALUES = [
    torch.tensor(2.0),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.rand(3).bfloat16(),
    torch.rand(3).to(torch.float8_e4m3fn),
    torch.rand(3).to(torch.complex64).conj(),
    torch.rand(4, 4).t()[::2],
    torch.eye(3).to_sparse(),
]


@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.parametrize("value", VALUES, ids=lambda x: f"{x.dtype} {x.layout} {tuple(x.shape)}")
def test_every_kind_of_tensor_counts(value):
    def model(x):
        holder = nn.Module()
        holder.register_buffer("x", x)
        return holder

    assert fingerprint(model(value)) == fingerprint(model(value.clone()))
    if value.numel():
        dense = value.to_dense() if value.layout != torch.strided else value
        changed = ~dense if value.dtype == torch.bool else (dense.to(torch.complex64) * 2 + 1)
        changed = changed.real.to(value.dtype) if not value.is_complex() else changed
        if value.layout != torch.strided:
            changed = changed.to_sparse(layout=value.layout)
        assert fingerprint(model(value)) != fingerprint(model(changed))


def test_a_model_without_bytes_counts_by_its_shapes():
    with torch.device("meta"):
        a, b, c = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 3)
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_a_shape_or_bytes_count_by_their_names():
    """A lazy head that the maps do not need, and buffers that can only be stored."""

    def model(x):
        holder = nn.Module()
        holder.register_buffer("x", x)
        return holder

    assert fingerprint(nn.LazyLinear(3)) == fingerprint(nn.LazyLinear(3))
    assert fingerprint(nn.LazyBatchNorm2d()) != fingerprint(nn.LazyLinear(3))
    masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
    assert fingerprint(model(masked)) == fingerprint(model(masked))
    parts = [torch.ones(2), torch.ones(3)]
    others = [torch.ones(2), torch.zeros(3)]
    for layout in (torch.strided, torch.jagged):
        one, same, other = (
            model(torch.nested.nested_tensor(x, layout=layout)) for x in (parts, parts, others)
        )
        assert fingerprint(one) == fingerprint(same) != fingerprint(other)
