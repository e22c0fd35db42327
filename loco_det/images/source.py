"""`Source`: encoded images by number, which is all that pretraining and probes ask of a data set.

`folders.py` finds the right one for a path; `tar.py` and `indexed.py` have their own kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loco_det.images.decode import read_file
from loco_det.images.packed import PackedStrings


class Source:
    """Encoded images by number; safe to share with forked and spawned workers.

    Attributes:
        root: what the user named, for messages.
        classes: class names, sorted; empty where images have no labels.
        containers: the files that hold the images; empty where every image is a file of its own.
    """

    containers: Sequence[str] = ()

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[str] | None) -> None:
        self.root = root
        self._names = PackedStrings.pack(names)
        self.classes = sorted(set(labels)) if labels else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = np.array([numbers[label] for label in labels], np.int32) if labels else None

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The image's name as the user would look for it."""
        return str(Path(self.root) / self._names[index])

    def identity(self) -> str:
        """sha256 of the number of images and of their names below `root`, in order; not of their contents."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(self._names.data.tobytes())
        digest.update(self._names.offsets.tobytes())
        return digest.hexdigest()

    def label(self, index: int) -> int | None:
        """Position in `classes`, or None where there are no labels."""
        return None if self._labels is None else int(self._labels[index])

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UserError: it cannot be read; names it.
        """
        return read_file(self.name(index))
