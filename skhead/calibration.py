"""Similarities held against what random subspaces would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import TransformerMixin
from sklearn.utils import TransformerTags
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import (
    _check_feature_names_in,
    check_is_fitted,
    check_non_negative,
    validate_data,
)

from skhead._base import check_option, check_same_record, free_dimension
from skhead._checks import check_count
from skhead._estimators import SkheadEstimator
from skhead._nulls import (
    AnisotropicNull,
    CovarianceNull,
    EmpiricalLaw,
    GaussianNull,
    HaarNull,
    NullLaw,
    SignflipNull,
    plain_scores,
)
from skhead._progress import reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.containers import Calibration, Similarity, feature_names, similarity_in
from skhead.exceptions import HeadShapeError, ProvenanceMismatchError
from skhead.stats import adjust_log_p, gaussian_divergence, haar_moments

__all__ = ["NullCalibrator", "informativeness"]

NULLS = ("haar", "gaussian", "anisotropic", "signflip", "empirical")
#: Of every output: its name as a unit, and the value that an undefined pair takes as a feature.
OUTPUTS = {
    "z": ("z", 0.0),
    "log_p": ("log10_p", -1 / np.log(10)),
    "q": ("q", 1.0),
    "ratio": ("ratio", 1.0),
    "excess": ("excess", 0.0),
}
#: How far rounding may carry a kernel beyond its range.
_ROUNDING = 1e-3


class NullCalibrator(TransformerMixin, SkheadEstimator):
    """Similarities in units of a null law: deviation, p-value, false discovery rate, effect size.

    The law is learned from the training heads alone and applied to whatever is compared with them.

    Parameters
    ----------
    null : {"haar", "gaussian", "anisotropic", "signflip", "empirical"}, default="haar"
        - "haar": uniformly random subspaces of the measured ranks, by their exact law. Right for
          untrained weights; trained heads share preferred directions, and nearly every pair
          differs from this null in one direction or the other.
        - "gaussian": a normal law with the same mean and variance, as published; tails too thin.
        - "anisotropic": random subspaces that prefer the directions which the training heads
          prefer, an angular central Gaussian law fitted to their mean projectors. Right as an
          effect size: more overlap than two heads have that merely live in the same directions.
        - "signflip": every head keeps its energy on each of the training heads' preferred axes, and
          how it combines them is random. Stricter; it depends on the axes, which heads without
          common directions leave arbitrary.
        - "empirical": the bulk of the model's other pairs, once every head's own level is taken
          out. Right for discovery: which pairs stand out. Takes positive composition scores too; it
          needs many pairs, and its p-values near 1e-3 are up to twice too small.

    output : {"z", "log_p", "q", "ratio", "excess"}, default="z"
        What the values become: deviation in null standard deviations, log10 of the p-value, false
        discovery rate at which the pair is called, score over expectation, score minus expectation.
        All five are in the result's ``calibration`` whatever is chosen.
    side : {"two", "upper", "lower"}, default="two"
        Which deviations count as evidence.
    groups : {None, "layer"}, default=None
        For "anisotropic": one law for every role, or one for every role and layer, to which the
        layers of that number of all models belong.
    fdr : {"bh", "by"}, default="bh"
        Benjamini-Hochberg, or Benjamini-Yekutieli for any dependence. Each pair kind is a family of
        its own; a symmetric kind counts each pair once.
    tails : {"normal", "t"}, default="normal"
        For "empirical": the law of the bulk. Its tails are heavy; "t", of 4 degrees of freedom, is
        the strict reading, under which no single pair of a large model may be left.
    shrinkage : float or None, default=None
        For "anisotropic": how far the mean projectors are drawn towards isotropy, 0 to 1; None is
        0, or 0.5 with groups, where a mean is taken over few heads.
    covariance : ndarray of shape (d_model, d_model) or None, default=None
        For "anisotropic": the law of subspaces spanned by Gaussian vectors of this covariance, such
        as that of activations or embeddings, in place of one fitted to the training heads.
    random_state : int or None, default=None
        For "haar" at ranks 2 and 3, whose tails are drawn: the seed; None is 0.
    d_model : int or None, default=None
        For a plain array: dimension of the space. A `Similarity` knows its own.
    rank : int, tuple of (int, int) or None, default=None
        For a plain array: rank of all subspaces, or of rows and of columns.

    Attributes
    ----------
    law_ : object
        The fitted null law.
    pairs_ : tuple of str
        Pair kinds that were fitted.

    Notes
    -----
    Of weights that were centred the dimension is ``d_model - 1``. A p-value far below 1e-6 is
    nominal: no null holds that exactly.

    References
    ----------
    .. [1] K. C. S. Pillai, Annals of Mathematical Statistics 26 (1955).
    .. [2] Y. Chikuse, "Statistics on Special Manifolds", Springer (2003).
    .. [3] Y. Benjamini and D. Yekutieli, Annals of Statistics 29 (2001).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    >>> calibrated = skhead.NullCalibrator(side="upper").fit_transform(similarity)
    >>> frame = calibrated.to_frame()
    >>> frame.loc[frame["q"] < 0.001, ["source", "target"]].values.tolist()[0]
    ['L0H0', 'L1H1']
    """

    def __init__(
        self,
        null: str = "haar",
        output: str = "z",
        side: str = "two",
        groups: str | None = None,
        fdr: str = "bh",
        tails: str = "normal",
        shrinkage: float | None = None,
        covariance: NDArray[np.floating] | None = None,
        random_state: int | None = None,
        d_model: int | None = None,
        rank: int | tuple[int, int] | None = None,
    ) -> None:
        self.null = null
        self.output = output
        self.side = side
        self.groups = groups
        self.fdr = fdr
        self.tails = tails
        self.shrinkage = shrinkage
        self.covariance = covariance
        self.random_state = random_state
        self.d_model = d_model
        self.rank = rank

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> NullCalibrator:
        """Learn the null law from the training heads.

        Parameters
        ----------
        X : Similarity, or array of shape (n_rows, n_columns)
            Projection kernels; an array needs `d_model` and `rank`.
        y : ignored

        Returns
        -------
        self
        """
        similarity = self._open(X, reset=True)
        self.law_ = self._make_law()
        self.law_.caller = type(self).__name__
        self.law_.fit(similarity)
        self.pairs_ = similarity.pairs
        self._columns, self._record = similarity.columns, dict(similarity.record)
        return self

    def transform(self, X: Any) -> Any:
        """Hold similarities to the fitted columns against the law.

        Parameters
        ----------
        X : Similarity, or array of shape (n_rows, n_columns)
            As for `fit`, against the same reference heads.

        Returns
        -------
        Similarity, or ndarray of shape (n_rows, n_columns)
            The same kind as X; a Similarity carries every output in ``calibration``. After
            ``set_output(transform="pandas")`` a DataFrame of its 2-D form.
        """
        check_is_fitted(self)
        similarity = self._open(X, reset=False)
        self._check_reference(similarity)
        calibration = self._calibrate(similarity)
        unit, undefined = OUTPUTS[self.output]
        values = getattr(calibration, unit).astype(np.float32)
        if similarity_in(X) is None:
            return values[:, :, 0]
        found = replace(
            similarity,
            values=values,
            unit=unit,
            null_mean=np.full((1, 1, 1), undefined),
            null_sd=np.full((1, 1, 1), 1.0 if unit == "z" else np.nan),
            calibration=calibration,
        )
        wants_frame = _get_output_config("transform", self)["dense"] == "pandas"
        return found.to_features() if wants_frame else found

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the features, those of the similarities.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the columns of a plain array.

        Returns
        -------
        ndarray of str
        """
        check_is_fitted(self)
        if hasattr(self, "n_features_in_"):
            return np.asarray(_check_feature_names_in(self, input_features), dtype=object)
        return np.asarray(feature_names(self.pairs_, self._columns), dtype=object)

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.transformer_tags = TransformerTags(preserves_dtype=["float32"])
        sized = self.d_model is not None and self.rank is not None
        return declare(tags, HeadTags(("similarity", "matrix") if sized else ("similarity",)))

    def _make_law(self) -> NullLaw:
        by_layer = self.groups == "layer"
        shrinkage = (0.5 if by_layer else 0.0) if self.shrinkage is None else self.shrinkage
        if not 0 <= shrinkage <= 1:
            raise ValueError(
                f"{type(self).__name__}: shrinkage must lie between 0 and 1, got {shrinkage!r}"
            )
        laws: dict[str, Callable[[], NullLaw]] = {
            "haar": lambda: HaarNull(0 if self.random_state is None else self.random_state),
            "gaussian": GaussianNull,
            "anisotropic": lambda: AnisotropicNull(by_layer, shrinkage),
            "signflip": SignflipNull,
            "empirical": lambda: EmpiricalLaw(self.tails),
        }
        if self.null == "anisotropic" and self.covariance is not None:
            return CovarianceNull(np.asarray(self.covariance, dtype=np.float64))
        return laws[self.null]()

    def _open(self, X: Any, reset: bool) -> Similarity:
        for name, options in (
            ("null", NULLS),
            ("output", tuple(OUTPUTS)),
            ("side", ("two", "upper", "lower")),
            ("groups", (None, "layer")),
            ("fdr", ("bh", "by")),
            ("tails", ("normal", "t")),
        ):
            check_option(name, getattr(self, name), options, type(self).__name__)
        given, X = X, similarity_in(X)
        if X is None:
            array = validate_data(self, given, reset=reset, dtype=[np.float64, np.float32])
            check_non_negative(array, f"{type(self).__name__}: a kernel is a sum of squares")
            X = self._similarity_of(array)
        composition = X.unit.startswith("composition") and not X.unit.endswith("difference")
        if not (X.unit.startswith("pk") or (composition and self.null == "empirical")):
            also = " and of positive composition scores" if self.null == "empirical" else ""
            raise ValueError(
                f"{type(self).__name__}: null={self.null!r} is a law of the projection kernel"
                f"{also}, and these are values of unit {X.unit!r}; calibrate the output of "
                "ProjectionKernel"
            )
        if X.unit.startswith("pk"):
            for p in range(len(X.pairs)):
                self._check_range(X, p)
        return X

    def _similarity_of(self, array: NDArray[np.floating]) -> Similarity:
        """A plain array as similarities between heads without names."""
        if self.d_model is None or self.rank is None:
            raise ValueError(
                f"{type(self).__name__}: a plain array says neither in which dimension nor of "
                "which ranks its subspaces are; give d_model= and rank=, or pass a Similarity"
            )
        name = type(self).__name__
        d_model = check_count("d_model", self.d_model, name)
        ranks = self.rank if isinstance(self.rank, tuple | list) else (self.rank,) * 2
        whole = all(isinstance(r, int | np.integer) and 1 <= r <= d_model for r in ranks)
        if len(ranks) != 2 or not whole:
            raise ValueError(
                f"{name}: rank={self.rank!r} must be one or two integers between 1 and "
                f"d_model={d_model}"
            )
        row_ranks, column_ranks = (
            np.full((n, 1), r, dtype=np.int64) for n, r in zip(array.shape, ranks, strict=True)
        )
        unknown = np.full((1, 1, 1), np.nan)
        return Similarity(
            values=np.asarray(array)[:, :, None],
            pairs=("XX",),
            rows=_nameless(array.shape[0]),
            columns=_nameless(array.shape[1]),
            unit="pk",
            record={},
            d_model=d_model,
            row_ranks=row_ranks,
            column_ranks=column_ranks,
            null_mean=unknown,
            null_sd=unknown,
        )

    def _check_reference(self, similarity: Similarity) -> None:
        name = type(self).__name__
        check_same_record(self._record, similarity.record, name)
        if similarity.pairs != self.pairs_ or not similarity.columns.equals(self._columns):
            raise ProvenanceMismatchError(
                f"{name}: was fitted on pairs {' '.join(self.pairs_)} against "
                f"{len(self._columns)} reference heads, and these similarities are of pairs "
                f"{' '.join(similarity.pairs)} against {len(similarity.columns)} others; calibrate "
                "what the same fitted kernel gives"
            )

    def _calibrate(self, similarity: Similarity) -> Calibration:
        shape = similarity.values.shape
        parts = {name: np.full(shape, np.nan) for name in ("score", "z", "log_p", "q", "mean")}
        for p, pair in enumerate(similarity.pairs):
            scores = plain_scores(similarity, p)
            judged = self.law_.judge(similarity, p, scores, self.side)
            counted = ~np.isnan(similarity.listed(pair))
            log_q = adjust_log_p(np.where(counted, judged.log_p, np.nan), self.fdr)
            q = np.exp(similarity.fill_mirrored(pair, log_q))
            found = {"score": scores, "z": judged.z, "log_p": judged.log_p, "mean": judged.mean}
            for name, values in (found | {"q": q}).items():
                parts[name][:, :, p] = np.where(np.isnan(scores), np.nan, values)
        return Calibration(
            null=self.null,
            side=self.side,
            score=similarity.values.astype(np.float32),
            z=parts["z"].astype(np.float32),
            log10_p=parts["log_p"] / np.log(10),
            q=parts["q"],
            ratio=(parts["score"] / parts["mean"]).astype(np.float32),
            excess=(parts["score"] - parts["mean"]).astype(np.float32),
        )

    def _check_range(self, similarity: Similarity, p: int) -> None:
        """Refuse what cannot be a projection kernel of the ranks."""
        scores = plain_scores(similarity, p)
        r, s = similarity.row_ranks[:, None, p], similarity.column_ranks[None, :, p]
        wrong = (scores < -_ROUNDING) | (scores > np.minimum(r, s) + _ROUNDING)
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            ranks = int(similarity.row_ranks[i, p]), int(similarity.column_ranks[j, p])
            raise HeadShapeError(
                f"{type(self).__name__}: {similarity.pairs[p]} of {similarity.row_labels[i]} and "
                f"{similarity.column_labels[j]} is {scores[i, j]:.6g}, and a projection kernel of "
                f"ranks {ranks[0]} and {ranks[1]} lies between 0 and {min(ranks)}; pass kernels as "
                "ProjectionKernel gives them, with their true ranks"
            )


def _nameless(n_heads: int) -> pd.DataFrame:
    """A heads table for rows or columns of a plain array."""
    return pd.DataFrame(
        {"source": "array", "layer": -1, "head": np.arange(n_heads), "kv_head": np.arange(n_heads)},
        index=pd.Index([f"H{i}" for i in range(n_heads)], dtype=object),
    )


def informativeness(similarity: Similarity, bins: int = 255) -> pd.Series:
    """Divergence of every pair kind's distribution from that of random subspaces.

    ``KL(random || observed)`` over equal bins between 0 and the largest value possible, with a
    normal reference of the exact Haar mean and variance. It says how little of the observed
    distribution lies where random subspaces would put it, and it depends on the number of bins.

    Parameters
    ----------
    similarity : Similarity
        From `ProjectionKernel` with ``normalize=None``, all heads of a role of one rank.
    bins : int, default=255
        Number of bins; 255 is the published choice.

    Returns
    -------
    Series
        In nats, indexed by pair kind.

    Raises
    ------
    ValueError
        If the unit is not the plain projection kernel, or ranks differ between heads.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> skhead.informativeness(similarity, bins=8).index.tolist()
    ['OQ', 'OK', 'OV']
    """
    if similarity.unit != "pk":
        raise ValueError(
            f"informativeness: needs a plain projection kernel (unit 'pk'), got "
            f"{similarity.unit!r}; use ProjectionKernel(normalize=None)"
        )
    divergences = {}
    for p, pair in enumerate(similarity.pairs):
        ranks = [np.unique(similarity.row_ranks[:, p]), np.unique(similarity.column_ranks[:, p])]
        if max(len(found) for found in ranks) > 1:
            raise ValueError(
                f"informativeness: the heads of pair {pair} have unequal ranks {ranks}, so that no "
                "single reference describes them; truncate with SubspaceExtractor(rank=...)"
            )
        r, s = (int(found[0]) for found in ranks)
        moments = haar_moments(r, s, free_dimension(similarity.d_model, similarity.record))
        listed = similarity.listed(pair)
        if np.isnan(listed).all():
            raise ValueError(
                f"informativeness: no {pair} pair is defined among these heads; use "
                "ProjectionKernel(layer_order='all') or heads of several layers"
            )
        divergences[pair] = gaussian_divergence(
            listed[~np.isnan(listed)],
            float(moments.mean),
            float(moments.variance),
            upper=float(min(r, s)),
            bins=bins,
        )
    return pd.Series(divergences, name="informativeness")
