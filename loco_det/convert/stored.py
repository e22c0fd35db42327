"""Tensors that stay in their file until they are asked for, so that a backbone in a large checkpoint costs no more
than the backbone.

`Stored` knows dtype, shape and place; `read` copies one tensor into memory and gives the file's pages back to the
system, `view` shares the pages instead.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Span:
    """`size` bytes from `start` of a mapped file, or of bytes that are in memory already."""

    data: mmap.mmap | bytes
    start: int
    size: int

    def copy(self, offset: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes from `offset` of the span, or all of it."""
        start = self.start + offset
        size = self.size - offset if size is None else size
        with memoryview(self.data) as whole:
            copied = bytearray(whole[start : start + size])
        self._release(start, size)
        return copied

    def crc32(self) -> int:
        """The checksum that zip files use."""
        checksum = 0
        for offset in range(0, self.size, CHUNK):
            checksum = zlib.crc32(self.copy(offset, min(CHUNK, self.size - offset)), checksum)
        return checksum

    def _release(self, start: int, size: int) -> None:
        """Let the system take back the pages that were read; they come from the file again if they are needed."""
        if size >= mmap.PAGESIZE and isinstance(self.data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, start + size - first)


@dataclass
class Allowance:
    """How many bytes `Stored.view` may copy where it cannot share: a short file must not become many long tensors."""

    left: int

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError("its tensors amount to more than the file holds")


@dataclass(frozen=True, eq=False)
class Stored:
    """A strided tensor in the bytes of `span`, already checked to lie inside it.

    Attributes:
        span: its storage.
        dtype: of its elements.
        offset: elements of the storage before its first.
        shape, stride: in elements.
        swapped: its bytes are in the order of big-endian machines.
        check: raises where the storage is damaged; called before its bytes are used.
    """

    span: Span
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    swapped: bool = False
    check: Callable[[], None] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor in memory of its own, contiguous."""
        if self.check is not None:
            self.check()
        if not self.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        item = self.dtype.itemsize
        copied = self.span.copy(self.offset * item, self.extent() * item)
        if self.swapped:
            copied = bytearray(np.frombuffer(copied, np.uint8).reshape(-1, item)[:, ::-1].tobytes())
        return torch.frombuffer(copied, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()

    def view(self, allowance: Allowance) -> Tensor:
        """The tensor over the file's own pages where they can be used as they stand, else as `read`."""
        start = self.span.start + self.offset * self.dtype.itemsize
        mapped = isinstance(self.span.data, mmap.mmap)
        if not mapped or self.swapped or start % self.dtype.itemsize or not self.numel():
            allowance.take(self.extent() * self.dtype.itemsize)
            return self.read()
        if self.check is not None:
            self.check()
        flat = torch.frombuffer(self.span.data, dtype=self.dtype, count=self.extent(), offset=start)
        return flat.as_strided(self.shape, self.stride)

    def extent(self) -> int:
        """Elements from its first to its last."""
        return sum((n - 1) * step for n, step in zip(self.shape, self.stride)) + 1 if self.numel() else 0


AnyTensor = Tensor | Stored


def in_memory(tensor: AnyTensor) -> Tensor:
    """`tensor`, read if it is still in its file."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def contiguous_stride(shape: tuple[int, ...], *, fortran: bool = False) -> tuple[int, ...]:
    """Elements from one index to the next along each dimension; the last runs fastest, or the first (`fortran`)."""

    def products(sizes: tuple[int, ...]) -> Iterator[int]:
        step = 1
        for size in sizes:
            yield step
            step *= max(size, 1)

    return tuple(products(shape)) if fortran else tuple(products(shape[::-1]))[::-1]
