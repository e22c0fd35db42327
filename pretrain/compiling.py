"""torch.compile of the stages, tested before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from loco_det.core.errors import UserError


def stage_compiler(device: torch.device, backend: str = "inductor") -> Callable[[nn.Module], nn.Module]:
    """Return a function that compiles a stage for the local step; parameters and buffers stay the module's.

    A stage may be differentiated several times after one forward. A compiled stage's backward always computes weight
    gradients, which an input-only pass discards: values stay exact, at additional cost.

    Raises:
        UserError: torch.compile cannot generate code for `device` here.
    """
    try:
        torch.compile(torch.neg, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # compilers, Triton and Python versions raise various exceptions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"SOLVER.COMPILE: torch.compile does not work here ({reason[0]}); install "
            f"{'Triton' if device.type == 'cuda' else 'a C++ compiler such as g++'} or set SOLVER.COMPILE False"
        ) from error
    torch._functorch.config.donated_buffer = False  # a backward must not reuse buffers that the next one reads
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # stages share their code
    return partial(torch.compile, backend=backend)
