"""Distribution of a similarity's values, held against random subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skhead.containers import reference_law
from skhead.exceptions import HeadShapeError
from skhead.inspection._fitted import similarity_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from skhead.containers import Similarity

__all__ = ["DistributionDisplay"]


class DistributionDisplay:
    """Histogram of every pair kind, with what random subspaces would give drawn in.

    Made by `from_estimator` or `from_similarity`. A dashed line marks the mean between independent
    random subspaces of the same ranks, a shaded band three standard deviations around it. Trained
    weights share few directions, so values far from the reference are the rule: it shows scale and
    is no test.

    Parameters
    ----------
    samples : mapping of str to ndarray
        Defined values of each pair kind.
    references : mapping of str to (float, float)
        Mean and standard deviation of the random reference; NaN where unknown.
    unit : str, default="pk"
        What the numbers are.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : dict of str to matplotlib container
        Histogram of each pair kind.
    lines_ : dict of str to matplotlib Line2D
        Mean of the random reference, for the kinds that have one.

    See Also
    --------
    SimilarityDisplay : The same values as a matrix.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.inspection import DistributionDisplay
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> display = DistributionDisplay.from_similarity(similarity)
    >>> sorted(display.lines_)
    ['OK', 'OQ', 'OV']
    """

    def __init__(
        self,
        samples: Mapping[str, NDArray[np.floating]],
        references: Mapping[str, tuple[float, float]],
        *,
        unit: str = "pk",
    ) -> None:
        self.samples = samples
        self.references = references
        self.unit = unit

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        pairs: Sequence[str] | None = None,
        bins: int = 60,
        ax: Axes | None = None,
    ) -> DistributionDisplay:
        """Draw what a fitted kernel or calibrator makes of heads.

        Parameters
        ----------
        estimator : transformer
            Fitted: a kernel, a `skhead.NullCalibrator`, or a pipeline that ends with one.
        X : object
            Heads, as the estimator takes them.
        pairs : sequence of str, optional
            Which pair kinds; all by default.
        bins : int, default=60
            Equal bins over the range of all values drawn.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        DistributionDisplay

        Raises
        ------
        HeadShapeError
            If the estimator makes no similarity, or one that cannot be drawn.
        """
        similarity = similarity_of(estimator, X, cls.__name__)
        return cls.from_similarity(similarity, pairs, bins, ax)

    @classmethod
    def from_similarity(
        cls,
        similarity: Similarity,
        pairs: Sequence[str] | None = None,
        bins: int = 60,
        ax: Axes | None = None,
    ) -> DistributionDisplay:
        """Draw the distributions of a similarity.

        Parameters
        ----------
        similarity : Similarity
        pairs : sequence of str, optional
            Which pair kinds; all by default.
        bins : int, default=60
            Equal bins over the range of all values drawn.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        DistributionDisplay

        Raises
        ------
        HeadShapeError
            If the similarity lacks a pair kind.
        """
        wanted = similarity.pairs if pairs is None else tuple(pairs)
        missing = [pair for pair in wanted if pair not in similarity.pairs]
        if missing:
            raise HeadShapeError(
                f"DistributionDisplay: the similarity holds {' '.join(similarity.pairs)}, "
                f"not {missing[0]!r}"
            )
        samples, references = {}, {}
        for pair in wanted:
            values = similarity.listed(pair)
            samples[pair] = values[~np.isnan(values)]
            references[pair] = reference_law(similarity, pair)
        return cls(samples, references, unit=similarity.unit).plot(bins=bins, ax=ax)

    def plot(self, bins: int = 60, ax: Axes | None = None) -> DistributionDisplay:
        """Draw the histograms.

        Parameters
        ----------
        bins : int, default=60
            Equal bins over the range of all values.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.ax_ = ax
        self.figure_ = ax.figure
        self.bars_: dict[str, Any] = {}
        self.lines_: dict[str, Any] = {}
        edges = np.histogram_bin_edges(np.concatenate(list(self.samples.values())), bins).tolist()
        for i, (pair, values) in enumerate(self.samples.items()):
            color = f"C{i}"
            _, _, self.bars_[pair] = ax.hist(
                values, edges, histtype="step", linewidth=1.5, color=color, label=pair
            )
            mean, sd = self.references[pair]
            if np.isfinite(mean):
                self.lines_[pair] = ax.axvline(mean, color=color, linestyle="--", linewidth=1)
            if np.isfinite(mean) and np.isfinite(sd):
                ax.axvspan(mean - 3 * sd, mean + 3 * sd, color=color, alpha=0.12, linewidth=0)
        ax.set(xlabel=self.unit, ylabel="pairs of heads")
        ax.legend(title="dashed: random", frameon=False)
        return self
