"""Write loco_det/detection/d2_defaults.yaml: the keys and default values of an installed Detectron2.

Run once for each Detectron2 whose keys should be known, from the top of the repository:

    python tests/record_d2_defaults.py COMMIT

COMMIT is the Detectron2 commit that is installed; it is noted at the head of the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).parent.parent / "loco_det" / "detection" / "d2_defaults.yaml"


def plain(value: Any) -> Any:
    """Sections as dicts; tuples as the text that Detectron2's own files use for them, e.g. "(800,)"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return repr(value) if isinstance(value, tuple) else value


def main(commit: str) -> None:
    import detectron2
    from detectron2.config import get_cfg

    head = (
        f"# Every configuration key of Detectron2 {detectron2.__version__} (commit {commit}) with its default.\n"
        "# Facts, written by tests/record_d2_defaults.py; not edited by hand. Tuples stand as text.\n"
    )
    TARGET.write_text(head + yaml.safe_dump(plain(get_cfg()), sort_keys=True, width=110))


if __name__ == "__main__":
    main(sys.argv[1])
