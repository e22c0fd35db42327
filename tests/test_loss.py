"""NT-Xent against a double loop, and what must hold of it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from pretrain.loss import embedding_health, nt_xent
from pretrain.memory import SavedBytes


def loop_nt_xent(z: torch.Tensor, temperature: float) -> float:
    rows = z.double().tolist()
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows]
    half, total = len(rows) // 2, 0.0
    for i, a in enumerate(rows):
        similar = {j: math.exp(sum(x * y for x, y in zip(a, b)) / temperature) for j, b in enumerate(rows) if j != i}
        total -= math.log(similar[(i + half) % len(rows)] / sum(similar.values()))
    return total / len(rows)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_equals_the_double_loop(images: int, temperature: float) -> None:
    z = torch.randn(2 * images, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(images))
    assert nt_xent(z, temperature).item() == pytest.approx(loop_nt_xent(z, temperature), abs=1e-12)


def test_gradient() -> None:
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: nt_xent(t, 0.3), z)


@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 10, 11])
def test_row_chunks_equal_the_dense_loss_in_value_and_gradient(chunk: int) -> None:
    z = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert nt_xent(z, 0.3, chunk).item() == pytest.approx(loop_nt_xent(z.detach(), 0.3), abs=1e-12)
    (want,), (got,) = (torch.autograd.grad(nt_xent(z, 0.3, rows), z) for rows in (0, chunk))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_memory_of_row_chunks_is_linear_in_the_batch() -> None:
    def kept(images: int, chunk: int) -> int:
        with SavedBytes() as saved:
            nt_xent(torch.randn(2 * images, 8, requires_grad=True), 0.1, chunk).backward()
        return saved.peak

    assert kept(512, 16) < 2.1 * kept(256, 16)
    assert kept(512, 0) > 3.5 * kept(256, 0)


def test_symmetries() -> None:
    z = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = nt_xent(z, 0.1)
    first, second = z.chunk(2)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(nt_xent(torch.cat([second, first]), 0.1), loss)
    torch.testing.assert_close(nt_xent(torch.cat([first[order], second[order]]), 0.1), loss)
    torch.testing.assert_close(nt_xent(z * torch.rand(8, 1, dtype=torch.float64).add(0.1), 0.1), loss)


def test_limits() -> None:
    one = torch.ones(10, 3, dtype=torch.float64)
    assert nt_xent(one, 0.1).item() == pytest.approx(math.log(9))  # collapsed: every candidate is as good
    apart = torch.eye(5, dtype=torch.float64).repeat(2, 1)
    assert nt_xent(apart, 0.01).item() == pytest.approx(0, abs=1e-12)  # solved
    assert nt_xent(torch.randn(2, 4), 0.1).item() == 0  # no negatives


def test_half_precision_input_is_computed_in_float32() -> None:
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert nt_xent(z, 0.1).dtype == torch.float32
    assert nt_xent(z, 0.1).item() == pytest.approx(loop_nt_xent(z, 0.1), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(z, 0.1).item() == pytest.approx(loop_nt_xent(z, 0.1), abs=1e-5)


def test_health_equals_its_formulas_in_loops() -> None:
    z = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 1
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in z.tolist()]

    def squared(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b))

    apart = [squared(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    spread = [statistics.stdev(column) for column in zip(*rows)]
    found = embedding_health(z)
    assert found["alignment"].item() == pytest.approx(statistics.mean(map(squared, rows[:5], rows[5:])), rel=1e-5)
    assert found["uniformity"].item() == pytest.approx(
        math.log(statistics.mean(math.exp(-2 * d) for d in apart)), rel=1e-5
    )
    assert found["std"].item() == pytest.approx(statistics.mean(spread) * math.sqrt(3), rel=1e-5)


def test_health_tells_collapse_from_spread() -> None:
    collapsed = embedding_health(torch.ones(32, 8) + 1e-4 * torch.randn(32, 8))
    half = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    spread = embedding_health(torch.cat([half, half]))
    assert collapsed["std"] < 0.01 < 0.9 < spread["std"]
    assert spread["alignment"] == 0
    assert spread["uniformity"] < -2 < -0.01 < collapsed["uniformity"]
