"""The Detectron2 engine: its model and data pipeline. The only file that imports it, and only when called.

`engine.Engine` documents the methods. Model, losses, anchors, sampling, mapper and inference are Detectron2's; loop,
solver (tested equal), checkpoints and evaluation are this package's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from loco_det.annotations.coco import readable_annotations
from loco_det.annotations.instances import Instances
from loco_det.annotations.pixels import IGNORED
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.backbones.own import OTHER_BACKBONES
from loco_det.core.config import Settings, refusal
from loco_det.core.errors import UserError
from loco_det.core.launch import leave_stopping_to_parent
from loco_det.core.own_keys import own_value
from loco_det.detection.engine import Batch
from loco_det.detection.fpn import build_backbone
from loco_det.detection.keys import check_task, stock
from loco_det.detection.roi_heads import EXTRA_NORM

_registered: dict[str, tuple[str, str]] = {}


def installed() -> bool:
    """Whether Detectron2 can be imported."""
    return importlib.util.find_spec("detectron2") is not None


def version() -> str:
    """Import Detectron2 and its operators, compiled for one version of torch; returns its version.

    Raises:
        ImportError: either import fails.
    """
    import detectron2
    import detectron2.layers  # loads the operators

    return detectron2.__version__


class Detectron2Engine:
    """See `engine.Engine`."""

    name = "detectron2"

    def check(self, cfg: CfgNode, settings: Settings | None = None) -> None:
        """Check the task, and own keys: the others are Detectron2's, which validates most values itself."""
        check_task(cfg, settings)
        if own_value(cfg, "DETERMINISTIC"):
            reason = ", but the gradient of Detectron2's ROIAlign differs from run to run; use --engine torchvision."
            raise refusal(cfg, settings, "DETERMINISTIC", reason)

    def build_model(self, cfg: CfgNode) -> nn.Module:
        from detectron2.modeling import build_model

        model = build_model(_native(cfg))
        if square := own_value(cfg, "MODEL.BACKBONE.SQUARE_PAD"):
            model.backbone.square_pad = square
        return model

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[Batch]:
        """`start` is unused: Detectron2's loader restarts its order of images at every start."""
        from detectron2.data import DatasetMapper, build_detection_train_loader

        datasets = [find_dataset(name) for name in cfg.DATASETS.TRAIN]
        for dataset in datasets:
            _register(dataset)
        native = _native(cfg)
        mapper = DatasetMapper(native, is_train=True, **_scale_jitter(cfg))
        if any(dataset.is_pixels for dataset in datasets):
            mapper = _SemanticMapper(mapper, datasets)
        return build_detection_train_loader(native, mapper=_WorkersMapper(mapper))

    def test_batches(self, cfg: CfgNode, dataset: Dataset) -> Iterable[Batch]:
        from detectron2.data import build_detection_test_loader

        _register(dataset)
        return build_detection_test_loader(_native(cfg), dataset.name)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        from detectron2.utils.events import EventStorage

        with EventStorage():  # its heads require one
            return model(batch)

    def predict(self, model: nn.Module, batch: Batch) -> list[Instances] | list[Tensor]:
        return [output["sem_seg"] if "sem_seg" in output else _instances(output) for output in model(batch)]

    def augment(self, cfg: CfgNode, model: nn.Module) -> nn.Module:
        from detectron2.modeling import GeneralizedRCNNWithTTA

        return GeneralizedRCNNWithTTA(_native(cfg), model)


def _instances(output: dict[str, Any]) -> Instances:
    if "proposals" in output:
        found = output["proposals"]
        return Instances(tuple(found.image_size), found.proposal_boxes.tensor, scores=found.objectness_logits)
    found = output["instances"]
    return Instances(
        image_size=tuple(found.image_size),
        boxes=found.pred_boxes.tensor,
        classes=found.pred_classes,
        scores=found.scores,
        masks=found.pred_masks if found.has("pred_masks") else None,
    )


def _native(cfg: CfgNode) -> Any:
    from detectron2.config import get_cfg

    native = get_cfg()
    native.merge_from_other_cfg(stock(cfg))
    if cfg.MODEL.BACKBONE.NAME.startswith(OTHER_BACKBONES):
        _register_backbone(cfg.MODEL.BACKBONE.NAME)
    if cfg.MODEL.ROI_HEADS.NAME == EXTRA_NORM:
        _register_extra_norm()
    return native


def _scale_jitter(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of Detectron2's mapper for INPUT.SCALE_JITTER; none if that is off."""
    from detectron2.data import transforms

    if not (scales := own_value(cfg, "INPUT.SCALE_JITTER")):
        return {}
    size, flip = own_value(cfg, "INPUT.SCALE_JITTER_SIZE"), cfg.INPUT.RANDOM_FLIP
    chosen = [
        transforms.ResizeScale(*scales, size, size),
        transforms.FixedSizeCrop((size, size), pad=own_value(cfg, "INPUT.SCALE_JITTER_PAD")),
    ]
    if flip != "none":
        chosen.insert(0, transforms.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return {"augmentations": chosen, "recompute_boxes": cfg.MODEL.MASK_ON}


def _register_backbone(name: str) -> None:
    """Let Detectron2 build this package's backbone `name`, no ResNet of Detectron2's, with its pyramid."""
    from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ShapeSpec

    if name in BACKBONE_REGISTRY:
        return

    def output_shape(self: Any) -> dict[str, Any]:
        return {name: ShapeSpec(channels=self.channels[name], stride=self.strides[name]) for name in self.channels}

    def padding_constraints(self: Any) -> dict[str, int]:
        return {"square_size": self.square_pad}

    def build(native: Any, _: Any) -> Any:
        backbone = build_backbone(native)
        kind = type(backbone)
        body = {
            "output_shape": output_shape,
            "size_divisibility": backbone.size_divisibility,
            "square_pad": 0,
            "padding_constraints": property(padding_constraints),
        }
        backbone.__class__ = type(kind.__name__, (kind, Backbone), body)
        return backbone

    BACKBONE_REGISTRY._do_register(name, build)


def _register_extra_norm() -> None:
    """Let Detectron2 build `Res5ROIHeadsExtraNorm`, MoCo's head, which it lacks."""
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    if EXTRA_NORM in ROI_HEADS_REGISTRY:
        return

    def build_res5(cls: Any, native: Any) -> tuple[nn.Module, int]:
        blocks, channels = Res5ROIHeads._build_res5_block.__func__(cls, native)
        blocks.add_module("norm", get_norm(native.MODEL.RESNETS.NORM, channels))
        return blocks, channels

    head = type(EXTRA_NORM, (Res5ROIHeads,), {"_build_res5_block": classmethod(build_res5)})
    ROI_HEADS_REGISTRY._do_register(EXTRA_NORM, head)


class _WorkersMapper:
    """A mapper that leaves stopping to the parent process if it runs in a loader's worker."""

    def __init__(self, mapper: Any) -> None:
        self.mapper = mapper
        self.called = False

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self.called and get_worker_info() is not None:
            leave_stopping_to_parent()
        self.called = True
        return self.mapper(record)


class _SemanticMapper:
    """Detectron2's mapper on labels that this package reads as classes; its own would read a palette's colours."""

    def __init__(self, mapper: Any, datasets: Sequence[Dataset]) -> None:
        self.mapper, self.labels = mapper, {dataset.name: dataset.labels for dataset in datasets}
        self.augmentations, self.read = mapper.augmentations, None  # the labels of the record that it is called with
        mapper.augmentations = self._augmented

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        labels = self.labels[record["dataset"]]
        self.read = labels.read(record["file_name"], (record["height"], record["width"]))
        return self.mapper(record)

    def _augmented(self, given: Any) -> Any:
        given.sem_seg = self.read
        return self.augmentations(given)


def _semantic_records(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the records of a data set with pixel labels for Detectron2."""
    index = dataset.index
    columns = zip(index.image_id.tolist(), index.file_name.tolist(), index.height.tolist(), index.width.tolist())
    images = [(number, str(dataset.images / file), height, width) for number, file, height, width in columns]
    return [
        {"image_id": i, "file_name": file, "height": h, "width": w, "dataset": dataset.name} for i, file, h, w in images
    ]


def _register(dataset: Dataset) -> None:
    """Register a NAME_SPLIT data set that Detectron2 does not know."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    name, places = dataset.name, (str(readable_annotations(dataset)), str(dataset.images))
    if _registered.get(name) == places:
        return
    whole, at, _ = name.partition("@")
    if dataset.benchmark == "lvis" and (at or importlib.util.find_spec("lvis") is None):
        raise UserError(
            f"Detectron2 reads {whole} by lvis-api, which must be installed, and only whole; use --engine torchvision."
        )
    if name in DatasetCatalog.list():
        own = MetadataCatalog.get(name)
        elsewhere = own.get("evaluator_type") == "coco" and own.json_file != places[0]
        if name not in _registered and not dataset.derived and not elsewhere:
            return  # Detectron2's own, below DETECTRON2_DATASETS at its import
        DatasetCatalog.remove(name)  # the same name for another DETECTRON2_DATASETS or format
        MetadataCatalog.remove(name)
    if dataset.is_pixels:
        DatasetCatalog.register(name, functools.partial(_semantic_records, dataset))
        MetadataCatalog.get(name).set(stuff_classes=list(dataset.index.category_names), ignore_label=IGNORED)
    else:
        register_coco_instances(name, {}, *places)
    _registered[name] = places
