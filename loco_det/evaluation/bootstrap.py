"""Bootstrap over test images: intervals of a result's numbers, and of the differences of two results.

Images are drawn with replacement, as many as there are, and every number is computed on each draw (Efron, The Annals of
Statistics 1979). Two results are compared on the same draws, so that the difficulty of an image cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import hotcoco
import numpy as np

from loco_det.core.log import Progress

Interval = list[float]  # 95 %: lower and upper end in percent
# Numbers for which more than this share of draws has no object are left out; the share is known beforehand.
_EMPTY_DRAWS = 1e-3


class Resamplable(Protocol):
    """Results matched once with the ground truth, whose numbers can be computed for any draw of images.

    Attributes:
        kind: task of the numbers: "bbox", "segm", "box_proposals" or "sem_seg".
        images: number of images.
    """

    kind: str
    images: int

    def numbers(self) -> dict[str, float]:
        """{number: percent} of every image once; not of every number of the measure."""

    def intervals(self, resamples: int) -> dict[str, Interval]:
        """Return {number: its interval}."""

    def differences(self, reference: Any, resamples: int) -> dict[str, dict[str, Any]]:
        """Return {number: {"difference": this minus the reference's in percent, "ci95": its interval}}.

        Args:
            reference: other results of the same kind on the same images.
        """


@dataclass
class Counted:
    """Results of one of our own measures, with each image's contribution to the numbers.

    Attributes:
        names: names of the numbers.
        measure: (images,) weights of the images -> the numbers in percent, NaN without objects.
    """

    kind: str
    names: tuple[str, ...]
    images: int
    measure: Callable[[np.ndarray], list[float]]
    _drawn: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def numbers(self) -> dict[str, float]:
        return dict(zip(self.names, self.measure(np.ones(self.images, np.int64))))

    def intervals(self, resamples: int) -> dict[str, Interval]:
        return _limits(self.names, self._resampled(resamples)[1:])

    def differences(self, reference: Counted, resamples: int) -> dict[str, dict[str, Any]]:
        difference = self._resampled(resamples) - reference._resampled(resamples)
        whole = dict(zip(self.names, difference[0].tolist()))
        limits = _limits(self.names, difference[1:])
        return {name: {"difference": whole[name], "ci95": interval} for name, interval in limits.items()}

    def _resampled(self, resamples: int) -> np.ndarray:
        """Compute (1 + resamples, numbers) once: for all images, then for each draw."""
        if resamples not in self._drawn:
            with Progress(resamples + 1, f"bootstrap of {self.kind}", unit="draws") as progress:
                rows = []
                for times in (np.ones(self.images, np.int64), *_draws(self.images, resamples)):
                    rows.append(self.measure(times))
                    progress.advance()
            self._drawn[resamples] = np.array(rows)
        return self._drawn[resamples]


@dataclass
class Matched:
    """Results matched by hotcoco, in COCO's or LVIS's protocol; hotcoco draws itself.

    Attributes:
        evaluation: evaluated and accumulated.
        nothing: makes the same of no results at all, whose every number is 0, for each kind.
        names: the numbers that practically every draw has; see `in_every_draw`.
    """

    kind: str
    evaluation: hotcoco.COCOeval
    nothing: Callable[[], dict[str, hotcoco.COCOeval]]
    names: tuple[str, ...]
    images: int

    def numbers(self) -> dict[str, float]:
        precision = np.asarray(self.evaluation.eval["precision"])[:, :, :, 0, -1]
        return {"AP": 100 * precision[precision > -1].mean()}

    def intervals(self, resamples: int) -> dict[str, Interval]:
        compared = self._compare(self.nothing()[self.kind], resamples)
        return {name: found["ci95"] for name, found in compared.items()}

    def differences(self, reference: Matched, resamples: int) -> dict[str, dict[str, Any]]:
        return self._compare(reference.evaluation, resamples)

    def _compare(self, reference: hotcoco.COCOeval, resamples: int) -> dict[str, dict[str, Any]]:
        compared = hotcoco.compare(reference, self.evaluation, n_bootstrap=resamples, seed=0)
        return {
            name: {
                "difference": 100 * compared["deltas"][name],
                "ci95": [100 * compared["ci"][name][end] for end in ("lower", "upper")],
            }
            for name in self.names
        }


def in_every_draw(images_with: int, images: int) -> bool:
    """Whether practically every draw has an object, if `images_with` of the images have one.

    hotcoco counts a draw without any as a difference of 0, which would bias an interval towards 0.
    """
    return bool(images) and (1 - images_with / images) ** images < _EMPTY_DRAWS


def _limits(names: tuple[str, ...], drawn: np.ndarray) -> dict[str, Interval]:
    """The interval of each number that practically every one of the (draws, numbers) has."""
    columns = {name: column[np.isfinite(column)] for name, column in zip(names, drawn.T)}
    most = _EMPTY_DRAWS * len(drawn)
    usual = {name: column for name, column in columns.items() if len(drawn) - len(column) <= most}
    return {name: np.percentile(column, [2.5, 97.5]).tolist() for name, column in usual.items()}


def _draws(images: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield the number of times each image is drawn, per resample."""
    rng = np.random.default_rng(0)
    return (rng.multinomial(images, np.full(images, 1 / images)) for _ in range(resamples))
