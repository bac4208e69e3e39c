"""How the pairs of a report stand against null laws, in counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead.calibration import NullCalibrator
from skhead.containers import CALIBRATED, Calibration, Similarity, Subspaces
from skhead.linalg.topk import largest_entries
from skhead.weights import head_labels

__all__ = ["CONSTANT", "FDR", "STANDS_OUT", "Calls", "Verdict", "hold_against_nulls"]

#: A random reference narrower than this share of its mean leaves nothing to compare with.
CONSTANT = 1e-6
#: False discovery rate at which a pair is called.
FDR = 0.05
#: The null law that tells which pairs stand out from the others of the model.
STANDS_OUT = "empirical"
#: Null laws that every report tells of.
_TOLD = ("haar", "anisotropic", STANDS_OUT)
#: Null laws learned from mean subspaces, and the fewest heads that have a mean to speak of.
_LEARNED, _FEWEST_HEADS = ("anisotropic", "signflip"), 4


@dataclass(frozen=True)
class Calls:
    """Pairs of one kind that a null law calls at the false discovery rate.

    Attributes
    ----------
    pairs : int
        Pairs that the null judges.
    more, less : int
        Called for more, and for less, overlap than expected.
    ratio : float
        Median of overlap over expectation.
    """

    pairs: int
    more: int
    less: int
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """What a null law says of a model.

    Attributes
    ----------
    refusal : str or None
        Why it cannot be computed, if it cannot.
    calls : dict of str to Calls
        By pair kind, without those in which the ranks alone fix every overlap.
    at_edges : ndarray or None
        False discovery rate of every edge of the report, NaN where the null says nothing.
    furthest : DataFrame
        The k pairs of each kind that exceed their expectation most, by falling z: ``pair, rank,
        source, target, score, ratio, z, log10_p, q``.
    """

    refusal: str | None
    calls: dict[str, Calls]
    at_edges: NDArray[np.float64] | None = None
    furthest: pd.DataFrame = field(default_factory=pd.DataFrame)


def hold_against_nulls(
    kernel: Similarity,
    subspaces: Subspaces,
    chosen: str,
    edges: tuple[NDArray[np.integer], ...],
    k: int,
    stage: Callable[[str], None],
) -> tuple[dict[str, Verdict], Calibration | None]:
    """Count what each null law calls, and keep the calibration by the chosen one.

    Parameters
    ----------
    kernel : Similarity
        Projection kernels.
    subspaces : Subspaces
        Of the heads compared.
    chosen : str
        Null law of the edges.
    edges : tuple of ndarray
        Row, column and pair kind of every edge of the report.
    k : int
        Pairs of each kind that are listed by how far they exceed their expectation.
    stage : callable
        Told one line.

    Returns
    -------
    verdicts : dict of str to Verdict
        By name of the null law.
    calibration : Calibration or None
        By the chosen null law, unless it cannot be computed. NaN for kinds that the ranks fix.
    """
    laws = tuple(dict.fromkeys((*_TOLD, chosen)))
    stage(f"holding them against null laws: {', '.join(laws)}")
    verdicts, kept = {}, None
    for null in laws:
        found = _calibrated(kernel, subspaces, null)
        if isinstance(found, str):
            verdicts[null] = Verdict(found, {})
            continue
        furthest = _furthest(kernel, found, k)
        verdicts[null] = Verdict(None, _calls(kernel, found), found.q[edges], furthest)
        if null == chosen:
            kept = found
    return verdicts, kept


def _calibrated(kernel: Similarity, subspaces: Subspaces, null: str) -> Calibration | str:
    """Calibration of the kinds that a null can judge, or why there is none."""
    open_kinds = (kernel.null_sd > CONSTANT * kernel.null_mean).any(axis=(0, 1))
    if not open_kinds.any():
        return "the ranks alone fix every overlap, so that none can be more than chance"
    roles = sorted(set("".join(kernel.pairs)))
    heads = min(len(subspaces.role(role).ranks) for role in roles)
    if null in _LEARNED and heads < _FEWEST_HEADS:
        return (
            f"preferred directions are learned from the other heads, and {heads} distinct heads "
            f"are too few; it takes {_FEWEST_HEADS}"
        )
    try:
        result = NullCalibrator(null=null).fit_transform(kernel).calibration
    except ValueError as error:
        return str(error)
    parts = {name: np.where(open_kinds, getattr(result, name), np.nan) for name in CALIBRATED}
    return replace(result, **parts)


def _calls(kernel: Similarity, calibration: Calibration) -> dict[str, Calls]:
    found = {}
    for p, pair in enumerate(kernel.pairs):
        judged = ~np.isnan(kernel.listed(pair)) & ~np.isnan(calibration.q[:, :, p])
        if not judged.any():
            continue
        called = calibration.q[:, :, p][judged] <= FDR
        z = calibration.z[:, :, p][judged]
        found[pair] = Calls(
            int(judged.sum()),
            int((called & (z > 0)).sum()),
            int((called & (z < 0)).sum()),
            float(np.median(calibration.ratio[:, :, p][judged])),
        )
    return found


def _furthest(kernel: Similarity, calibration: Calibration, k: int) -> pd.DataFrame:
    """Pairs of each kind that exceed their expectation most."""
    writers, readers = head_labels(kernel.rows), head_labels(kernel.columns)
    parts = []
    for p, pair in enumerate(kernel.pairs):
        z = calibration.z[:, :, p]
        rows, columns = largest_entries(
            np.where(np.isnan(kernel.listed(pair)) | ~(z > 0), np.nan, z), k
        )
        at = (rows, columns, p)
        found = {
            "pair": pair,
            "rank": np.arange(1, len(rows) + 1),
            "source": [writers[i] for i in rows],
            "target": [readers[i] for i in columns],
            "score": kernel.values[at].astype(np.float64),
        }
        judged = {name: getattr(calibration, name)[at] for name in ("ratio", "z", "log10_p", "q")}
        parts.append(pd.DataFrame(found | judged))
    return pd.concat(parts, ignore_index=True)
