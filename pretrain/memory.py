"""The bytes that autograd saves for the backward pass; the tests of local learning count them too."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


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
