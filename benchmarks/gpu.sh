#!/usr/bin/env bash
# All figures that need a GPU, in about ten minutes on one card: benchmarks/gpu.sh
#
# Writes benchmarks/results/*_gpu.json and prints what failed. A step that fails does not stop the others. It has not been
# run yet: where a file is missing, the documentation says "not run".
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
results=benchmarks/results
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU; loco-det doctor says more" >&2
  exit 2
fi

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  echo "+ $*"
  timeout "$limit" "$@" || failed+=("$name")
  echo "= $name: $((SECONDS - begun)) s"
}

"$python" - > "$results/machine_gpu.json" <<'PY'
import json, os, torch
device = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": device.name, "gib": round(device.total_memory / 2**30, 1), "gpus": torch.cuda.device_count(),
                  "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "cuda": torch.version.cuda}))
PY

step tests 150 "$python" -m pytest -m cuda -q
step local_backward 100 "$python" benchmarks/local_backward.py --device cuda --json "$results/local_backward_gpu.json"
step detection_step 120 "$python" benchmarks/detection_step.py --device cuda --json "$results/detection_step_gpu.json"
step input_pipeline 60 "$python" benchmarks/input_pipeline.py --json "$results/input_pipeline_gpu.json"
step vit_detection 60 "$python" benchmarks/vit_detection.py --device cuda --json "$results/vit_detection_gpu.json"
# A short run from images to frozen AP on the card: that it works, not how well.
step evidence 110 "$python" - "$scratch" "$results/evidence_gpu.json" <<'PY'
import os, sys, time
from pathlib import Path
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.commands.pretrain import pretrain_file
from loco_det.convert import convert
from loco_det.core.files import write_json
from loco_det.detection.keys import load_cfg
from loco_det.detection.train import train_net

out, begun, found = Path(sys.argv[1]), time.monotonic(), {}
os.environ["DETECTRON2_DATASETS"] = str(out / "datasets")
make_shapes_dataset(out / "datasets", train=400, val=100, seed=0)
for method in ("random", "loco"):
    folder, images = out / method, out / "datasets" / "shapes" / "train"
    settings = ["METHOD", method, "DATA.PATH", str(images), "OUTPUT_DIR", str(folder / "pretrain"), "DEVICE", "cuda"]
    convert(pretrain_file("configs/pretrain/quickstart.yaml", settings), folder / "backbone.pkl")
    settings = ["MODEL.WEIGHTS", str(folder / "backbone.pkl"), "OUTPUT_DIR", str(folder / "detector")]
    cfg, _ = load_cfg("configs/quickstart.yaml", [*settings, "MODEL.DEVICE", "cuda"])
    found[method] = train_net(cfg, engine="torchvision")
write_json(Path(sys.argv[2]), {"frozen": found, "seconds": round(time.monotonic() - begun, 1)})
PY

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
