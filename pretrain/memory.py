"""The bytes that a pretraining step keeps for its backward, and what a local method saves of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer
from pretrain.train import Learner


class SavedBytes(saved_tensors_hooks):
    """While active, counts the bytes saved for backward on any device, each storage once.

    Args:
        ignore: tensors that exist anyway, such as parameters.

    Attributes:
        now: saved bytes.
        peak: their maximum so far.
        history: (time.perf_counter(), saved bytes) after every change.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda saved: saved.tensor)
        self.ignored = {t.untyped_storage().data_ptr() for t in ignore}
        self.uses: Counter[int] = Counter()
        self.now = self.peak = 0
        self.history: list[tuple[float, int]] = []

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def change(self, nbytes: int) -> None:
        """Add `nbytes`, which may be negative."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self.history.append((time.perf_counter(), self.now))


class _Saved:
    """One saved tensor; autograd frees it with its graph."""

    def __init__(self, tensor: Tensor, account: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.account, self.place, self.bytes = tensor, account, storage.data_ptr(), storage.nbytes()
        if self.place in account.ignored:
            self.bytes = 0
        account.uses[self.place] += 1
        if account.uses[self.place] == 1:
            account.change(self.bytes)

    def __del__(self) -> None:
        self.account.uses[self.place] -= 1
        if not self.account.uses[self.place]:
            self.account.change(-self.bytes)


def learner_of(backbone: str, method: str, size: int = 224, **keys: object) -> Learner:
    """Return `method` with the paper's decoder on `backbone` for images of `size`; `keys` are further BACKBONE keys."""
    cfg = get_cfg()
    cfg.METHOD, cfg.BACKBONE.NAME, cfg.DECODER.CONV_BLOCKS = method, backbone, int(method == "loco")
    cfg.DATA.IMAGE_SIZE = size
    cfg.BACKBONE.update(keys)
    torch.manual_seed(0)
    return Learner(cfg)


def kept(learner: Learner, x: Tensor) -> tuple[int, int]:
    """Return the peak of the bytes saved in a step on `x` (2B, 3, S, S): of everything, and of the backbone alone."""
    weights = [*learner.parameters(), *learner.buffers()]

    def apart(i: int, features: Tensor) -> Tensor:
        with SavedBytes():  # an account of its own: the one outside does not see what is saved in here
            return learner.loss(i, features)

    peaks = []
    for loss, ignored in ((learner.loss, weights), (apart, [*weights, x])):
        losses = [partial(loss, i) for i in range(len(learner.units))]
        trainer = LocalTrainer([stage.module for stage in learner.stages], learner.units, losses)
        with SavedBytes(ignored) as saved:
            trainer.step(x)
        learner.zero_grad(set_to_none=True)
        peaks.append(saved.peak)
    return peaks[0], peaks[1]


def savings(backbone: str, x: Tensor, **keys: object) -> dict[str, dict[str, float]]:
    """Return the bytes of SimCLR, GIM and LoCo on `backbone`, and how many times less they are than end to end.

    Args:
        x: (2B, 3, S, S).
        keys: as for `learner_of`.

    Returns:
        {method: {"bytes", "saving", "backbone_bytes", "backbone_saving"}}
    """
    peaks = {method: kept(learner_of(backbone, method, x.shape[-1], **keys), x) for method in ("simclr", "gim", "loco")}
    whole, alone = peaks["simclr"]
    return {
        method: {"bytes": a, "saving": whole / a, "backbone_bytes": b, "backbone_saving": alone / b}
        for method, (a, b) in peaks.items()
    }
