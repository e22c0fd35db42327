"""Pretraining from images to `OUTPUT_DIR/backbone.safetensors`: data, steps, schedule, checkpoints, metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, backbone_tensors, describe, save_backbone
from loco_det.backbones.hf_blocks import HfBlocks
from loco_det.backbones.networks import build_network
from loco_det.backbones.own import HF_PREFIX
from loco_det.backbones.resnet import StagedBackbone, measure_batchnorm
from loco_det.backbones.timm_blocks import TimmBlocks
from loco_det.backbones.timm_models import PREFIX, parse
from loco_det.core import config
from loco_det.core.config import Settings, flat
from loco_det.core.device import (
    arithmetic,
    check_bf16,
    has_bf16_units,
    keep_freed_memory,
    resolve_device,
    seed_everything,
)
from loco_det.core.distributed import barrier, is_main, of_rank_0, on_cpu, same_on_all, world_size
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.launch import CommonStop, StopSignal
from loco_det.core.log import Progress, log
from loco_det.core.metrics import RunMetrics
from loco_det.core.run_folder import differences, run_folder, summary
from loco_det.images.folders import open_source
from loco_det.images.source import Source
from loco_det.images.two_views import TwoViewLoader, build_two_view_loader
from loco_det.images.views import normalise
from pretrain.accumulate import Accumulation
from pretrain.average import GradientAverage
from pretrain.check import check
from pretrain.checkpoint import drop_old_checkpoints, latest_checkpoint, retire_checkpoints, save_checkpoint
from pretrain.compiling import stage_compiler
from pretrain.decoders import build_decoder
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, method_units, split_backbone
from pretrain.loss import nt_xent
from pretrain.monitor import Monitor, Stopwatch, UnreadLosses
from pretrain.optim import build_optimizer, learning_rate
from pretrain.probe import KnnProbe
from pretrain.sharing import SoftTrainer, UpperTrainer, private_copies
from pretrain.stage_run import StageRun, StageSteps
from pretrain.stepping import Stepping
from pretrain.sync_batchnorm import sync_anywhere

RANDOM_BATCHES = 50  # batches for BatchNorm's statistics with METHOD random
LAYOUT = torch.channels_last  # memory format of images and weights: faster on a CPU; not timed on GPUs
# Keys that affect where and how fast a run goes but not its result; they may differ under --resume. In streaming a
# checkpoint and a probe apply the gradients under way a forward earlier, so there their periods matter a little.
FREE_KEYS = (
    "OUTPUT_DIR",
    "DEVICE",
    "LOG_PERIOD",
    "CHECKPOINT_PERIOD",
    "CUDNN_BENCHMARK",
    "DETERMINISTIC",
    "DATA.NUM_WORKERS",
    "DATA.PATH",
    "AUGMENT.DEVICE",
    "SOLVER.RECOMPUTE",
    "SOLVER.COMPILE",
    "SOLVER.STEP_EARLY",
    "SOLVER.PARALLEL",
    "KNN.",
)


class Learner(nn.Module):
    """The backbone, cut at the units' borders, with one decoder and loss per unit.

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
        self.embeddings: dict[int, Tensor] = {}  # of the last step, for monitoring
        self.to(memory_format=LAYOUT)

    def parts(self) -> list[nn.Module]:
        """The modules stepped one at a time: every stage, then every private copy, then every decoder."""
        return [*(stage.module for stage in self.stages), *self.copies, *self.decoders]

    def loss(self, i: int, features: Tensor) -> Tensor:
        """Compute unit i's NT-Xent from its last stage's output (2b, C, H, W)."""
        return self.contrast(i, self.decoders[i](features))

    def contrast(self, i: int, z: Tensor) -> Tensor:
        """Compute unit i's NT-Xent from its embeddings (2b, D)."""
        self.embeddings[i] = z.detach()
        return nt_xent(z, self.temperature, self.chunk)


def build_backbone(cfg: CfgNode) -> StagedBackbone:
    """Build the network of BACKBONE.*, validated by `check`.

    Raises:
        UserError: a model of timm or transformers that cannot be pretrained.
    """
    if cfg.BACKBONE.NAME.startswith((PREFIX, HF_PREFIX)):
        return _of_a_library(cfg)
    shape = {"stem": cfg.BACKBONE.STEM, "norm": cfg.BACKBONE.NORM, "width": cfg.BACKBONE.WIDTH}
    return sync_anywhere(build_network(cfg.BACKBONE.NAME, **shape))


def _of_a_library(cfg: CfgNode) -> TimmBlocks | HfBlocks:
    name, library = cfg.BACKBONE.NAME, "timm"
    if name.startswith(HF_PREFIX):
        library = "transformers"
        backbone = HfBlocks(name.removeprefix(HF_PREFIX), image_size=cfg.DATA.IMAGE_SIZE)
    else:
        timm_name, options = parse(name)
        backbone = TimmBlocks(timm_name, image_size=cfg.DATA.IMAGE_SIZE, **options)
    if cfg.BACKBONE.NORM == "SyncBN" and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()
    ):
        raise UserError(f"BACKBONE.NORM is 'SyncBN', but the BatchNorm of {name} is {library}'s own; use BN")
    return backbone


def unit_names(cfg: CfgNode, backbone: StagedBackbone) -> list[list[str]]:
    """Return the [first, last] stage names of the units of UNITS, else METHOD."""
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
    """Train the backbone of `cfg` (keys: pretrain/defaults.py) and write it.

    Args:
        cfg: the frozen configuration.
        resume: continue from the newest checkpoint in OUTPUT_DIR, if there is one.
        source: the images, instead of those of DATA.PATH; images/indexed.py makes one from any data set.
        wandb: W&B project to log metrics.json to.
        settings: what the user set (`loco_det.core.config.load_config`), for the origin in error messages.

    Returns:
        OUTPUT_DIR/backbone.safetensors.

    Raises:
        UserError: invalid configuration or data, a non-finite loss, a stop by signal (after saving).
    """
    check(cfg, settings)
    device = resolve_device(cfg.DEVICE)
    if cfg.SOLVER.AMP == "bf16":
        check_bf16(device, "SOLVER.AMP", "SOLVER.AMP fp16")
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.SEED)  # the same weights on every process
    is_random = cfg.METHOD == "random" and not cfg.UNITS
    network = build_backbone(cfg) if is_random else Learner(cfg)  # refuses invalid UNITS before files are read
    exact = {"precision": cfg.FLOAT32_PRECISION, "deterministic": cfg.DETERMINISTIC}
    with (
        run_folder(cfg.OUTPUT_DIR),
        RunMetrics(cfg, wandb, resume) as metrics,
        arithmetic(device, benchmark=cfg.CUDNN_BENCHMARK, **exact),
    ):
        if source is None:
            source = open_source(cfg.DATA.PATH, cfg.DATA.FORMAT)
        else:
            cfg = config.changed(cfg, **{"DATA.PATH": source.root})  # for records and messages
        spread = cfg.SOLVER.PARALLEL == "stages"
        loader = None if spread else build_two_view_loader(cfg, source)
        seed_everything(cfg.SEED)
        if is_random:
            if resume and (found := latest_checkpoint(Path(cfg.OUTPUT_DIR))):
                raise UserError(f"{found[0]} is of another run, for METHOD random has none; choose another OUTPUT_DIR")
            _begin(cfg, start=0)
            backbone = network.to(device, memory_format=LAYOUT)
            measure_statistics(backbone, loader)
            return write_backbone(cfg, backbone, [], source, step=0)
        learner = network.to(device)
        if _is_slow_bf16(cfg, device):
            log.warning(
                "SOLVER.AMP is bf16 and this CPU has no units for it: computing in float32, which is faster here"
            )
        if spread:
            step = _train_stages(cfg, learner, source, device, resume, metrics)
        else:
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
    """Run all steps; returns their number."""
    compiler = stage_compiler(device) if cfg.SOLVER.COMPILE else None
    optimizer = build_optimizer(cfg, learner)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.SOLVER.AMP == "fp16")
    total = cfg.SOLVER.MAX_STEPS or cfg.SOLVER.EPOCHS * loader.steps_per_epoch
    schedule = learning_rate(cfg, total, loader.steps_per_epoch)
    state = {"learner": learner, "optimizer": optimizer, "scaler": scaler}
    start = _restore(cfg, state, source) if resume and is_main() else 0
    start = _same_start(state, start)
    probe = KnnProbe(cfg, source, device, LAYOUT, autocast(cfg, device))  # may refuse its images
    _begin(cfg, start)
    metrics.trim(start)
    average = GradientAverage(learner.parameters())
    stepping = Stepping(optimizer, learner.parts(), average, scaler, cfg.SOLVER.STEP_EARLY)
    if cfg.SOLVER.STEP_EARLY and not stepping.early:
        log.info(
            "SOLVER.AMP fp16: the optimizer steps at the end, since one infinite gradient must skip the whole step"
        )
    parts = cfg.SOLVER.ACCUMULATE
    trainer = local_trainer(learner, stepping, compiler, parts)
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
        should_stop = CommonStop(stop)
        for step in range(start, total):
            try:
                batch = next(batches)
            except UserError:
                if step > start and world_size() == 1:  # with several processes a collective would be needed
                    unread.read()
                    stepping.finish()
                    _save(cfg, _values(state), step, source)
                raise
            stepping.lr = schedule(step / total)
            done = step + 1
            probing = probe.due(done, loader.steps_per_epoch, total)
            looking = monitor.due(step) or probing
            stepping.observe = monitor.record_gradients if looking else None
            losses = trainer.step(
                _input(batch.views) if parts == 1 else [partial(_input, v) for v in batch.views.chunk(parts, 1)],
                autocast=autocast(cfg, device),
                scale=scaler.scale if scaler.is_enabled() else None,
            )
            unread.add(step, losses, batch.index)
            if looking:
                unread.read()
            if looking or not stepping.early:
                stepping.finish()
            with waited.paused():
                if probing:
                    same_on_all(learner.buffers())  # statistics of BatchNorm, which differ by process without SyncBN
                found = probe(learner.backbone) if probing else {}
            progress.advance(**monitor(step, losses, stepping.lr, found))
            stopped = done < total and should_stop()
            if done % cfg.CHECKPOINT_PERIOD == 0 or done == total or stopped:
                unread.read()
                stepping.finish()
                same_on_all(learner.buffers())
                _save(cfg, _values(state), done, source)
            if stopped:
                by = stop.received or "a signal"
                raise UserError(f"stopped by {by} after step {done}; --resume continues from there")
    return total


def _train_stages(
    cfg: CfgNode, learner: Learner, source: Source, device: torch.device, resume: bool, metrics: RunMetrics
) -> int:
    """Run all steps with the stages spread over processes; returns their number."""
    optimizer = build_optimizer(cfg, learner)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = {"learner": learner, "optimizer": optimizer, "scaler": scaler}
    start = _same_start(state, _restore(cfg, state, source) if resume and is_main() else 0)
    probe = KnnProbe(cfg, source, device, LAYOUT, autocast(cfg, device))
    run = StageRun(cfg, learner, optimizer, device, _input)
    loader = build_two_view_loader(cfg, source, rank=run.place.pipeline, world_size=run.place.pipelines)
    total = cfg.SOLVER.MAX_STEPS or cfg.SOLVER.EPOCHS * loader.steps_per_epoch
    schedule = learning_rate(cfg, total, loader.steps_per_epoch)
    _begin(cfg, start)
    metrics.trim(start)

    def save(done: int, optimizer_state: dict[str, Any] | None) -> None:
        values = {"learner": learner.state_dict(), "optimizer": optimizer_state, "scaler": scaler.state_dict()}
        _save(cfg, values, done, source)

    context = autocast(cfg, device)
    StageSteps(run, source, loader, total, metrics, schedule, context, probe, save).train(start)
    return total


def local_trainer(
    learner: Learner,
    stepping: Stepping | None = None,
    compiler: Callable[[nn.Module], nn.Module] | None = None,
    parts_of_batch: int = 1,
) -> LocalTrainer | SoftTrainer | Accumulation:
    """Build the learner's local step for its SHARING.MODE.

    Args:
        learner: its stages, units and losses.
        stepping: is notified when `learner.parts()` are needed and final; None without an optimizer.
        compiler: replaces the module of each stage and private copy.
        parts_of_batch: above 1, the step takes the batch in so many parts (pretrain/accumulate.py).
    """
    parts = learner.parts()  # in the trainers' order: stages and copies first
    taken: list[nn.Module] = []  # decoders whose loss is known; their gradients are final with the next stage's

    def decode(i: int) -> None:
        if stepping:
            stepping.ready(learner.decoders[i])

    def loss(i: int, features: Tensor) -> Tensor:
        decode(i)
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
    local = trainer(stages, learner.units, losses, on_final=final, recompute=recompute, on_start=ready)
    if parts_of_batch == 1:
        return local
    average = stepping.average if stepping else None
    return Accumulation(
        local, learner.decoders, learner.contrast, average, decode, lambda i: taken.append(learner.decoders[i])
    )


def _input(views: Tensor) -> Tensor:
    """Convert (2, b, 3, S, S) uint8 to (2b, 3, S, S) float32: the first view of every image, then the second."""
    return normalise(views.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD, LAYOUT)


def autocast(cfg: CfgNode, device: torch.device) -> Callable[[], object]:
    """Return what makes the context of one forward: SOLVER.AMP."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if cfg.SOLVER.AMP == "none" or _is_slow_bf16(cfg, device):
        return nullcontext
    return lambda: torch.autocast(device.type, types[cfg.SOLVER.AMP])


def _is_slow_bf16(cfg: CfgNode, device: torch.device) -> bool:
    return cfg.SOLVER.AMP == "bf16" and device.type == "cpu" and not has_bf16_units()


def measure_statistics(backbone: StagedBackbone, loader: TwoViewLoader) -> None:
    """Measure BatchNorm's statistics over up to 50 batches (METHOD random)."""
    batches = loader.batches(0)
    count = min(RANDOM_BATCHES, loader.steps_per_epoch)
    with Progress(count, "batch statistics") as progress:

        def inputs() -> Iterator[Tensor]:
            for _ in range(count):
                yield _input(next(batches).views)
                progress.advance()

        measure_batchnorm(backbone, inputs())


# --- files ------------------------------------------------------------------------------------------------------


def config_hash(cfg: CfgNode) -> str:
    """Return the sha256 of the configuration without keys that do not affect the result."""
    keys = [key.removesuffix(".") for key in FREE_KEYS]
    return hashlib.sha256(config.without(cfg, keys).dump().encode()).hexdigest()


def changed_settings(before: Mapping[str, Any], cfg: CfgNode) -> dict[str, str]:
    """Return the keys in which `cfg` differs from an earlier run's configuration: {"SEED": "0 before, 1 now", ...}.

    Keys that do not affect the result may differ. Those that an older release did not have had their default.

    Args:
        before: nested plain data, as YAML has it.
    """
    defaults, now = (flat(yaml.safe_load(one.dump())) for one in (get_cfg(), cfg))
    return differences({**defaults, **flat(before)}, now, FREE_KEYS)


def _begin(cfg: CfgNode, start: int) -> None:
    """Write config.yaml, only after a refused --resume can no longer overwrite the folder's configuration."""
    if is_main():
        if start == 0:
            retire_checkpoints(Path(cfg.OUTPUT_DIR))
        else:  # a run that was killed after a save may not have come to it
            drop_old_checkpoints(Path(cfg.OUTPUT_DIR))
        with atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml", "w") as file:
            file.write(cfg.dump())


def _save(cfg: CfgNode, state: dict[str, Any], step: int, source: Source) -> None:
    """Write a checkpoint with the entries of `state`, which only rank 0 needs to have."""
    barrier()  # until every process has verified its losses
    if is_main():
        facts = {"step": step, "images": len(source), "names": source.identity()}
        facts |= {"config": cfg.dump(), "config_hash": config_hash(cfg)}
        save_checkpoint(Path(cfg.OUTPUT_DIR), {**state, **facts})
    barrier()


def _values(state: dict[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in state.items()}


def _restore(cfg: CfgNode, state: dict[str, object], source: Source) -> int:
    found = latest_checkpoint(Path(cfg.OUTPUT_DIR))
    if found is None:
        log.info("%s has no checkpoint; starting from the beginning", cfg.OUTPUT_DIR)
        return 0
    path, values = found
    before = yaml.safe_load(values.get("config", ""))
    if before:
        different = summary(changed_settings(before, cfg))
    else:
        different = "its hash differs" if values["config_hash"] != config_hash(cfg) else ""
    if different:
        raise UserError(
            f"{path} was made with another configuration ({different}); resume with the "
            f"{path.parent / 'config.yaml'} that it was made with, or choose another OUTPUT_DIR"
        )
    if values["images"] != len(source):  # epochs would be cut differently
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


def _same_start(state: dict[str, Any], start: int) -> int:
    """Give every process rank 0's weights, optimizer and first step: others may draw or read something else.

    Machines without a common folder have no common checkpoint, and other CPUs may draw other initial weights.
    """
    if world_size() == 1:
        return start
    start = of_rank_0(start)
    same_on_all(state["learner"].state_dict().values())
    if start:
        for name in ("optimizer", "scaler"):
            state[name].load_state_dict(of_rank_0(on_cpu(state[name].state_dict()) if is_main() else None))
    return start


def write_backbone(cfg: CfgNode, backbone: StagedBackbone, units: list[list[str]], source: Source, step: int) -> Path:
    """Write OUTPUT_DIR/backbone.safetensors with its manifest; returns its path."""
    path = Path(cfg.OUTPUT_DIR) / "backbone.safetensors"
    if is_main():
        stem = cfg.BACKBONE.STEM
        if isinstance(backbone, (TimmBlocks, HfBlocks)):
            stem = "patch" if backbone.is_plain else "timm" if isinstance(backbone, TimmBlocks) else "transformers"
        manifest = describe(
            backbone,
            stem=stem,
            method="custom" if cfg.UNITS else cfg.METHOD,
            units=units,
            decoder=dict(cfg.DECODER) if units else {},
            config=yaml.safe_load(cfg.dump()),
            config_hash=config_hash(cfg),
            step=step,
            dataset=Path(cfg.DATA.PATH).name,
            images=len(source),
        )
        tensors = backbone_tensors(backbone)
        save_backbone(path, tensors, manifest)
        log.info("wrote %s", path)
        if isinstance(backbone, HfBlocks):
            backbone.write_folder(path.parent, path.name, tensors)
            log.info("every command takes it as %s%s", HF_PREFIX, path.parent)
    barrier()
    return path
