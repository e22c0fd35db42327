"""loco-det report: what is found, what is computed from it, and the page as a browser sees it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lvis_cases
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_voc import detections as voc_detections
from test_voc import write_voc
from tiny_detection import tiny_cfg, write_tiny

from loco_det.annotations.registry import find_dataset
from loco_det.cli import main
from loco_det.commands.report import training_series
from loco_det.core.config import flat
from loco_det.core.errors import UserError
from loco_det.core.files import write_checked_json
from loco_det.detection.keys import get_cfg
from loco_det.evaluation.coco import evaluate_coco
from loco_det.evaluation.lvis import NUMBERS, evaluate_lvis
from loco_det.evaluation.voc import evaluate_voc
from loco_det.report import charts
from loco_det.report.analysis import experiments, probe_curves
from loco_det.report.page import KINDS
from loco_det.report.panels import panels
from loco_det.report.runs import DetectorRun, find_runs
from loco_det.report.statistics import summarise, t95

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"), images=12)


@pytest.fixture(autouse=True)
def _found_there(data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))


def detections(data: Path, shift: float, seed: int = 0, keep: float = 1.0) -> list[dict]:
    """The ground truth's boxes and masks, moved by up to `shift` pixels, each found with probability `keep`."""
    rng = np.random.default_rng(seed)
    truth = json.loads((data / "tiny/annotations/instances_val.json").read_text())
    coco = COCO.__new__(COCO)
    coco.imgs = {image["id"]: image for image in truth["images"]}
    found = []
    for a in truth["annotations"]:
        score, (dx, dy) = float(rng.random()), rng.uniform(-shift, shift, 2).tolist()
        if rng.random() < keep:
            x, y, w, h = a["bbox"]
            rle = coco.annToRLE(a)
            mask = {"size": rle["size"], "counts": rle["counts"].decode()}
            found.append(
                {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [x + dx, y + dy, w, h],
                 "score": score, "segmentation": mask}
            )  # fmt: skip
    return found


def make_run(folder: Path, data: Path, found: list[dict], method: str | None = None, **changes: object) -> Path:
    """A folder as `loco-det train` leaves it, with these detections and their AP."""
    cfg = tiny_cfg(folder, **changes)
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(found))
    results = evaluate_coco(data / "tiny/annotations/instances_val.json", found)
    flat = {f"{k}/{n}": None if math.isnan(v) else v for k, numbers in results.items() for n, v in numbers.items()}
    lines = [{"iteration": i, "total_loss": 3.0 - i / 10} for i in range(5)] + [{"iteration": 6, **flat}]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method:
        weights = {"path": f"{method}.pkl", "sha256": method.encode().hex() * 4, "method": method}
        record = {"seed": cfg.SEED, "engine": "torchvision", "started": "2030-01-01", "weights": weights}
        record |= {"datasets": {}, "environment": None}
        (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def runs(data, tmp_path) -> Path:
    """random and loco, two seeds each: loco's boxes are nearer to the truth."""
    for seed in (0, 1):
        make_run(tmp_path / f"runs/random{seed}", data, detections(data, 9, seed, 0.8), "random", SEED=seed)
        make_run(tmp_path / f"runs/loco{seed}", data, detections(data, 2, seed), "loco", SEED=seed)
    return tmp_path / "runs"


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 7, 30, 31, 60, 500])
def test_students_quantile_is_where_its_density_leaves_one_fortieth(degrees):
    def density(x):
        norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
        return np.exp(norm - (degrees + 1) / 2 * np.log1p(x * x / degrees))

    x = np.linspace(0, t95(degrees), 200_001)
    assert np.trapezoid(density(x), x) == pytest.approx(0.475, abs=2e-5)


def test_mean_and_interval_by_hand():
    found = summarise([1.0, 3.0, None, float("nan")])
    assert found["n"] == 2
    assert found["mean"] == 2.0
    assert found["std"] == pytest.approx(math.sqrt(2))
    assert found["ci95"] == pytest.approx([2 - 12.7062, 2 + 12.7062], abs=1e-3)  # std / sqrt(2) is 1
    assert summarise([4.0]) == {"n": 1, "mean": 4.0, "std": None, "ci95": None, "values": [4.0]}
    assert summarise([None])["mean"] is None


def test_rows_hold_the_mean_of_what_the_runs_recorded(runs):
    missing: list[str] = []
    (found,) = experiments(find_runs([str(runs)]), None, 0, missing)
    assert missing == []
    assert [row["backbone"] for row in found["backbones"]] == ["loco", "random"]
    for row in found["backbones"]:
        recorded = [json.loads((Path(p) / "metrics.json").read_text().splitlines()[-1]) for p in row["runs"]]
        for key in ("bbox/AP", "segm/AP50", "bbox/AP-red"):
            assert row["numbers"][key]["mean"] == pytest.approx(np.mean([r[key] for r in recorded]))
    assert found["title"] == "Mask R-CNN FPN, frozen, tiny_train, 6 iterations of 2"


def test_paired_bootstrap_against_a_loop_over_pycocotools(data, runs, capsys):
    (found,) = experiments(find_runs([str(runs)]), "random", 400, [])
    pair = next(p for p in found["paired"] if p["seed"] == 0)
    assert pair["backbone"] == "loco"
    assert pair["images"] == 12
    first, second = (detections(data, 9, 0, 0.8), detections(data, 2, 0))
    truth = json.loads((data / "tiny/annotations/instances_val.json").read_text())
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(60):
        chosen = rng.integers(1, 13, 12)
        drawn.append(_resampled_ap(truth, second, chosen) - _resampled_ap(truth, first, chosen))
    whole = _resampled_ap(truth, second, np.arange(1, 13)) - _resampled_ap(truth, first, np.arange(1, 13))
    assert pair["bbox"]["AP"]["difference"] == pytest.approx(whole, abs=1e-6)
    low, high = pair["bbox"]["AP"]["ci95"]
    assert low < whole < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.4)  # 60 draws are few


def _resampled_ap(truth: dict, results: list[dict], images: np.ndarray) -> float:
    """Box AP in percent where each drawn image is an image of its own."""
    gt, found = {**truth, "images": [], "annotations": []}, []
    for new, old in enumerate(images.tolist(), 1):
        gt["images"].append({**truth["images"][old - 1], "id": new})
        own = [a for a in truth["annotations"] if a["image_id"] == old]
        gt["annotations"] += [{**a, "image_id": new, "id": len(gt["annotations"]) + i + 1} for i, a in enumerate(own)]
        found += [{k: v for k, v in r.items() if k != "segmentation"} | {"image_id": new} for r in results
                  if r["image_id"] == old]  # fmt: skip
    coco = COCO()
    coco.dataset = gt
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return 100 * precision[precision > -1].mean()


@pytest.mark.parametrize("benchmark", ["voc", "lvis"])
def test_other_measures_have_paired_differences_and_no_errors(benchmark, tmp_path, monkeypatch):
    """Each the difference of two evaluations, in columns of its measure; TIDE's errors stay COCO's."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    if benchmark == "voc":
        name, ids = "voc_2007_val", write_voc(tmp_path / "sets", "2007", "val")
        found = [voc_detections(tmp_path / "sets", "2007", ids, seed) for seed in (0, 1)]
        numbers = [evaluate_voc(find_dataset(name).annotations, rows, eleven_points=True) for rows in found]
        columns, changes = {"bbox": ("AP", "AP50", "AP75")}, {"MODEL__MASK_ON": False}
    else:
        name, (content, rows) = "lvis_v1_val", lvis_cases.made_up(0)
        path = tmp_path / "sets/lvis/lvis_v1_val.json"
        path.parent.mkdir(parents=True)
        (tmp_path / "sets/coco").mkdir()
        path.write_text(json.dumps(content))
        found = [rows, rows[::2]]
        numbers = [evaluate_lvis(path, rows) for rows in found]
        usual = tuple(each for each in NUMBERS if each != "APs")  # few images have a small object
        columns, changes = dict.fromkeys(("bbox", "segm"), usual), {}
    for run, rows, own in zip(("one", "two"), found, numbers):
        cfg = tiny_cfg(tmp_path / run, DATASETS__TEST=(name,), **changes)
        (tmp_path / run / "inference").mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text(cfg.dump())
        (tmp_path / run / "inference/coco_instances_results.json").write_text(json.dumps(rows))
        flat = {f"{k}/{n}": None if math.isnan(v) else v for k, each in own.items() for n, v in each.items()}
        (tmp_path / run / "metrics.json").write_text(json.dumps({"iteration": 1, **flat}) + "\n")
    argv = [*(f"{run}={tmp_path / run}" for run in ("one", "two")), "--out", str(tmp_path / "out")]
    assert main(["report", *argv, "--bootstrap", "50", "--images", "0", "--quiet"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    (experiment,) = report["experiments"]
    (pair,) = experiment["paired"]
    for kind, names in columns.items():
        assert tuple(pair[kind]) == names
        for each in names:
            whole = numbers[1][kind][each] - numbers[0][kind][each]
            assert pair[kind][each]["difference"] == pytest.approx(whole)
        low, high = pair[kind]["AP"]["ci95"]
        assert low < pair[kind]["AP"]["difference"] < high
    shown = [f"{KINDS[kind]} {each}" for kind, names in columns.items() for each in names]
    assert "| backbone | seed | " + " | ".join(shown) + " |" in (tmp_path / "out/report.md").read_text()
    assert not any(row["analysis"] for row in experiment["backbones"])
    assert not [told for told in report["missing"] if "pictures" not in told]

    lines = (tmp_path / "two/metrics.json").read_text()
    (tmp_path / "two/metrics.json").write_text(lines.replace('"bbox/AP": ', '"bbox/AP": 1'))
    missing: list[str] = []
    experiments(find_runs(argv[:2]), None, 10, missing)
    assert re.search(r"its detections give bbox AP .*evaluate it again with --eval-only. So no paired", missing[0])


def test_a_run_compared_with_itself_differs_by_nothing(data, tmp_path):
    same = detections(data, 4)
    for name in ("a", "b"):
        make_run(tmp_path / name, data, same, name)
    (found,) = experiments(find_runs([str(tmp_path / "a"), str(tmp_path / "b")]), None, 50, [])
    assert found["paired"][0]["bbox"]["AP"] == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_each_kind_of_error_is_found_where_it_was_made(data, tmp_path):
    perfect = detections(data, 0)
    ghosts = [*perfect, *({**d, "bbox": [60.0, 60.0, 4.0, 4.0], "score": 0.0} for d in perfect)]  # objects end at 59
    twice = [*perfect, *({**d, "score": 0.0} for d in perfect)]
    half = [d for d in perfect if d["image_id"] % 2]
    for name, found in (("perfect", perfect), ("ghosts", ghosts), ("twice", twice), ("half", half)):
        make_run(tmp_path / name, data, found, name)
    (found,) = experiments(find_runs([str(tmp_path)]), None, 0, [])
    errors = {row["backbone"]: row["analysis"]["bbox"]["counts"] for row in found["backbones"]}
    objects = len(perfect)
    assert not any(errors["perfect"].values())
    assert {kind: n for kind, n in errors["ghosts"].items() if n} == {"Bkg": objects}
    assert {kind: n for kind, n in errors["twice"].items() if n} == {"Dupe": objects}
    assert errors["half"]["Miss"] == objects - len(half)
    curves = {row["backbone"]: row["analysis"]["bbox"]["curves"]["0.50"] for row in found["backbones"]}
    assert curves["perfect"] == [1.0] * 101
    assert curves["half"][:40] == [1.0] * 40
    assert curves["half"][-1] == 0.0


# --- what is found ----------------------------------------------------------------------------------------------


def test_other_settings_are_other_tables(data, tmp_path):
    make_run(tmp_path / "a", data, detections(data, 3), "loco")
    make_run(tmp_path / "b", data, detections(data, 3), "loco", SOLVER__BASE_LR=0.02)
    make_run(tmp_path / "c", data, detections(data, 3), "loco", MODEL__BACKBONE__FREEZE_AT=0)
    titles = [e["title"] for e in experiments(find_runs([str(tmp_path)]), None, 0, [])]
    assert len(titles) == 3
    assert "SOLVER.BASE_LR 0.01" in titles[0]
    assert "SOLVER.BASE_LR 0.02" in titles[1]
    assert ", fine-tuned," in titles[2]


def test_names_come_from_the_user_the_record_or_the_file(data, tmp_path):
    make_run(tmp_path / "a", data, [], "loco")
    make_run(tmp_path / "b", data, [], MODEL__WEIGHTS="weights/swav_800.pkl")
    make_run(tmp_path / "c", data, [], MODEL__WEIGHTS="runs/byol/backbone.pkl")
    found = find_runs([f"mine={tmp_path / 'a'}", str(tmp_path)])
    assert [run.backbone for run in found.detectors] == ["mine", "swav_800", "byol"]  # a folder counts once


def test_different_backbones_of_one_name_are_refused(data, tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, data, [], "loco")
    record = json.loads((tmp_path / "b/run.json").read_text())
    record["weights"]["sha256"] = "0" * 64
    (tmp_path / "b/run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="both called 'loco'"):
        find_runs([str(tmp_path)])
    find_runs([f"long={tmp_path / 'a'}", f"short={tmp_path / 'b'}"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "there is no such run"),
        (lambda p: p.mkdir(), "holds no run"),
        (lambda p: p.write_text("{"), "no result of loco-det probe"),
    ],
)
def test_bad_places_are_one_sentence(tmp_path, capsys, make, words):
    make(tmp_path / "x.json")
    assert main(["report", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_line_of_metrics_is_named_and_a_cut_last_one_is_not(data, runs):
    metrics = runs / "loco0" / "metrics.json"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"iteration": 7, "bbo')
    find_runs([str(runs)])
    metrics.write_text(whole.replace('"iteration": 2', '"iteration" 2'))
    with pytest.raises(UserError, match=r"metrics\.json: line 3"):
        find_runs([str(runs)])


def test_detections_of_another_run_are_not_taken_apart(data, runs):
    (runs / "loco0/inference/coco_instances_results.json").write_text(json.dumps(detections(data, 8, 3)))
    missing: list[str] = []
    (found,) = experiments(find_runs([str(runs)]), "random", 10, missing)
    assert len(missing) == 1
    assert "evaluate it again" in missing[0]
    assert [(p["backbone"], p["seed"]) for p in found["paired"]] == [("loco", 1)]


def test_a_run_that_left_nothing_is_named(data, runs, tmp_path, capsys):
    (runs / "loco0/metrics.json").unlink()  # it was stopped before the first line; run.json is there from the start on
    shutil.rmtree(runs / "loco0/inference")
    missing: list[str] = []
    (found,) = experiments(find_runs([str(runs)]), None, 0, missing)
    assert [(row["backbone"], row["seeds"]) for row in found["backbones"]] == [("loco", [1]), ("random", [0, 1])]
    assert missing == [f"{runs / 'loco0'}: loco, seed 0: not evaluated yet, so it is in no table"]
    missing.clear()
    experiments(find_runs([str(runs)]), "loco", 10, missing)
    assert missing[1:] == [f"{runs / 'random0'}: no paired difference, for loco has no such run of seed 0"]
    assert main(["report", str(runs / "loco0"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "Results: nothing was given" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "MODEL: {META_ARCHITECTURE: GeneralizedRCNN, MASK_ON: true", "config.yaml"),  # cut off
        ("config.yaml", "MODEL: {META_ARCHITECTURE: GeneralizedRCNN}", "config.yaml: lacks DATASETS.TEST"),
        ("metrics.json", '3\n{"iteration": 1}\n', "metrics.json: line 1 is no JSON object"),
        ("metrics.json", b"\xff\xfe\n", "metrics.json: cannot be read"),
        ("metrics.json", "[" * 100_000 + "\n{}\n", "metrics.json: line 1 is no JSON object"),
        ("run.json", '{"seed": 1', "run.json: is damaged"),
        ("run.json", '{"seed": 1, "environment": {"devi": "cpu"}}', "run.json: is damaged"),
        ("run.json", '{"seed": 1, "datasets": {"a": {"path": "a.json"}}}', "run.json: is damaged"),
        ("SHA256SUMS", f"{'0' * 64}  config.yaml\n", "config.yaml: is not what the run wrote"),
    ],
)
def test_a_damaged_run_is_one_sentence(runs, tmp_path, capsys, file, content, words):
    (runs / "loco0" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("content", ['[{"image_id": 1, "categ', "{}", "[3]", '[{"image_id": 1}]', "[]"])
def test_damaged_detections_are_a_gap(runs, tmp_path, capsys, content):
    (runs / "loco0/inference/coco_instances_results.json").write_text(content)
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out), "--bootstrap", "0", "--images", "1", "--quiet"]) == 0
    told = json.loads((out / "report.json").read_text())["missing"]
    assert any(text.startswith(f"{runs / 'loco0'}: its detections") for text in told)


@pytest.mark.parametrize("measure", ["top1", "miou"])
def test_a_probe_that_was_changed_is_refused(tmp_path, measure):
    stages = {"res5": {measure: 30.0, f"{measure}_interval": [29, 31]}}
    content = {"stages": stages, "features": {"batchnorm": "as stored"}}
    write_checked_json(tmp_path / "probe.json", content)
    assert len(find_runs([str(tmp_path)]).probes) == 1
    text = (tmp_path / "probe.json").read_text()
    for changed in (text.replace("30.0", "80.0"), text[:-9]):
        (tmp_path / "probe.json").write_text(changed)
        with pytest.raises(UserError, match=r"probe\.json: is no"):
            find_runs([str(tmp_path)])


@pytest.mark.parametrize("stages", [5, ["res5"], {"res5": 3.0}, {"res5": {"top1": None}}, {}])
def test_other_json_is_no_probe(runs, tmp_path, stages):
    (runs / "other.json").write_text(json.dumps({"stages": stages}))
    assert find_runs([str(runs)]).probes == []
    with pytest.raises(UserError, match="no result of loco-det probe"):
        find_runs([str(runs / "other.json")])


def probe(folder: Path, name: str, top1: float, seed: int = 0, **changes: object) -> Path:
    """A file as `loco-det probe --json` leaves it."""
    weights = {"name": f"{name}/backbone.pkl", "weights_sha256": name.encode().hex()}
    content = {
        "protocol": "linear",
        "data": {"path": "d/set.zip", "train_images": 50},
        "backbone": weights,
        "seed": seed,
    }
    content["stages"] = {"res5": {"top1": top1, "top1_interval": [top1 - 1, top1 + 1]}}
    folder.mkdir(exist_ok=True)
    file = folder / f"{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps({**content, **changes}))
    return file


def test_probes_of_one_name_are_averaged(tmp_path):
    folder = tmp_path / "probes"
    files = [probe(folder, "a", 20), probe(folder, "a", 23, seed=1), probe(folder, "b", 26), probe(folder, "c", 50)]
    probe(folder, "a", 70, data={"path": "d/set.zip", "train_images": 9})  # of other images: a table of its own
    found, other = probe_curves(find_runs([f"x={files[2]}", str(folder)]))
    assert (found["protocol"], found["data"], other["data"]) == ("linear", "set.zip, 50 images", "set.zip, 9 images")
    res5 = {name: stages["res5"] for name, stages in found["backbones"].items()}
    assert list(res5) == ["x", "a", "c"]
    assert res5["c"] == {"top1": 50, "top1_interval": [49, 51], "top1_std": None, "runs": 1}
    assert res5["a"]["runs"] == 2
    assert res5["a"]["top1"] == 21.5
    assert res5["a"]["top1_std"] == pytest.approx(1.5 * math.sqrt(2))
    assert res5["a"]["top1_interval"] == pytest.approx([21.5 - 1.5 * 12.7062, 21.5 + 1.5 * 12.7062], abs=1e-3)
    # Two pretrainings under one name that the user gave.
    (found,) = probe_curves(find_runs([f"x={file}" for file in files[:3]]))
    assert found["backbones"]["x"]["res5"]["top1"] == pytest.approx(23)


def segmented(folder: Path, name: str, miou: float, seed: int = 0, size: int = 448, **changes: object) -> Path:
    """A file as `loco-det probe --protocol segmentation --json` leaves it."""
    found = {"miou": miou, "miou_interval": [miou - 2, miou + 2], "pixel_accuracy": 90.0, "iou": {"cat": miou}}
    content = {
        "protocol": "segmentation",
        "method": "ridge",
        "seed": seed,
        "stages": {"norm": found, "blocks.3": found},
    }
    content |= {"features": {"image_size": size, "batchnorm": "as stored"}, "data": {"path": "voc"}}
    content["backbone"] = {"name": name, "weights_sha256": "00"}
    path = folder / f"{name}_{seed}_{size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked_json(path, content | changes)
    return path


def test_segmentation_probes_are_tables_of_their_own(tmp_path):
    """Mean IoU, averaged over seeds; sizes of images apart, stages of any name, in table and chart."""
    for seed, miou in enumerate((40, 44)):
        segmented(tmp_path / "p", "dino", miou, seed)
    segmented(tmp_path / "p", "loco", 30)
    segmented(tmp_path / "p", "dino", 50, size=224)
    probe(tmp_path / "p", "resnet", 20)
    assert main(["report", str(tmp_path / "p"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    one, two, top1 = (
        page.partition(f"## {title}\n")[2].partition("##")[0]
        for title in ("segmentation (ridge, 448 pixels) probe, voc", "segmentation (ridge, 224 pixels) probe, voc",
                      "linear probe, set.zip, 50 images")
    )  # fmt: skip
    assert "backbone, mean IoU" in one
    mean = "42.0 ± 2.8 [16.6, 67.4]"  # of 40 and 44: Student's t of one degree of freedom, 12.706 * 2
    assert f"| dino | 2 | {mean} | {mean} |" in one
    assert "| loco | 1 | 30.0 [28.0, 32.0] |" in one
    assert "| dino | 1 | 50.0 [48.0, 52.0] |" in two
    assert "| backbone, top-1 | runs | res5 |" in top1
    assert "mean IoU" not in top1
    drawn = (tmp_path / "out" / "index.html").read_text()
    assert drawn.count("mean IoU, percent</text>") == 2
    assert "blocks.3</text>" in drawn


def test_stages_of_resnets_come_first_and_in_order():
    found = {"vit": ["blocks.0-2", "norm"], "late": ["res5", "res3"], "early": ["norm", "stem", "blocks.0-5"]}
    order = charts.stage_order({name: dict.fromkeys(stages) for name, stages in found.items()})
    assert order == ["stem", "res3", "res5", "blocks.0-2", "norm", "blocks.0-5"]


@pytest.mark.parametrize("stages", [{}, {"norm": {"miou": None}}, {"norm": {"miou": 3}, "res5": {"top1": 3}}])
def test_a_segmentation_probe_without_numbers_is_refused(tmp_path, stages):
    file = segmented(tmp_path, "dino", 1, stages=stages)
    with pytest.raises(UserError, match=r"dino_0_448\.json: is no result of loco-det probe"):
        find_runs([str(file)])


def test_probes_of_different_backbones_are_not_averaged_unasked(tmp_path):
    probe(tmp_path / "p", "gim/pretrain", 20)
    probe(tmp_path / "p", "loco/pretrain", 30)
    with pytest.raises(UserError, match="both of 'pretrain'"):
        find_runs([str(tmp_path / "p")])
    content = {"name": "gim/pretrain/backbone.safetensors", "source": "gim", "weights_sha256": "0"}
    file = probe(tmp_path / "q", "", 20, backbone=content)
    assert [one.backbone for one in find_runs([str(file)]).probes] == ["gim"]  # what its own manifest says


def test_every_share_of_labels_is_shown(tmp_path):
    shares = {"1": {"top1": 10.0, "top1_interval": [9, 11]}, "10": {"top1": 30.0, "top1_interval": [29, 31]}}
    file = probe(tmp_path / "p", "a", 0, protocol="semi", stages={"res5": {**shares["10"], "by_percent": shares}})
    assert main(["report", str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    page = (tmp_path / "out/report.md").read_text()
    for title, top1 in (("semi 1 % probe", "10.0 [9.0, 11.0]"), ("semi 10 % probe", "30.0 [29.0, 31.0]")):
        assert f"## {title}, set.zip, 50 images\n\n" in page
        assert f"| a | 1 | {top1} |" in page
    assert f"| a | 0 | {file} | a/backbone.pkl 61 | d/set.zip | - | - | - |" in page  # among the inputs


def test_numbers_of_several_data_sets_and_of_augmentation_have_columns(data, tmp_path):
    run = make_run(tmp_path / "a", data, [], "loco", DATASETS__TEST=("tiny_val", "tiny_train"))
    names = ("tiny_val/bbox/AP", "tiny-train/bbox/AP", "bbox_TTA/AP", "tiny-train/bbox/AP-a/b")
    line = {name: 10.0 + place for place, name in enumerate(names)}
    (run / "metrics.json").write_text(json.dumps({"iteration": 1, **line}) + "\n")
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert "| backbone | runs | tiny_val box AP | tiny-train box AP | box TTA AP |" in lines
    assert "| loco | 1 | 10.0 | 11.0 | 12.0 |" in lines
    assert "| class | tiny-train box AP, loco |" in lines
    assert "| a/b | 13.0 |" in lines
    assert f"- {run}: it was tested on several data sets, which are not analysed" in "\n".join(lines)


def test_pictures_are_of_the_images_that_the_run_was_tested_on(data, runs, tmp_path, monkeypatch):
    other = write_tiny(tmp_path / "other", images=5)
    for file in (other / "tiny/val").iterdir():
        Image.new("RGB", (80, 64)).save(file)  # black, under the same name
    annotations = str(data / "tiny/annotations/instances_val.json")
    for file in runs.glob("*/run.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "datasets": {"tiny_val": {"path": annotations, "sha256": "0"}}}))
    here = panels(find_runs([str(runs)]).detectors, 2, 0.5, [])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(other))
    missing: list[str] = []
    assert panels(find_runs([str(runs)]).detectors, 2, 0.5, missing) == here
    assert missing == []


def test_images_that_are_gone_are_named(data, tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", data, detections(data, 3))
    annotations = tmp_path / "kept" / "instances_val.json"
    annotations.parent.mkdir()
    shutil.copy(data / "tiny/annotations/instances_val.json", annotations)
    record = {"seed": 0, "weights": None, "datasets": {"tiny_val": {"path": str(annotations), "sha256": "0"}}}
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "the images of tiny_val are not there; set DETECTRON2_DATASETS" in text
    assert "| none: random weights |" in text


def test_a_backbone_that_brings_its_weights_is_not_random(data, tmp_path):
    """Of a module given from Python, and one that a function returns."""
    names = [f"python:given-{'ab' * 32}", f"python:given-{'cd' * 32}", "python:package.module:function"]
    for i, name in enumerate(names):
        make_run(tmp_path / f"{i}", data, detections(data, 3, i), MODEL__BACKBONE__NAME=name)
    folders = [str(tmp_path / f"{i}") for i in range(3)]
    assert main(["report", *folders, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "random weights" not in text
    shown = ["python:given-abababab", "python:given-cdcdcdcd", names[2]]
    assert [run.backbone for run in find_runs(folders).detectors] == shown
    inputs = [
        line.split(" | ")[3] for line in text.splitlines() if line.startswith("| python:") and str(tmp_path) in line
    ]
    assert inputs == [f"{name} hash not recorded" for name in names]


def test_a_backbone_without_detections_keeps_its_place_in_the_pictures(runs, tmp_path):
    for seed in (0, 1):
        (runs / f"random{seed}/inference/coco_instances_results.json").unlink()
    (runs / "loco0/inference/coco_instances_results.json").unlink()  # seed 1 stands in
    panel = panels(find_runs([str(runs)]).detectors, 1, 0.5, [])
    (row,) = panel["rows"]
    assert [name for name, uri in row["pictures"].items() if uri] == ["ground truth", "loco"]
    assert row["pictures"]["random"] is None
    assert main(["report", str(runs), "--out", str(tmp_path / "out"), "--quiet", "--bootstrap", "0"]) == 0
    assert '<div class="none">missing</div>' in (tmp_path / "out/index.html").read_text()


def test_each_experiment_has_curves_of_its_own(data, runs):
    make_run(runs / "tuned", data, detections(data, 3), "loco", MODEL__BACKBONE__FREEZE_AT=0)
    make_run(runs / "other", data, detections(data, 3), "loco", SOLVER__MAX_ITER=9)
    (runs / "other/metrics.json").write_text('{"iteration": 0, "total_loss": 1}\n{"iteration": 1, "total_loss": 0}\n')
    found = training_series(find_runs([str(runs)]), {str(runs / "tuned"): "the tuned one"})
    frozen = "Mask R-CNN FPN, frozen, tiny_train, 6 iterations of 2"
    assert list(found) == [frozen, "Mask R-CNN FPN, frozen, tiny_train, 9 iterations of 2", "the tuned one"]
    assert {name: len(curves) for name, curves in found[frozen]["total loss"].items()} == {"loco": 2, "random": 2}
    assert found["the tuned one"]["total loss"] == {"loco": [([0, 1, 2, 3, 4], [3.0, 2.9, 2.8, 2.7, 2.6])]}


# --- the page ---------------------------------------------------------------------------------------------------

ODD = """<script>"&amp;'</script>" onload"""  # a name; no "=", which would end it


class Page(HTMLParser):
    """Collects text, ids, links, names of elements and attributes, and whether every element is closed."""

    VOID = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.ids, self.links, self.markup = [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.markup |= {tag, *attrs}
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(runs, tmp_path, data) -> Path:
    probe = {"protocol": "knn", "data": {"path": "cifar.zip"}, "backbone": {"name": "loco"}}
    probe["stages"] = {
        s: {"top1": 20.0 + i, "top1_interval": [19.0 + i, 21.0 + i]} for i, s in enumerate(("stem", "res5"))
    }
    (runs / "probe.json").write_text(json.dumps(probe))
    out = tmp_path / "out"
    odd = make_run(tmp_path / "<img onerror=x>", data, detections(data, 5), SEED=0)
    command = ["report", str(runs), f"{ODD}={odd}", "--title", "<b onload>&amp;</b>", "--out", str(out)]
    assert main([*command, "--bootstrap", "20", "--images", "2", "--quiet"]) == 0
    return out / "index.html"


def test_the_page_stands_alone_and_says_everything(page):
    text = page.read_text()
    found = Page(text)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith(("#", "data:image/")) for link in found.links), "something would be fetched"
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    shown = " ".join(found.text)
    report = json.loads((page.parent / "report.json").read_text())
    number = report["experiments"][0]["backbones"][0]["numbers"]["bbox/AP"]
    assert f"{number['mean']:.1f} ± {number['std']:.1f}" in shown
    assert f"{number['mean']:.1f} ± {number['std']:.1f}" in (page.parent / "report.md").read_text()
    for words in (
        "MODEL.RESNETS.NORM: FrozenBN",
        "score of at least 0.5",
        "Paired differences",
        "AP50 lost by kind of error",
        "knn probe, cifar.zip",
        "hash not recorded",
    ):
        assert words in shown
    assert sum(link.startswith("data:image/jpeg") for link in found.links) == 2 * (1 + 3)


def test_names_are_text_and_never_markup(page):
    found = Page(page.read_text())
    assert not found.markup & {"script", "onerror", "onload"}
    shown = " ".join(found.text)
    for words in ("<b onload>&amp;</b>", f"box AP, {ODD}", f".png, {ODD}", "<img onerror=x>"):
        assert words in shown


def test_missing_parts_are_shown_as_missing(data, tmp_path):
    run = make_run(tmp_path / "a", data, detections(data, 3), "loco")
    (run / "inference/coco_instances_results.json").unlink()
    lines = (run / "metrics.json").read_text().splitlines(keepends=True)
    (run / "metrics.json").write_text(lines[-1])
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    shown = " ".join(Page((tmp_path / "out/index.html").read_text()).text)
    assert "coco_instances_results.json) are not there" in shown
    for part in ("Paired differences", "Errors and curves", "Probes", "Pictures", "Training"):
        assert f"{part}: nothing was given for this part" in shown


def test_an_unknown_baseline_is_refused(runs, tmp_path, capsys):
    assert main(["report", str(runs), "--out", str(tmp_path / "o"), "--baseline", "dino"]) == 2
    assert "there are loco, random" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the page with")
def test_a_browser_shows_it_on_a_phone_in_light_and_dark_without_errors(page, tmp_path):
    source = json.dumps(page.read_text()).replace("</", "<\\/")
    for dark, paper in ((False, "rgb(255, 255, 255)"), (True, "rgb(13, 17, 23)")):
        probe = tmp_path / f"probe{dark}.html"
        probe.write_text(
            "<!doctype html><meta charset=utf-8><pre id=out></pre><script>const f=document.createElement('iframe');"
            f"f.style.width='390px';f.style.height='844px';f.srcdoc={source};"
            "f.onload=()=>{const d=f.contentDocument,w=f.contentWindow,s=d.querySelector('svg text');"
            "document.getElementById('out').textContent=JSON.stringify({width:d.documentElement.scrollWidth,"
            "paper:w.getComputedStyle(d.body).backgroundColor,ink:w.getComputedStyle(d.body).color,"
            "svg:w.getComputedStyle(s).fill,text:w.getComputedStyle(s).fontFamily,"
            "charts:[...d.querySelectorAll('svg')].filter(e=>e.getBoundingClientRect().height>40).length,"
            "all:d.querySelectorAll('svg').length})};document.body.append(f)</script>"
        )
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic",
                 "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000",
                 f"--user-data-dir={tmp_path / f'profile{dark}'}"]  # fmt: skip
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
        done = subprocess.run(
            [CHROMIUM, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        seen = json.loads(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)[1].replace("&quot;", '"'))
        assert seen["width"] <= 390, "it would have to be scrolled sideways"
        assert seen["paper"] == paper
        assert seen["svg"] == seen["ink"], "charts must be readable in both schemes"
        assert seen["charts"] == seen["all"] >= 8


def test_backbones_of_timm_are_compared_with_each_other_and_not_with_another_pyramid(tmp_path: Path) -> None:
    plain = {"MODEL.FPN.IN_FEATURES": [], "MODEL.FPN.NORM": "LN", "MODEL.BACKBONE.FREEZE_AT": 5}
    stages = {"MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"], "MODEL.BACKBONE.FREEZE_AT": 2}

    def run(name: str, changes: dict[str, Any]) -> DetectorRun:
        config = {**flat(get_cfg()), "MODEL.BACKBONE.NAME": f"timm:{name}", **changes}
        return DetectorRun(name, tmp_path, config, [], None)

    small, base, convnext = run("vit_small", plain), run("vit_base", plain), run("convnext", stages)
    assert small.experiment == base.experiment != convnext.experiment
    assert "simple pyramid, frozen" in small.title
    assert "FPN, fine-tuned above stage 2" in convnext.title
