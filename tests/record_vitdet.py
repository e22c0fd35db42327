"""Write tests/golden/vitdet.json: what an installed Detectron2 computes for a small ViTDet, and ViT-B's tensors.

Run once for each Detectron2 that should be the reference, from the top of the repository:

    python tests/record_vitdet.py COMMIT

COMMIT is the Detectron2 commit that is installed; it is noted in the file.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import vitdet_cases as cases
from record_golden import detections, plain
from record_stock_configs import form

TARGET = Path(__file__).parent / "golden" / "vitdet.json"


def learning_rates(model: torch.nn.Module) -> dict[str, list[float]]:
    """{name: [learning rate, weight decay]} of ViT-B's recipe at the small model's depth."""
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
    from detectron2.solver.build import get_default_optimizer_params

    groups = get_default_optimizer_params(
        model,
        base_lr=1e-4,
        weight_decay=0.1,
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=6, lr_decay_rate=0.7),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}


def main(commit: str) -> None:
    import detectron2
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    torch.set_num_threads(1)
    model = instantiate(cases.lazy_model()).eval()
    cases.fill(model.state_dict())
    whole = instantiate(model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model)
    maps = cases.padded_maps(model.backbone)
    with torch.no_grad():
        found = model(cases.batch())
    golden = {
        "recorded_by": "python tests/record_vitdet.py COMMIT",
        "detectron2": detectron2.__version__,
        "commit": commit,
        "torch": torch.__version__.split("+")[0],
        "vit_b": form(whole),
        "maps": {
            level: {"shape": list(x.shape), "sample": plain(x.flatten()[:: x.numel() // 12])}
            for level, x in maps.items()
        },
        "detections": [detections(item["instances"]) for item in found],
        "groups": learning_rates(model),
    }
    TARGET.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
