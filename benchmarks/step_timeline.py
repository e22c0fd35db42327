"""One training step of simclr, gim and loco on a time line, drawn from a trace of torch's profiler.

    python benchmarks/step_timeline.py --json step.json --png docs/local_step.png     # half a minute on 2 cores

ResNet-50, 128 px, 2 x 16 views, float32, on the CPU. For every stage the picture shows when its forward, its
passes and the losses that end at it run and when its gradients are final; below it, the bytes saved for backward.
End-to-end SimCLR is cut into the same four stages, which changes nothing of what it computes, so that its backward can
be seen stage by stage.

JSON: {method: {"spans": [{"what": "forward" | "loss" | "input-only pass" | "parameter pass", "stage": name, "begin",
"end"}], "final": {stage: time}, "saved": [[time, bytes], ...], "end": time}}, times in milliseconds of the step.
"""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path

import torch
from _common import parser, report
from local_backward import configuration
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from torch.profiler import ProfilerActivity, profile, record_function

from loco_det.core.device import keep_freed_memory
from pretrain.loco import LocalTrainer, Unit, method_units, split_backbone
from pretrain.memory import SavedBytes
from pretrain.train import LAYOUT, Learner

TITLES = {"simclr": "SimCLR, end to end", "gim": "Greedy InfoMax", "loco": "LoCo"}
STAGES = ["res2", "res3", "res4", "res5"]
COLOURS = {  # they differ in lightness too
    "forward": "#9ecae1",
    "loss": "#fdd049",
    "input-only pass": "#e6550d",
    "parameter pass": "#1b5e8a",
}


def record(method: str, x: torch.Tensor) -> dict[str, object]:
    """What a step of `method` did when, after one to warm up."""
    torch.manual_seed(0)
    learner = Learner(configuration(method, 0, "none"))
    stages, units = split_backbone(learner.backbone, method_units("gim", STAGES) + method_units(method, STAGES))
    units = units[len(STAGES) :]  # the first ones were for their borders only
    losses = [partial(learner.loss, i) for i in range(len(units))]
    trainer = LocalTrainer([stage.module for stage in stages], units, losses)
    trainer.step(x)
    learner.zero_grad()
    with SavedBytes() as saved, profile(activities=[ProfilerActivity.CPU]) as trace, record_function("step"):
        begun = time.perf_counter()
        trainer.step(x)
    step = next(event.time_range for event in trace.events() if event.name == "step")
    spans = [
        {**span, "begin": (event.time_range.start - step.start) / 1e3, "end": (event.time_range.end - step.start) / 1e3}
        for event in trace.events()
        if (span := _meaning(event.name, units))
    ]
    return {
        "spans": spans,
        "final": {span["stage"]: span["end"] for span in spans if span["what"] == "parameter pass"},
        "saved": [[(moment - begun) * 1e3, nbytes] for moment, nbytes in saved.history],
        "end": (step.end - step.start) / 1e3,
    }


def _meaning(label: str, units: list[Unit]) -> dict[str, str] | None:
    """What and where a label that pretrain/loco.py gives to a part of a step is; None for any other."""
    if match := re.fullmatch(r"stage (\d+) (.+)", label):
        return {"what": match[2], "stage": STAGES[int(match[1])]}
    if match := re.fullmatch(r"unit (\d+) loss", label):
        return {"what": "loss", "stage": STAGES[units[int(match[1])].last]}
    return None


def draw(records: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(
        2 * len(records), sharex=True, figsize=(9, 9.5), height_ratios=[3, 1.6] * len(records), layout="constrained"
    )
    most = max(nbytes for recorded in records.values() for _, nbytes in recorded["saved"]) / 1e6
    for (method, recorded), lanes, curve in zip(records.items(), axes[::2], axes[1::2]):
        for span in recorded["spans"]:
            row = STAGES.index(span["stage"])
            lanes.barh(row, span["end"] - span["begin"], 0.7, span["begin"], color=COLOURS[span["what"]])
        for stage, moment in recorded["final"].items():
            lanes.plot(moment, STAGES.index(stage), "D", color="black", markersize=5, clip_on=False, zorder=3)
        lanes.set_yticks(range(len(STAGES)), STAGES)
        lanes.set_ylim(-0.6, len(STAGES) - 0.4)
        lanes.set_title(TITLES[method], loc="left", fontsize=11, fontweight="bold")
        moments, saved = zip(*((moment, nbytes / 1e6) for moment, nbytes in recorded["saved"]))
        curve.fill_between(moments, saved, step="post", color="#bdbdbd")
        peak = max(saved)
        curve.axhline(peak, color="#636363", linewidth=0.8, linestyle="--")
        curve.text(moments[saved.index(peak)], peak, f"{peak:.0f} MB", va="bottom", ha="center", fontsize=9)
        curve.set_ylim(0, 1.25 * most)
        curve.set_ylabel("saved, MB")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[-1].set_xlabel("milliseconds since the start of the step")
    handles = [Patch(color=colour, label=what) for what, colour in COLOURS.items()]
    handles.append(plt.Line2D([], [], color="black", marker="D", linestyle="", markersize=5, label="gradients final"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--png", type=Path, metavar="PATH", help="draw the picture there")
    options.add_argument("--tries", type=int, default=5, help="steps of each method; the fastest is drawn")
    args = options.parse_args()
    keep_freed_memory()  # as `loco-det pretrain` does
    x = torch.randn(32, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(memory_format=LAYOUT)
    tries = [{method: record(method, x) for method in TITLES} for _ in range(args.tries)]
    records = {method: min((each[method] for each in tries), key=lambda r: r["end"]) for method in TITLES}
    rows = [
        [method, *(recorded["final"][stage] / recorded["end"] for stage in STAGES), recorded["end"]]
        for method, recorded in records.items()
    ]
    if args.png is not None:
        draw(records, args.png)
    report(["method", *(f"{stage} final" for stage in STAGES), "step, ms"], rows, records, args.json)


if __name__ == "__main__":
    main()
