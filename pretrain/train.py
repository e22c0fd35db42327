"""Pretraining from images to `OUTPUT_DIR/backbone.safetensors`: data, steps, schedule, checkpoints, metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, backbone_tensors, describe, save_backbone
from loco_det.backbones.presnet import PRESNET, PResNet
from loco_det.backbones.resnet import ResNet, StagedBackbone, measure_batchnorm, narrow
from loco_det.core import config
from loco_det.core.config import Settings
from loco_det.core.device import keep_freed_memory, resolve_device, seed_everything
from loco_det.core.distributed import barrier, is_main, world_size
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.launch import CommonStop, StopSignal
from loco_det.core.log import Progress, log
from loco_det.core.metrics import RunMetrics
from loco_det.core.run_folder import differences, run_folder, told
from loco_det.images.folders import open_source
from loco_det.images.source import Source
from loco_det.images.two_views import TwoViewLoader, TwoViews, build_two_view_loader
from loco_det.images.views import normalise
from pretrain.average import GradientAverage
from pretrain.check import check
from pretrain.checkpoint import latest_checkpoint, retire_checkpoints, save_checkpoint
from pretrain.compiling import stage_compiler
from pretrain.decoders import build_decoder
from pretrain.loco import LocalTrainer, method_units, split_backbone
from pretrain.loss import nt_xent
from pretrain.monitor import Monitor, Stopwatch, UnreadLosses
from pretrain.optim import build_optimizer, learning_rate
from pretrain.probe import KnnProbe
from pretrain.sharing import SoftTrainer, UpperTrainer, private_copies
from pretrain.stepping import Stepping
from pretrain.sync_batchnorm import sync_anywhere

RANDOM_BATCHES = 50  # batches that METHOD random measures BatchNorm's statistics on
LAYOUT = torch.channels_last  # of images and weights: the faster one on a CPU; not timed on GPUs
# Keys that change where and how fast a run goes but not what it computes; --resume lets them differ.
FREE_KEYS = (
    "OUTPUT_DIR",
    "DEVICE",
    "LOG_PERIOD",
    "CHECKPOINT_PERIOD",
    "DATA.NUM_WORKERS",
    "DATA.PATH",
    "AUGMENT.DEVICE",
    "SOLVER.RECOMPUTE",
    "SOLVER.COMPILE",
    "SOLVER.STEP_EARLY",
    "KNN.",
)


class Learner(nn.Module):
    """The backbone, cut at the units' borders, and one decoder and loss for each unit.

    With SHARING.MODE soft also the units' private copies of shared stages.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        names = unit_names(cfg, self.backbone)
        self.stages, self.units = split_backbone(self.backbone, names, cfg.SOLVER.RECOMPUTE)
        self.unit_labels = [f"{first}-{last}" for first, last in names]
        self.decoders = nn.ModuleList(
            build_decoder(cfg.DECODER, self.backbone, self.stages[unit.last].ends_in, cfg.BACKBONE.NORM)
            for unit in self.units
        )
        sync_anywhere(self.decoders)
        self.sharing = cfg.SHARING
        modules = [stage.module for stage in self.stages]
        self.copies = nn.ModuleList(private_copies(modules, self.units) if self.sharing.MODE == "soft" else [])
        self.temperature, self.chunk = cfg.LOSS.TEMPERATURE, cfg.LOSS.CHUNK
        self.embeddings: dict[int, Tensor] = {}  # of the last step, for the monitoring
        self.to(memory_format=LAYOUT)

    def parts(self) -> list[nn.Module]:
        """What is stepped at a time: every stage, then every private copy, then every decoder."""
        return [*(stage.module for stage in self.stages), *self.copies, *self.decoders]

    def loss(self, i: int, features: Tensor) -> Tensor:
        """Unit i's NT-Xent from its last stage's output (2b, C, H, W)."""
        z = self.decoders[i](features)
        self.embeddings[i] = z.detach()
        return nt_xent(z, self.temperature, self.chunk)


def build_backbone(cfg: CfgNode) -> StagedBackbone:
    """The network that BACKBONE.* describes, as `check` lets it pass."""
    width, stem, norm = cfg.BACKBONE.WIDTH, cfg.BACKBONE.STEM, cfg.BACKBONE.NORM
    if cfg.BACKBONE.NAME == PRESNET:
        return sync_anywhere(PResNet(stem=stem, norm=norm, stem_channels=width // 2))
    depth = int(cfg.BACKBONE.NAME.removeprefix("resnet"))
    return sync_anywhere(ResNet(depth, stem=stem, norm=norm, **narrow(depth, width)))


def unit_names(cfg: CfgNode, backbone: StagedBackbone) -> list[list[str]]:
    """The [first, last] stage names of the units that UNITS, else METHOD, asks for."""
    if cfg.UNITS:
        return [list(unit) if isinstance(unit, (list, tuple)) else unit for unit in cfg.UNITS]
    return method_units(cfg.METHOD, backbone.stage_names[1:])


def pretrain(
    cfg: CfgNode,
    resume: bool = False,
    source: Source | None = None,
    wandb: str | None = None,
    settings: Settings | None = None,
) -> Path:
    """Train a backbone as `cfg` says (keys: pretrain/defaults.py) and write it.

    Args:
        cfg: the frozen configuration.
        resume: continue from the newest checkpoint in OUTPUT_DIR, if there is one.
        source: the images, where they are not those of DATA.PATH: images/indexed.py makes one of any data set.
        wandb: W&B project that also gets the numbers of metrics.json.
        settings: what the user set (`loco_det.core.config.load_config`), for error messages to say where.

    Returns:
        OUTPUT_DIR/backbone.safetensors.

    Raises:
        UserError: unusable configuration or data, a loss that is not finite, a stop by signal (after saving).
    """
    check(cfg, settings)
    device = resolve_device(cfg.DEVICE)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.SEED)  # the same weights on every process
    is_random = cfg.METHOD == "random" and not cfg.UNITS
    network = build_backbone(cfg) if is_random else Learner(cfg)  # refuses UNITS that do not fit, before files are read
    with run_folder(cfg.OUTPUT_DIR), RunMetrics(cfg, wandb, resume) as metrics:
        if source is None:
            source = open_source(cfg.DATA.PATH, cfg.DATA.FORMAT)
        else:
            cfg = config.changed(cfg, **{"DATA.PATH": source.root})  # for records and messages
        loader = build_two_view_loader(cfg, source)
        seed_everything(cfg.SEED)
        if is_random:
            if resume and (found := latest_checkpoint(Path(cfg.OUTPUT_DIR))):
                raise UserError(f"{found[0]} is of another run, for METHOD random has none; choose another OUTPUT_DIR")
            _begin(cfg, start=0)
            backbone = network.to(device, memory_format=LAYOUT)
            measure_statistics(backbone, loader)
            return write_backbone(cfg, backbone, [], source, step=0)
        learner = network.to(device)
        step = _train(cfg, learner, loader, source, device, resume, metrics)
        return write_backbone(cfg, learner.backbone, unit_names(cfg, learner.backbone), source, step)


def _train(
    cfg: CfgNode,
    learner: Learner,
    loader: TwoViewLoader,
    source: Source,
    device: torch.device,
    resume: bool,
    metrics: RunMetrics,
) -> int:
    """All steps; returns how many there were."""
    compiler = stage_compiler(device) if cfg.SOLVER.COMPILE else None
    optimizer = build_optimizer(cfg, learner)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.SOLVER.AMP == "fp16")
    total = cfg.SOLVER.MAX_STEPS or cfg.SOLVER.EPOCHS * loader.steps_per_epoch
    schedule = learning_rate(cfg, total, loader.steps_per_epoch)
    state = {"learner": learner, "optimizer": optimizer, "scaler": scaler}
    start = _restore(cfg, state, source) if resume else 0
    probe = KnnProbe(cfg, source, device, LAYOUT, _autocast(cfg, device))  # may refuse its images
    _begin(cfg, start)
    metrics.trim(start)
    average = GradientAverage(learner.parameters())
    stepping = Stepping(optimizer, learner.parts(), average, scaler, cfg.SOLVER.STEP_EARLY)
    if cfg.SOLVER.STEP_EARLY and not stepping.early:
        log.info("SOLVER.AMP fp16: the optimizer steps at the end, since one infinite gradient must hold back all")
    trainer = local_trainer(learner, stepping, compiler)
    log.info(
        "%s: %d images, %d steps of %d images on %s", cfg.METHOD, len(source), total, cfg.SOLVER.BATCH_SIZE, device
    )
    waited = Stopwatch()
    monitor = Monitor(
        cfg.LOG_PERIOD,
        cfg.SOLVER.BATCH_SIZE,
        learner.backbone,
        learner.unit_labels,
        learner.embeddings,
        waited,
        metrics,
    )
    unread = UnreadLosses(learner.unit_labels, source)
    batches = waited.through(loader.batches(start))
    with StopSignal() as stop, Progress(total, "pretrain", start, unit="it") as progress:
        told_to_stop = CommonStop(stop)
        for step in range(start, total):
            try:
                batch = next(batches)
            except UserError:
                if step > start and world_size() == 1:  # several processes would have to meet
                    unread.read()
                    stepping.finish()
                    _save(cfg, state, step, source)
                raise
            stepping.lr = schedule(step / total)
            done = step + 1
            probing = probe.due(done, loader.steps_per_epoch, total)
            looking = monitor.due(step) or probing
            stepping.observe = monitor.see_gradients if looking else None
            losses = trainer.step(
                _input(batch), autocast=_autocast(cfg, device), scale=scaler.scale if scaler.is_enabled() else None
            )
            unread.add(step, losses, batch.index)
            if looking:
                unread.read()
            if looking or not stepping.early:
                stepping.finish()
            with waited.paused():
                found = probe(learner.backbone) if probing else {}
            progress.advance(**monitor(step, losses, stepping.lr, found))
            stopped = done < total and told_to_stop()
            if done % cfg.CHECKPOINT_PERIOD == 0 or done == total or stopped:
                unread.read()
                stepping.finish()
                _save(cfg, state, done, source)
            if stopped:
                by = stop.received or "a signal"
                raise UserError(f"stopped by {by} after step {done}; --resume continues from there")
    return total


def local_trainer(
    learner: Learner,
    stepping: Stepping | None = None,
    compiler: Callable[[nn.Module], nn.Module] | None = None,
) -> LocalTrainer | SoftTrainer:
    """The learner's local step, by its SHARING.MODE.

    Args:
        learner: its stages, units and losses.
        stepping: learns which of `learner.parts()` are needed and final; None where nobody steps.
        compiler: replaces the module of each stage and private copy.
    """
    parts = learner.parts()  # by the trainers' numbers: stages and copies come first
    taken: list[
        nn.Module
    ] = []  # decoders whose loss is known, so that their gradients are final when next a stage's are

    def loss(i: int, features: Tensor) -> Tensor:
        if stepping:
            stepping.ready(learner.decoders[i])
            taken.append(learner.decoders[i])
        return learner.loss(i, features)

    def ready(k: int) -> None:
        if stepping:
            stepping.ready(parts[k])

    def final(k: int) -> None:
        if stepping:
            stepping.final(parts[k], *taken)
            taken.clear()

    made = compiler or (lambda module: module)
    stages = [made(stage.module) for stage in learner.stages]
    losses = [partial(loss, i) for i in range(len(learner.units))]
    if learner.sharing.MODE == "soft":
        copies, penalty = [made(module) for module in learner.copies], learner.sharing.PENALTY
        return SoftTrainer(stages, copies, learner.units, losses, penalty, on_final=final, on_start=ready)
    trainer = UpperTrainer if learner.sharing.MODE == "upper" else LocalTrainer
    recompute = [k for k, stage in enumerate(learner.stages) if stage.recompute]
    return trainer(stages, learner.units, losses, on_final=final, recompute=recompute, on_start=ready)


def _input(batch: TwoViews) -> Tensor:
    """(2b, 3, S, S) float32 on the device of the views: the first view of every image, then the second."""
    return normalise(batch.views.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD, LAYOUT)


def _autocast(cfg: CfgNode, device: torch.device) -> Callable[[], object]:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if cfg.SOLVER.AMP == "none":
        return nullcontext
    return lambda: torch.autocast(device.type, types[cfg.SOLVER.AMP])


def measure_statistics(backbone: StagedBackbone, loader: TwoViewLoader) -> None:
    """METHOD random: BatchNorm's statistics over up to 50 batches."""
    batches = loader.batches(0)
    count = min(RANDOM_BATCHES, loader.steps_per_epoch)
    with Progress(count, "batch statistics") as progress:

        def inputs() -> Iterator[Tensor]:
            for _ in range(count):
                yield _input(next(batches))
                progress.advance()

        measure_batchnorm(backbone, inputs())


# --- files ------------------------------------------------------------------------------------------------------


def config_hash(cfg: CfgNode) -> str:
    """sha256 of the configuration without the keys that do not change what is computed."""
    keys = [key.removesuffix(".") for key in FREE_KEYS]
    return hashlib.sha256(config.without(cfg, keys).dump().encode()).hexdigest()


def _begin(cfg: CfgNode, start: int) -> None:
    """Only now that a refused --resume can no longer lose the configuration that the folder's run was made with."""
    if is_main():
        if start == 0:
            retire_checkpoints(Path(cfg.OUTPUT_DIR))
        with atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml", "w") as file:
            file.write(cfg.dump())


def _save(cfg: CfgNode, state: dict[str, object], step: int, source: Source) -> None:
    barrier()  # until every process has found its losses finite
    if is_main():
        values = {name: part.state_dict() for name, part in state.items()}
        facts = {"step": step, "images": len(source), "names": source.identity()}
        facts |= {"config": cfg.dump(), "config_hash": config_hash(cfg)}
        save_checkpoint(Path(cfg.OUTPUT_DIR), {**values, **facts})
    barrier()


def _restore(cfg: CfgNode, state: dict[str, object], source: Source) -> int:
    found = latest_checkpoint(Path(cfg.OUTPUT_DIR))
    if found is None:
        log.info("%s has no checkpoint; starting from the beginning", cfg.OUTPUT_DIR)
        return 0
    path, values = found
    if values["config_hash"] != config_hash(cfg):
        before = yaml.safe_load(values.get("config", "")) or {}
        found = told(differences(before, yaml.safe_load(cfg.dump()), FREE_KEYS)) if before else "its hash differs"
        raise UserError(
            f"{path} was made with another configuration ({found}); resume with the {path.parent / 'config.yaml'} that "
            "it was made with, or choose another OUTPUT_DIR"
        )
    if values["images"] != len(source):  # epochs would be cut elsewhere, and no step would be what it was to be
        raise UserError(
            f"{path} was made with {values['images']} images and DATA.PATH {cfg.DATA.PATH} has {len(source)}; resume "
            "with the images that it was made with, or choose another OUTPUT_DIR"
        )
    if values.get("names", source.identity()) != source.identity():
        raise UserError(
            f"{path} was made with images of other names than those of DATA.PATH {cfg.DATA.PATH}; resume with the "
            "images that it was made with, or choose another OUTPUT_DIR"
        )
    for name, part in state.items():
        part.load_state_dict(values[name])
    log.info("resumed from %s at step %d", path, values["step"])
    return values["step"]


def write_backbone(cfg: CfgNode, backbone: StagedBackbone, units: list[list[str]], source: Source, step: int) -> Path:
    """OUTPUT_DIR/backbone.safetensors with its manifest; returns its path."""
    path = Path(cfg.OUTPUT_DIR) / "backbone.safetensors"
    if is_main():
        manifest = describe(
            backbone,
            stem=cfg.BACKBONE.STEM,
            method="custom" if cfg.UNITS else cfg.METHOD,
            units=units,
            decoder=dict(cfg.DECODER) if units else {},
            config=yaml.safe_load(cfg.dump()),
            config_hash=config_hash(cfg),
            step=step,
            dataset=Path(cfg.DATA.PATH).name,
            images=len(source),
        )
        save_backbone(path, backbone_tensors(backbone), manifest)
        log.info("wrote %s", path)
    barrier()
    return path
