"""Many strings in two arrays: reference counts would copy a million Python strings into every worker."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings, including those that `os.fsdecode` makes of invalid UTF-8.

    Attributes:
        data: (total,) uint8, UTF-8.
        offsets: (count + 1,) int64, the start of each string.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def pack(cls, strings: Sequence[str]) -> PackedStrings:
        encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
        data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(data, np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def tolist(self) -> list[str]:
        text, ends = self.data.tobytes(), self.offsets.tolist()
        return [text[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(ends)]
