"""Queries and keys in the coordinates of a feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from skhead._checks import label_array
from skhead.exceptions import HeadShapeError
from skhead.inspection._contrast import PALETTE, checked_feature, checked_pairs
from skhead.qk_pairs import QKPairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FeatureScatterDisplay"]

#: For more labels than `PALETTE` has colours (Tol, "muted", with black).
_TEN = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255",
    "#AA4499", "#000000",
)  # fmt: skip
_MISSING = "0.75"
#: Labels that a legend lists; more of them are no longer told apart by colour.
_MOST_LABELS = 10
_GOLDEN = 0.6180339887
_MARKERS = {"keys": "s", "queries": "o"}


class FeatureScatterDisplay:
    """Queries and keys in coordinates of the query and the key subspace of a feature.

    Made by `from_estimator` or `from_coordinates`. Queries (circles) and keys (squares) have the
    colour of their label. The two subspaces are not the same, but their components come in pairs:
    pairs that agree lie on the same side of zero more than others do. What that does to their score
    is another question, which the decomposer's ``cross_gram_`` answers: a head may also avoid keys
    that agree. Each side is divided by its root mean square, over the coordinates that are drawn. A
    single coordinate is drawn as two strips, with the labels side by side.

    Parameters
    ----------
    queries : ndarray of shape (n_queries, 1 or 2)
        Coordinates in the query subspace.
    keys : ndarray of shape (n_keys, 1 or 2)
        Coordinates in the key subspace.
    query_labels : ndarray of shape (n_queries,)
        What queries look for; None or NaN where it is not known.
    key_labels : ndarray of shape (n_keys,)
        What keys are.
    feature : str
        Name of the feature.
    components : tuple of int
        Number of each coordinate, from 0.
    head : str, default=""
        Label of the head.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    queries_, keys_ : matplotlib PathCollection
        Points, in the order of the pairs.
    scales_ : tuple of float
        Root mean squares by which queries and keys are divided.
    colors_ : dict of label to str or tuple
        Colour of each label.
    legend_ : matplotlib Legend

    See Also
    --------
    skhead.ContrastiveQKDecomposer.transform : Coordinates of queries in all features.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.datasets import load_payload_head, make_payload_retrieval
    >>> from skhead.inspection import FeatureScatterDisplay
    >>> head = load_payload_head("d16-r3-r5")
    >>> task = make_payload_retrieval(2000, embeddings=head.embeddings, random_state=0)
    >>> pairs = task.pairs(head)
    >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
    >>> display = FeatureScatterDisplay.from_estimator(decomposer, pairs[:50], feature="z1")
    >>> display.ax_.get_xlabel()
    'component 0 of z1 (queries: u0, keys: v0)'
    """

    def __init__(
        self,
        queries: NDArray[np.floating],
        keys: NDArray[np.floating],
        query_labels: NDArray[Any],
        key_labels: NDArray[Any],
        *,
        feature: str,
        components: tuple[int, ...],
        head: str = "",
    ) -> None:
        self.queries = queries
        self.keys = keys
        self.query_labels = query_labels
        self.key_labels = key_labels
        self.feature = feature
        self.components = components
        self.head = head

    @classmethod
    def from_estimator(
        cls,
        decomposer: Any,
        pairs: QKPairs,
        feature: str | None = None,
        components: Sequence[int] = (0, 1),
        ax: Axes | None = None,
    ) -> FeatureScatterDisplay:
        """Draw the queries and keys of pairs.

        Parameters
        ----------
        decomposer : ContrastiveQKDecomposer
            Fitted.
        pairs : QKPairs
            All of their queries and keys are drawn; some hundreds are legible.
        feature : str, optional
            One of the decomposer's ``feature_names_``; may be left out when there is only one.
        components : sequence of one or two int, default=(0, 1)
            Which coordinates, from 0. Of a feature with one component that one is drawn by default.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        FeatureScatterDisplay

        Raises
        ------
        TypeError
            If `pairs` are no `QKPairs`.
        ValueError
            If the feature is unknown, or several and none is named; if it has no component, or
            fewer than asked for; or if the pairs have no labels of it.
        """
        name = checked_feature(decomposer, feature, cls.__name__)
        pairs = checked_pairs(pairs, cls.__name__)
        found = decomposer.decompositions_[name]
        chosen = _components(components, found.rank, name, cls.__name__)
        column = _column(pairs, name, cls.__name__)
        of = np.asarray(decomposer.component_features_) == name
        queries, keys = (
            np.asarray(side)[:, of][:, list(chosen)]
            for side in (decomposer.transform(pairs), decomposer.transform_keys(pairs))
        )
        labels = pairs.query_labels[:, column], pairs.key_labels[:, column]
        return cls(queries, keys, *labels, feature=name, components=chosen, head=pairs.head).plot(
            ax
        )

    @classmethod
    def from_coordinates(
        cls,
        queries: ArrayLike,
        keys: ArrayLike,
        query_labels: ArrayLike,
        key_labels: ArrayLike,
        *,
        feature: str = "feature",
        components: Sequence[int] | None = None,
        head: str = "",
        ax: Axes | None = None,
    ) -> FeatureScatterDisplay:
        """Draw coordinates that are at hand.

        Parameters
        ----------
        queries : array-like of shape (n_queries, 1 or 2)
            Coordinates in the query subspace.
        keys : array-like of shape (n_keys, 1 or 2)
            Coordinates in the key subspace.
        query_labels : array-like of shape (n_queries,)
            What queries look for; None or NaN where it is not known.
        key_labels : array-like of shape (n_keys,)
            What keys are.
        feature : str, default="feature"
            Name of the feature.
        components : sequence of int, optional
            Number of each coordinate; counted from 0 by default.
        head : str, default=""
            Label of the head.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        FeatureScatterDisplay

        Raises
        ------
        HeadShapeError
            If coordinates, labels and components do not fit together.
        """
        sides = [np.asarray(side, dtype=np.float64) for side in (queries, keys)]
        labels = [label_array(side) for side in (query_labels, key_labels)]
        width = sides[0].shape[1] if sides[0].ndim == 2 else 0
        chosen = tuple(range(width)) if components is None else tuple(components)
        fits = all(x.shape == (len(y), width) for x, y in zip(sides, labels, strict=True))
        if not fits or width not in (1, 2) or len(chosen) != width:
            raise HeadShapeError(
                f"{cls.__name__}: queries and keys need one or two coordinates, a label each, and "
                f"as many components; got shapes {sides[0].shape} and {sides[1].shape}, "
                f"{len(labels[0])} and {len(labels[1])} labels, and components {chosen}"
            )
        return cls(*sides, *labels, feature=feature, components=chosen, head=head).plot(ax)

    def plot(self, ax: Axes | None = None) -> FeatureScatterDisplay:
        """Draw the points.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        self.colors_ = _colors(self.query_labels, self.key_labels)
        scales = [_root_mean_square(side) for side in (self.queries, self.keys)]
        self.scales_ = (scales[0], scales[1])
        ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        many = len(self.keys) > 400
        self.keys_ = self._points(ax, "keys", size=9 if many else 20, alpha=0.55, edge="none")
        self.queries_ = self._points(ax, "queries", size=42, alpha=0.9, edge="black")
        self._name_axes(ax)
        self._legend(ax)
        return self

    def _points(self, ax: Axes, side: str, size: float, alpha: float, edge: str) -> Any:
        queries = side == "queries"
        values = self.queries / self.scales_[0] if queries else self.keys / self.scales_[1]
        labels = self.query_labels if queries else self.key_labels
        across = values[:, 1] if len(self.components) > 1 else self._strip(labels, 1.0 * queries)
        known = ~pd.isna(labels)
        colors = [
            self.colors_[label] if there else _MISSING
            for label, there in zip(labels.tolist(), known, strict=True)
        ]
        return ax.scatter(
            values[:, 0], across, size, c=colors, marker=_MARKERS[side], alpha=alpha,
            edgecolors=edge, linewidths=0.6, rasterized=True,
        )  # fmt: skip

    def _strip(self, labels: NDArray[Any], height: float) -> NDArray[np.float64]:
        """Heights around that of the side: labels side by side, a little spread."""
        places = {label: i for i, label in enumerate(self.colors_)}
        last = len(places)
        known = ~pd.isna(labels)
        at = [
            places[label] if there else last
            for label, there in zip(labels.tolist(), known, strict=True)
        ]
        spread = np.arange(len(labels)) * _GOLDEN % 1
        rows = last + int(not known.all())
        return np.asarray(height + 0.8 * ((np.asarray(at) + 0.15 + 0.7 * spread) / rows - 0.5))

    def _name_axes(self, ax: Axes) -> None:
        names = [
            f"component {c} of {self.feature} (queries: u{c}, keys: v{c})" for c in self.components
        ]
        ax.set(xlabel=names[0], title=self.head)
        if len(names) > 1:
            ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            ax.set_ylabel(names[1])
        else:
            ax.set_yticks([0.0, 1.0], ["keys", "queries"])
            ax.set_ylim(-0.6, 1.6)

    def _legend(self, ax: Axes) -> None:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="none", marker=_MARKERS[side], color="0.5", label=label,
                   markeredgecolor="black" if side == "queries" else "none")
            for side, label in (("queries", "query"), ("keys", "key"))
        ]  # fmt: skip
        if len(self.colors_) <= _MOST_LABELS:
            handles += [
                Line2D([], [], linestyle="none", marker="o", color=color, label=str(label))
                for label, color in self.colors_.items()
            ]
        self.legend_ = ax.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
            borderaxespad=0,
        )  # fmt: skip


def _components(components: Sequence[int], rank: int, name: str, display: str) -> tuple[int, ...]:
    """Checked numbers of coordinates; the one there is where two are the default."""
    if rank == 0:
        raise ValueError(
            f"{display}: feature {name!r} has no component to draw; fit with another rank"
        )
    chosen = tuple(int(c) for c in components)
    if rank == 1 and chosen == (0, 1):
        chosen = (0,)
    if len(chosen) not in (1, 2):
        raise ValueError(f"{display}: draws one or two components; got {chosen}")
    if min(chosen) < 0 or max(chosen) >= rank:
        raise ValueError(
            f"{display}: feature {name!r} has {rank} components, counted from 0, and "
            f"components={chosen} are asked for"
        )
    return chosen


def _column(pairs: QKPairs, name: str, display: str) -> int:
    """Which labels belong to a feature, or to a class of one."""
    whole = name.partition("=")[0]
    for known in (name, whole):
        if known in pairs.features:
            return pairs.features.index(known)
    if len(pairs.features) == 1:
        return 0
    raise ValueError(
        f"{display}: the pairs have the features {', '.join(pairs.features)}, and no labels of "
        f"{name!r}"
    )


def _colors(*sides: NDArray[Any]) -> dict[Any, Any]:
    """A colour for every label of queries or keys."""
    import matplotlib as mpl

    labels = {label for side in sides for label in side[~pd.isna(side)].tolist()}
    try:
        ordered = sorted(labels)
    except TypeError:
        ordered = sorted(labels, key=str)
    if len(ordered) > _MOST_LABELS:
        shades = mpl.colormaps["viridis"](np.linspace(0, 1, len(ordered)))
        return {label: tuple(shade) for label, shade in zip(ordered, shades, strict=True)}
    colors = PALETTE if len(ordered) <= len(PALETTE) else _TEN
    return dict(zip(ordered, colors, strict=False))


def _root_mean_square(values: NDArray[np.floating]) -> float:
    found = float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
    return found or 1.0
