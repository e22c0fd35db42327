"""A t-SNE plot of one stage's pooled features, and the compactness of their classes.

The paper shows 500 images of 10 classes and calls LoCo's clusters more compact. The two numbers measure that in feature
space, undistorted by t-SNE.

Shape legend: N images, D dimensions.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loco_det.annotations.subsets import hashed_order
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, check_writable, write_json
from loco_det.core.log import log
from loco_det.evaluation.probes.images import LabelledImages

IMAGES, CLASSES = 500, 10
PCA_DIMENSIONS = 50  # before t-SNE
PERPLEXITY = 30.0  # scikit-learn's default; less for few images


def check_tsne(picture: Path) -> None:
    """Raise UserError unless the plot and the JSON beside it can be made and written."""
    if picture.suffix.lower() != ".png":
        raise UserError(f"--tsne {picture}: the picture is a PNG; give a name that ends in .png")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("--tsne needs scikit-learn, which is not installed; pip install scikit-learn, or leave it out")
    for path in (picture, numbers_of(picture)):
        check_writable(path)


def numbers_of(picture: Path) -> Path:
    """Return the path of a plot's JSON with coordinates and numbers: beside it, with the same name."""
    return picture.with_suffix(".json")


def balanced(images: LabelledImages, count: int, seed: int) -> LabelledImages:
    """Select the same number of images of each of the first 10 non-empty classes, `count` in total or fewer.

    `loco_det.annotations.subsets` selects within a class.

    Raises:
        UserError: fewer than two classes, or fewer than two images of each.
    """
    labels = np.unique(images.labels)[:CLASSES]
    members = [np.flatnonzero(images.labels == label) for label in labels]
    each = min(count // len(labels), *(len(rows) for rows in members))
    if len(labels) < 2 or each < 2:
        raise UserError(
            f"--tsne: {count} images of {len(labels)} classes make fewer than two of each class, or the test set has "
            "no more of one; raise --tsne-images or --limit, or leave --tsne out"
        )
    names = images.names()
    chosen = [rows[hashed_order([names[row] for row in rows], seed)[:each]] for rows in members]
    return images.take(np.concatenate(chosen))


def embed(features: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """(N, D) float32 -> (N, 2) coordinates by principal components and t-SNE, and the perplexity.

    Both are scikit-learn's; the same features, seed and version give the same coordinates.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    reduced = PCA(min(PCA_DIMENSIONS, *features.shape), svd_solver="full").fit_transform(features.astype(np.float64))
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return points, perplexity


def compactness(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure the distance of images within a class relative to the others, by Euclidean distance.

    Args:
        features: (N, D), at least two of each class and not all the same.
        labels: (N,) integers.

    Returns:
        silhouette: the mean over images, in [-1, 1], more is more compact (Rousseeuw 1987). within_over_between: the
        mean distance of two images of one class over that of two images of different classes; less is more compact.
        Neither changes if all features are scaled by one factor.
    """
    from sklearn.metrics import pairwise_distances, silhouette_score

    distances = pairwise_distances(features.astype(np.float64))
    same = labels[:, None] == labels[None]
    pairs = ~np.eye(len(labels), dtype=bool)  # without an image and itself
    return {
        "silhouette": float(silhouette_score(distances, labels, metric="precomputed")),
        "within_over_between": float(distances[same & pairs].mean() / distances[~same].mean()),
    }


def draw(points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """A dot for each image, one colour a class.

    Args:
        points: (N, 2).
        labels: (N,) positions in `classes`.
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"].colors
    for colour, label in zip(colours, np.unique(labels)):
        name = classes[label].replace("$", r"\$")  # else mathtext
        axes.scatter(*points[labels == label].T, s=14, color=colour, label=name, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[], aspect="equal")
    axes.set_adjustable("datalim")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, markerscale=1.6)
    return figure


def write_tsne(
    picture: Path,
    features: np.ndarray,
    images: LabelledImages,
    classes: Sequence[str],
    backbone: str,
    stage: str,
    seed: int,
) -> dict[str, Any]:
    """Write the PNG and the JSON beside it.

    Args:
        features: (N, D), as many as `images`.
        classes: names, by `images.labels`.
        backbone, stage: for the title; of a path its last two parts.

    Returns:
        The JSON without the points.

    Raises:
        UserError: all features are the same, or a file cannot be written.
    """
    import sklearn

    if (features == features[0]).all():
        raise UserError(
            f"--tsne: {backbone} gives every image the same features at {stage}; choose another of --stages"
        )
    points, perplexity = embed(features, seed)
    facts = {
        "backbone": backbone,
        "stage": stage,
        "images": len(images),
        "classes": [classes[label] for label in np.unique(images.labels)],
        **compactness(features, images.labels),
        "pca_dimensions": min(PCA_DIMENSIONS, *features.shape),
        "perplexity": perplexity,
        "seed": seed,
        "scikit_learn": sklearn.__version__,
    }
    title = f"{'/'.join(backbone.split('/')[-2:])}, {stage}"
    buffer = io.BytesIO()
    FigureCanvasAgg(draw(points, images.labels, classes, title)).print_png(buffer)
    with atomic_write(picture) as file:
        file.write(buffer.getvalue())
    rows = zip(images.names(), images.labels.tolist(), points.tolist())
    listed = [{"image": name, "class": classes[label], "x": x, "y": y} for name, label, (x, y) in rows]
    write_json(numbers_of(picture), {**facts, "points": listed})
    log.info("wrote %s: silhouette %.3f, within over between classes %.3f", picture, facts["silhouette"],
             facts["within_over_between"])  # fmt: skip
    return facts
