"""Means and intervals over seeds, always with n: an interval from two seeds is rightly wide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def t95(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t, to 1e-4; above 30 degrees of freedom by expansion."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)  # Cornish and Fisher's expansion, Abramowitz and Stegun 26.7.5
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def summarise(values: Sequence[float | None]) -> dict[str, Any]:
    """Summarise one number over runs as {"n", "mean", "std", "ci95", "values"}.

    std has n - 1 in its denominator; ci95 is the 95 % interval of the mean by Student's t. Both are None for a single
    run, and all are None if no run has the number (e.g. no object of that size).
    """
    present = [v for v in values if v is not None and math.isfinite(v)]
    if not present:
        return {"n": 0, "mean": None, "std": None, "ci95": None, "values": []}
    mean = statistics.fmean(present)
    if len(present) == 1:
        return {"n": 1, "mean": mean, "std": None, "ci95": None, "values": present}
    std = statistics.stdev(present)
    half = t95(len(present) - 1) * std / math.sqrt(len(present))
    return {"n": len(present), "mean": mean, "std": std, "ci95": [mean - half, mean + half], "values": present}
