"""States that any writer of checkpoints takes: one tensor of a size known before anything is read.

``torch.distributed.checkpoint`` reads into the state of the resumed module, so neither names nor
shapes may depend on what has been collected; safetensors writes nothing but tensors.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_TEXT = 4096  # bytes that a text may take, before what its entries are known to need


def text_tensor(value: Mapping[str, Any], entries: int = 0) -> Tensor:
    """Plain values as JSON, uint8 ``(N,)`` on the processor.

    ``N`` depends on ``entries`` alone, the number of names in it, as long as they are of usual
    length (64 bytes each).
    """
    text = json.dumps(value).encode()
    size = _TEXT + 64 * entries
    while size < len(text):
        size *= 2
    return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)


def text_of(state: Any) -> dict[str, Any]:
    """What :func:`text_tensor` was given; a dictionary as it is, as states were before."""
    if isinstance(state, Mapping):
        return dict(state)
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(f"state_dict: expected uint8 (N,), but got {type(state).__name__}")
    value = json.loads(bytes(state.tolist()))
    if not isinstance(value, dict):
        raise ValueError("state_dict: expected the JSON of a dictionary")
    return value


def packed(
    header: Sequence[int], tables: Sequence[Tensor], capacity: int, empty: Sequence[Tensor]
) -> Tensor:
    """Numbers and tables with a common number of rows, uint8 ``(N,)`` on the processor.

    Args:
        header: Beside the number of rows, which is put before it.
        tables: ``(R, ...)`` of items of 4 or 8 bytes; none: no rows.
        capacity: Rows that there is room for, if more than ``R``; what is left over is zero.
        empty: Tables ``(0, ...)``, in place of ``tables`` where there are none.
    """
    rows = len(tables[0]) if tables else 0
    tables = tables or empty
    room = max(rows, capacity)
    sizes = [8 * (1 + len(header)), *(room * _row_bytes(x) for x in tables)]
    whole = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
    head, *parts = whole.split(sizes)
    numbers = torch.tensor([rows, *header], dtype=torch.int64, device="cpu")
    head.copy_(numbers.view(torch.uint8))
    for part, table in zip(parts, tables, strict=True):
        used = table.detach().cpu().contiguous().flatten().view(torch.uint8)
        part[: len(used)].copy_(used)
    return whole


def unpacked(
    state: Tensor, header: int, layout: Callable[[Sequence[int]], Sequence[Tensor]]
) -> tuple[list[int], list[Tensor]]:
    """The header of :func:`packed`, and copies of the rows, on the device of ``state``.

    Args:
        state: As packed.
        header: Its length.
        layout: From the header, tables ``(0, ...)`` of the shapes and dtypes to come.
    """
    fits = state.dtype == torch.uint8 and state.dim() == 1 and len(state) >= 8 * (1 + header)
    if not fits:
        raise ValueError(
            f"state_dict: expected a sample as uint8 (N,), but got {state.dtype} "
            f"{tuple(state.shape)}"
        )
    start = 8 * (1 + header)
    rows, *numbers = state[:start].clone().view(torch.int64).tolist()
    empty = layout(numbers)
    width = sum(map(_row_bytes, empty))
    room, rest = divmod(len(state) - start, width)
    if rest or not 0 <= rows <= room:
        raise ValueError(
            f"state_dict: expected room for {rows} rows of {width} bytes, but got "
            f"{len(state) - start} bytes"
        )
    tables = []
    for like in empty:
        size = _row_bytes(like)
        part = state[start : start + rows * size].clone()
        tables.append(part.view(like.dtype).view(rows, *like.shape[1:]))
        start += room * size
    return numbers, tables


def _row_bytes(x: Tensor) -> int:
    return x[:0].element_size() * int(torch.Size(x.shape[1:]).numel())


def device_after(fn: Callable[[Tensor], Tensor], x: Tensor) -> torch.device:
    """Where ``module._apply(fn)`` puts a tensor, whatever else it does to it."""
    return fn(torch.empty(0, dtype=x.dtype, device=x.device)).device


def moved(fn: Callable[[Tensor], Tensor], x: Tensor, *, widen: bool = False) -> Tensor:
    """A tensor where ``module._apply(fn)`` puts it, in the dtype that it has.

    Args:
        fn: What ``.to``, ``.half`` and their kin hand on.
        x: Of the module.
        widen: Let it become float64; never anything narrower than float32.
    """
    told = fn(torch.empty(0, dtype=x.dtype, device=x.device))
    dtype = torch.promote_types(told.dtype, torch.float32) if widen else x.dtype
    if told.device == x.device:
        return x.to(dtype)
    # Nothing can be copied out of a tensor without storage: `module.to_empty(device=...)`.
    return (
        torch.zeros_like(x, dtype=dtype, device=told.device)
        if x.is_meta
        else x.to(told.device, dtype)
    )
