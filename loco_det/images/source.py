"""`Source`: encoded images by index, the interface of pretraining and probes to a data set.

`folders.py` opens the right kind for a path; `tar.py` and `indexed.py` define further kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loco_det.images.decode import read_file
from loco_det.images.packed import PackedStrings


class Source:
    """Encoded images by index; can be shared with forked and spawned workers.

    Attributes:
        root: the user's path, for messages.
        classes: class names, sorted; empty without labels.
        containers: the files that hold the images; empty if every image is a file.
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
        """The image's name, as the user would search for it."""
        return str(Path(self.root) / self._names[index])

    def identity(self) -> str:
        """sha256 of the number of images and their names below `root`, in order; not of their contents."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(self._names.data.tobytes())
        digest.update(self._names.offsets.tobytes())
        return digest.hexdigest()

    def label(self, index: int) -> int | None:
        """Return the index in `classes`, or None without labels."""
        return None if self._labels is None else int(self._labels[index])

    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            UserError: unreadable; names the image.
        """
        return read_file(self.name(index))
