"""Convolutions in a row, against each by itself."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loco_det.detection.layers import Conv, run_convs


class Maps(TorchDispatchMode):
    """Counts the memory of maps of 2 x 64 x 5 x 4 that operations have made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if first.shape in ((2, 64, 5, 4), (2, 5, 4, 64)):
            storage = first.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                weakref.finalize(storage, self.alive.discard, storage._cdata)
        return out


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("norm", ["LN", "GN", ""])
def test_convolutions_in_a_row_keep_less_and_give_the_same_bits(norm: str, fast: bool, mixed: bool) -> None:
    torch.manual_seed(0)
    convs = nn.ModuleList(Conv(64 if k else 3, 64, 3, norm, relu=True) for k in range(3))
    for conv in convs:
        if conv.norm is not None:
            nn.init.normal_(conv.norm.weight)
            conv.norm.fast = fast
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    precision = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found = [x.grad, *(p.grad for p in convs.parameters())]
        x.grad = None
        convs.zero_grad()
        return [out, *found]

    with precision:
        one_by_one = gradients(convs[2](convs[1](convs[0](x))))
    with precision, Maps() as maps:
        out = run_convs(convs, x)
        if norm == "LN":  # two inputs of a LayerNorm, what the last one keeps (its input, or two steps), and the result
            assert len(maps.alive) == (4 if fast else 5)
    assert all(torch.equal(a, b) for a, b in zip(gradients(out), one_by_one))
    with torch.no_grad(), precision:
        assert torch.equal(run_convs(convs, x), out)
