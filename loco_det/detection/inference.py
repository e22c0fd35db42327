"""A detector over whole data sets: predictions in COCO's format, on disk, and their AP. The same for both engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.data.catalog import LVIS_NAMES, DatasetPaths, find_dataset, has_own_measure
from loco_det.data.cityscapes import is_cityscapes
from loco_det.data.coco import load_coco
from loco_det.data.index import load_index
from loco_det.data.rules import Use, warn
from loco_det.data.semantic import is_semantic
from loco_det.data.voc import VOC_SETS, image_number
from loco_det.errors import UserError
from loco_det.evaluation.cityscapes import OFFICIAL, evaluate_cityscapes, write_submission
from loco_det.evaluation.coco import EVALUATORS, evaluate_coco, format_results, instances_to_coco, write_results
from loco_det.evaluation.coco_checks import read_ground_truth
from loco_det.evaluation.lvis import evaluate_lvis
from loco_det.evaluation.proposals import Proposals, evaluate_proposals, write_proposals
from loco_det.evaluation.semantic import evaluate_semantic, write_prediction
from loco_det.evaluation.semantic import write_submission as write_semantic_submission
from loco_det.evaluation.voc import evaluate_voc
from loco_det.runtime import Progress, barrier, is_main, log, world_size

Results = dict[str, dict[str, float]]


def evaluate(cfg: CfgNode, model: nn.Module, engine: ModuleType, evaluator: str = "hotcoco") -> dict[str, Any]:
    """Run `model` on every data set of DATASETS.TEST and measure AP, the recall of its proposals, or IoU of labels.

    Predictions go to OUTPUT_DIR/inference/coco_instances_results.json (a proposal network's to box_proposals.pkl, a
    semantic segmentor's to sem_seg/IMAGE_pred.png), or where there are several data sets to
    OUTPUT_DIR/NAME/inference/....

    Returns:
        On the main process {"bbox": {"AP": percent, ...}, "segm": ...} or {"box_proposals": {"AR@100": ...}}, for
        several data sets {name: {...}}; {} on other processes and where there is nothing to test on.
    """
    return _evaluate_all(cfg, model, engine, evaluator, "inference")


def evaluate_finally(cfg: CfgNode, model: nn.Module, engine: ModuleType, evaluator: str = "hotcoco") -> dict[str, Any]:
    """`evaluate`, and once more with test-time augmentation if TEST.AUG.ENABLED.

    The latter's predictions go to the folder inference_TTA and its results are named "bbox_TTA", "segm_TTA", for
    several data sets NAME_TTA.
    """
    results = evaluate(cfg, model, engine, evaluator)
    if cfg.TEST.AUG.ENABLED:
        log.info("once more, with test-time augmentation")
        augmented = engine.augment(cfg, model)
        more = _evaluate_all(cfg, augmented, engine, evaluator, "inference_TTA")
        results.update({f"{name}_TTA": values for name, values in more.items()})
    return results


def check_expected(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Hold results to TEST.EXPECTED_RESULTS, a list of [task, metric, value, tolerance].

    Raises:
        UserError: naming the first that is missing, not finite or further off than its tolerance.
    """
    if not is_main():
        return  # which alone has results
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results.get(task, {}).get(metric)
        if actual is None or not abs(actual - expected) <= tolerance:
            raise UserError(
                f"{task} {metric} is {'not measured' if actual is None else f'{actual:.4f}'}; TEST.EXPECTED_RESULTS "
                f"says {expected} within {tolerance}."
            )
    if cfg.TEST.EXPECTED_RESULTS:
        log.info("all results are what TEST.EXPECTED_RESULTS says")


def _evaluate_all(cfg: CfgNode, model: nn.Module, engine: ModuleType, evaluator: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    names = list(cfg.DATASETS.TEST)
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    semantic = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    for name in names:
        output_dir = Path(cfg.OUTPUT_DIR) if len(names) == 1 else Path(cfg.OUTPUT_DIR) / name
        if semantic:
            found = _evaluate_semantic(cfg, model, engine, name, output_dir, evaluator)
        elif proposals:
            found = _evaluate_proposals(cfg, model, engine, name, output_dir)
        else:
            found = _evaluate_one(cfg, model, engine, name, output_dir, evaluator, folder)
        results.update(found if len(names) == 1 else {name: found})
    return results if is_main() else {}


def _evaluate_one(
    cfg: CfgNode, model: nn.Module, engine: ModuleType, name: str, output_dir: Path, evaluator: str, folder: str
) -> Results:
    paths = find_dataset(name)
    category_ids = tuple(load_index(paths.annotations).categories)
    began = time.perf_counter()
    predictions = predict_dataset(model, engine, engine.test_batches(cfg, name), category_ids)
    results: Results = {}
    if is_main():
        seconds = time.perf_counter() - began
        file = write_results(output_dir, predictions, folder)
        log.info("%s: %d detections in %.1f s, written to %s", name, len(predictions), seconds, file)
        results = _measure(cfg, paths, predictions, evaluator, file.parent)
    barrier()
    return results


def _measure(
    cfg: CfgNode, paths: DatasetPaths, predictions: list[dict[str, Any]], evaluator: str, folder: Path
) -> Results:
    """The numbers of one data set, by the measure that it is known for."""
    whole = paths.name.partition("@")[0]
    if is_cityscapes(paths.name) and paths.images.name == "test":
        if cfg.MODEL.MASK_ON:
            file = folder / "cityscapes_submission.zip"
            write_submission(paths.annotations, paths.images, predictions, file)
            log.info("%s: its truth is secret; %s can be submitted to cityscapes-dataset.com", paths.name, file)
        return {}
    if is_cityscapes(paths.name) and cfg.MODEL.MASK_ON:
        official = evaluator == OFFICIAL
        results = evaluate_cityscapes(paths.annotations, paths.images, predictions, official=official)
        evaluator = OFFICIAL if official else "loco_det"
    elif whole in LVIS_NAMES:
        evaluator = "the rules of LVIS"
        results = evaluate_lvis(paths.annotations, predictions, ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",))
    elif whole in VOC_SETS:
        evaluator = "the rules of VOC 2007" if paths.name.startswith("voc_2007") else "the rules of VOC 2012"
        results = evaluate_voc(paths.annotations, predictions, eleven_points=paths.name.startswith("voc_2007"))
    else:
        iou_types = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        results = evaluate_coco(paths.annotations, predictions, iou_types, evaluator=evaluator)
    log.info("%s, by %s:\n%s", paths.name, evaluator, format_results(results))
    return results


def check_evaluator(cfg: CfgNode, evaluator: str) -> None:
    """Refuse an evaluator that does not know a data set of DATASETS.TEST, before hours are spent.

    Raises:
        UserError: naming both.
    """
    for name in cfg.DATASETS.TEST:
        known = EVALUATORS
        if (is_cityscapes(name) and cfg.MODEL.MASK_ON) or is_semantic(name):
            known = (OFFICIAL,)
        elif has_own_measure(name, cfg.MODEL.MASK_ON):
            known = ()
        if evaluator not in (*known, EVALUATORS[0]):  # the first is what stands there if nothing is said
            remedy = " or ".join(known if known == EVALUATORS else (*known, "nothing"))
            raise UserError(f"--evaluator {evaluator} does not measure {name}; give {remedy}.")


def check_data(cfg: CfgNode, *, own_reader: bool) -> None:
    """Judge each data set of DATASETS.TEST as its evaluation will, before hours are spent.

    Args:
        own_reader: this package reads the images and says of DATASETS.TRAIN what is probably wrong; else it is said
            here.

    Raises:
        UserError: what the evaluation would raise.
    """
    masks = cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    if not own_reader:
        for name in cfg.DATASETS.TRAIN:
            warn(load_index(find_dataset(name).annotations), Use("train"))
    for name in cfg.DATASETS.TEST:
        paths = find_dataset(name)
        if own_reader:
            load_coco(paths, need_annotations=False)
        if is_semantic(name) or (is_cityscapes(name) and paths.images.name == "test"):  # whose truth is secret
            continue
        warn(read_ground_truth(paths.annotations, ("bbox", "segm") if masks else ("bbox",)).index, Use("train"))


def _evaluate_proposals(cfg: CfgNode, model: nn.Module, engine: ModuleType, name: str, output_dir: Path) -> Results:
    paths = find_dataset(name)
    began = time.perf_counter()
    found = _run_everywhere(model, _proposals(model, engine, engine.test_batches(cfg, name)))
    results: Results = {}
    if is_main():
        seconds = time.perf_counter() - began
        found.sort(key=lambda proposals: proposals.image_id)
        file = write_proposals(output_dir, found)
        log.info("%s: proposals of %d images in %.1f s, written to %s", name, len(found), seconds, file)
        results = evaluate_proposals(paths.annotations, found)
        log.info("%s: %s", name, ", ".join(f"{k} {v:.3f}" for k, v in results["box_proposals"].items()))
    barrier()
    return results


def _evaluate_semantic(
    cfg: CfgNode, model: nn.Module, engine: ModuleType, name: str, output_dir: Path, evaluator: str
) -> Results:
    paths = find_dataset(name)
    images = [paths.images / file for file in load_index(paths.annotations).file_name.tolist()]
    folder = output_dir / "inference" / "sem_seg"
    written = _run_everywhere(model, _written(model, engine, engine.test_batches(cfg, name), folder))
    results: Results = {}
    if is_main():
        log.info("%s: labels of %d images written to %s", name, len(written), folder)
        if paths.images.name == "test":
            file = folder.parent / "cityscapes_submission.zip"
            write_semantic_submission(images, folder, file)
            log.info("%s: its truth is secret; %s can be submitted to cityscapes-dataset.com", name, file)
        else:
            results = evaluate_semantic(images, folder, official=evaluator == OFFICIAL)
            log.info("%s: %s", name, ", ".join(f"{k} {v:.3f}" for k, v in results["sem_seg"].items()))
    barrier()
    return results


def predict_dataset(
    model: nn.Module, engine: ModuleType, batches: Any, category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """COCO results of every image; on the main process those of all processes, elsewhere an empty list.

    The model's training mode is put back as it was.
    """
    found = _run_everywhere(model, _predictions(model, engine, batches, category_ids))
    # By image, so that the file does not depend on the number of processes.
    return found if world_size() == 1 else sorted(found, key=lambda r: r["image_id"])


def _run_everywhere(model: nn.Module, predictions: Iterator[Any]) -> list[Any]:
    """What every process predicts, on the main process; the model is in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        own = list(predictions)
    finally:
        model.train(training)
    if world_size() == 1:
        return own
    gathered: list[Any] = [None] * world_size()
    dist.gather_object(own, gathered if is_main() else None)
    return [result for part in gathered for result in part] if is_main() else []


def _predictions(
    model: nn.Module, engine: ModuleType, batches: Any, category_ids: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    for item, instances in _found(model, engine, batches):
        yield from instances_to_coco(instances, image_number(item["image_id"]), category_ids)


def _proposals(model: nn.Module, engine: ModuleType, batches: Any) -> Iterator[Proposals]:
    for item, found in _found(model, engine, batches):
        yield Proposals(image_number(item["image_id"]), found.boxes.float().cpu(), found.scores.float().cpu())


def _written(model: nn.Module, engine: ModuleType, batches: Any, folder: Path) -> Iterator[str]:
    """Writes the labels of every image; gives its name."""
    for item, logits in _found(model, engine, batches):
        write_prediction(folder, item["file_name"], logits.argmax(0).cpu().numpy())
        yield item["file_name"]


@torch.inference_mode()
def _found(model: nn.Module, engine: ModuleType, batches: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every image of the batches with what the model finds in it."""
    with Progress(len(batches), "evaluation", unit="batches") as progress:
        for batch in batches:
            yield from zip(batch, engine.predict(model, batch))
            progress.advance()


def flatten(results: dict[str, Any]) -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} -> {"bbox/AP": 1.0}, the names of metrics.json."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": number for name, number in flatten(value).items()})
        else:
            flat[key] = value
    return flat
