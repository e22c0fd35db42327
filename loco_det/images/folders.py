"""Opens pretraining images of any kind as a `Source`: class folders, a flat folder, a text list, a zip and others.

`open_source(path, format)`:

| format | path | labels |
|---|---|---|
| folder | a folder of class folders, in torchvision's ImageFolder order | the class folder |
| flat | a folder, searched with all below it | none |
| list | a text file: one path per line, relative to the list; a class, if any, after a tab, space or comma | that |
| tar | a `.tar`, a folder of them, or `shards-{0000..0146}.tar`: webdataset's shards, see images/tar.py | `.cls` |
| zip | `images.zip`, or `images.zip!inner/folder` for a part of it; read in place, never unpacked | as auto |
| huggingface | a folder that `datasets` saved, see images/indexed.py | its first column of classes |
| torchvision:NAME | the root folder of torchvision's class NAME, see images/indexed.py | the data set's |
| auto | by suffix and by a folder's content; images at its top: `flat`, else `folder` | as above |

Folders that enclose everything in a zip are skipped: `x.zip` with only `x/cat/1.jpg` and `x/dog/2.jpg` has the classes
cat and dog.
"""

from __future__ import annotations

import os
import re
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from loco_det.core.errors import UserError
from loco_det.core.files import read_regular
from loco_det.core.outputs import walk_data
from loco_det.images.decode import SUFFIXES, check_bytes, log_unread
from loco_det.images.indexed import open_huggingface, open_torchvision
from loco_det.images.source import Source
from loco_det.images.tar import open_tar

FORMATS = ("auto", "folder", "flat", "list", "zip", "tar", "huggingface")
# "a b.jpg 3", "a.jpg,cat": formats of other programs' lists. A path that ends in an image suffix is complete.
_PATH_AND_CLASS = re.compile(
    rf"(?!.*({'|'.join(map(re.escape, SUFFIXES))})$)(.*?(?:{'|'.join(map(re.escape, SUFFIXES))}))([ ,]+)(\S.*)", re.I
)
_DEFLATED = 1032  # bytes that a packed byte can stand for, by deflate's longest match of its shortest codes
_LOCAL_HEADER = 30  # bytes before the name; PKWARE APPNOTE 4.3.7


class ZipSource(Source):
    """Images in a zip file, read by offset, so that workers need not parse the index."""

    def __init__(self, path: Path, members: Sequence[zipfile.ZipInfo], labels: Sequence[str] | None) -> None:
        super().__init__(str(path), [member.filename for member in members], labels)
        self.containers = (self.root,)
        columns = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self._table = np.array(columns, np.int64)
        self._files: dict[tuple[int, int], BinaryIO] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            file.close()

    def name(self, index: int) -> str:
        return f"{self.root}!{self._names[index]}"

    def read(self, index: int) -> bytes:
        offset, packed, size, checksum, method = (int(value) for value in self._table[index])
        check_bytes(size, self.name(index))
        try:
            file = self._file()
            file.seek(offset)
            header = file.read(_LOCAL_HEADER)
            # Name and extra field may be longer here than in the zip's index.
            file.seek(sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28)), os.SEEK_CUR)
            data = file.read(packed)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except (OSError, zlib.error) as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error}); take an intact zip") from error
        if header[:4] != b"PK\x03\x04" or len(data) != size or zlib.crc32(data) != checksum:
            raise UserError(f"{self.name(index)}: damaged inside the zip; take an intact zip")
        return data

    def _file(self) -> BinaryIO:
        # A file position shared after a fork, or between threads, would move unexpectedly.
        owner = (os.getpid(), threading.get_ident())
        if owner not in self._files:
            self._files[owner] = open(self.root, "rb")  # noqa: SIM115 (lives as long as its worker)
        return self._files[owner]


def open_source(path: str | Path, format: str = "auto") -> Source:
    """Open the images at `path`; see the module's table.

    Raises:
        UserError: nothing there, no images in it, not of the given `format`, or a damaged zip; names path and key.
    """
    if format not in FORMATS and not format.startswith("torchvision:"):
        raise UserError(f"DATA.FORMAT {format!r} is unknown; use one of {', '.join(FORMATS)} or torchvision:NAME")
    if not str(path):
        raise UserError("DATA.PATH is empty; set it to a folder, a list or a zip of images")
    file, _, inner = str(path).partition("!")
    root = Path(file if file.lower().endswith(".zip") else path)
    if format == "tar" or (format == "auto" and _holds_shards(root)):
        return open_tar(str(path), root)
    if format.startswith("torchvision:") or format == "huggingface" or (format == "auto" and is_huggingface(root)):
        named = format.removeprefix("torchvision:")
        return open_torchvision(named, root) if named != format else open_huggingface(root)
    if not os.path.exists(root):
        parts = [part for part in re.split(r"[,;:\s]+", str(path).strip("()[]")) if part]
        several = len(parts) > 1 and all(os.path.exists(part.strip("'\"")) for part in parts)
        remedy = "make one folder with links to them (ln -s), which are followed" if several else "correct the path"
        raise UserError(f"DATA.PATH {path}: no such file or folder; {remedy}")
    wanted = format
    if format == "auto":
        by_suffix = {".zip": "zip", ".txt": "list"}
        format = "folder or flat" if os.path.isdir(root) else by_suffix.get(root.suffix.lower(), "")
    if not (os.path.isdir(root) or os.path.isfile(root)):
        raise UserError(f"DATA.PATH {root}: is no regular file; name a file or a folder")
    if not format or os.path.isdir(root) != (format not in ("zip", "list")):
        kind = "a folder" if os.path.isdir(root) else "a file"
        raise UserError(f"DATA.PATH {root} is {kind}, which DATA.FORMAT {wanted!r} does not read; change one")
    if format == "zip":
        return _open_zip(root, inner)
    return _open_list(root) if format == "list" else _open_folder(root, format)


def is_huggingface(root: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any(os.path.isfile(root / name) for name in ("state.json", "dataset_dict.json"))


def _holds_shards(root: Path) -> bool:
    return root.suffix == ".tar" or (os.path.isdir(root) and any(root.glob("*.tar")))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _open_folder(root: Path, format: str) -> Source:
    names: list[tuple[str, str, str]] = []  # class folder, folder, file: the sort order of ImageFolder
    unread: list[str] = []
    outputs = set()  # top-level folders with this package's output
    for folder, files, own in walk_data(root):
        below = os.path.relpath(folder, root)
        top = below.partition(os.sep)[0]
        outputs |= {top} if own and top != "." else own
        names += [(top, below, name) for name in files if _is_image(name)]
        unread += (name for name in files if not _is_image(name))
    log_unread(str(root), unread)
    if not names:
        raise UserError(
            f"DATA.PATH {root}: no images in this folder (looked for {' '.join(SUFFIXES)}); correct the path"
        )
    names.sort()
    paths = [os.path.normpath(os.path.join(below, name)) for _, below, name in names]
    labels = [top for top, _, _ in names]
    if format == "folder":
        empty = {entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."}
        empty -= {*labels, *outputs}
        if empty:
            raise UserError(
                f"DATA.PATH {root}: class folder {min(empty)} holds no images; remove it or use DATA.FORMAT flat"
            )
        if "." in labels:
            raise UserError(f"DATA.PATH {root}: {paths[0]} lies in no class folder; move it or use DATA.FORMAT flat")
    return Source(str(root), paths, None if format == "flat" or "." in labels else labels)


def _open_list(path: Path) -> Source:
    try:
        lines = read_regular(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DATA.PATH {path}: cannot be read as a UTF-8 text list ({error}); correct the file") from error
    lines = [line.rstrip() for line in lines if line.strip() and not line.startswith("#")]
    rows = [line.partition("\t") for line in lines]
    if not any(tab for _, tab, _ in rows):  # then a class may still follow every path
        matches = [_PATH_AND_CLASS.fullmatch(line) for line in lines]
        if all(matches):
            rows = [match.groups()[1:] for match in matches]
    if not rows:
        raise UserError(f"DATA.PATH {path}: lists no images; write one path a line")
    labels = [label.strip() for _, _, label in rows]
    if any(labels) and not all(labels):
        bare = rows[labels.index("")][0]
        raise UserError(f"DATA.PATH {path}: {bare} has no class while others have one; add it after a tab")
    return Source(str(path.parent), [name.strip() for name, _, _ in rows], labels if any(labels) else None)


def _open_zip(path: Path, inner: str) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and _is_image(PurePosixPath(m.filename).name)]
    except Exception as error:  # damage makes zipfile raise nearly anything
        raise UserError(f"DATA.PATH {path}: not a readable zip ({error}); take an intact one") from error
    members = [m for m in members if not m.filename.startswith("__MACOSX/")]  # resource forks named like images
    prefix = tuple(PurePosixPath(inner).parts)
    parts = {m.filename: PurePosixPath(m.filename).parts for m in members}
    members = [m for m in members if parts[m.filename][: len(prefix)] == prefix]
    if not members:
        where = f"folder {inner} of this zip" if inner else "this zip"
        raise UserError(f"DATA.PATH {path}: no images in {where} (looked for {' '.join(SUFFIXES)}); correct the path")
    most = path.stat().st_size
    for member in members:
        if member.compress_size > most or member.file_size > _DEFLATED * most:
            raise UserError(f"DATA.PATH {path}: {member.filename} is larger than can be in it; take an intact zip")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"DATA.PATH {path}: {member.filename} is encrypted or packed unusually; pack with plain zip"
            )
    members.sort(key=lambda m: (parts[m.filename][:-1], parts[m.filename][-1]))
    folders = [parts[m.filename][:-1] for m in members]
    depth = _shared_depth(folders)
    labelled = all(len(folder) > depth for folder in folders)
    return ZipSource(path, members, [folder[depth] for folder in folders] if labelled else None)


def _shared_depth(folders: Sequence[tuple[str, ...]]) -> int:
    """Return the number of leading folders common to all: first and last in order share what all share."""
    first, last = min(folders), max(folders)
    same = [a == b for a, b in zip(first, last)]
    return same.index(False) if False in same else len(same)
