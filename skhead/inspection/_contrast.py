"""Scores split by feature, and spectra of features, of a query-key decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skhead.qk_pairs import QKPairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

__all__ = ["PALETTE", "AttributionDisplay", "SpectrumDisplay", "checked_feature", "checked_pairs"]

#: Told apart with any kind of colour vision (Okabe and Ito).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_HATCHES = (None, "//", "..", "xx")
_REST = "0.82"
_DARK = "0.15"
#: Keys named on an axis; more of them would overlap.
_MOST_TICKS = 60
#: Letters that fit side by side under one inch of the axis.
_LETTERS = 11
#: Singular values below this share of the largest one lie under the axis.
_FLOOR = 1e-6


def checked_feature(decomposer: Any, feature: str | None, display: str) -> str:
    """The feature that is named, or the only one there is."""
    check_is_fitted(decomposer, "decompositions_")
    known = list(decomposer.decompositions_)
    if feature is None and len(known) > 1:
        raise ValueError(
            f"{display}: the decomposer has the features {', '.join(known)}; say which one to "
            f"draw, for example feature={known[0]!r}"
        )
    feature = known[0] if feature is None else feature
    if feature not in known:
        raise ValueError(
            f"{display}: the decomposer has the features {', '.join(known)}, not {feature!r}"
        )
    return feature


def checked_pairs(pairs: Any, display: str) -> QKPairs:
    """Refuse anything but pairs with their contexts."""
    if not isinstance(pairs, QKPairs):
        raise TypeError(
            f"{display}: draws the keys of queries and needs QKPairs; got {type(pairs).__name__}"
        )
    return pairs


class AttributionDisplay:
    """Attention scores of one query, a bar for each key, split into what features contribute.

    Made by `from_estimator` or `from_attribution`. Positive parts are stacked upward and negative
    ones downward, features in order and the residual last; a diamond marks the score itself. Above
    the keys that agree with the query stands a dot, a row of them for each feature of the pairs.

    Parameters
    ----------
    table : DataFrame of n_keys rows
        A column for each feature, ``residual`` and ``total``.
    agreement : DataFrame of n_keys rows
        A column for each feature of the pairs: whether key and query agree.
    key_names : sequence of str
        Under the bars.
    title : str, default=""
        Of the axes.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : dict of str to matplotlib BarContainer
        Of every feature and the residual.
    totals_ : matplotlib Line2D
        Diamonds at the scores.
    agreeing_ : dict of str to matplotlib Line2D
        Dots above the keys that agree.
    legend_ : matplotlib Legend

    See Also
    --------
    skhead.ContrastiveQKDecomposer.attribute : The table that is drawn.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.datasets import load_payload_head, make_payload_retrieval
    >>> from skhead.inspection import AttributionDisplay
    >>> head = load_payload_head("d16-r3-r5")
    >>> task = make_payload_retrieval(2000, embeddings=head.embeddings, random_state=0)
    >>> pairs = task.pairs(head)
    >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
    >>> display = AttributionDisplay.from_estimator(decomposer, pairs, query=3)
    >>> list(display.bars_), len(display.bars_["z1"])
    (['z1', 'z2', 'residual'], 16)
    """

    def __init__(
        self,
        table: pd.DataFrame,
        agreement: pd.DataFrame,
        key_names: Sequence[str],
        title: str = "",
    ) -> None:
        self.table = table
        self.agreement = agreement
        self.key_names = key_names
        self.title = title

    @classmethod
    def from_estimator(
        cls,
        decomposer: Any,
        pairs: QKPairs,
        query: int = 0,
        others: Sequence[Any] = (),
        ax: Axes | None = None,
    ) -> AttributionDisplay:
        """Draw the scores of one query.

        Parameters
        ----------
        decomposer : ContrastiveQKDecomposer
            Fitted.
        pairs : QKPairs
            Their `key_names` name the bars; without them keys are numbered.
        query : int, default=0
            Number of the query, from 0.
        others : sequence of ContrastiveQKDecomposer, default=()
            Further features of the same head, fitted on pairs of their own.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default, wide enough for the keys.

        Returns
        -------
        AttributionDisplay

        Raises
        ------
        TypeError
            If `pairs` are no `QKPairs`.
        ValueError
            If there is no such query, or it has no keys.
        """
        check_is_fitted(decomposer, "decompositions_")
        own = _one_query(pairs, query, cls.__name__)
        table = decomposer.attribute(own, others).drop(columns="query")
        return cls._of_query(table, own, query, ax)

    @classmethod
    def from_attribution(
        cls, table: pd.DataFrame, pairs: QKPairs, query: int = 0, ax: Axes | None = None
    ) -> AttributionDisplay:
        """Draw one query of an attribution that is at hand.

        Parameters
        ----------
        table : DataFrame
            From `skhead.ContrastiveQKDecomposer.attribute`, of these pairs.
        pairs : QKPairs
        query : int, default=0
            Number of the query, from 0.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default, wide enough for the keys.

        Returns
        -------
        AttributionDisplay

        Raises
        ------
        TypeError
            If `pairs` are no `QKPairs`.
        ValueError
            If there is no such query, it has no keys, or the table has other keys of it.
        """
        own = _one_query(pairs, query, cls.__name__)
        rows = table[table["query"] == query].drop(columns="query")
        if len(rows) != len(own.keys):
            raise ValueError(
                f"{cls.__name__}: the table has {len(rows)} keys of query {query}, and the pairs "
                f"have {len(own.keys)}; give the pairs that were attributed"
            )
        return cls._of_query(rows, own, query, ax)

    @classmethod
    def _of_query(
        cls, table: pd.DataFrame, own: QKPairs, query: int, ax: Axes | None
    ) -> AttributionDisplay:
        agreement = pd.DataFrame(own.agreement == 1, columns=list(own.features))
        names = [str(i) for i in range(len(own.keys))]
        if own.key_names is not None:
            names = [str(name) for name in own.key_names]
        asked = "" if own.query_names is None else f" {own.query_names[0]!r}"
        of = f"{own.head}: " if own.head else ""
        return cls(table, agreement, names, f"{of}query {query}{asked}").plot(ax)

    def plot(self, ax: Axes | None = None) -> AttributionDisplay:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default, wide enough for the keys.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt

        n = len(self.table)
        if ax is None:
            width = float(np.clip(3.4 + 0.3 * n, 6.4, 12))
            _, ax = plt.subplots(figsize=(width, 4.2), layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        parts = [name for name in self.table.columns if name != "total"]
        styles = {name: _style(i) for i, name in enumerate(parts[:-1])}
        self._stack(ax, parts, styles)
        (self.totals_,) = ax.plot(
            np.arange(n), self.table["total"], "D", color=_DARK, markersize=5,
            markeredgecolor="white", label="total",
        )  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.8)
        self.agreeing_: dict[str, Line2D] = {}
        for i, name in enumerate(self.agreement.columns):
            rows = np.flatnonzero(self.agreement[name])
            (self.agreeing_[name],) = ax.plot(
                rows, np.full(len(rows), 1.04 + 0.045 * i), "o", clip_on=False, markersize=5.5,
                color=styles.get(name, {"color": _DARK})["color"], label=f"agrees on {name}",
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip
        self._name_keys(ax)
        ax.set(xlim=(-0.7, n - 0.3), ylabel="attention score")
        ax.set_title(self.title, pad=10 + 11 * len(self.agreement.columns), fontsize="medium")
        self.legend_ = ax.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0
        )
        return self

    def _stack(self, ax: Axes, parts: list[str], styles: Mapping[str, dict[str, Any]]) -> None:
        at = np.arange(len(self.table))
        ends = {True: np.zeros(len(at)), False: np.zeros(len(at))}
        self.bars_: dict[str, BarContainer] = {}
        for name in parts:
            values = self.table[name].to_numpy()
            up = values >= 0
            style = styles.get(name, {"color": _REST})
            self.bars_[name] = ax.bar(
                at, values, 0.78, np.where(up, ends[True], ends[False]), label=name,
                edgecolor="white", linewidth=0.5, **style,
            )  # fmt: skip
            for sign, end in ends.items():
                end += np.where(up == sign, values, 0.0)

    def _name_keys(self, ax: Axes) -> None:
        step = -(-len(self.key_names) // _MOST_TICKS)
        shown = range(0, len(self.key_names), step)
        width = ax.get_window_extent().width / ax.figure.dpi
        longest = max(len(self.key_names[i]) for i in shown) + 1
        crowded = longest * len(shown) > _LETTERS * width
        ax.set_xticks(
            list(shown), [self.key_names[i] for i in shown],
            rotation=90 if crowded and longest > 3 else 0,
            fontsize="small" if crowded else "medium",
        )  # fmt: skip
        ax.set_xlabel("key")


def _one_query(pairs: Any, query: Any, display: str) -> QKPairs:
    """The pairs of one query, which has keys."""
    pairs = checked_pairs(pairs, display)
    if not isinstance(query, int | np.integer) or not 0 <= query < len(pairs):
        raise ValueError(
            f"{display}: query={query!r} is none of the {len(pairs)} queries, which are counted "
            "from 0"
        )
    own = pairs[[int(query)]]
    if not len(own.keys):
        raise ValueError(f"{display}: query {query} has no keys; draw another one")
    return own


def _style(number: int) -> dict[str, Any]:
    """Colour, and a hatch where colours repeat."""
    hatch = _HATCHES[number // len(PALETTE) % len(_HATCHES)]
    return {"color": PALETTE[number % len(PALETTE)], "hatch": hatch}


class SpectrumDisplay:
    """Singular values of the contrast of features, on a logarithmic scale.

    Made by `from_estimator` or `from_decompositions`. Points of components that are kept are
    filled, and a dashed line separates them from the others. Where ranks come from a null, the
    range of the largest singular values under permuted labels is shaded, with a dotted line at the
    threshold. Values below a millionth of the largest are under the axis.

    Parameters
    ----------
    decompositions : mapping of str to Decomposition
        Features to draw; see ``decompositions_`` of `skhead.ContrastiveQKDecomposer`.
    head : str, default=""
        Label of the head.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    kept_, dropped_ : dict of str to matplotlib Line2D
        Points of each feature.
    cuts_ : dict of str to matplotlib Line2D
        Behind the last component that is kept.
    thresholds_ : dict of str to matplotlib Line2D
        What a singular value must exceed; empty without a null.
    nulls_ : dict of str to matplotlib Patch
        From the least to the greatest singular value of permuted labels; empty without a null.
    legend_ : matplotlib Legend

    See Also
    --------
    skhead.ContrastiveQKDecomposer.summary : Ranks and gaps as a table.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.datasets import load_payload_head, make_contrast_pairs
    >>> from skhead.inspection import SpectrumDisplay
    >>> pairs = make_contrast_pairs("z1", 2000, head=load_payload_head("d16-r3-r5"), random_state=0)
    >>> decomposer = skhead.ContrastiveQKDecomposer(rank="null", random_state=0).fit(pairs)
    >>> display = SpectrumDisplay.from_estimator(decomposer)
    >>> len(display.kept_["z1"].get_xdata()), float(display.cuts_["z1"].get_xdata()[0])
    (3, 3.5)
    """

    def __init__(self, decompositions: Mapping[str, Any], head: str = "") -> None:
        self.decompositions = decompositions
        self.head = head

    @classmethod
    def from_estimator(
        cls, decomposer: Any, feature: str | None = None, ax: Axes | None = None
    ) -> SpectrumDisplay:
        """Draw the spectrum of one feature, or of all.

        Parameters
        ----------
        decomposer : ContrastiveQKDecomposer
            Fitted.
        feature : str, optional
            One of its ``feature_names_``; all of them by default.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        SpectrumDisplay

        Raises
        ------
        ValueError
            If there is no such feature.
        """
        check_is_fitted(decomposer, "decompositions_")
        chosen = dict(decomposer.decompositions_)
        if feature is not None:
            chosen = {feature: chosen[checked_feature(decomposer, feature, cls.__name__)]}
        return cls.from_decompositions(chosen, decomposer.head_, ax)

    @classmethod
    def from_decompositions(
        cls, decompositions: Mapping[str, Any], head: str = "", ax: Axes | None = None
    ) -> SpectrumDisplay:
        """Draw spectra of several fits together, such as those of other layers or lags.

        Parameters
        ----------
        decompositions : mapping of str to Decomposition
            By the name to show; from ``decompositions_`` of any decomposers.
        head : str, default=""
            Title of the axes.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        SpectrumDisplay

        Raises
        ------
        ValueError
            If there is nothing to draw.
        """
        if not decompositions:
            raise ValueError(f"{cls.__name__}: needs at least one decomposition; got none")
        return cls(decompositions, head).plot(ax)

    def plot(self, ax: Axes | None = None) -> SpectrumDisplay:
        """Draw the spectra.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        self.kept_: dict[str, Line2D] = {}
        self.dropped_: dict[str, Line2D] = {}
        self.cuts_: dict[str, Line2D] = {}
        self.thresholds_: dict[str, Line2D] = {}
        self.nulls_: dict[str, Patch] = {}
        for i, (name, found) in enumerate(self.decompositions.items()):
            self._draw(ax, name, found, PALETTE[i % len(PALETTE)], "osD^v"[i % 5])
        spectra = [found.singular_values for found in self.decompositions.values()]
        drawn = np.concatenate([values[values > _FLOOR * values[0]] for values in spectra])
        ax.set_yscale("log")
        ax.set_ylim(drawn.min() / 2, drawn.max() * 2)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="component", ylabel="singular value", title=self.head)
        self.legend_ = ax.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0
        )
        return self

    def _draw(self, ax: Axes, name: str, found: Any, color: str, marker: str) -> None:
        values: NDArray[np.float64] = found.singular_values
        at, rank = np.arange(1, len(values) + 1), found.rank
        shown = np.where(values > 0, values, np.nan)
        ax.plot(at, shown, color=color, linewidth=1, alpha=0.6)
        style: dict[str, Any] = {"linestyle": "none", "marker": marker, "color": color}
        label = f"{name}: {rank} of {len(values)} kept"
        (self.kept_[name],) = ax.plot(at[:rank], shown[:rank], **style, label=label)
        (self.dropped_[name],) = ax.plot(at[rank:], shown[rank:], **style, markerfacecolor="white")
        self.cuts_[name] = ax.axvline(
            rank + 0.5, color=color, linestyle="--", linewidth=1, alpha=0.8
        )
        null = found.null_singular_values
        if null is None:
            return
        self.nulls_[name] = ax.axhspan(
            null.min(), null.max(), color=color, alpha=0.18, linewidth=0,
            label=f"{name}: permuted labels",
        )  # fmt: skip
        self.thresholds_[name] = ax.axhline(
            found.null_threshold, color=color, linestyle=":", linewidth=1.4
        )
