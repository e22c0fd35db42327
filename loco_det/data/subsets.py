"""Which images belong to a part of a set: by the hash of their names, so that anyone can work it out again.

The order of a set under a seed is that of sha256("SEED NAME"), in hexadecimal, of its members' names; the first n of
it are the part of n members. So the parts of one seed are nested (1 % lies within 10 %), they depend on neither the
machine, the library nor the order of a file, and `printf '0 42' | sha256sum` tells where a member stands.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def hashed_order(names: Sequence[str], seed: int) -> np.ndarray:
    """(n,) int64 positions in `names`, in the order of the module's rule; equal names stay in their order."""
    digests = [hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).hexdigest() for name in names]
    return np.array(sorted(range(len(names)), key=digests.__getitem__), dtype=np.int64)


def part_size(share: float, total: int) -> int:
    """How many of `total` members a share of (0, 1] means: rounded up, so never none, and exact for 1 % of 100."""
    return min(total, math.ceil(round(share * total, 6)))


def share_of_each_class(labels: np.ndarray, names: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Ascending positions of `share` of the members of every class, and of at least one of each.

    Args:
        labels: (n,) integers.
        names: n, as `hashed_order` takes them.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = hashed_order([names[i] for i in members], seed)
        chosen.append(members[order[: part_size(share, len(members))]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
