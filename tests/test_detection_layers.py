"""Convolutions in a row, against each by itself."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from loco_det.detection.layers import Conv, run_convs


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("norm", ["LN", "GN", ""])
def test_convolutions_in_a_row_keep_less_and_give_the_same_bits(norm: str, fast: bool) -> None:
    torch.manual_seed(0)
    convs = nn.ModuleList(Conv(64 if k else 3, 64, 3, norm, relu=True) for k in range(3))
    made: list[weakref.ref] = []
    for conv in convs:
        if conv.norm is not None:
            nn.init.normal_(conv.norm.weight)
            conv.norm.fast = fast
            conv.norm.register_forward_hook(lambda _, inputs, out: made.append(weakref.ref(out)))
    x = torch.randn(2, 3, 5, 4, requires_grad=True)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found = [x.grad, *(p.grad for p in convs.parameters())]
        x.grad = None
        convs.zero_grad()
        return [out, *found]

    one_by_one = gradients(convs[2](convs[1](convs[0](x))))
    made.clear()
    out = run_convs(convs, x)
    if norm == "LN":
        # What a LayerNorm gave lives only as the result itself, if the ReLU was in place.
        assert [output() is None for output in made] == [True, True, fast]
    assert all(torch.equal(a, b) for a, b in zip(gradients(out), one_by_one))
    with torch.no_grad():
        assert torch.equal(run_convs(convs, x), out)
