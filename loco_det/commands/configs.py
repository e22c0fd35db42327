"""`loco-det configs`: the configurations that come with this package, with their one-line headers."""

from __future__ import annotations

import argparse

from loco_det.core.config import packaged_configs
from loco_det.core.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Print the name and the first sentence of every file, or of those with all words.

    Raises:
        UserError: no file has them.
    """
    headers = {name: header(path.read_text()) for name, path in packaged_configs().items()}
    words = [word.lower() for word in args.words]
    shown = {name: text for name, text in headers.items() if all(word in f"{name} {text}".lower() for word in words)}
    if not shown:
        raise UserError(f"no configuration has {' and '.join(args.words)} in its name or header; leave the words out")
    width = max(map(len, shown))
    for name, text in shown.items():
        print(f"{name:<{width}}  {text}")


def header(text: str) -> str:
    """Return the first sentence of a file's opening comment."""
    comment: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        comment.append(line.lstrip("# ").strip())
    sentence, dot, _ = " ".join(comment).partition(". ")
    return f"{sentence.rstrip('.')}." if dot or comment else ""
