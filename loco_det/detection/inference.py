"""Evaluates a detector of either engine on whole data sets: predictions in COCO's format, on disk, and their AP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.classes import category_ids
from loco_det.annotations.coco import check_images, load_coco
from loco_det.annotations.registry import Dataset, find_dataset, folder_name, measure_of
from loco_det.annotations.rules import Use, warn
from loco_det.annotations.voc import image_number
from loco_det.core.distributed import barrier, is_main, world_size
from loco_det.core.errors import UserError
from loco_det.core.log import Progress, log
from loco_det.detection.engine import Engine
from loco_det.evaluation.coco_checks import read_ground_truth
from loco_det.evaluation.measure import Measure, Subject, check_known_evaluator, measure_class


def evaluate(cfg: CfgNode, model: nn.Module, engine: Engine, evaluator: str = "hotcoco") -> dict[str, Any]:
    """Run `model` on every data set of DATASETS.TEST and measure AP, the recall of its proposals, or IoU of labels.

    Predictions go to OUTPUT_DIR/inference/coco_instances_results.json (a proposal network's to box_proposals.pkl, a
    semantic segmentor's to sem_seg/IMAGE_pred.png); with several data sets to OUTPUT_DIR/NAME/inference/....

    Returns:
        On the main process {"bbox": {"AP": percent, ...}, "segm": ...} or {"box_proposals": {"AR@100": ...}}, for
        several data sets {name: {...}}; {} on other processes and without test sets.
    """
    return _evaluate_all(cfg, model, engine, evaluator, "inference")


def evaluate_finally(cfg: CfgNode, model: nn.Module, engine: Engine, evaluator: str = "hotcoco") -> dict[str, Any]:
    """Run `evaluate`, and again with test-time augmentation if TEST.AUG.ENABLED.

    The augmented predictions go to the folder inference_TTA; their results are named "bbox_TTA", "segm_TTA", for
    several data sets NAME_TTA.
    """
    results = evaluate(cfg, model, engine, evaluator)
    if cfg.TEST.AUG.ENABLED:
        log.info("evaluating with test-time augmentation")
        augmented = engine.augment(cfg, model)
        more = _evaluate_all(cfg, augmented, engine, evaluator, "inference_TTA")
        results.update({f"{name}_TTA": values for name, values in more.items()})
    return results


def check_expected(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Compare results with TEST.EXPECTED_RESULTS, a list of [task, metric, value, tolerance].

    Raises:
        UserError: naming the first that is missing, not finite or off by more than its tolerance.
    """
    if not is_main():
        return  # only the main process has results
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results.get(task, {}).get(metric)
        if actual is None or not abs(actual - expected) <= tolerance:
            raise UserError(
                f"{task} {metric} is {'not measured' if actual is None else f'{actual:.4f}'}; TEST.EXPECTED_RESULTS "
                f"says {expected} within {tolerance}."
            )
    if cfg.TEST.EXPECTED_RESULTS:
        log.info("all results match TEST.EXPECTED_RESULTS")


def _evaluate_all(cfg: CfgNode, model: nn.Module, engine: Engine, evaluator: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    names = list(cfg.DATASETS.TEST)
    for name in names:
        dataset = find_dataset(name)
        output_dir = Path(cfg.OUTPUT_DIR) if len(names) == 1 else Path(cfg.OUTPUT_DIR) / folder_name(name)
        measure = build_measure(cfg, dataset, evaluator, output_dir / folder)
        began = time.perf_counter()
        found = run_everywhere(model, engine, engine.test_batches(cfg, dataset), measure)
        if is_main():
            log.info("%s: predicted in %.1f s", name, time.perf_counter() - began)
            measure.write(found)
            numbers = measure.evaluate(found)
            results.update(numbers if len(names) == 1 else {name: numbers})
        barrier()
    return results


def build_measure(cfg: CfgNode, dataset: Dataset, evaluator: str, folder: Path) -> Measure:
    """Build the measure of a data set for the model of `cfg`; its files go to `folder`."""
    kind = _measure_class(cfg, dataset.name)
    return kind(Subject(dataset, folder, cfg.MODEL.MASK_ON, category_ids(cfg, dataset), evaluator))


def _measure_class(cfg: CfgNode, name: str) -> type[Measure]:
    """Return the measure's class; a proposal network's class-agnostic boxes have the same one on every data set."""
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    return measure_class("proposals" if proposals else measure_of(name, cfg.MODEL.MASK_ON))


def check_evaluator(cfg: CfgNode, evaluator: str) -> None:
    """Check that the evaluator supports every data set of DATASETS.TEST, before training.

    Raises:
        UserError: naming both.
    """
    for name in cfg.DATASETS.TEST:
        check_known_evaluator(_measure_class(cfg, name), evaluator, name)


def check_data(cfg: CfgNode, *, own_reader: bool) -> None:
    """Validate each data set of DATASETS.TEST by its evaluation's rules, before training.

    Args:
        own_reader: this package's loader reads DATASETS.TRAIN and logs probable mistakes in it; otherwise they are
            logged here.

    Raises:
        UserError: as the evaluation would raise.
    """
    masks = cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    if not own_reader:
        for name in cfg.DATASETS.TRAIN:
            warn(find_dataset(name).index, Use("train"))
    for dataset in map(find_dataset, cfg.DATASETS.TEST):
        if own_reader:
            check_images(load_coco(dataset, need_annotations=False))
        if not dataset.is_pixels and not dataset.secret:
            truth = read_ground_truth(dataset.annotations, ("bbox", "segm") if masks else ("bbox",))
            warn(truth.index, Use("train"))


def run_everywhere(model: nn.Module, engine: Engine, batches: Any, measure: Measure) -> list[Any]:
    """Run the model in evaluation mode; returns `measure`'s records of all images on the main process, else [].

    With several processes the records are ordered by image, so that a file does not depend on their number.
    """
    training = model.training
    model.eval()
    try:
        own = [
            (image_number(item["image_id"]), measure.collect(image_number(item["image_id"]), item["file_name"], output))
            for item, output in _found(model, engine, batches)
        ]
    finally:
        model.train(training)
    if world_size() > 1:
        gathered: list[Any] = [None] * world_size()
        dist.gather_object(own, gathered if is_main() else None)
        own = sorted((one for part in gathered for one in part), key=lambda one: one[0]) if is_main() else []
    return [result for _, results in own for result in results]


@torch.inference_mode()
def _found(model: nn.Module, engine: Engine, batches: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield every image of the batches with the model's predictions."""
    with Progress(len(batches), "evaluation", unit="batches") as progress:
        for batch in batches:
            yield from zip(batch, engine.predict(model, batch))
            progress.advance()


def flatten(results: dict[str, Any]) -> dict[str, float]:
    """Flatten {"bbox": {"AP": 1.0}} to {"bbox/AP": 1.0}, the names of metrics.json."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": number for name, number in flatten(value).items()})
        else:
            flat[key] = value
    return flat
