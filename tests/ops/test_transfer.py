"""Small tensors go to a device in few pieces, from memory that makes no host wait."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from global_kd import Targets
from global_kd.ops import transfer

LABELS = torch.tensor([1, 2])


class Copies(TorchDispatchMode):
    """What is copied to another device, and whether without a wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func.overloadpacket) == "aten._to_copy" and "device" in kwargs:
            self.seen.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


def image(boxes, **more):
    return {"boxes": torch.rand(boxes, 4).cumsum(1), "labels": torch.arange(boxes)} | more


@pytest.mark.parametrize("ids", [False, True])
def test_targets_of_many_images_are_sent_in_two_pieces(ids):
    """ "meta" stands for a GPU."""
    counts = (3, 0, 2, 1, 4)
    rows = [image(n, **({"ids": torch.arange(n)} if ids else {})) for n in counts]
    with Copies() as copies:
        packed = Targets.from_list(rows, "meta")
    assert len(copies.seen) == 2 and len(packed) == 10
    columns = [packed.boxes, packed.labels, packed.image_index, *([packed.ids] if ids else [])]
    assert all(x.device.type == "meta" for x in columns) and (packed.ids is None) != ids
    here = Targets.from_list(rows)
    assert here.image_index.tolist() == [0] * 3 + [2] * 2 + [3] + [4] * 4
    assert here.labels.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("send", ["from_list", "to", "sent"])
def test_what_goes_to_a_gpu_goes_through_pinned_memory(send, monkeypatch):
    """No GPU is needed to see what is asked of one."""
    pinned, sent = [], []
    one, rows = Targets(torch.rand(2, 4).cumsum(1), LABELS, LABELS), [image(2), image(1)]
    to = torch.Tensor.to

    def pin(x):
        pinned.append(x)
        return x

    def to_cuda(x, where, *args, **options):
        if not str(where).startswith("cuda"):
            return to(x, where, *args, **options)
        sent.append((any(x is y for y in pinned), options))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to_cuda)
    if send == "from_list":
        Targets.from_list(rows, "cuda")
    elif send == "to":
        one.to("cuda")
    else:
        transfer.sent(LABELS, "cuda")
    pieces = {"from_list": 2, "to": 3}.get(send, 1)
    assert sent == [(True, {"non_blocking": True})] * pieces


def test_numbers_have_the_dtype_and_the_device_of_another():
    for like in (torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)):
        found = transfer.numbers([[1, 2], [3, 4]], like)
        assert found.dtype == like.dtype and found.tolist() == [[1, 2], [3, 4]]
    with torch.device("meta"):  # the default device has no say
        assert transfer.numbers([1.5], torch.zeros(1, device="cpu")).tolist() == [1.5]
    assert transfer.numbers([1.5], torch.zeros(1, device="meta")).device.type == "meta"


def test_what_is_there_already_is_not_copied():
    x = torch.rand(3)
    assert transfer.sent(x, "cpu") is x and transfer.sent(x, None) is x
