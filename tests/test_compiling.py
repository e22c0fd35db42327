"""Compiled stages in the local step against eager ones, and the message if nothing can be compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loco_cases import gradients
from torch._inductor import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

from loco_det.backbones.resnet import BasicBlock
from loco_det.core.errors import UserError
from pretrain.compiling import stage_compiler
from pretrain.loco import LocalTrainer, Unit

CPU = torch.device("cpu")
UNITS = {
    "simclr": [Unit(0, 2)],
    "gim": [Unit(0, 0), Unit(1, 1), Unit(2, 2)],
    "loco": [Unit(0, 1), Unit(1, 2)],
    "nested": [Unit(0, 2), Unit(1, 1), Unit(1, 2)],
}


def two_steps(units: list[Unit], recompute: list[int], backend: str | Callable | None) -> list[torch.Tensor]:
    """Losses, gradients and BatchNorm's buffers after two steps over residual blocks, in float64."""
    torch.compiler.reset()
    torch.manual_seed(0)
    stages = [BasicBlock(4, 4, 1, "BN").double() for _ in range(1 + max(unit.last for unit in units))]
    modules = [stage_compiler(CPU, backend)(stage) for stage in stages] if backend else stages
    trainer = LocalTrainer(modules, units, [lambda h: h.mean((2, 3)).square().sum()] * len(units), recompute=recompute)
    for _ in range(2):
        values = trainer.step(torch.randn(2, 4, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last))
    return [*values, *gradients(*stages), *(buffer for stage in stages for buffer in stage.buffers())]


@pytest.mark.parametrize("recompute", [[], [0], [0, 1, 2]])
@pytest.mark.parametrize("name", UNITS)
def test_compiled_stages_equal_eager_ones(name: str, recompute: list[int]) -> None:
    """Traced as for any backend; loco and nested differentiate a stage more than once."""
    eager, compiled = (two_steps(UNITS[name], recompute, backend) for backend in (None, "aot_eager"))
    for want, got in zip(eager, compiled):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert {int(buffer) for buffer in compiled if buffer.dtype == torch.int64} == {2}  # batches that BatchNorm counted


@pytest.mark.parametrize(("recompute", "graphs"), [([], 3), ([0, 1, 2], 6)], ids=["kept", "recomputed"])
def test_a_stage_is_one_graph_and_compiled_no_more_than_once(recompute: list[int], graphs: int) -> None:
    """A recomputed one twice: its first forward has no gradient, the later ones leave the statistics alone.

    torch 2.4 traces one of them a third time.
    """
    from torch._dynamo.utils import counters

    made = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        made.append(graph.code)
        return graph.forward

    counters.clear()
    two_steps(UNITS["loco"], recompute, backend)
    assert not counters["graph_break"]
    # Stages of the same code may share a graph; those without a convolution are trials before training.
    older = bool(recompute) and torch.__version__.startswith("2.4")
    assert 1 <= len([code for code in made if "conv" in code]) <= graphs + older


class _Convolutions(TorchDispatchMode):
    """How many gradients of convolutions are computed, of their (inputs, weights, biases)."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = [0, 0, 0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.computed = [count + asked for count, asked in zip(self.computed, args[10])]
        return func(*args, **(kwargs or {}))

    def counted(self, graph: torch.fx.GraphModule, *_: object, **__: object) -> Callable:
        """Stand for inductor: run its graph as it is. Nothing is compiled where the mode is on already."""

        def run(values: list) -> list:
            with self:
                return graph.forward(*values)

        run._boxed_call = True
        return run


@pytest.mark.parametrize("recompute", [[], [0, 1, 2]], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["loco", "nested"])
def test_a_pass_computes_the_gradients_that_an_eager_one_does(
    name: str, recompute: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input-only pass no weight's, and a parameter pass that ends in its stage no gradient of the input."""
    eager, compiled = _Convolutions(), _Convolutions()
    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiled.counted)
    with eager:
        want = two_steps(UNITS[name], recompute, None)
    got = two_steps(UNITS[name], recompute, "inductor")
    assert compiled.computed == eager.computed
    assert compiled.computed[1] == 2 * 2 * 3  # steps, convolutions of a block, blocks: each weight's once
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_other_sizes_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile then takes sizes as further inputs of the graph, which have no gradient."""
    counted = _Convolutions()
    monkeypatch.setattr(compile_fx, "compile_fx_inner", counted.counted)
    torch.compiler.reset()
    stage = stage_compiler(CPU)(BasicBlock(4, 4, 1, "BN"))
    for side in (8, 12, 16):
        x = torch.randn(2, 4, side, side, requires_grad=True)
        counted.computed = [0, 0, 0]
        torch.autograd.grad(stage(x).sum(), x)
        assert counted.computed == [2, 0, 0]


def test_every_stage_is_compiled_though_many_share_their_code() -> None:
    """Past its limit torch.compile would run the rest as they are."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=8):
        compiled = [stage_compiler(CPU, backend)(BasicBlock(c, c, 1, "BN")) for c in range(1, 13)]
        graphs.clear()  # of the trial
        for channels, stage in enumerate(compiled, 1):
            stage(torch.randn(2, channels, 4, 4))
    torch.compiler.reset()
    assert len(graphs) == 12


def test_code_made_by_inductor_equals_eager() -> None:
    try:
        stage_compiler(CPU)
    except UserError as error:
        pytest.skip(str(error))
    units = [Unit(0, 1), Unit(1, 1)]  # the upper stage is differentiated twice
    for want, got in zip(*(two_steps(units, [], backend) for backend in (None, "inductor"))):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_compiler_that_is_missing_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand many lines more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"SOLVER.COMPILE: .*\(No working C\+\+ compiler found\); install a C\+\+"):
        stage_compiler(CPU)
