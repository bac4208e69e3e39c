"""Observed pairs held against a null law: histogram, quantiles and volcano."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skhead.exceptions import HeadShapeError
from skhead.inspection._fitted import checked_pair, similarity_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from skhead.containers import Similarity

__all__ = ["NullDisplay"]

#: False discovery rate up to which a pair is drawn as called.
_FDR = 0.05
_CALLED, _OTHERS = "C3", "0.55"


class NullDisplay:
    """How far the pairs of one kind depart from a null law, in three panels.

    Made by `from_estimator` or `from_similarity`. On the left the deviations z with the standard
    normal law drawn in; in the middle the p-values, sorted, against those that the law lets expect;
    on the right the effect size of every pair against its p-value, the pairs called at a false
    discovery rate of 5% in colour. Where the law holds, bars follow the curve and points the
    diagonal. Pairs without a finite value are not drawn.

    Parameters
    ----------
    z : ndarray of shape (n,)
        Deviations in standard deviations of the null.
    log10_p : ndarray of shape (n,)
        Decimal logarithms of the p-values.
    ratio : ndarray of shape (n,)
        Score over expectation.
    q : ndarray of shape (n,)
        False discovery rate at which each pair is called.
    null : str
        Name of the null law.
    pair : str
        Pair kind, such as ``"OQ"``.

    Attributes
    ----------
    axes_ : ndarray of shape (3,), of matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : matplotlib container
        Histogram of z.
    normal_ : matplotlib Line2D
        Standard normal density.
    quantiles_ : matplotlib Line2D
        Points of the middle panel.
    diagonal_ : matplotlib Line2D
        Where they would lie if the law held.
    called_, others_ : matplotlib Line2D
        Points of the right panel.

    See Also
    --------
    DistributionDisplay : Histogram of the values themselves.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.inspection import NullDisplay
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> calibrated = skhead.NullCalibrator().fit_transform(similarity)
    >>> display = NullDisplay.from_similarity(calibrated, pair="OK")
    >>> len(display.called_.get_xdata())
    5
    """

    def __init__(
        self,
        z: NDArray[np.floating],
        log10_p: NDArray[np.floating],
        ratio: NDArray[np.floating],
        q: NDArray[np.floating],
        *,
        null: str,
        pair: str,
    ) -> None:
        self.z = z
        self.log10_p = log10_p
        self.ratio = ratio
        self.q = q
        self.null = null
        self.pair = pair

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        pair: str | None = None,
        bins: int = 60,
        axes: NDArray[Any] | None = None,
    ) -> NullDisplay:
        """Draw what a fitted calibrator makes of heads.

        Parameters
        ----------
        estimator : transformer
            Fitted: a `skhead.NullCalibrator`, or a pipeline that ends with one.
        X : object
            Heads, as the estimator takes them.
        pair : str, optional
            Which pair kind; may be left out when there is only one.
        bins : int, default=60
            Equal bins of the histogram.
        axes : array of three matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        NullDisplay

        Raises
        ------
        HeadShapeError
            If the estimator makes no similarity, or one that cannot be drawn.
        ValueError
            If the similarity is not calibrated.
        """
        similarity = similarity_of(estimator, X, cls.__name__)
        return cls.from_similarity(similarity, pair, bins, axes)

    @classmethod
    def from_similarity(
        cls,
        similarity: Similarity,
        pair: str | None = None,
        bins: int = 60,
        axes: NDArray[Any] | None = None,
    ) -> NullDisplay:
        """Draw one pair kind of a calibrated similarity.

        Parameters
        ----------
        similarity : Similarity
            From `NullCalibrator`.
        pair : str, optional
            Which pair kind; may be left out when there is only one.
        bins : int, default=60
            Equal bins of the histogram.
        axes : array of three matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        NullDisplay

        Raises
        ------
        HeadShapeError
            If the similarity lacks the pair kind, has several and none is named, or has no pair of
            the kind that the null judges.
        ValueError
            If the similarity is not calibrated.
        """
        calibration = similarity.calibration
        if calibration is None:
            raise ValueError(
                f"NullDisplay: the similarity (unit {similarity.unit!r}) is not calibrated; pass "
                "NullCalibrator().fit_transform(similarity)"
            )
        pair = checked_pair(similarity, pair, cls.__name__)
        p = similarity.pairs.index(pair)
        parts = {
            name: getattr(calibration, name)[:, :, p] for name in ("z", "log10_p", "ratio", "q")
        }
        judged = np.isfinite(list(parts.values())).all(axis=0)
        judged &= ~np.isnan(similarity.listed(pair))
        if not judged.any():
            raise HeadShapeError(
                f"NullDisplay: no {pair} pair has finite values under the null "
                f"{calibration.null!r}; choose another kind or null"
            )
        shown = {name: values[judged] for name, values in parts.items()}
        display = cls(**shown, null=calibration.null, pair=pair)
        return display.plot(bins=bins, axes=axes)

    def plot(self, bins: int = 60, axes: NDArray[Any] | None = None) -> NullDisplay:
        """Draw the three panels.

        Parameters
        ----------
        bins : int, default=60
            Equal bins of the histogram.
        axes : array of three matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If `axes` are not three.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        self.axes_ = np.asarray(axes, dtype=object).ravel()
        if len(self.axes_) != 3:
            raise ValueError(f"NullDisplay: draws on three axes, got {len(self.axes_)}")
        self.figure_ = self.axes_[0].figure
        self._draw_deviations(self.axes_[0], bins)
        self._draw_quantiles(self.axes_[1])
        self._draw_volcano(self.axes_[2])
        self.axes_[1].set_title(f"{self.pair} against the null {self.null!r}")
        return self

    def _draw_deviations(self, ax: Axes, bins: int) -> None:
        _, _, self.bars_ = ax.hist(self.z, bins, density=True, color="C0", alpha=0.6)
        at = np.linspace(-4, 4, 161)
        density = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
        (self.normal_,) = ax.plot(at, density, color="black", linewidth=1.2, label="null")
        ax.set(xlabel="z", ylabel="density of pairs")
        ax.legend(frameon=False)

    def _draw_quantiles(self, ax: Axes) -> None:
        n = len(self.log10_p)
        expected = -np.log10((np.arange(n) + 0.5) / n)
        (self.quantiles_,) = ax.plot(
            expected, -np.sort(self.log10_p), ".", markersize=4, color="C0", rasterized=True
        )
        end = float(expected[0])
        (self.diagonal_,) = ax.plot([0, end], [0, end], color="black", linewidth=1.2)
        ax.set(xlabel="expected −log10 p", ylabel="observed −log10 p")

    def _draw_volcano(self, ax: Axes) -> None:
        called = self.q <= _FDR
        lines = []
        for chosen, color, label in (
            (~called, _OTHERS, f"others: {np.count_nonzero(~called):,}"),
            (called, _CALLED, f"q ≤ {_FDR:g}: {np.count_nonzero(called):,}"),
        ):
            lines += ax.plot(
                self.ratio[chosen], -self.log10_p[chosen], ".", markersize=4, color=color,
                label=label, rasterized=True,
            )  # fmt: skip
        self.others_, self.called_ = lines
        ax.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        ax.set(xlabel="score / expectation", ylabel="−log10 p")
        ax.legend(frameon=False)
