"""Pixel labels of one's own: a folder of label masks and a folder of images, named as a path.

    MASKS@IMAGES[@SPLIT]            masks are PNG (BMP, TIFF) of one number a pixel, grey or palette: the class; 255 is
                                    ignored. IMAGES/a/b.jpg has MASKS/a/b.png, or b_mask.png, b_label.png and the like
    SegmentationClass[@SPLIT]       Pascal VOC's layout, whatever stands before it: the images are in JPEGImages beside
    gtFine@leftImg8bit_foggy@train@foggy_beta_0.02
                                    Cityscapes' file names, fine or coarse: 19 classes; names of images that end so
    ...@polygons, ...@masks         the instances of such a tree, from its polygons or its bitmaps

IMAGES has a / in it (./images), for else it is a split. SPLIT is a list, ImageSets/Segmentation/SPLIT.txt or SPLIT.txt
beside MASKS, or a folder in both. The classes are named in MASKS or one of the two folders around it, in classes.txt (a
name a line, from 0 on), or in classes.json or .yaml, a list or a mapping of names and values, or in ADE20K's
objectInfo150.txt, beside which 0 is ignored; else they are VOC's 21 in SegmentationClass, and elsewhere "class 0" to
the greatest value that occurs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from loco_det.annotations import pixels, voc
from loco_det.annotations.cityscapes import Frame, coco_format, require_shapely
from loco_det.annotations.converted import derived_file, files_digest
from loco_det.annotations.formats.files import Size, Tree, Unreadable, read_json, read_text
from loco_det.annotations.formats.splits import WHOLE, split_of_folder
from loco_det.annotations.paths import ANNOTATION_FILE, local_path, split_parts
from loco_det.core.device import usable_cores
from loco_det.core.errors import UserError
from loco_det.core.files import file_sha256
from loco_det.core.log import Progress, log
from loco_det.images.decode import SUFFIXES as IMAGE_SUFFIXES

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
INSTANCES = ("polygons", "masks")  # at the end: Cityscapes' instances from these
_LOSSY = (".jpg", ".jpeg", ".webp")
_VOC = re.compile(r"SegmentationClass\w*")
_NAME_FILES = [
    f"{stem}{suffix}"
    for stem in ("classes", "class_names", "names", "labels")
    for suffix in (".txt", ".json", ".yaml", ".yml")
]
_ADE20K = "objectInfo150.txt"  # the 150 classes, from 1 on, of ADEChallengeData2016, whose 0 is "other"
_MOST_NAMED = 1 << 20  # bytes of a file of names
_MASK_ENDING = re.compile(r"(.+)[_-](?:masks?|labels?|seg|segmentation|gt|L)", re.IGNORECASE)
_CITYSCAPES_IMAGE = re.compile(r"(.+)_leftImg8bit.*")
_CITYSCAPES_TRUTH = re.compile(r"(.+)_gt[A-Z][a-z]+_(labelIds|labelTrainIds|instanceIds|polygons)")
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of one whole number a pixel


class Folders(NamedTuple):
    """A spelling taken apart.

    Attributes:
        splits: what stands behind the folders: a list or a folder, and how names of images end.
        instances: what Cityscapes' instances are to be made from; None for pixel labels.
    """

    masks: Path
    images: Path
    splits: tuple[str, ...]
    instances: str | None


class Pair(NamedTuple):
    """An image and its mask, or what else the truth is read from."""

    image: Path
    mask: Path


def find_folders(name: str) -> Folders | None:
    """The folders that a data set's name stands for, without or with parts behind it; None for any other name."""
    whole = split_parts(name)[0]
    head, rest = _first_folder(whole.split("@"))
    masks = local_path(head)
    if not ("/" in head or head.startswith("~")) or (rest and os.path.isdir(local_path(whole))):
        return None
    if ANNOTATION_FILE.fullmatch(head) and not os.path.isdir(masks):
        return None
    instances = rest.pop() if rest and rest[-1] in INSTANCES else None
    if rest and "/" in rest[0]:
        images, rest = _first_folder(rest)
        return None if ANNOTATION_FILE.fullmatch(images) else Folders(masks, local_path(images), (*rest,), instances)
    return Folders(masks, masks.parent / "JPEGImages", (*rest,), instances) if _VOC.fullmatch(masks.name) else None


def _first_folder(pieces: list[str]) -> tuple[str, list[str]]:
    """The first of the pieces, with those behind it that make it a folder that is there, and the others."""
    cuts = (k for k in range(1, len(pieces) + 1) if os.path.isdir(local_path("@".join(pieces[:k]))))
    cut = next(cuts, 1)
    return "@".join(pieces[:cut]), pieces[cut:]


def is_labels_path(name: str) -> bool:
    """Whether a data set's name, without or with parts, is a path of pixel labels."""
    found = find_folders(name)
    return found is not None and found.instances is None


def folder_annotations(name: str, folders: Folders) -> Path:
    """The list of a set's images in COCO's format, or their instances, made where there is none yet.

    An image of pixel labels has the path of its mask under "labels".

    Args:
        name: for messages.

    Raises:
        UserError: a folder, an image or a mask is not there, sizes differ, a mask is in colours, or a split or the
            names of the classes mean nothing.
    """
    for folder in folders[:2]:
        if not os.path.isdir(folder):
            raise UserError(f"DATASETS: '{name}': there is no folder {folder}; write MASKS@IMAGES with both folders.")
    found = _find_pairs(name, folders)
    names = None if found.of_cityscapes else _name_file(folders)
    read = [file for pair in found.pairs for file in pair] + ([names] if names else [])
    facts = {
        "format": 1,
        "pairs": [[str(file) for file in pair] for pair in found.pairs],
        "files": files_digest(read, folders.masks),
        "names": str(names),
        "instances": folders.instances,
        "images": str(folders.images.absolute()),
    }
    title = "-".join([folders.masks.absolute().name, folders.images.absolute().name, *folders.splits])
    make = _instances if folders.instances else _labels
    return derived_file(re.sub(r"[^\w.+-]", "_", title)[-80:], facts, lambda: make(folders, found, names))


# --- which images, which masks ----------------------------------------------------------------------------------


class _Found(NamedTuple):
    """The pairs of a split, sorted, and the walk that met them; `of_cityscapes` if they are called so."""

    pairs: list[Pair]
    tree: Tree
    of_cityscapes: bool


def _find_pairs(name: str, folders: Folders) -> _Found:
    tree = Tree(folders.masks, folders.images)
    image_root = Path(os.path.abspath(folders.images))
    candidates = [file for file in tree.files if tree.root in file.parents]
    truths = _cityscapes_truths(tree.root, candidates, folders.instances)
    of_cityscapes = bool(truths)
    if folders.instances and not of_cityscapes:
        raise UserError(
            f"DATASETS: '{name}': {folders.masks} holds no instances called as Cityscapes' "
            f"(CITY/NAME_gtFine_instanceIds.png, ..._polygons.json); leave @{folders.instances} out for pixel labels."
        )
    masks = [] if of_cityscapes else _mask_files(name, folders, tree.root, image_root, candidates)
    images: dict[str, list[Path]] = defaultdict(list)
    for image in tree.images(image_root):
        if of_cityscapes or image not in masks:
            images[_key(image, image_root, _CITYSCAPES_IMAGE if of_cityscapes else None)].append(image)
    truths = truths or _under_images_keys(masks, tree.root, images)
    keys = _chosen_keys(name, folders, truths, images)
    doubled = next((images[key] for key in keys if len(images[key]) > 1), None)
    if doubled and not of_cityscapes:
        raise UserError(f"{doubled[0]} and {doubled[1]} have one mask; remove or rename one of the images.")
    return _Found(sorted(Pair(image, truths[key]) for key in keys for image in images[key]), tree, of_cityscapes)


def _cityscapes_truths(root: Path, files: Sequence[Path], instances: str | None) -> dict[str, Path]:
    """By key the files that Cityscapes' names say to have the truth; labelIds before labelTrainIds."""
    kinds = {"polygons": ("polygons",), "masks": ("instanceIds",), None: ("labelTrainIds", "labelIds")}[instances]
    called = [(_CITYSCAPES_TRUTH.fullmatch(file.stem), file) for file in files]
    return {_key(file, root, _CITYSCAPES_TRUTH): file for kind in kinds for m, file in called if m and m[2] == kind}


def _mask_files(name: str, folders: Folders, root: Path, image_root: Path, files: Sequence[Path]) -> set[Path]:
    masks = {file for file in files if file.suffix.lower() in SUFFIXES}
    if image_root == root:  # all in one folder
        masks = {file for file in masks if _MASK_ENDING.fullmatch(file.stem)} or masks
    elif root in image_root.parents:
        masks = {file for file in masks if image_root not in file.parents}
    if masks:
        return masks
    lossy = next((file for file in files if file.suffix.lower() in _LOSSY), None)
    if lossy:
        raise UserError(f"{lossy} is no mask: its compression changes the classes; save masks as PNG.")
    raise UserError(
        f"DATASETS: '{name}': {folders.masks} holds no masks (.png); write MASKS@IMAGES with the masks first, and "
        "boxes and polygons as the folder that holds both."
    )


def _under_images_keys(masks: set[Path], root: Path, images: Mapping[str, list[Path]]) -> dict[str, Path]:
    """The masks by the keys of their images; those without one by their own."""
    found: dict[str, Path] = {}
    for mask in sorted(masks):
        own, short = _key(mask, root, None), _key(mask, root, _MASK_ENDING)
        key = short if short in images and own not in images else own
        if key in found:
            raise UserError(f"{found[key]} and {mask} are masks of one image; remove one of them.")
        found[key] = mask
    return found


def _key(file: Path, root: Path, pattern: re.Pattern[str] | None) -> str:
    """The path below `root` without suffix, and of its last part only what the pattern's first group is."""
    called = pattern.fullmatch(file.stem) if pattern else None
    return (file.parent.relative_to(root) / (called[1] if called else file.stem)).as_posix()


def _chosen_keys(name: str, folders: Folders, truths: Mapping[str, Path], images: dict[str, list[Path]]) -> list[str]:
    """The keys of the split, each with an image and a mask.

    Raises:
        UserError: a half is missing, or the split.
    """
    keys, splits = sorted({*truths, *images}), list(folders.splits)
    several = _splits(folders, keys)
    if not splits and len(several) == 1:
        splits = several
    listed = _list_of(folders, splits[0]) if splits else None
    if listed:
        keys = _listed_keys(folders, listed, images)
    elif splits and any(key.startswith(f"{splits[0]}/") for key in keys):
        keys = [key for key in keys if key.startswith(f"{splits[0]}/")]
    elif several:
        which = f"has no split '{splits[0]}'" if splits else "has several splits"
        remedy = ", ".join(f"@{split}" for split in several)
        raise UserError(f"DATASETS: '{name}' {which}; put one of {remedy} behind the path.")
    elif splits:
        splits = ["", *splits]
    if splits[1:]:
        keys = _with_ending(name, splits[1:], keys, images)
    _refuse_halves(folders, listed, keys, truths, images)
    if not keys:
        raise UserError(f"DATASETS: '{name}' holds no image; write MASKS@IMAGES with the masks first.")
    return keys


def _splits(folders: Folders, keys: Sequence[str]) -> list[str]:
    """The splits that there are: lists of VOC's layout, and folders called as splits are."""
    lists = Path(os.path.abspath(folders.masks)).parent / "ImageSets" / "Segmentation"
    found = {file.stem for file in lists.glob("*.txt")}
    return sorted(found or {split_of_folder(Path(key), Path())[0] for key in keys} - {WHOLE})


def _list_of(folders: Folders, split: str) -> Path | None:
    around = Path(os.path.abspath(folders.masks)).parent
    places = (around / "ImageSets" / "Segmentation" / f"{split}.txt", around / f"{split}.txt")
    return next((place for place in places if "/" not in split and place.is_file()), None)


def _listed_keys(folders: Folders, listed: Path, images: Mapping[str, list[Path]]) -> list[str]:
    """Of a list of names, without or with suffixes, the images' folder in front or the mask behind."""
    try:
        lines = [line.split()[0].lstrip("/") for line in read_text(listed).split("\n") if line.strip()]
    except Unreadable as error:
        raise UserError(f"{listed}: cannot be read ({error}); give the name of an image a line.") from None
    lines = [line[: -len(Path(line).suffix)] if Path(line).suffix.lower() in IMAGE_SUFFIXES else line for line in lines]
    front = f"{folders.images.absolute().name}/"
    return list(dict.fromkeys(line if line in images else line.removeprefix(front) for line in lines))


def _with_ending(name: str, endings: list[str], keys: list[str], images: dict[str, list[Path]]) -> list[str]:
    """The keys of the images whose names end so, which alone are left in `images`."""
    for key in keys:
        images[key] = [image for image in images[key] if image.stem.endswith(f"_{endings[0]}")]
    kept = [key for key in keys if images[key]]
    if kept and not endings[1:]:
        return kept
    raise UserError(
        f"DATASETS: '{name}': @{endings[-1]} is neither a list {endings[-1]}.txt beside the folder of masks, nor a "
        "folder in both, nor how names of images end, as foggy_beta_0.02; correct it."
    )


def _refuse_halves(
    folders: Folders, listed: Path | None, keys: list[str], truths: Mapping[str, Path], images: Mapping[str, list[Path]]
) -> None:
    halves = (("image", images, folders.images, folders.masks), ("mask", truths, folders.masks, folders.images))
    for half, known, folder, other in halves:
        lost = [key for key in keys if not known.get(key)]
        if lost:
            whose = f"that {listed} lists" if listed else f"to go with the files in {other}"
            raise UserError(
                f"{folder} lacks {len(lost)} {half}s {whose}, {lost[0]} first; complete the folder, or list the images "
                "that have masks in SPLIT.txt beside the folder of masks and put @SPLIT behind the path."
            )


# --- what is listed of them -------------------------------------------------------------------------------------


def _labels(folders: Folders, found: _Found, names: Path | None) -> bytes:
    ignored = {"ignored": 0} if names and names.name == _ADE20K else {}
    entries = [{**entry, **ignored} for entry in _entries(folders, found)]
    categories = [{"id": value, "name": name} for value, name in _classes(folders, found, names).items()]
    digest = hashlib.sha256("".join(file_sha256(pair.mask) for pair in found.pairs).encode())
    info = {"labels_sha256": digest.hexdigest()}  # so that the list's own hash tells other labels apart too
    return json.dumps({"info": info, "images": entries, "annotations": [], "categories": categories}).encode()


def _entries(folders: Folders, found: _Found) -> list[dict[str, Any]]:
    root = Path(os.path.abspath(folders.images))
    entries: list[dict[str, Any]] = []
    differing, coloured = [], []
    for number, pair in enumerate(found.pairs, 1):
        mode, labels = _mask_header(pair.mask)
        image = found.tree.size(pair.image)
        size = image or labels
        if size is None:
            raise UserError(f"{pair.image} and {pair.mask}: neither can be read; restore or remove both.")
        if mode not in (None, *_MODES):
            coloured.append(f"{pair.mask} and %d other masks are pictures in colour ({mode})")
        if image and labels and image[:2] != labels[:2]:
            turned = ", turned upright as its EXIF data say," if image.turned else ""
            differing.append(
                f"{pair.mask} is {labels.width} x {labels.height} pixels and its image {pair.image}{turned} "
                f"{image.width} x {image.height}, and %d other masks have another size than their images"
            )
        name = pair.image.relative_to(root).as_posix()
        entries.append({"id": number, "file_name": name, "height": size.height, "width": size.width})
        entries[-1]["labels"] = str(pair.mask)
    if coloured:
        remedy = "save them with one channel, grey or with a palette, whose values are the classes"
        raise UserError(f"{coloured[0] % (len(coloured) - 1)}; {remedy}.")
    if differing:
        raise UserError(f"{differing[0] % (len(differing) - 1)}; correct the one or the other.")
    return entries


def _mask_header(path: Path) -> tuple[str | None, Size | None]:
    """Pillow's mode and the size; None where decoding will tell what is wrong, which a training may endure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.mode, Size(*image.size)
    except Exception:  # hostile bytes make PIL's parsers raise nearly anything
        return None, None


def _instances(folders: Folders, found: _Found, _: Path | None) -> bytes:
    from_polygons = folders.instances == "polygons"
    if from_polygons:
        require_shapely()
    frames = [Frame(pair.image, pair.mask, pair.mask) for pair in found.pairs]
    return json.dumps(coco_format(frames, Path(os.path.abspath(folders.images)), from_polygons)).encode()


# --- the classes ------------------------------------------------------------------------------------------------


def _classes(folders: Folders, found: _Found, file: Path | None) -> dict[int, str]:
    """{value in a mask: name}."""
    if found.of_cityscapes:
        return dict(zip(pixels.LABEL_IDS.tolist(), pixels.CLASSES))
    if file:
        return read_class_names(file)
    if _VOC.fullmatch(folders.masks.name):
        return dict(enumerate(("background", *voc.CLASSES)))
    return {value: f"class {value}" for value in range(_greatest(folders, found.pairs) + 1)}


def _name_file(folders: Folders) -> Path | None:
    """The nearest file that names the classes."""
    masks = Path(os.path.abspath(folders.masks))
    for folder in (masks, *masks.parents[:2]):
        found = [folder / name for name in (*_NAME_FILES, _ADE20K) if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1].name} both name classes; remove one of them.")
        if found:
            return found[0]
    return None


def _greatest(folders: Folders, pairs: Sequence[Pair]) -> int:
    """The greatest value below 255 in all masks that can be decoded."""

    def of_one(pair: Pair) -> int:
        try:
            values = pixels.read_values(pair.mask)
        except UserError:
            return -1  # which training and data check tell of
        below = values[values < pixels.IGNORED]
        return int(below.max()) if below.size else -1

    log.info("%s: no classes.txt names the classes; every mask is read to number them", folders.masks)
    greatest = -1
    with ThreadPoolExecutor(usable_cores()) as pool, Progress(len(pairs), "masks", unit="images") as progress:
        for value in pool.map(of_one, pairs):
            greatest = max(greatest, value)
            progress.advance()
    if greatest < 1:
        raise UserError(
            f"{folders.masks}: there is no class but 0 in its masks; 255 is ignored, so of masks of 0 and 255 make the "
            "255 a 1."
        )
    return greatest


def read_class_names(path: Path) -> dict[int, str]:
    """{value in a mask: name} in ascending order, from a small file.

    Lines of text count from 0; labelme's first line __ignore__ counts for nothing. A name for 255, which is ignored,
    is left out.

    Raises:
        UserError: unreadable, or not such a file.
    """
    try:
        if path.stat().st_size > _MOST_NAMED:
            raise Unreadable("it has more than a megabyte")
        if path.name == _ADE20K:
            rows = [line.split("\t") for line in read_text(path).split("\n")[1:] if line.strip()]
            found: Any = {row[0].strip(): row[-1].strip() for row in rows}
        elif path.suffix == ".txt":
            found = [line.strip() for line in read_text(path).split("\n") if line.strip()]
            found = found[1:] if found[:1] == ["__ignore__"] else found
        else:
            found = (
                read_json(path) if path.suffix == ".json" else _plain(yaml.compose(read_text(path), yaml.SafeLoader), 2)
            )
        if isinstance(found, dict) and len(held := found.keys() & {"names", "classes"}) == 1:
            found = found[held.pop()]
        names = dict(_named(found))
    except (Unreadable, OSError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not name classes ({reason}); give a list of names, or one of values.") from None
    if not names or len(set(names.values())) < len(names) or not 0 <= min(names) <= max(names) < pixels.IGNORED:
        raise UserError(f"{path}: each value from 0 to 254 takes one name of its own; correct the file.")
    return dict(sorted(names.items()))


def _plain(node: yaml.Node | None, depth: int) -> Any:
    """Lists and mappings of a YAML file, so many levels deep, with every scalar as the text that it is."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.MappingNode) and depth:
        pairs = ((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
        return {key: _plain(value, depth - 1) for key, value in pairs}
    if isinstance(node, yaml.SequenceNode) and depth:
        return [_plain(child, depth - 1) for child in node.value]
    return None


def _named(found: Any) -> Iterator[tuple[int, str]]:
    """Values with their names.

    Raises:
        Unreadable: neither a list of names nor a mapping between values and names.
    """
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in pairs:
        numbers = [text for text in (str(key), str(value)) if re.fullmatch(r"\d{1,9}", text)]
        if not isinstance(value, (str, int)) or not numbers:
            raise Unreadable(f"{str(key)[:40]!r}: {str(value)[:40]!r} is no value with a name")
        number, name = (key, value) if numbers[0] == str(key) else (value, key)
        if int(number) != pixels.IGNORED:
            yield int(number), str(name)
