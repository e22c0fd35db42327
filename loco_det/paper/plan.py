"""Plans what makes the paper's tables and figures: for each row and seed the commands that lead to its figure.

    OUT/ROW_SEED/                     pretraining's OUTPUT_DIR: backbone.safetensors, metrics.json
    OUT/ROW_SEED/linear.json, ...     probes of that backbone
    OUT/detect_ROW_SEED/              small scale: pretraining on a detection set's own images, and detector/
    OUT/coco_ROW_EPOCHSep_SEED/       full scale: a detector's OUTPUT_DIR

ROW is the name of the paper's configuration without network and epochs at small scale ("gim_conv" is
gim_conv_r50_100ep.yaml's switches on a narrow ResNet-18), and the configuration's own at full scale. A step whose file
exists is not run again, whoever made it.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loco_det.annotations.registry import find_dataset
from loco_det.core.config import find_config, read_settings
from loco_det.core.errors import UserError
from loco_det.paper.figures import DECODER, FEW, FROZEN, MAIN, METHODS, NETWORKS, PROGRESSIVE, ROWS, SHARING_ROWS, Row

SCALES = ("full", "small")
SWITCHES = ("METHOD", "UNITS", "DECODER", "SHARING")  # of a paper's configuration, for the small networks
SMALL_RATE = 0.125  # SOLVER.BASE_LR, best for simclr, gim and loco of five on held-out images: docs/results.md
SMALL_PROBES = {"linear": ("--epochs", "30"), "knn": (), "ridge": ()}
SMALL_SHARES = {"10k": "50pct", "1k": "10pct"}  # of a small detection set, in the place of COCO-10K and COCO-1K
SMALL_DETECTION = ("random", "gim", "simclr", "loco")
SMALL_WORDS = {**METHODS, "random": "no pretraining"}
SPLITS = (0, 1, 2, 3, 4)
_DATA = {"coco": "COCO", "cityscapes": "Cityscapes"}
COCO_IMAGES = {"10k": 10_000, "1k": 1_000}
BACKBONE, DONE = "backbone.safetensors", "SHA256SUMS"  # what a finished pretraining, a finished detector leaves


@dataclass(frozen=True)
class Step:
    """One command: `loco-det WORDS`, done once `made` exists."""

    made: Path
    words: tuple[str, ...]

    @property
    def clock(self) -> Path:
        """The file with the seconds of processor time that it took."""
        return self.made.with_name(f".{self.made.name}.seconds")


@dataclass(frozen=True)
class Chain:
    """The commands of one row and seed, each of which may need the one before."""

    seed: int
    steps: tuple[Step, ...]

    @property
    def done(self) -> bool:
        return all(step.made.exists() for step in self.steps)


@dataclass(frozen=True)
class PlannedRow:
    """A row of a page.

    Attributes:
        label: what it is, in words.
        paper: the paper's figures by column.
        chains: one for each seed; none if it cannot be run, and `why` says why.
        differs: how the run at this scale differs from the paper's row besides the scale.
        group: rows that are compared with one another, with the first of them.
    """

    label: str
    paper: dict[str, float]
    chains: tuple[Chain, ...] = ()
    why: str = ""
    differs: str = ""
    group: str = ""


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        scale: "full" or "small".
        data: full: the folder of ImageNet; small: CIFAR-10, or a detection set.
        out: folder of all runs.
        seeds: of the rows; splits of few_labels.
        pretrain, train: KEY VALUE ... for every pretraining, every detector.
        supervised: weights of the supervised rows.
    """

    scale: str
    data: str
    out: Path
    seeds: tuple[int, ...]
    pretrain: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    supervised: str = ""

    @property
    def is_small(self) -> bool:
        return self.scale == "small"


def plan(target: str, options: Options) -> list[PlannedRow]:
    """Return the rows of a table or figure, in its order, with the commands that make them."""
    return list(_PLANS[target](options))


# --- pretraining ------------------------------------------------------------------------------------------------


def small_name(config: str) -> str:
    """Return the row of a paper's configuration: "gim_conv_r50_100ep" -> "gim_conv"."""
    return config.removesuffix("_100ep").removesuffix("_r50").replace("presnet50", "presnet")


def small_network(name: str) -> str:
    """Return the network of a small row, as in configs/pretrain/evidence_NETWORK.yaml."""
    return next((network for network in ("presnet", "sh50") if name.endswith(network)), "r18")


def small_images(network: str) -> str:
    """Return the list of CIFAR-10's images, of `data.PRETRAINED`, that a small network pretrains on."""
    return Path(read_settings(f"configs/pretrain/evidence_{network}.yaml")["DATA.PATH"].value).name


def switches(config: str) -> dict[str, Any]:
    """Return what the paper's configuration sets of METHOD, UNITS, DECODER and SHARING, its bases included."""
    settings = read_settings(f"configs/pretrain/{config}.yaml")
    return {
        key: setting.value
        for key, setting in settings.items()
        if key.partition(".")[0] in SWITCHES and "/base_" not in setting.origin
    }


def words_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """KEY VALUE KEY VALUE ..."""
    return tuple(str(part) for pair in settings.items() for part in pair)


def pretraining(config: str, seed: int, options: Options) -> Step:
    """Return the pretraining of a paper's row."""
    if not options.is_small:
        folder = options.out / f"{config}_{seed}"
        settings = {"DATA.PATH": Path(options.data) / "train", "SEED": seed, "OUTPUT_DIR": folder}
        return _pretrain(f"configs/pretrain/{config}.yaml", folder, settings, options)
    name = small_name(config)
    folder = options.out / f"{name}_{seed}"
    network = small_network(name)
    settings = {**switches(config), "SOLVER.BASE_LR": SMALL_RATE, "SEED": seed}
    settings |= {"DATA.PATH": options.out / small_images(network), "OUTPUT_DIR": folder}
    return _pretrain(f"configs/pretrain/evidence_{network}.yaml", folder, settings, options)


def _pretrain(config: str, folder: Path, settings: dict[str, Any], options: Options) -> Step:
    told = ("--quiet", "--resume", "--config-file", config)
    return Step(folder / BACKBONE, ("pretrain", *told, *words_of(settings), *options.pretrain))


def probes(backbone: Path, last: str, options: Options) -> list[Step]:
    """Return the readouts of a backbone: the paper's own recipe, or at small scale three protocols on every stage."""
    folder, images = backbone.parent, labelled(options)
    common = ("--data", str(images), "--quiet")
    if not options.is_small:
        made = folder / "linear.json"
        told = ("--protocol", "linear", "--recipe", "paper", "--stages", last)
        return [Step(made, ("probe", str(backbone), *told, *common, "--json", str(made)))]
    common += ("--cache", str(folder / "features"), "--workers", "0")
    steps = []
    for protocol, more in SMALL_PROBES.items():
        made = folder / f"{protocol}.json"
        words = ("probe", str(backbone), "--protocol", protocol, *more, *common, "--json", str(made))
        steps.append(Step(made, words))
    return steps


def labelled(options: Options) -> Path:
    """Return the folder with the labelled images, training and test: CIFAR-10's is in OUT if it comes in a zip."""
    path = Path(options.data)
    if options.is_small and path.suffix == ".zip" and path.is_file():
        return options.out / folder_in(path)
    return path


@functools.cache  # reading the names of 60,000 images takes a while
def folder_in(archive: Path) -> str:
    """Return the name of the only folder at the top of a zip.

    Raises:
        UserError: there are others, or files.
    """
    with zipfile.ZipFile(archive) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
    if len(tops) != 1:
        raise UserError(f"{archive}: has {len(tops)} folders at its top; give a zip of one, with train and test")
    return tops.pop()


def last_stage(config: str) -> str:
    """Return the uppermost stage of a paper's row."""
    return "res7" if "presnet" in config else "res5"


def _read_out(rows: Sequence[Row], options: Options) -> Iterator[PlannedRow]:
    for row in rows:
        chains = []
        for seed in options.seeds:
            first = pretraining(row.config, seed, options)
            steps = (first, *probes(first.made, last_stage(row.config), options))
            chains.append(Chain(seed, steps))
        paper = {"top-1": row.top1} if row.top1 is not None else {}
        label = f"{row.words}, {row.place}" if row.place == PROGRESSIVE else row.words
        group = small_network(small_name(row.config))
        yield PlannedRow(label, paper, tuple(chains), differs=_differs(row.config, options), group=group)


def _differs(config: str, options: Options) -> str:
    if options.is_small and "share2blocks" in config:
        return "two blocks are a whole stage of ResNet-18"
    return ""


def _rows(*places: str) -> list[Row]:
    return [row for row in ROWS if row.place in places]


def _sharing(options: Options) -> Iterator[PlannedRow]:
    by_config = {row.config: row for row in ROWS}
    yield from _read_out([by_config[config] for config in SHARING_ROWS], options)


def _curves(options: Options) -> Iterator[PlannedRow]:
    words = {row.config: row.words for row in ROWS}
    for config in ("simclr_r50", "gim_r50", "loco_res2_r50"):
        chains = [Chain(seed, (pretraining(config, seed, options),)) for seed in options.seeds]
        yield PlannedRow(words[config], {}, tuple(chains))


def _tsne(options: Options) -> Iterator[PlannedRow]:
    seed = options.seeds[0]
    for method in ("simclr", "gim", "loco"):
        config = f"{method}_r50"
        first = pretraining(config, seed, options)
        picture = first.made.parent / "tsne.png"
        told = ("--protocol", "knn", "--stages", last_stage(config), "--tsne", str(picture), "--quiet", "--no-cache")
        told += ("--data", str(labelled(options)), *(("--workers", "0") if options.is_small else ()))
        step = Step(picture.with_suffix(".json"), ("probe", str(first.made), *told))
        yield PlannedRow(METHODS[method], {}, (Chain(seed, (first, step)),))


# --- detection --------------------------------------------------------------------------------------------------


def _detector(config: str, folder: Path, settings: dict[str, Any], options: Options) -> Step:
    engine = ("--engine", "torchvision") if options.is_small else ()
    told = ("--quiet", "--resume", *engine, "--config-file", config)
    return Step(folder / DONE, ("train", *told, *words_of({**settings, "OUTPUT_DIR": folder}), *options.train))


def _pair(figures: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("box AP", "mask AP"), figures))


def _detection(options: Options) -> Iterator[PlannedRow]:
    if options.is_small:
        for method in SMALL_DETECTION:
            chains = tuple(_small_detector(method, seed, options) for seed in options.seeds)
            yield PlannedRow(SMALL_WORDS[method], {}, chains)
        return
    for (data, method, network), by_epochs in FROZEN.items():
        for epochs, figures in by_epochs.items():
            config = f"configs/paper/{data}_{method}_{network}.yaml"
            label = f"{METHODS[method]}, {NETWORKS[network]}{_epochs(epochs)}, {_DATA[data]}"
            yield _full_detector(label, f"{data}_{method}_{network}", config, method, network, epochs, figures, options)


def _epochs(epochs: int) -> str:
    return f", {epochs} epochs" if epochs else ""


def _weights(method: str, network: str, epochs: int, seed: int, options: Options) -> tuple[list[Step], dict[str, Any]]:
    """Return what makes a row's backbone, and the keys that name it."""
    if method == "random":
        return [], {"MODEL.WEIGHTS": '""'}
    if method == "supervised":
        return [], {"MODEL.WEIGHTS": options.supervised}
    step = pretraining(f"{method}_{network}{'_100ep' if epochs == 100 else ''}", seed, options)
    return [step], {"MODEL.WEIGHTS": step.made}


def _full_detector(
    label: str,
    name: str,
    config: str,
    method: str,
    network: str,
    epochs: int,
    figures: tuple[float, float],
    options: Options,
    splits: str = "",
) -> PlannedRow:
    """Return a row of detectors; `splits` is the data set of each seed as a pattern, for few labels."""
    paper = _pair(figures)
    if method == "supervised" and not options.supervised:
        return PlannedRow(label, paper, why="give its weights: --supervised FILE")
    chains = []
    for seed in options.seeds:
        steps, settings = _weights(method, network, epochs, 0 if splits else seed, options)
        settings |= {"SEED": seed}
        if splits:
            settings["DATASETS.TRAIN"] = f"('{splits.format(seed)}',)"
        folder = options.out / f"{name}{f'_{epochs}ep' if epochs else ''}_{seed}"
        chains.append(Chain(seed, (*steps, _detector(config, folder, settings, options))))
    return PlannedRow(label, paper, tuple(chains))


def _few_labels(options: Options) -> Iterator[PlannedRow]:
    if options.is_small:
        for size, share in SMALL_SHARES.items():
            for method in SMALL_DETECTION:
                label = f"{SMALL_WORDS[method]}, {share.removesuffix('pct')} % of the images"
                chains = tuple(_small_few(size, share, method, split, options) for split in options.seeds)
                yield PlannedRow(label, {}, chains, group=size)
        return
    for (size, method), by_epochs in FEW.items():
        for epochs, figures in by_epochs.items():
            name = f"coco_{size}_{method}_r50"
            config, splits = f"configs/paper/{name}.yaml", f"coco_2017_train@{COCO_IMAGES[size]}images_seed{{}}"
            label = f"{METHODS[method]}{_epochs(epochs)}, COCO-{size.upper()}"
            yield _full_detector(label, name, config, method, "r50", epochs, figures, options, splits)


def detection_images(options: Options) -> Path:
    """Return the list of a small detection set's training images, for pretraining; `prepare` writes it."""
    return options.out / f"{Path(options.data).name}_train.txt"


def small_pretraining(method: str, seed: int, options: Options) -> Step:
    """Return the pretraining of a backbone on a small detection set's own images."""
    folder = options.out / f"detect_{method}_{seed}"
    settings = {"METHOD": method, "DATA.PATH": detection_images(options), "SEED": seed, "OUTPUT_DIR": folder}
    if method != "loco":
        settings["DECODER.CONV_BLOCKS"] = 0
    return _pretrain("configs/pretrain/evidence_detection.yaml", folder, settings, options)


def _small_detector(method: str, seed: int, options: Options) -> Chain:
    first = small_pretraining(method, seed, options)
    settings = {"MODEL.WEIGHTS": first.made, "SEED": seed, **_small_sets(options)}
    second = _detector("configs/evidence_detection.yaml", first.made.parent / "detector", settings, options)
    return Chain(seed, (first, second))


def _small_sets(options: Options, part: str = "") -> dict[str, Any]:
    path = Path(options.data).absolute()
    sets = {"TRAIN": f"{path}@train{part}", "TEST": f"{path}@test"}
    found = {f"DATASETS.{split}": f"('{name}',)" for split, name in sets.items()}
    try:
        classes = len(find_dataset(sets["TEST"]).index.category_names)
    except UserError:  # a dry run without the images
        return found
    return {**found, "MODEL.ROI_HEADS.NUM_CLASSES": classes}


def _small_few(size: str, share: str, method: str, split: int, options: Options) -> Chain:
    first = small_pretraining(method, 0, options)
    settings = {"MODEL.WEIGHTS": first.made, "SEED": split, **_small_sets(options, f"@{share}_seed{split}")}
    if method == "random":
        settings["MODEL.BACKBONE.FREEZE_AT"] = 0
    folder = options.out / f"few_{size}_{method}_{split}"
    return Chain(split, (first, _detector("configs/evidence_few_labels.yaml", folder, settings, options)))


def _pictures(options: Options) -> Iterator[PlannedRow]:
    rows = _detection(replace(options, seeds=options.seeds[:1]))
    wanted = re.compile(r"no pretraining|(SimCLR|GIM|LoCo)(, ResNet-50, 800 epochs, COCO)?")
    yield from (PlannedRow(row.label, {}, row.chains, row.why) for row in rows if wanted.fullmatch(row.label))


_PLANS = {
    "table1": lambda options: _read_out(_rows(MAIN), options),
    "detection": _detection,
    "few_labels": _few_labels,
    "decoder": lambda options: _read_out(_rows(DECODER), options),
    "sharing": _sharing,
    "memory": lambda options: _read_out(_rows(PROGRESSIVE), options),
    "curves": _curves,
    "tsne": _tsne,
    "pictures": _pictures,
}
TARGETS = {
    "table1": "table 1: linear readout on ImageNet, 800 epochs, ResNet-50 and ShuffleNet v2-50",
    "detection": "Mask R-CNN on frozen backbones: COCO and Cityscapes",
    "few_labels": "COCO-10K and COCO-1K, fine-tuned, five splits",
    "decoder": "ablation of the decoder: linear readout, 100 epochs",
    "sharing": "ablation of sharing: linear readout, 100 epochs",
    "memory": "memory of ResNet-50 and Progressive ResNet-50, and the latter's linear readout, 100 epochs",
    "curves": "losses of every unit at the end of 800 epochs",
    "tsne": "t-SNE of 500 images of 10 classes, and how compact the classes are",
    "pictures": "detections of the frozen detectors on test images",
}


def commands_of(rows: Sequence[PlannedRow]) -> list[Step]:
    """Return every command once, in an order in which each finds what it needs."""
    return list(dict.fromkeys(step for row in rows for chain in row.chains for step in chain.steps))


def config_of(step: Step) -> Path:
    """Return the configuration file of a step, found as the command finds it."""
    return find_config(step.words[step.words.index("--config-file") + 1])
