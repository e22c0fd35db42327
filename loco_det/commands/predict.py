"""`loco-det predict`: run a trained detector or segmentor on images, folders and videos; writes pictures, JSON, ONNX.

For every input the output folder gets a picture (or video) of the same name with boxes, masks, classes and scores. It
also gets coco_instances_results.json, the detections in an evaluation's format, and instances.json, an annotation file:
images, categories and the same detections as annotations.

A semantic segmentor's pictures are coloured by class, above a legend; sem_seg/ has the category of every pixel as PNG,
sem_seg_predictions.json one result per category of an image, and sem_seg.json is the annotation file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from loco_det.annotations.index import load_index
from loco_det.annotations.instances import Instances
from loco_det.annotations.pixels import CLASSES, LABEL_IDS, is_semantic
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.transforms import resize_short_side
from loco_det.core import config
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, read_regular, write_json
from loco_det.core.log import Progress, log, setup_logging
from loco_det.core.outputs import PREDICTED, check_places, check_written, record_places
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.engine import Engine
from loco_det.detection.keys import load_cfg
from loco_det.detection.train import choose_engine, detector_device, log_engine
from loco_det.detection.weights import load_weights
from loco_det.evaluation.coco import instances_to_coco
from loco_det.evaluation.pixels import labels_to_coco, write_labels
from loco_det.images.media import Frame, Medium, VideoWriter, find_media, read_ahead, read_frames
from loco_det.report.drawing import Shape, class_colours, draw_instances, draw_labels, draw_legend

CONFIG = "config.yaml"  # of a run
AHEAD = 2  # batches decoded ahead of prediction


def run(args: argparse.Namespace) -> None:
    """Predict with the parsed arguments.

    Raises:
        UserError: bad arguments, configuration or weights; at the end, if an input was unreadable.
    """
    _find_run(args)
    threshold = 0.5 if args.score_threshold is None else args.score_threshold
    if not 0 <= threshold <= 1:
        raise UserError(f"--score-threshold is {args.score_threshold}; a score lies in 0 to 1.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; give at least 1.")
    overrides = ["MODEL.WEIGHTS", args.weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(threshold)]
    overrides = [*args.opts, *overrides]
    cfg, settings = load_cfg(args.config_file, overrides)
    engine = choose_engine("torchvision" if args.export_onnx and args.engine == "auto" else args.engine)
    log_engine(engine)
    if engine.name == "torchvision":  # Detectron2 also predicts with configurations that training here refuses
        engine.check(cfg, settings)
    if _is_segmentor(cfg) and (args.score_threshold is not None or args.export_onnx):
        raise UserError("a SemanticSegmentor takes no --score-threshold (every pixel has a class) nor --export-onnx.")
    if args.export_onnx and cfg.TEST.AUG.ENABLED:
        raise UserError("--export-onnx exports one pass over an image; set TEST.AUG.ENABLED False, or leave one out.")
    media, unreadable, written = _claimed(args, cfg)
    setup_logging(args.out)
    model, cfg = load_detector(cfg, engine)
    names = class_names(cfg, args.classes)
    if args.export_onnx:
        export(model, cfg, engine, media, args.export_onnx)
    speed_up(model, not args.exact)
    if cfg.TEST.AUG.ENABLED and not _is_segmentor(cfg):
        model = engine.augment(cfg, model)
    record_places(args.out, written, planned=True)
    predict(model, cfg, engine, media, names, args.out, args.batch_size, not args.no_pictures, unreadable)
    record_places(args.out, written, planned=False)
    if unreadable:
        listed = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        raise UserError(
            f"{len(unreadable)} inputs could not be read and were left out: {listed}; the others are in {args.out}."
        )


def _find_run(args: argparse.Namespace) -> None:
    """Take configuration, weights and output folder from a run of `train`, where they are not given.

    The run is the first input, or the folder of --weights.

    Raises:
        UserError: there is none, it has no checkpoint, or no input follows.
    """
    run = Path(args.inputs[0])
    if not args.config_file and (run / CONFIG).is_file():
        del args.inputs[0]
        if not args.inputs:
            raise UserError(f"{run} is a run and no image; name images after it: loco-det predict {run} photo.jpg")
        args.weights = args.weights or str(_checkpoint_of(run))
        args.out = args.out or run / "predictions"
    elif not args.config_file and args.weights:
        run = Path(args.weights).parent
    if not args.config_file and (run / CONFIG).is_file():
        args.config_file = [str(run / CONFIG)]
    if not args.config_file or not args.weights:
        gone = not args.config_file and not args.weights and not os.path.exists(run)
        raise UserError(
            f"{f'{run} does not exist' if gone else 'predict needs a detector'}; name the folder of a run before the "
            "images, or --config-file FILE --weights FILE"
        )
    args.out = args.out or Path("predictions")


def _checkpoint_of(run: Path) -> Path:
    found = last_checkpoint(run) or run / "model_final.pth"
    if not found.is_file():
        raise UserError(
            f"{run} has a configuration and no checkpoint; train it with loco-det train --config-file {run / CONFIG}"
        )
    return found


def _claimed(args: argparse.Namespace, cfg: CfgNode) -> tuple[list[Medium], list[Path], list[str]]:
    """Return the media, the unreadable ones, and the files to be written below --out.

    Raises:
        UserError: an input is missing, or an output would overwrite an input or a file that predict did not write.
    """
    of_input = partial(places, labels=_is_segmentor(cfg), pictures=not args.no_pictures)
    media, unreadable = find_media(args.inputs, of_input)
    output = Labels if _is_segmentor(cfg) else Detections
    written = [output.RESULTS, output.ANNOTATIONS, PREDICTED]
    written += [place for medium in media for place in of_input(medium.name, medium.is_video)]
    given = [*args.config_file, args.weights, *([args.classes] if args.classes else [])]
    inputs = [*(medium.path for medium in media), *map(Path, given)]
    check_written([*map(args.out.joinpath, written), *([args.export_onnx] if args.export_onnx else [])], inputs)
    check_places(args.out, written)
    return media, unreadable, [*written, "log.txt"]


def places(name: str, is_video: bool, *, labels: bool, pictures: bool) -> list[str]:
    """Return the outputs for an input: a picture or video, a segmentor's labels (for a video, in a folder)."""
    found = []
    if pictures:
        kinds = (".mp4",) if is_video else (".jpg", ".jpeg", ".png")
        found.append(name if PurePosixPath(name).suffix.lower() in kinds else f"{name}{kinds[0]}")
    if labels:
        found.append(f"sem_seg/{name}/" if is_video else f"sem_seg/{name.removesuffix('.png')}_pred.png")
    return found


def _is_segmentor(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"


def load_detector(cfg: CfgNode, engine: Engine) -> tuple[nn.Module, CfgNode]:
    """Return the detector or segmentor with MODEL.WEIGHTS, in evaluation mode, and the configuration with its device.

    Raises:
        UserError: no weights, a backbone only, weights that do not fit, or a model that predicts no classes.
    """
    if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "SemanticSegmentor") or cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} with MODEL.LOAD_PROPOSALS "
            f"{cfg.MODEL.LOAD_PROPOSALS} finds no objects in an image alone; predict takes a Faster or Mask R-CNN, "
            "or a SemanticSegmentor."
        )
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: give --weights, a checkpoint of a trained detector.")
    cfg = config.changed(cfg, **{"MODEL.DEVICE": str(detector_device(cfg.MODEL.DEVICE))})
    model = engine.build_model(cfg)
    weights = load_weights(model, cfg)
    if weights.is_backbone:
        raise UserError(f"{weights.path} holds a backbone; train a detector on it and give its checkpoint.")
    return model.eval(), cfg


def class_names(cfg: CfgNode, given: Path | None) -> dict[int, str]:
    """Return {category id: name} in the order of the model's classes.

    Names come from `given`, a COCO annotation file or a text file with one name per line (ids from 1). Without it they
    come from the first data set on this machine of DATASETS.TRAIN, which numbers the model's classes, and TEST, or from
    Cityscapes' pixel labels; else they are "class 1" and so on.

    Raises:
        UserError: `given` is unreadable or has another number of classes than the model.
    """
    count = (cfg.MODEL.SEM_SEG_HEAD if _is_segmentor(cfg) else cfg.MODEL.ROI_HEADS).NUM_CLASSES
    if given is not None:
        names = load_index(given).categories if given.suffix == ".json" else _lines(given)
        if len(names) != count:
            raise UserError(f"{given} names {len(names)} classes and the model has {count}; give the right file.")
        return names
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        with contextlib.suppress(UserError):
            if is_semantic(dataset):
                names = dict(zip(LABEL_IDS.tolist(), CLASSES))
            else:
                names = load_index(find_dataset(dataset).annotations).categories
            if len(names) == count:
                return names
    log.warning("no data set of DATASETS is available for class names, so classes are numbered; give --classes")
    return {number: f"class {number}" for number in range(1, count + 1)}


def _lines(path: Path) -> dict[int, str]:
    try:
        lines = read_regular(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); give one class name a line.") from error
    return dict(enumerate(filter(None, map(str.strip, lines)), start=1))


# --- prediction -------------------------------------------------------------------------------------------------


def predict(
    model: nn.Module,
    cfg: CfgNode,
    engine: Engine,
    media: Sequence[Medium],
    names: dict[int, str],
    out: Path,
    batch_size: int,
    draw: bool,
    unreadable: list[Path],
) -> None:
    """Write the predictions for all `media` below `out`; appends undecodable ones to `unreadable`."""
    output = (Labels if _is_segmentor(cfg) else Detections)(names, out)
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    frames = read_ahead(read_frames(media, cfg.INPUT.FORMAT, unreadable), AHEAD * batch_size)
    total = sum(medium.frames for medium in media)
    with Pictures(out, output, draw) as pictures, Progress(total, "predict", unit="image") as progress:
        while batch := list(itertools.islice(frames, batch_size)):
            for frame, found in zip(batch, detect(model, cfg, engine, [frame.pixels for frame in batch])):
                images.append(_image(len(images) + 1, frame))
                results += output.results(found, images[-1])
                pictures.draw(frame, found, cfg.INPUT.FORMAT)
            progress.advance(len(batch), found=len(results))
    write_json(out / output.RESULTS, results)
    annotations = [_annotation(number, result) for number, result in enumerate(results, start=1)]
    categories = [{"id": number, "name": name} for number, name in names.items()]
    write_json(out / output.ANNOTATIONS, {"images": images, "annotations": annotations, "categories": categories})
    log.info("%d %s in %d images, written to %s", len(results), output.WHAT, len(images), out)
    if images and not results:
        threshold = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        log.warning(
            "0 %s: no score reached %g; lower --score-threshold, or train the detector longer", output.WHAT, threshold
        )


@torch.inference_mode()
def detect(model: nn.Module, cfg: CfgNode, engine: Engine, pixels: Sequence[np.ndarray]) -> list[Any]:
    """Predict for (H, W, 3) uint8 images in INPUT.FORMAT order, in each image's pixels.

    Returns:
        Instances per image; for a semantic segmentor (H, W) int64 classes.
    """
    found = engine.predict(model, [network_input(cfg, image) for image in pixels])
    return [one.argmax(0).cpu().numpy() if isinstance(one, Tensor) else one for one in found]


def network_input(cfg: CfgNode, pixels: np.ndarray) -> dict[str, Any]:
    """Prepare an image as the test loader does: resized to INPUT.MIN_SIZE_TEST, (3, H, W)."""
    height, width = pixels.shape[:2]
    if cfg.INPUT.MIN_SIZE_TEST:
        pixels = resize_short_side(height, width, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST).image(pixels)
    return {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "height": height, "width": width}


def _image(number: int, frame: Frame) -> dict[str, Any]:
    height, width = frame.pixels.shape[:2]
    image = {"id": number, "file_name": frame.medium.name, "width": width, "height": height}
    return {**image, "frame": frame.index} if frame.medium.is_video else image


def _annotation(number: int, result: dict[str, Any]) -> dict[str, Any]:
    """Convert a result to an annotation; missing box and area come from the mask, as in pycocotools' loadRes."""
    mask = result.get("segmentation")
    box = result["bbox"] if "bbox" in result else coco_mask.toBbox(mask).tolist()
    area = box[2] * box[3] if mask is None else int(coco_mask.area(mask))
    return {"id": number, **result, "bbox": box, "area": area, "iscrowd": 0}


class Detections:
    """Converts and draws a detector's Instances."""

    RESULTS, ANNOTATIONS, WHAT = "coco_instances_results.json", "instances.json", "detections"

    def __init__(self, names: dict[int, str], out: Path) -> None:
        self.ids, self.names = list(names), list(names.values())

    def results(self, found: Instances, image: dict[str, Any]) -> list[dict[str, Any]]:
        return instances_to_coco(found, image["id"], self.ids)

    def draw(self, pixels: np.ndarray, found: Instances, is_video: bool) -> np.ndarray:
        return draw_instances(pixels, shapes(found), self.names)


class Labels:
    """Converts and draws a semantic segmentor's (H, W) classes."""

    RESULTS, ANNOTATIONS, WHAT = "sem_seg_predictions.json", "sem_seg.json", "segments"

    def __init__(self, names: dict[int, str], out: Path) -> None:
        self.names, self.colours = list(names.values()), class_colours(list(names.values()))
        self.ids = np.array(list(names), np.uint8 if max(names) < 256 else np.uint16)
        self.out = out

    def results(self, found: np.ndarray, image: dict[str, Any]) -> list[dict[str, Any]]:
        """Return COCO results, one per category of the image, and write the labels as PNG (one per video frame)."""
        labels = self.ids[found]
        (place,) = places(image["file_name"], "frame" in image, labels=True, pictures=False)
        write_labels(self.out / (f"{place}{image['frame']:06d}.png" if "frame" in image else place), labels)
        return labels_to_coco(labels, image)

    def draw(self, pixels: np.ndarray, found: np.ndarray, is_video: bool) -> np.ndarray:
        """Colour the classes above a legend of those present; for video of all, since its frames have one size."""
        drawn = draw_labels(pixels, found, self.colours)
        there = np.arange(len(self.names)) if is_video else np.unique(found)
        legend = draw_legend([self.names[k] for k in there], self.colours[there], drawn.shape)
        return np.concatenate([drawn, legend])


class Pictures:
    """Draws predictions and writes them below `out`: images one by one, the frames of a video into one file."""

    def __init__(self, out: Path, output: Detections | Labels, on: bool) -> None:
        self.out, self.output, self.on = out, output, on
        self.medium: Medium | None = None
        self.video = contextlib.ExitStack()
        self.writer: VideoWriter | None = None

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *error: Any) -> None:
        self.video.__exit__(*error)

    def draw(self, frame: Frame, found: Instances | np.ndarray, order: str) -> None:
        """Draw one image, or the next frame of a video; `order` is its channel order."""
        if not self.on:
            return
        pixels = frame.pixels if order == "RGB" else np.ascontiguousarray(frame.pixels[:, :, ::-1])
        drawn = self.output.draw(pixels, found, frame.medium.is_video)
        if frame.medium.is_video:
            if frame.medium != self.medium:
                self.video.close()
                height, width = drawn.shape[:2]
                writer = VideoWriter(self._path(frame), frame.medium.rate, width, height)
                self.medium, self.writer = frame.medium, self.video.enter_context(writer)
            self.writer.write(drawn)
            return
        path = self._path(frame)
        _, encoded = cv2.imencode(path.suffix, drawn[:, :, ::-1])
        with atomic_write(path) as file:
            file.write(encoded.tobytes())

    def _path(self, frame: Frame) -> Path:
        (place,) = places(frame.medium.name, frame.medium.is_video, labels=False, pictures=True)
        return self.out / place


def shapes(found: Instances) -> Iterator[Shape]:
    """Convert detections to the shapes of `draw_instances`."""
    boxes = found.boxes.cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    masks = [None] * len(found) if found.masks is None else found.masks.cpu().numpy()
    return map(Shape, found.classes.tolist(), boxes.tolist(), masks, found.scores.tolist())


def export(model: nn.Module, cfg: CfgNode, engine: Engine, media: Sequence[Medium], path: Path) -> None:
    """Export the detector to ONNX for images of the first image's size, and compare it with the model on that image.

    Raises:
        UserError: the engine or the model cannot be exported, there is no image, or the results differ.
    """
    from loco_det.detection.onnx import export_onnx

    if engine.name != "torchvision":
        raise UserError("--export-onnx needs --engine torchvision, which reads Detectron2's checkpoints too.")
    first = next(read_frames(media, cfg.INPUT.FORMAT, []), None)
    if first is None:
        raise UserError("--export-onnx needs an image that can be read, to take its size and to check the result.")
    export_onnx(model, network_input(cfg, first.pixels)["image"], path)
