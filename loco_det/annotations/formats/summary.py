"""Counts what was and was not converted from a data set, by reason, with the first few places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

from loco_det.annotations.formats.files import Tree, Unreadable, read_xml
from loco_det.core.errors import UserError

EXAMPLES = 5
Content = TypeVar("Content")


def printable(text: str) -> str:
    """Escape characters that UTF-8 cannot represent, such as invalid bytes of a file name."""
    return text.encode(errors="backslashreplace").decode()


@dataclass
class Reasons:
    """Reasons in order of appearance, each with a count and its first places."""

    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        before, examples = self.found.get(reason, (0, []))
        if len(examples) < EXAMPLES:
            examples = [*examples, printable(where)]
        self.found[reason] = (before + count, examples)

    def plain(self) -> list[dict[str, Any]]:
        return [{"reason": reason, "count": count, "examples": ex} for reason, (count, ex) in self.found.items()]


@dataclass
class Summary:
    """Filled by a reader and by the conversion.

    Attributes:
        classes: declared by the source, in order; empty if classes are defined by the objects.
        objects, images: skipped, by reason.
        notes: objects converted to another shape, and remarks.
        broken: unreadable files, each with the reason.
        seen: images that are already counted.
    """

    classes: list[str] = field(default_factory=list)
    objects: Reasons = field(default_factory=Reasons)
    images: Reasons = field(default_factory=Reasons)
    notes: Reasons = field(default_factory=Reasons)
    broken: list[tuple[str, str]] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)

    def leave_out_image(self, reason: str, where: str, objects: int, image: Path | None = None) -> None:
        """Count a skipped image and its annotated objects."""
        self.images.add(reason, where)
        if objects:
            self.objects.add("its image is left out", where, objects)
        if image is not None:
            self.seen.add(image)

    def readable(self, paths: Iterable[Path], read: Callable[[Path], Content]) -> Iterator[tuple[Path, Content]]:
        """Yield each file with its content by `read`; unreadable ones are counted as broken."""
        for path in paths:
            try:
                content = read(path)
            except Unreadable as error:
                self.broken.append((str(path), str(error)))
                continue
            yield path, content

    def documents(self, tree: Tree, paths: Iterable[Path], tag: str) -> Iterator[tuple[Path, ElementTree.Element]]:
        """Yield each XML file whose root element is <tag>, with that element; others are noted."""
        for path, root in self.readable(paths, read_xml):
            if root.tag == tag:
                yield path, root
            else:
                self.notes.add(f"an XML file whose root element is <{root.tag}>, not <{tag}>", tree.name(path))

    def refuse_broken(self, what: str) -> None:
        """Raise UserError if a file is damaged: an AP on the remaining files would hide it."""
        if self.broken:
            (name, reason), others = self.broken[0], len(self.broken) - 1
            more = f" ({others} other{'s' * (others != 1)} likewise)" if others else ""
            raise UserError(
                f"{name} is no {what}: {reason}{more}; restore the file, or remove it together with its image."
            )


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the parts of a summary (as written by `conversion`) that need attention, one per line."""
    found = []
    for key, what in (("images_left_out", "image"), ("objects_left_out", "object")):
        for entry in summary[key]:
            count = entry["count"]
            found.append(f"left out {count} {what}{'s' * (count != 1)}: {entry['reason']} ({_examples(entry)})")
    found += [f"note, {entry['count']} x: {entry['reason']} ({_examples(entry)})" for entry in summary["notes"]]
    return found


def _examples(entry: dict[str, Any]) -> str:
    examples: Sequence[str] = entry["examples"]
    return "; ".join(examples) + ("; ..." if entry["count"] > len(examples) else "")
