"""What differs between two models, or between two processings or revisions of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import binom, ks_2samp, spearmanr

from skhead._report.chance import FDR
from skhead._report.data import Analysis, Options, analyse, ratios_of
from skhead.containers import Subspaces
from skhead.kernels import ProjectionKernel
from skhead.spectra import SpectrumSimilarity
from skhead.weights import head_labels

__all__ = ["BASES", "Comparison", "compare", "known_scores", "title_of"]

BASES = ("auto", "shared", "unrelated")
#: Probability that unrelated models pass for one residual stream, see `_closest_to_namesakes`.
_LEVEL = 1e-3
#: Kinds of pairs of spectra, and the maps that they are spectra of.
_MAPS = {"QKQK": "QK", "OVOV": "OV"}


@dataclass(frozen=True)
class Comparison:
    """Two analysed models and what can be said of both.

    Attributes
    ----------
    sides : tuple of two Analysis
        A and B.
    refusal : str or None
        Why heads have no counterpart in a common basis, unless they do.
    matched : float or None
        Share of heads of A whose output is closest to that of the same head of B among all heads
        of B, where it was asked.
    heads : DataFrame
        With a common basis, one row per head: distances by role, figures of A and B. Without, the
        heads of A, then those of B, with their nearest spectra in the other model.
    pairs : DataFrame
        With a common basis, by pair kind: ``spearman``, ``top``, ``shared_top``, and calls of the
        null law ``called_a, called_b, called_both``.
    edges : DataFrame
        With a common basis, pairs that the null law judges in both and calls in one of them only,
        by falling change of z.
    overlaps : DataFrame
        By pair kind and side: distribution of the ratio to random, and pairs called.
    scores : DataFrame
        By score: quartiles on either side and the Kolmogorov-Smirnov distance ``ks``.
    spectra : DataFrame
        By map: mean similarity of a head of A to heads of B, and to its nearest.
    """

    sides: tuple[Analysis, Analysis]
    refusal: str | None
    matched: float | None
    heads: pd.DataFrame
    pairs: pd.DataFrame
    edges: pd.DataFrame
    overlaps: pd.DataFrame
    scores: pd.DataFrame
    spectra: pd.DataFrame


def compare(
    sources: tuple[str | PathLike[str], str | PathLike[str]],
    options: tuple[Options, Options],
    bases: str,
    stage: Callable[[str], None],
) -> Comparison:
    """Analyse two sides and compare what is comparable.

    Parameters
    ----------
    sources : tuple of two str or path-like
    options : tuple of two Options
    bases : {"auto", "shared", "unrelated"}
        Whether both have one residual stream.
    stage : callable
        Told one line at the start of every stage.

    Returns
    -------
    Comparison
    """
    first, second = (
        analyse(source, option, lambda line, side=side: stage(f"{side}: {line}"))  # type: ignore[misc]
        for side, source, option in zip("AB", sources, options, strict=True)
    )
    stage("comparing A with B")
    refusal, matched = _refusal(first, second, bases)
    if refusal is not None and bases == "shared":
        raise ValueError(f"write_comparison: bases='shared', but {refusal}")
    spectra = _spectra(first, second)
    shared = refusal is None
    return Comparison(
        (first, second),
        refusal,
        matched,
        _head_by_head(first, second, spectra) if shared else _both_tables(first, second, spectra),
        _pair_kinds(first, second) if shared else pd.DataFrame(),
        _changed_edges(first, second) if shared else pd.DataFrame(),
        _overlaps(first, second),
        _scores(first, second),
        pd.DataFrame(
            {
                name: {
                    "mean": float(values.mean()),
                    "nearest": float(values.max(axis=1).mean()),
                }
                for name, values in spectra.items()
            }
        ).T,
    )


def title_of(analysis: Analysis) -> str:
    """Name of a model with revision and processing."""
    told = [analysis.info.name]
    if analysis.options.revision is not None:
        told.append(analysis.options.revision)
    record = analysis.subspaces.record
    processed = [
        words
        for key, words in (("fold_norm", "norm gains folded in"), ("center", "centred"))
        if record[key]
    ]
    return ", ".join([*told, " and ".join(processed) or "raw"])


def known_scores(analysis: Analysis) -> pd.DataFrame:
    """Scores of single heads that the model's file can give."""
    assert analysis.cards is not None
    found = analysis.cards.scores
    return found.table.drop(columns=[name for name in found.missing if name in found.table])


def _refusal(first: Analysis, second: Analysis, bases: str) -> tuple[str | None, float | None]:
    """Why no head has a counterpart, and how many heads are closest to their namesakes."""
    a, b = first.info, second.info
    for words, one, other in (
        ("widths of the residual stream (d_model)", a.d_model, b.d_model),
        ("widths of a head (d_head)", a.d_head, b.d_head),
        ("numbers of layers and heads", (a.n_layers, a.n_heads), (b.n_layers, b.n_heads)),
    ):
        if one != other:
            return f"the {words} differ: {_plain(one)} and {_plain(other)}", None
    if list(first.heads.index) != list(second.heads.index):
        return "the layers that hold attention heads differ", None
    if bases == "unrelated":
        return "the residual streams were said to be unrelated", None
    if bases == "shared" or a.source == b.source:
        return None, None
    count, matched = _closest_to_namesakes(first.subspaces, second.subspaces)
    heads = len(first.heads)
    if binom.sf(count - 1, heads, 1 / heads) < _LEVEL:
        return None, matched
    return (
        f"of {heads} heads of A, what {count} write lies closest to what the same head of B "
        "writes; by chance it is about one. The two were trained apart, and a "
        "direction of one residual stream means nothing in the other"
    ), matched


def _plain(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _closest_to_namesakes(first: Subspaces, second: Subspaces) -> tuple[int, float]:
    """Heads of A whose output overlaps with that of the same head of B more than with any other.

    Unrelated models have about one such head. Values that ranks alone fix decide nothing.
    """
    kernel = ProjectionKernel(pairs=("OO",), layer_order="all").fit(second)
    own = Subspaces(first.heads, first.bases, second.record)
    values = kernel.transform(own).values[:, :, 0]
    diagonal = np.diagonal(values)
    others = np.where(np.eye(len(values), dtype=bool), -np.inf, values)
    ahead = diagonal > others.max(axis=1) * (1 + 1e-5)
    return int(ahead.sum()), float(ahead.mean())


def _distances(first: Subspaces, second: Subspaces, role: str) -> NDArray[np.float64]:
    """One less the projection kernel of every head with its namesake over the smaller rank."""
    sides = [subspaces.role(role) for subspaces in (first, second)]
    found = np.empty(len(first))
    for i in range(len(first)):
        a, b = (side.tensor[int(side.index[i])].to(torch.float64).cpu() for side in sides)
        ranks = [int(side.ranks[side.index[i]]) for side in sides]
        found[i] = 1 - float((a.T @ b).square().sum()) / min(ranks)
    return found.clip(0.0, 1.0)


def _head_by_head(
    first: Analysis, second: Analysis, spectra: dict[str, NDArray[np.float64]]
) -> pd.DataFrame:
    table = first.heads[["layer", "head"]].copy()
    if "class" in first.table:
        table["class"] = first.table["class"]
    for role in first.subspaces.roles:
        table[f"distance_{role}"] = _distances(first.subspaces, second.subspaces, role)
    for name, values in spectra.items():
        table[f"spectrum_{name}"] = np.diagonal(values)
    own, other = known_scores(first), known_scores(second)
    for name in own.columns.intersection(other.columns, sort=False):
        table[f"{name}_a"], table[f"{name}_b"] = own[name], other[name]
    table["degree_a"], table["degree_b"] = first.table["degree"], second.table["degree"]
    return table


def _both_tables(
    first: Analysis, second: Analysis, spectra: dict[str, NDArray[np.float64]]
) -> pd.DataFrame:
    parts = []
    for side, analysis, other, turned in (("A", first, second, False), ("B", second, first, True)):
        table = analysis.table.rename_axis("label").reset_index()
        table.insert(0, "model", side)
        names = np.array(head_labels(other.heads), dtype=object)
        for name, values in spectra.items():
            among = values.T if turned else values
            best = among.argmax(axis=1)
            table[f"nearest_{name}"] = names[best]
            table[f"spectrum_{name}"] = among[np.arange(len(among)), best]
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _spectra(first: Analysis, second: Analysis) -> dict[str, NDArray[np.float64]]:
    """By map, similarity of spectra of all heads of A (rows) and B (columns)."""
    sides = [
        SpectrumSimilarity(
            tuple(_MAPS),
            fold_norm=side.options.fold_norm,
            center=side.options.center,
            device=side.options.device,
        )
        .fit(side.heads)
        .reference_spectra_
        for side in (first, second)
    ]
    found = {}
    for name in _MAPS.values():
        a, b = (spectra[name] for spectra in sides)
        shared = min(a.shape[1], b.shape[1])
        found[name] = a[:, :shared] @ b[:, :shared].T
    return found


def _pair_kinds(first: Analysis, second: Analysis) -> pd.DataFrame:
    """Agreement of the overlaps of all pairs, by kind."""
    rows = {}
    for pair in first.kernel.pairs:
        p = first.kernel.pairs.index(pair)
        one, other = (side.kernel.listed(pair) for side in (first, second))
        defined = ~np.isnan(one) & ~np.isnan(other)
        tops = [
            {edge[:2] for edge in _ends(side.edges) if edge[2] == pair} for side in (first, second)
        ]
        called = [_called(side, p) & defined for side in (first, second)]
        constant = min(np.ptp(one[defined]), np.ptp(other[defined])) == 0
        rows[pair] = {
            "pairs": int(defined.sum()),
            "spearman": np.nan if constant else float(spearmanr(one[defined], other[defined])[0]),
            "top": max(map(len, tops)),
            "shared_top": len(tops[0] & tops[1]),
            "called_a": int(called[0].sum()),
            "called_b": int(called[1].sum()),
            "called_both": int((called[0] & called[1]).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _ends(edges: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Writer, reader and kind of every edge."""
    return list(zip(edges["source"], edges["target"], edges["pair"], strict=True))


def _called(side: Analysis, p: int) -> NDArray[np.bool_]:
    """Pairs that the null law calls for more overlap; none where it says nothing."""
    calibration = side.kernel.calibration
    if calibration is None:
        return np.zeros(side.kernel.values.shape[:2], dtype=bool)
    return (calibration.q[:, :, p] <= FDR) & (calibration.z[:, :, p] > 0)


def _judged(side: Analysis, p: int) -> NDArray[np.bool_]:
    """Pairs of which the null law says anything."""
    calibration = side.kernel.calibration
    if calibration is None:
        return np.zeros(side.kernel.values.shape[:2], dtype=bool)
    return ~np.isnan(calibration.q[:, :, p])


def _changed_edges(first: Analysis, second: Analysis) -> pd.DataFrame:
    writers, readers = head_labels(first.kernel.rows), head_labels(first.kernel.columns)
    parts = []
    for p, pair in enumerate(first.kernel.pairs):
        called = [_called(side, p) for side in (first, second)]
        asked = _judged(first, p) & _judged(second, p) & ~np.isnan(first.kernel.listed(pair))
        rows, columns = np.nonzero((called[0] ^ called[1]) & asked)
        table: dict[str, Any] = {
            "pair": pair,
            "source": [writers[i] for i in rows],
            "target": [readers[i] for i in columns],
            "change": np.where(called[1][rows, columns], "appears", "vanishes"),
        }
        for name, side in (("a", first), ("b", second)):
            judged = side.kernel.calibration
            table[f"score_{name}"] = side.kernel.values[rows, columns, p].astype(np.float64)
            for what in ("z", "q"):
                known = None if judged is None else getattr(judged, what)[rows, columns, p]
                table[f"{what}_{name}"] = np.nan if known is None else known.astype(np.float64)
        parts.append(pd.DataFrame(table))
    edges = pd.concat(parts, ignore_index=True)
    order = (edges["z_b"] - edges["z_a"]).abs().sort_values(ascending=False, kind="stable").index
    return edges.loc[order].reset_index(drop=True)


def _overlaps(first: Analysis, second: Analysis) -> pd.DataFrame:
    """How the overlaps of either side stand to random ones, by pair kind."""
    rows = []
    for side, analysis in zip("AB", (first, second), strict=True):
        kernel = analysis.kernel
        for p, pair in enumerate(kernel.pairs):
            ratio = ratios_of(kernel, pair)
            quantiles = np.quantile(ratio, (0.05, 0.5, 0.95, 0.99)).tolist()
            called = _called(analysis, p) & ~np.isnan(kernel.listed(pair))
            known = _judged(analysis, p).any()
            rows.append(
                dict(zip(("q05", "median", "q95", "q99"), quantiles, strict=True))
                | {
                    "pair": pair,
                    "side": side,
                    "pairs": ratio.size,
                    "largest": float(ratio.max()),
                    "called": float(called.sum() / ratio.size) if known else np.nan,
                }
            )
    order = {pair: i for i, pair in enumerate(first.kernel.pairs)}
    return pd.DataFrame(rows).sort_values(
        "pair", key=lambda pairs: pairs.map(order), kind="stable", ignore_index=True
    )


def _scores(first: Analysis, second: Analysis) -> pd.DataFrame:
    own, other = known_scores(first), known_scores(second)
    rows = {}
    for name in own.columns.intersection(other.columns, sort=False):
        a, b = own[name].dropna(), other[name].dropna()
        quartiles = [float(x.quantile(q)) for x in (a, b) for q in (0.25, 0.5, 0.75)]
        names = [f"{q}_{side}" for side in "ab" for q in ("lower", "median", "upper")]
        distance = float(ks_2samp(a, b, method="asymp").statistic)
        rows[str(name)] = dict(zip(names, quartiles, strict=True)) | {"ks": distance}
    return pd.DataFrame.from_dict(rows, orient="index")
