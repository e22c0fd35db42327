"""Exports a Faster or Mask R-CNN to ONNX: one image of one size in, its detections out; checked by onnxruntime.

The graph is traced: the image size is fixed, the numbers of proposals and detections are not. Needs the extra `onnx`.
The network drops non-finite predictions; the exported file keeps them.

Shape legend: the image is (3, H, W), D detections, M mask side.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loco_det.core.errors import UserError, said
from loco_det.core.files import os_errors
from loco_det.core.log import log
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.deformable import DeformConv2d
from loco_det.detection.fast_rcnn import select_detections
from loco_det.detection.rcnn import GeneralizedRCNN
from loco_det.detection.roi_heads import Res5ROIHeads, StandardROIHeads

OPSET = 17
# Tolerances between the file and the model: pixels, score, probability of a pixel.
TOLERANCE = {"boxes": 0.05, "scores": 1e-3, "masks": 1e-2}


class OneImage(nn.Module):
    """`model` on one image, in operations that ONNX has; tracing does not fix the number of regions."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8 (3, H, W) in INPUT.FORMAT order -> boxes (D, 4) XYXY in its pixels, scores (D,) descending, classes
        (D,) int64 and, for Mask R-CNN, masks (D, M, M) of probabilities over the box."""
        model, heads = self.model, self.model.roi_heads
        size = int(image.shape[1]), int(image.shape[2])
        unit = max(model.padding_unit, 1)
        pixels = (image.to(model.pixel_mean.dtype) - model.pixel_mean) / model.pixel_std
        padded = nn.functional.pad(pixels, (0, -size[1] % unit, 0, -size[0] % unit))
        features = model.backbone(padded[None])
        (proposals,), _ = model.proposal_generator(features, [size])
        maps = [features[name] for name in heads.in_features]
        pooled = heads.box_pooler.pool(maps, in_image_0(proposals.boxes))
        shared = isinstance(heads, Res5ROIHeads)
        regions = heads.res5(pooled).mean(dim=[2, 3]) if shared else heads.box_head(pooled)
        predictor = heads.box_predictor
        scores, deltas = predictor(regions)
        boxes = predictor.coder.decode(deltas, proposals.boxes)
        limits = predictor.score_threshold, predictor.nms_threshold, predictor.max_detections
        found = select_detections(boxes, predictor.probabilities(scores), size, *limits)
        if not heads.mask_on:
            return found.boxes, found.scores, found.classes
        pooler = heads.box_pooler if shared else heads.mask_pooler
        pooled = pooler.pool(maps, in_image_0(found.boxes))
        pooled = heads.res5(pooled) if shared else pooled
        return found.boxes, found.scores, found.classes, heads.mask_head(pooled, found.classes).sigmoid()


def in_image_0(boxes: Tensor) -> Tensor:
    """Add image index 0 to boxes (D, 4): (D, 5) regions."""
    return nn.functional.pad(boxes, (1, 0))


def export_onnx(model: nn.Module, image: Tensor, path: Path) -> dict[str, float]:
    """Write `path` and compare it with the model on `image` and its mirror image.

    Args:
        model: torchvision engine's model, in evaluation mode.
        image: uint8 (3, H, W), resized for the network; fixes the file's image size.

    Returns:
        The largest differences of {"boxes" in pixels, "scores", "masks"}.

    Raises:
        UserError: the extra is not installed, the model has a part that cannot be exported, the file cannot be
            written, or its results differ by more than rounding. Nothing is left at `path` then.
    """
    runtime = _runtime()
    check_exportable(model)
    # On the CPU: a GPU's convolutions use TF32 by default, whose rounding can exceed TOLERANCE.
    network = OneImage(speed_up(copy.deepcopy(model).cpu(), False)).eval()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with torch.no_grad():
                _trace_or_refuse(network, image, temporary)
                session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
                differences = [_difference(network, session, view) for view in (image, image.flip(2))]
            largest = {name: max(d[name] for d in differences) for name in differences[0]}
            if any(largest[name] > limit for name, limit in TOLERANCE.items() if name in largest):
                raise UserError(f"{path}: onnxruntime's results differ from the model's by {largest}; not written.")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    shown = ", ".join(f"{name} {value:.2g}" for name, value in largest.items())
    log.info("%s: %d x %d pixels; largest difference from the model: %s", path, *image.shape[1:], shown)
    return largest


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401 (torch's exporter needs it)
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"ONNX export needs the extra onnx ({error}): pip install 'loco_det[onnx]', or onnx and onnxruntime."
        ) from None
    return onnxruntime


def check_exportable(model: nn.Module) -> None:
    """Raise UserError naming the part of `model` that cannot be exported."""
    if not isinstance(model, GeneralizedRCNN):
        raise UserError(f"{type(model).__name__} cannot be exported to ONNX; a Faster or Mask R-CNN can.")
    if type(model.roi_heads) not in (StandardROIHeads, Res5ROIHeads):
        raise UserError(
            f"MODEL.ROI_HEADS.NAME {type(model.roi_heads).__name__} cannot be exported to ONNX; StandardROIHeads and "
            "Res5ROIHeads can."
        )
    if any(isinstance(module, DeformConv2d) for module in model.modules()):
        raise UserError("deformable stages (MODEL.RESNETS.DEFORM_ON_PER_STAGE) cannot be exported to ONNX.")


def _trace_or_refuse(network: OneImage, image: Tensor, path: Path) -> None:
    try:
        _trace(network, image, path)
    except UserError:
        raise
    except Exception as error:  # timm's and users' networks hold anything
        raise UserError(
            f"this network cannot be exported to ONNX ({said(error)}); predict with its checkpoint here"
        ) from error


def _trace(network: OneImage, image: Tensor, path: Path) -> None:
    names = ["boxes", "scores", "classes", *(["masks"] if network.model.roi_heads.mask_on else [])]
    options: dict[str, Any] = {}
    if (
        "dynamo" in inspect.signature(torch.onnx.export).parameters
    ):  # since torch 2.5; it does not support NMS's output sizes
        options["dynamo"] = False
    with warnings.catch_warnings(), _without_antialias():
        warnings.simplefilter("ignore")  # about sizes that become constants, as intended
        torch.onnx.export(
            network,
            (image,),
            str(path),
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes={name: {0: "detections"} for name in names},
            **options,
        )


@contextlib.contextmanager
def _without_antialias() -> Iterator[None]:
    """Let antialiased resizing, which ONNX lacks at this opset, be two matrix products with the same weights.

    Transformers resize their position embeddings and, with patches of another size than 16, the image so.
    """
    resize = nn.functional.interpolate

    def products(x: Tensor, size: Any = None, *args: Any, antialias: bool = False, **options: Any) -> Tensor:
        if not antialias or x.ndim != 4 or size is None:
            return resize(x, size, *args, antialias=antialias, **options)
        height, width = (int(side) for side in x.shape[2:])
        new_height, new_width = (int(side) for side in ((size, size) if isinstance(size, int) else size))
        rows, columns = (torch.eye(side, dtype=x.dtype)[None, None] for side in (height, width))
        down = resize(rows, (new_height, height), *args, antialias=True, **options)
        across = resize(columns, (width, new_width), *args, antialias=True, **options)
        return down.detach() @ x @ across.detach()

    nn.functional.interpolate = products
    try:
        yield
    finally:
        nn.functional.interpolate = resize


def _difference(network: OneImage, session: Any, image: Tensor) -> dict[str, float]:
    """Return the largest differences over detections, each compared with the nearest one of its class."""
    expected = [value.numpy() for value in network(image)]
    found = session.run(None, {"image": image.numpy()})
    nothing = {name: 0.0 for name, _ in zip(("boxes", "scores", "masks"), (0, 1, *expected[3:]))}
    if len(found[0]) != len(expected[0]):
        raise UserError(f"onnxruntime finds {len(found[0])} objects where the model finds {len(expected[0])}.")
    if not len(found[0]):
        return nothing
    distance = np.abs(expected[0][:, None] - found[0][None]).max(2)
    distance = np.where(expected[2][:, None] == found[2][None], distance, np.inf)
    nearest = distance.argmin(1)
    if len(set(nearest.tolist())) < len(nearest):
        raise UserError("onnxruntime finds other objects than the model.")
    result = {"boxes": float(distance.min(1).max()), "scores": float(np.abs(expected[1] - found[1][nearest]).max())}
    if len(expected) > 3:
        result["masks"] = float(np.abs(expected[3] - found[3][nearest]).max())
    return result
