"""Write tests/golden/lvis.json: what lvis-api says of the made-up sets of tests/lvis_cases.py.

    pip install --no-deps lvis==0.5.3 && python tests/record_lvis.py

It is not among the tests' dependencies, since it brings another OpenCV and is not maintained: NumPy has lost a name
that it uses, which is put back here.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

import lvis_cases
import numpy as np

TARGET = Path(__file__).parent / "golden" / "lvis.json"
SEEDS = range(4)
SHAPES = {"bbox": "bbox", "segm": "segmentation"}


def official(path: Path, results: list[dict], iou_type: str) -> dict[str, float]:
    """lvis-api's numbers, as shares; -1 where undefined."""
    import lvis

    if not hasattr(np, "float"):
        np.float = float  # noqa: NPY001
    keys = ("image_id", "category_id", "score", SHAPES[iou_type])
    truth = lvis.LVIS(str(path))
    found = lvis.LVISResults(truth, [{key: r[key] for key in keys} for r in results])
    evaluation = lvis.LVISEval(truth, found, iou_type)
    evaluation.run()
    return {name: float(value) for name, value in evaluation.get_results().items()}


def main() -> None:
    sets = {}
    for seed in SEEDS:
        content, results = lvis_cases.made_up(seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lvis.json"
            path.write_text(json.dumps(content))
            sets[str(seed)] = {kind: official(path, results, kind) for kind in SHAPES}
    version = importlib.metadata.version("lvis")
    TARGET.write_text(json.dumps({"recorded_by": "python tests/record_lvis.py", "lvis": version, "sets": sets}) + "\n")


if __name__ == "__main__":
    main()
