"""How many bytes autograd keeps for the backward."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes(saved_tensors_hooks):
    """While active, follows the bytes saved for backward on any device; each storage counts once.

    Args:
        ignore: tensors that live on anyway, such as parameters.

    Attributes:
        now: bytes alive.
        peak: their maximum so far.
        history: (seconds on time.perf_counter, bytes alive) after every change.
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
        """That many more bytes are alive."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self.history.append((time.perf_counter(), self.now))


class _Saved:
    """One saved tensor; it is dropped when autograd drops it."""

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
