"""Write tests/golden/stock_configs.json: what every YAML file that comes with Detectron2 sets.

Run once for each Detectron2 whose files should be known, from the top of the repository:

    python tests/record_stock_configs.py COMMIT

COMMIT is the Detectron2 commit that is installed; it is noted in the file. For each configuration the values that
differ from Detectron2's defaults are recorded and, where it describes an R-CNN or a semantic segmentor, the number of
tensors of the model that Detectron2 builds of it and a hash of their names and shapes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

TARGET = Path(__file__).parent / "golden" / "stock_configs.json"


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; tuples as lists, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: plain(value)})
    return found


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def form(model: torch.nn.Module) -> dict[str, Any]:
    """How many tensors a model has, and a hash of their names and shapes; step counters do not count."""
    lines = sorted(f"{k} {list(v.shape)}" for k, v in model.state_dict().items() if "num_batches_tracked" not in k)
    return {"tensors": len(lines), "hash": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]}


def stock_configs() -> dict[str, Path]:
    """{name: file} of the YAML files in the installed Detectron2."""
    from detectron2 import model_zoo

    root = Path(model_zoo.__file__).parent / "configs"
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def record(path: Path) -> dict[str, Any]:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg, defaults = get_cfg(), flat(get_cfg())
    cfg.merge_from_file(str(path), allow_unsafe=True)
    found: dict[str, Any] = {"sets": {k: v for k, v in flat(cfg).items() if v != defaults[k]}}
    ours = ("GeneralizedRCNN", "ProposalNetwork", "SemanticSegmentor")
    if cfg.MODEL.META_ARCHITECTURE in ours and not cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            found["model"] = form(build_model(cfg))
    return found


def main(commit: str) -> None:
    import detectron2

    facts = {
        "recorded_by": "python tests/record_stock_configs.py COMMIT",
        "detectron2": detectron2.__version__,
        "commit": commit,
    }
    rows = [f"{json.dumps(name)}: {json.dumps(record(path))}" for name, path in stock_configs().items()]
    configs = ",\n".join(rows)  # one a line
    TARGET.write_text(f'{json.dumps(facts)[:-1]}, "configs": {{\n{configs}\n}}}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
