"""The geometric transforms of detection training: crop, resize, flip, and large-scale jitter.

Each is a small tuple that transforms an image, a bitmap mask, pixel labels, points and polygons consistently;
`draw_transforms` and `draw_scale_jitter` draw them. Arithmetic, random draws and their order are Detectron2's
(data/transforms/), and for jitter those of ViTDet (projects/ViTDet/configs/common/coco_loader_lsj.py).

Shape legend: image (H, W, 3) uint8, mask and labels (H, W) uint8, points (P, 2) float64 or float32 x, y in pixels,
polygon a flat float64 array x0, y0, x1, y1, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from loco_det.annotations.pixels import IGNORED
from loco_det.core.errors import UserError

PADDING = 128  # value of padded pixels, Detectron2's


class Crop(NamedTuple):
    """The window of width w and height h whose first pixel is (x, y); what is beyond the image is left out."""

    x: int
    y: int
    w: int
    h: int

    def image(self, image: np.ndarray) -> np.ndarray:
        return image[self.y : self.y + self.h, self.x : self.x + self.w]

    mask = labels = image

    def points(self, points: np.ndarray) -> np.ndarray:
        return points - np.array((self.x, self.y), points.dtype)

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Return the parts inside the window; one polygon may become several or none."""
        for axis, low, side in ((0, self.x, self.w), (1, self.y, self.h)):
            polygons = [part for p in polygons for part in _clip(p, axis, low, 1.0)]
            polygons = [part for p in polygons for part in _clip(p, axis, low + side, -1.0)]
        return _move(self, polygons)


class Resize(NamedTuple):
    """From (height, width) to (new_height, new_width): bilinear for images, nearest for masks, both by PIL."""

    height: int
    width: int
    new_height: int
    new_width: int

    def image(self, image: np.ndarray) -> np.ndarray:
        return self._pil(image, Image.Resampling.BILINEAR)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        return self._pil(mask, Image.Resampling.NEAREST)

    labels = mask

    def _pil(self, image: np.ndarray, filter: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((self.new_width, self.new_height), filter))

    def points(self, points: np.ndarray) -> np.ndarray:
        scale = self.new_width * 1.0 / self.width, self.new_height * 1.0 / self.height
        return points * np.array(scale, points.dtype)

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return _move(self, polygons)


class Flip(NamedTuple):
    """Mirrors along axis 0 (vertical flip) or 1 (horizontal) of an image with `length` pixels on that axis."""

    axis: int
    length: int

    def image(self, image: np.ndarray) -> np.ndarray:
        return np.flip(image, self.axis)

    mask = labels = image

    def points(self, points: np.ndarray) -> np.ndarray:
        points = points.copy()
        points[:, 1 - self.axis] = self.length - points[:, 1 - self.axis]
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return _move(self, polygons)


class Pad(NamedTuple):
    """Adds rows below and columns on the right: grey to images, nothing to masks, `IGNORED` to labels."""

    rows: int
    columns: int

    def image(self, image: np.ndarray) -> np.ndarray:
        return self._padded(image, PADDING)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        return self._padded(mask, 0)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        return self._padded(labels, IGNORED)

    def _padded(self, image: np.ndarray, value: int) -> np.ndarray:
        widths = [(0, self.rows), (0, self.columns), (0, 0)]
        return np.pad(image, widths[: image.ndim], constant_values=value)

    def points(self, points: np.ndarray) -> np.ndarray:
        return points

    def polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return polygons


Transform = Crop | Resize | Flip | Pad


class ScaleJitter(NamedTuple):
    """Large-scale jitter: resize by a random scale, then crop to a square of `size` pixels, or with `pad` pad to it.

    At scale 1 the image just fits into the square.
    """

    least: float
    most: float
    size: int
    pad: bool


def draw_transforms(cfg: Any, height: int, width: int, rng: np.random.RandomState) -> list[Transform]:
    """Draw the transforms of a training image of height x width pixels, in order: crop, resize, flip.

    Args:
        cfg: the INPUT node, its values checked by `check_input`.
    """
    chosen: list[Transform] = []
    if cfg.CROP.ENABLED:
        h, w = _crop_size(cfg.CROP.TYPE, cfg.CROP.SIZE, height, width, rng)
        y, x = rng.randint(height - h + 1), rng.randint(width - w + 1)
        chosen.append(Crop(x, y, w, h))
        height, width = h, w
    sizes = cfg.MIN_SIZE_TRAIN
    sizes = (sizes, sizes) if isinstance(sizes, int) else sizes
    ranged = cfg.MIN_SIZE_TRAIN_SAMPLING == "range"
    short = rng.randint(sizes[0], sizes[1] + 1) if ranged else rng.choice(sizes)
    if short:
        chosen.append(resize_short_side(height, width, int(short), cfg.MAX_SIZE_TRAIN))
        height, width = chosen[-1].new_height, chosen[-1].new_width
    return chosen + _draw_flip(cfg.RANDOM_FLIP, height, width, rng)


def draw_scale_jitter(
    jitter: ScaleJitter, flip: str, height: int, width: int, rng: np.random.RandomState
) -> list[Transform]:
    """Draw the transforms of a training image of height x width pixels, in order: flip, resize, crop, pad.

    Args:
        flip: INPUT.RANDOM_FLIP.
    """
    chosen: list[Transform] = _draw_flip(flip, height, width, rng)
    side = jitter.size * rng.uniform(jitter.least, jitter.most)
    scale = min(side / height, side / width)
    resized = max(1, round(height * scale)), max(1, round(width * scale))
    share = rng.uniform()  # one for both axes
    y, x = (round(max(length - jitter.size, 0) * share) for length in resized)
    chosen += [Resize(height, width, *resized), Crop(x, y, jitter.size, jitter.size)]
    missing = [max(jitter.size - length, 0) for length in resized]
    if jitter.pad and any(missing):
        chosen.append(Pad(*missing))
    return chosen


def _draw_flip(kind: str, height: int, width: int, rng: np.random.RandomState) -> list[Transform]:
    if kind == "none" or rng.uniform() >= 0.5:
        return []
    return [Flip(1, width) if kind == "horizontal" else Flip(0, height)]


def resize_short_side(height: int, width: int, short: int, longest: int) -> Resize:
    """Scale to a short side of `short` pixels, or less if the long side would exceed `longest`, but not 0."""
    scale = short * 1.0 / min(height, width)
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > longest:
        scale = longest * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return Resize(height, width, max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5)))


def check_input(cfg: Any) -> None:
    """Refuse invalid values of the INPUT node.

    Raises:
        UserError: naming the key.
    """
    sizes = cfg.MIN_SIZE_TRAIN if isinstance(cfg.MIN_SIZE_TRAIN, (tuple, list)) else (cfg.MIN_SIZE_TRAIN,)
    if not len(sizes) or min(sizes) < 0:
        raise UserError(f"INPUT.MIN_SIZE_TRAIN must hold sizes in pixels, not {cfg.MIN_SIZE_TRAIN}.")
    ranged = cfg.MIN_SIZE_TRAIN_SAMPLING == "range" and isinstance(cfg.MIN_SIZE_TRAIN, (tuple, list))
    if ranged and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        raise UserError(f"INPUT.MIN_SIZE_TRAIN must be (least, most) with MIN_SIZE_TRAIN_SAMPLING range, not {sizes}.")
    for key in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST"):
        if cfg[key] <= 0:
            raise UserError(f"INPUT.{key} must be a size in pixels, not {cfg[key]}.")
    if cfg.MIN_SIZE_TEST < 0:
        raise UserError(f"INPUT.MIN_SIZE_TEST must be a size in pixels or 0 for none, not {cfg.MIN_SIZE_TEST}.")
    choices = {
        "MIN_SIZE_TRAIN_SAMPLING": (cfg.MIN_SIZE_TRAIN_SAMPLING, ("choice", "range")),
        "RANDOM_FLIP": (cfg.RANDOM_FLIP, ("none", "horizontal", "vertical")),
        "FORMAT": (cfg.FORMAT, ("BGR", "RGB")),
        "MASK_FORMAT": (cfg.MASK_FORMAT, ("polygon", "bitmask")),
        "CROP.TYPE": (cfg.CROP.TYPE, ("relative_range", "relative", "absolute", "absolute_range")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"INPUT.{key} must be one of {', '.join(known)}, not '{value}'.")
    first, second = cfg.CROP.SIZE
    ordered = cfg.CROP.TYPE != "absolute_range" or first <= second
    most = 1 if cfg.CROP.TYPE.startswith("relative") else float("inf")
    if cfg.CROP.ENABLED and not (0 < min(first, second) <= max(first, second) <= most and ordered):
        raise UserError(f"INPUT.CROP.SIZE {list(cfg.CROP.SIZE)} does not fit INPUT.CROP.TYPE '{cfg.CROP.TYPE}'.")


def _crop_size(
    kind: str, size: tuple[float, float], height: int, width: int, rng: np.random.RandomState
) -> tuple[int, int]:
    if kind == "absolute":
        return min(int(size[0]), height), min(int(size[1]), width)
    if kind == "absolute_range":
        least, most = (int(s) for s in size)
        return tuple(rng.randint(min(side, least), min(side, most) + 1) for side in (height, width))
    h, w = size
    if kind == "relative_range":
        # In float32 because Detectron2 stores the minimum size so; float64 could round to another pixel.
        least = np.asarray(size, dtype=np.float32)
        h, w = least + rng.rand(2) * (1 - least)
    return max(1, int(height * h + 0.5)), max(1, int(width * w + 0.5))


def _move(transform: Transform, polygons: list[np.ndarray]) -> list[np.ndarray]:
    return [transform.points(p.reshape(-1, 2)).reshape(-1) for p in polygons]


def _clip(polygon: np.ndarray, axis: int, edge: float, sign: float) -> list[np.ndarray]:
    """Return the parts of a polygon where sign * (coordinate - edge) >= 0.

    The border is cut into runs of points inside; runs meet the edge where they leave and enter the half-plane, and
    along the edge inside and outside alternate, so that sorted intersections are joined in pairs. Unlike
    Sutherland-Hodgman this leaves no zero-width bridges between parts, which would widen their boxes.
    """
    points = polygon.reshape(-1, 2)
    depth = sign * (points[:, axis] - edge)
    within = depth >= 0
    if within.all() or not within.any():
        return [polygon] if within.all() else []
    start = int(np.flatnonzero(~within & np.roll(within, -1))[0]) + 1  # the first point of a run
    points, depth, within = (np.roll(a, -start, 0) for a in (points, depth, within))

    runs: list[list[np.ndarray]] = []
    for i, point in enumerate(points):
        if within[i]:
            if i == 0 or not within[i - 1]:
                runs.append([_meet(points, depth, i - 1, axis, edge)])
            runs[-1].append(point)
            if not within[(i + 1) % len(points)]:
                runs[-1].append(_meet(points, depth, i, axis, edge))

    ends = sorted((tuple(run[side]), k, side) for k, run in enumerate(runs) for side in (0, -1))
    partner: dict[tuple[int, int], tuple[int, int]] = {}
    for (_, *one), (_, *other) in zip(ends[::2], ends[1::2]):
        partner[tuple(one)], partner[tuple(other)] = tuple(other), tuple(one)
    return _join(runs, partner)


def _meet(points: np.ndarray, depth: np.ndarray, i: int, axis: int, edge: float) -> np.ndarray:
    """Return where the side from point i to the next one crosses the edge."""
    j = (i + 1) % len(points)
    found = points[i] + (points[j] - points[i]) * (depth[i] / (depth[i] - depth[j]))
    found[axis] = edge
    return found


def _join(runs: list[list[np.ndarray]], partner: dict[tuple[int, int], tuple[int, int]]) -> list[np.ndarray]:
    """Join runs to closed polygons by the pairs of their ends (run, 0 for its first point or -1 for its last)."""
    closed, left = [], set(range(len(runs)))
    while left:
        ring: list[np.ndarray] = []
        run, side = min(left), 0
        while run in left:
            left.remove(run)
            ring += runs[run] if side == 0 else runs[run][::-1]
            run, side = partner[run, -1 - side]
        ring = [p for k, p in enumerate(ring) if (p != ring[k - 1]).any()]
        x, y = np.array(ring).reshape(-1, 2).T
        if len(ring) >= 3 and np.dot(x, np.roll(y, 1)) != np.dot(y, np.roll(x, 1)):
            closed.append(np.array(ring).reshape(-1))
    return closed
