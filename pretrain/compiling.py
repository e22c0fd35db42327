"""torch.compile of the stages, tested before a run begins; its backwards compute only the gradients that are asked for.

torch.compile makes one program for all gradients of a stage. Here its backward graph is cut to those that autograd asks
for in the pass at hand, and compiled once for each such set: the input's in an input-only pass, the weights' in a
parameter pass whose gradient ends there. Forward, activations and values stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext, TracingContext, compile_context, tracing

from loco_det.core.errors import UserError


def stage_compiler(device: torch.device, backend: str | Callable = "inductor") -> Callable[[nn.Module], nn.Module]:
    """Return a function that compiles a stage for the local step; parameters and buffers stay the module's.

    A stage may be differentiated several times after one forward, each time for other gradients.

    Args:
        backend: as for torch.compile; only inductor's backwards are cut.

    Raises:
        UserError: torch.compile cannot generate code for `device` here.
    """
    if backend == "inductor":
        backend = _inductor
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # compilers, Triton and Python versions raise various exceptions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"SOLVER.COMPILE: torch.compile does not work here ({reason[0]}); install "
            f"{'Triton' if device.type == 'cuda' else 'a C++ compiler such as g++'} or set SOLVER.COMPILE False"
        ) from error
    # A backward must not reuse buffers that the next one reads; a cache may hold whole backwards of an earlier program.
    for name in ("donated_buffer", "enable_autograd_cache"):
        if hasattr(torch._functorch.config, name):  # torch 2.4 has no donated buffers
            setattr(torch._functorch.config, name, False)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # stages share their code
    return partial(torch.compile, backend=backend)


def _inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
    from torch._inductor import compile_fx

    return compile_fx.compile_fx(graph, inputs, inner_compile=cutting(compile_fx.compile_fx_inner))


def cutting(compile_graph: Callable) -> Callable:
    """Return `compile_graph`, which takes a graph, its inputs and options, for backwards that compute what is asked."""

    def compile_(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable:
        def make(graph: fx.GraphModule) -> Callable:
            return compile_graph(graph, inputs, **options)

        return _Backward(graph, make) if options.get("is_backward") else make(graph)

    return compile_


class _Backward:
    """A backward graph, compiled for each set of gradients when it is first asked for."""

    def __init__(self, graph: fx.GraphModule, make: Callable[[fx.GraphModule], Callable]) -> None:
        self._boxed_call = True  # torch then hands over one list, which the callee may empty
        self.graph, self.make = graph, make
        self.given = [out is not None for out in _outputs(graph).args[0]]
        self.context = TracingContext.try_get(), CompileContext.try_get()
        self.compiled: dict[tuple[bool, ...], Callable] = {}

    def __call__(self, values: list[Any]) -> Sequence[Tensor | None]:
        asked = _asked(self.given)
        if asked not in self.compiled:
            with tracing(self.context[0]), compile_context(self.context[1]):
                self.compiled[asked] = self.make(cut(self.graph, asked))
        return self.compiled[asked](values)


def _asked(given: Sequence[bool]) -> tuple[bool, ...]:
    """Return which gradients autograd uses of the backward that is running.

    Args:
        given: whether the graph has a gradient for each of its inputs, numbers and buffers among them.
    """
    nodes = [node for node, _ in torch._C._current_autograd_node().next_functions if node is not None]
    if len(nodes) != sum(given):  # of a weight that the stage does not use there is none
        return tuple(given)
    used = iter([_is_used(node) for node in nodes])
    return tuple(has and next(used) for has in given)


def _is_used(node: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad returns the gradient of
        return True


def cut(graph: fx.GraphModule, wanted: Sequence[bool]) -> fx.GraphModule:
    """Return a copy of `graph` that computes the `wanted` ones of its outputs, and None for the others."""
    copied, old = fx.Graph(), _outputs(graph)
    outputs = copied.graph_copy(graph.graph, {})
    made = copied.output(tuple(out if keep else None for out, keep in zip(outputs, wanted)))
    made.meta = dict(old.meta)
    copied.eliminate_dead_code()
    for node in copied.nodes:
        arguments = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
        for place, argument in enumerate(arguments):
            if argument.name == "output_mask":  # of a convolution's gradients: input, weight, bias
                used = {user.args[1] for user in node.users}
                node.update_arg(place, [flag and i in used for i, flag in enumerate(node.args[place])])
    copied.lint()
    return fx.GraphModule(graph, copied)


def _outputs(graph: fx.GraphModule) -> fx.Node:
    return next(node for node in reversed(graph.graph.nodes) if node.op == "output")
