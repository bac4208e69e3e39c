"""Features of the query-key space of a head, by contrast of pairs that agree and that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import TransformerMixin
from sklearn.metrics import roc_auc_score
from sklearn.utils.validation import check_is_fitted

from skhead._base import check_option
from skhead._callers import warn_user
from skhead._checks import check_count, check_number
from skhead._devices import check_device, resolve_device
from skhead._progress import reports_fit
from skhead._qk.decomposition import FeatureSums, Solver
from skhead._qk.doors import generator, open_pairs, open_vectors, refuse_not_finite
from skhead._qk.reading import FeatureReader
from skhead._qk.weights import WEIGHTINGS, classes_asked
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.exceptions import NoContrastError
from skhead.qk_pairs import QKPairs

__all__ = ["ContrastiveQKDecomposer"]

#: Properties of a decomposition that become attributes, one value per feature.
_SHOWN = (
    "rank", "singular_values", "explained_energy", "spectral_gap", "C_pos", "C_neg", "n_pos",
    "n_neg", "condition",
)  # fmt: skip


class ContrastiveQKDecomposer(TransformerMixin, FeatureReader):
    """Low-rank features of a head's queries and keys, found by contrasting second moments.

    For a feature such as the category of a word, take the mean outer product of query and key over
    pairs that agree on it, ``C_pos``, and over pairs that differ, ``C_neg``. The singular vectors
    of ``C_pos - C_neg`` span the directions of queries and of keys by which the head tells them
    apart [1]_. Attention scores are then split into what each feature contributes, and two keys can
    be made to trade places in a feature to see whether attention follows.

    Parameters
    ----------
    rank : int, float or "null", default=0.99
        Components of each feature: their number; the share of squared singular values that they
        reach, in (0, 1]; or those whose singular value exceeds what permuted labels give.
    center : bool, default=False
        Whether to take the product of mean query and mean key off, per kind of pair, which leaves
        covariances. The published method does not.
    whiten : None or "qk", default=None
        "qk" decomposes the contrast in units of the queries' and keys' own second moments, as in
        canonical correlation. What comes out is the same for all maps of queries and keys that
        leave every score ``q @ k`` as it is; without it, singular values and subspaces depend on
        the basis in which the head happens to be written.
    pair_weighting : {"pair", "query", "released"}, default="pair"
        What counts alike within each kind: every pair; every query, however many keys it has; or
        sums divided by the number of queries as in the code released with [1]_, whose contrast is
        dominated by mean keys where negatives outnumber positives.
    per_class : bool, default=False
        Whether to contrast the queries of every class on their own, as [1]_ does with categories,
        and to join their subspaces in `union_query_components_` and `union_key_components_`.
    union_tol : float, default=0.1
        Where the components of several features are joined, also to exchange keys in all of them,
        singular values below this share of the largest one are dropped: contrasts of classes sum to
        nearly zero, so that their union has one dimension less.
    attribution : {"oblique", "query"}, default="oblique"
        How scores are split: by projectors along both subspaces of a feature, whatever the order of
        features; or by projecting the query on one feature after the other, as in [1]_.
    alpha : float, default=0.01
        For ``rank="null"``: probability of keeping a component where labels mean nothing.
    n_permutations : int, default=199
        For ``rank="null"``: permutations of labels, each as much work as the fit itself. Pairs of
        one context (and group) exchange theirs; contexts with pairs of one kind exchange them as
        wholes, with each other.
    device : str, torch.device or None, default=None
        Where sums are formed; cuda if present, else the CPU.
    random_state : int, RandomState instance or None, default=None
        Seeds permutations and random subspaces.

    Attributes
    ----------
    feature_names_ : list of str
    decompositions_ : dict of str to Decomposition
        All that is known of each feature.
    query_components_, key_components_ : ndarray of shape (n_components, d_head)
        Orthonormal rows of each feature, features one behind the other.
    component_features_ : list of str
        The feature of every component.
    rank_ : int, or ndarray of shape (n_features,)
        Here and below: one value for one feature, an array or list for several.
    singular_values_ : ndarray of shape ([n_features,] d_head)
    explained_energy_ : float, or ndarray of shape (n_features,)
        Share of squared singular values in the components.
    spectral_gap_ : float, or ndarray of shape (n_features,)
        Last singular value kept over the first dropped; NaN if there is none of either.
    C_pos_, C_neg_ : ndarray of shape ([n_features,] d_head, d_head)
        Mean outer products of query and key.
    n_pos_, n_neg_ : int, or ndarray of shape (n_features,)
        Pairs that counted.
    cross_gram_ : ndarray of shape (rank, rank), or list of such
        Inner products of key components with query components.
    condition_ : float, or ndarray of shape (n_features,)
        Condition number of `cross_gram_`.
    null_singular_values_ : ndarray of shape ([n_features,] n_permutations)
        Largest singular values of permuted labels; with ``rank="null"`` only.
    union_query_components_, union_key_components_ : ndarray of shape (n_union, d_head)
        What all features span together.
    n_queries_seen_ : int
    d_head_ : int
    head_ : str
        Label of the head.
    scale_ : float
        What the head multiplies ``q @ k`` with.
    n_features_in_ : int
        Columns of an array of pairs, ``2 * d_head``.

    See Also
    --------
    collect_qk : Queries and keys of the heads of a running model.
    QKTransformer : A scaler, or any other transformer, of queries and keys.

    Notes
    -----
    Queries and keys are those that enter the dot product. Features that vary together are not told
    apart, unless `QKPairs` names what must be held fixed in ``key_groups``. With the latter only
    contexts and groups with pairs of both kinds count, and pairs that differ weigh as much as those
    of their stratum that agree.

    The null takes pairs of different contexts for independent. Where the same words come back in
    many prompts they are not, and a component may stand for words rather than for their label:
    score on words that were not fitted. Whitening enlarges directions that hardly vary, so that a
    share of energy counts noise there; take it with ``rank="null"``.

    Memory is that of ``d_head**2`` numbers per feature, `n_permutations` times that with a null;
    time ``2 n_pairs d_head**2`` flops.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> import skhead
    >>> from skhead.datasets import load_payload_head, make_contrast_pairs
    >>> head = load_payload_head("d16-r3-r5")
    >>> pairs = make_contrast_pairs("z1", 5000, head=head, random_state=0)
    >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
    >>> decomposer.rank_
    3
    >>> decomposer.transform(pairs).shape
    (5000, 3)
    """

    def __init__(
        self,
        rank: int | float | str = 0.99,
        center: bool = False,
        whiten: str | None = None,
        pair_weighting: str = "pair",
        per_class: bool = False,
        union_tol: float = 0.1,
        attribution: str = "oblique",
        alpha: float = 0.01,
        n_permutations: int = 199,
        device: torch.device | str | None = None,
        random_state: Any = None,
    ) -> None:
        self.rank = rank
        self.center = center
        self.whiten = whiten
        self.pair_weighting = pair_weighting
        self.per_class = per_class
        self.union_tol = union_tol
        self.attribution = attribution
        self.alpha = alpha
        self.n_permutations = n_permutations
        self.device = device
        self.random_state = random_state

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> ContrastiveQKDecomposer:
        """Contrast pairs that agree with pairs that differ.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
            In an array, each row is a query followed by one key.
        y : array of shape (n_queries,) or (n_queries, n_features), or None, default=None
            For `QKPairs`, other labels of the queries. For an array, whether each pair agrees:
            booleans, or 0 and 1; needed there.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, there are fewer than two queries, a feature has pairs of
            one kind only, or labels have the wrong length.
        NoContrastError
            If a feature makes no difference, or in fewer directions than `rank`.
        HeadShapeError
            If an array has an odd number of columns.
        DegenerateHeadError
            If queries or keys hold NaN or infinite values.
        """
        for name in [name for name in vars(self) if name.endswith("_") or name == "_sums"]:
            delattr(self, name)
        solver = self._solver()
        self._add(open_pairs(self, X, y, reset=True, labelled=True), solver, whole=True)
        self._solve(solver, strict=True)
        return self

    def fit_pairs(self, Q_pos: Any, K_pos: Any, Q_neg: Any, K_neg: Any) -> ContrastiveQKDecomposer:
        """Contrast pairs whose negatives have queries of their own; see `QKPairs.from_pairs`.

        Parameters
        ----------
        Q_pos, K_pos : array of shape (n_pos, d_head)
        Q_neg, K_neg : array of shape (n_neg, d_head)

        Returns
        -------
        self

        Examples
        --------
        >>> import numpy as np
        >>> import skhead
        >>> rng = np.random.default_rng(0)
        >>> Q = rng.normal(size=(400, 8))
        >>> agreeing = 3 * Q[:200] * (np.arange(8) < 2) + rng.normal(size=(200, 8))
        >>> others = rng.normal(size=(200, 8))
        >>> decomposer = skhead.ContrastiveQKDecomposer(rank=2)
        >>> decomposer.fit_pairs(Q[:200], agreeing, Q[200:], others).summary()["rank"].tolist()
        [2]
        """
        return self.fit(QKPairs.from_pairs(Q_pos, K_pos, Q_neg, K_neg))

    def partial_fit(self, X: Any, y: Any = None) -> ContrastiveQKDecomposer:
        """Add pairs to those that were seen; the keys of one query must come together.

        A feature is decomposed as soon as it has pairs of both kinds, and directions enough. Pairs
        that are refused leave the sums as they were. With ``rank="null"`` labels are permuted among
        the pairs that come together, which must be of both kinds.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
        y : array of shape (n_queries,) or (n_queries, n_features), or None, default=None
            As for `fit`.

        Returns
        -------
        self
        """
        solver = self._solver()
        first = not hasattr(self, "_sums")
        pairs = open_pairs(self, X, y, reset=first, labelled=True)
        self._add(pairs, solver, whole=False)
        self._solve(solver, strict=False)
        return self

    @reports_fit
    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Fit, and give the coordinates of the queries; see `fit` and `transform`.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
        y : array of shape (n_queries,) or (n_queries, n_features), or None, default=None
        **fit_params : ignored

        Returns
        -------
        ndarray of shape (n_queries, n_components)
        """
        return self.fit(X, y).transform(X)

    def transform(self, X: Any) -> Any:
        """Coordinates of queries in the query subspaces of all features.

        Parameters
        ----------
        X : QKPairs, array of shape (n_queries, d_head), or array of shape (n_pairs, 2 * d_head)
            Of pairs, the queries.

        Returns
        -------
        ndarray of shape (n_queries, n_components)
            What ``set_output`` asks for, if it has been called.
        """
        check_is_fitted(self, "decompositions_")
        return open_vectors(self, X, "queries") @ self.query_components_.T

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the coordinates, such as ``"category_0"``.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_components,)
        """
        check_is_fitted(self, "decompositions_")
        names = [
            f"{name}_{i}" for name, found in self.decompositions_.items() for i in range(found.rank)
        ]
        return np.asarray(names, dtype=object)

    def summary(self) -> pd.DataFrame:
        """What was found of each feature, a row per feature.

        Returns
        -------
        DataFrame
            Columns ``n_queries, n_pos, n_neg``, ``rank``, ``rank_share`` (of d_head), ``energy``,
            ``gap``, ``condition`` and ``null_threshold``.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> decomposer.summary()["rank"].to_dict()
        {'z1': 3, 'z2': 5}
        """
        check_is_fitted(self, "decompositions_")
        rows = {
            name: {
                "n_queries": found.n_queries,
                "n_pos": found.n_pos,
                "n_neg": found.n_neg,
                "rank": found.rank,
                "rank_share": found.rank / self.d_head_,
                "energy": found.explained_energy,
                "gap": found.spectral_gap,
                "condition": found.condition,
                "null_threshold": found.null_threshold,
            }
            for name, found in self.decompositions_.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("feature")

    def score(self, X: Any, y: Any = None) -> float:
        """Area under the ROC curve of a feature's scores, for pairs that agree against the others.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
        y : array of shape (n_queries,) or (n_queries, n_features), or None, default=None
            As for `fit`.

        Returns
        -------
        float
            Mean over features; 1 if every pair that agrees scores above all that differ, 0.5 by
            chance, and for a feature without components.

        Raises
        ------
        ValueError
            If a feature has pairs of one kind only.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> decomposer.score(pairs) > 0.9
        True
        """
        check_is_fitted(self, "decompositions_")
        pairs = open_pairs(self, X, y, labelled=True)
        if pairs.features != self._columns:
            raise ValueError(
                f"{self._name}: was fitted on the features {', '.join(self._columns)}, and these "
                f"pairs have {', '.join(pairs.features)}"
            )
        parts, _ = self._split(self._own(pairs), self.decompositions_, pairs.scale)
        areas = []
        named = {sums.name: sums for sums in self._sums.values()}
        for place, name in enumerate(self.decompositions_):
            sums = named[name]
            kinds = sums.weigh(pairs).kinds
            used = kinds >= 0
            if len(np.unique(kinds[used])) < 2:
                if sums.asked is not None and not used.any():
                    continue
                raise ValueError(
                    f"{self._name}: feature {name!r} has {np.sum(kinds == 1)} pairs that agree and "
                    f"{np.sum(kinds == 0)} that differ; a score needs both"
                )
            areas.append(roc_auc_score(kinds[used], parts[used, place]))
        if not areas:
            raise ValueError(
                f"{self._name}: no query looks for one of {', '.join(named)}; a score needs "
                "pairs of a class that was fitted"
            )
        return float(np.mean(areas))

    def _add(self, pairs: QKPairs, solver: Solver, whole: bool) -> None:
        """Add pairs to the sums, all or none; if they are the whole, there must be a contrast."""
        if not hasattr(self, "_sums"):
            self._begin(pairs, solver)
        self._check_stream(pairs, solver)
        if whole and len(pairs) < 2:
            raise ValueError(
                f"{self._name}: too few queries, n_samples={len(pairs)}; a contrast needs at least "
                "two"
            )
        found = self._sums_of(pairs, solver)
        if whole and not found:
            raise ValueError(f"{self._name}: no query has a label; there is nothing to contrast")
        parts = []
        for sums in found:
            weighted = sums.weigh(pairs)
            if whole and not (weighted.count(1) and weighted.count(0)):
                grouped = " among keys of one context and group" if self._grouped else ""
                raise ValueError(
                    f"{self._name}: feature {sums.name!r} has {weighted.count(1)} pairs that agree "
                    f"and {weighted.count(0)} that differ{grouped}; a contrast needs both"
                )
            try:
                parts.append(sums.part(pairs, weighted, self._rng))
            except NoContrastError as error:
                raise NoContrastError(f"{self._name}: feature {sums.name!r}: {error}") from None
            if not parts[-1].finite:
                refuse_not_finite(pairs, self._name)
        for sums, part in zip(found, parts, strict=True):
            sums.add(part)
            self._sums[sums.column, sums.asked] = sums
        self.n_queries_seen_ += len(pairs)

    def _begin(self, pairs: QKPairs, solver: Solver) -> None:
        self.d_head_, self.head_, self.scale_ = pairs.d_head, pairs.head, pairs.scale
        self.n_queries_seen_ = 0
        self._sums: dict[tuple[int, Any], FeatureSums] = {}
        self._columns, self._grouped = pairs.features, pairs.key_groups is not None
        self._summed = solver.summed
        self._rng = generator(self.random_state)

    def _check_stream(self, pairs: QKPairs, solver: Solver) -> None:
        """Refuse pairs, or parameters, that do not go with what was summed before."""
        if (pairs.head, pairs.features) != (self.head_, self._columns):
            raise ValueError(
                f"{self._name}: was fitted on {self.head_ or 'a head'} with the features "
                f"{', '.join(self._columns)}, and these pairs are of {pairs.head or 'a head'} with "
                f"{', '.join(pairs.features)}; fit them on their own"
            )
        for name, value in solver.summed.items():
            if value != self._summed[name]:
                raise ValueError(
                    f"{self._name}: {name} was {self._summed[name]} when the sums were begun, and "
                    f"is {value} now; begin again with fit"
                )

    def _sums_of(self, pairs: QKPairs, solver: Solver) -> list[FeatureSums]:
        """The sums that these pairs go into: those that there are, and new ones for new classes."""
        found = dict(self._sums)
        names = {sums.name: key for key, sums in found.items()}
        device = resolve_device(self.device, self._name)
        for column, feature in enumerate(pairs.features):
            asked = classes_asked(pairs, column) if self.per_class else [None]
            for key in [(column, label) for label in asked if (column, label) not in found]:
                alone = len(pairs.features) == 1
                label = _label_text(key[1])
                named = label if alone else f"{feature}={label}"
                name = named if self.per_class else feature
                if name in names:
                    raise ValueError(
                        f"{self._name}: two classes are called {name!r}, {names[name][1]!r} and "
                        f"{key[1]!r}; give labels of one type"
                    )
                names[name] = key
                found[key] = FeatureSums.empty(name, *key, self.d_head_, solver, device)
        return list(found.values())

    def _solve(self, solver: Solver, strict: bool) -> None:
        """Decompose what can be; if strict, everything."""
        found = {}
        for sums in self._sums.values():
            try:
                if strict or (sums.complete and self.n_queries_seen_ > 1):
                    found[sums.name] = solver.solve(sums, self._name)
            except NoContrastError:
                if strict:
                    raise
        if not found:
            return
        self.feature_names_ = list(found)
        self.decompositions_ = found
        parts = list(found.values())
        self.query_components_ = np.concatenate([part.query_components for part in parts])
        self.key_components_ = np.concatenate([part.key_components for part in parts])
        self.component_features_ = [name for name, part in found.items() for _ in range(part.rank)]
        for name in _SHOWN:
            values = [getattr(part, name) for part in parts]
            setattr(self, f"{name}_", values[0] if len(values) == 1 else np.asarray(values))
        grams = [part.cross_gram for part in parts]
        self.cross_gram_ = grams[0] if len(grams) == 1 else grams
        self.union_query_components_ = self._subspace((), "query_components").T
        self.union_key_components_ = self._subspace((), "key_components").T
        if self.rank == "null":
            nulls = [part.null_singular_values for part in parts]
            self.null_singular_values_ = nulls[0] if len(nulls) == 1 else np.asarray(nulls)

    def _solver(self) -> Solver:
        """Checked parameters."""
        name, rank = self._name, self._checked_rank()
        check_device(self.device, name)
        check_option("pair_weighting", self.pair_weighting, WEIGHTINGS, name)
        check_option("whiten", self.whiten, (None, "qk"), name)
        check_option("attribution", self.attribution, ("oblique", "query"), name)
        for option in ("alpha", "union_tol"):
            if not 0 < check_number(option, getattr(self, option), name) < 1:
                raise ValueError(
                    f"{name}: {option} must be between 0 and 1, got {getattr(self, option)!r}"
                )
        check_count("n_permutations", self.n_permutations, name)
        if rank == "null" and (self.n_permutations + 1) * self.alpha < 1:
            raise ValueError(
                f"{name}: {self.n_permutations} permutations cannot reach alpha={self.alpha}; take "
                f"at least {int(np.ceil(1 / self.alpha)) - 1}"
            )
        if self.pair_weighting == "released":
            warn_user(
                f"{name}: pair_weighting='released' divides sums over pairs by the number of "
                "queries, so that the kind with more pairs weighs more; unless contexts hold as "
                "many pairs of both kinds, mean queries and keys come out as the feature",
            )
        return Solver(
            rank,
            self.center,
            self.whiten is not None,
            self.pair_weighting,
            self.per_class,
            self.n_permutations,
            self.alpha,
        )

    def _checked_rank(self) -> int | float | str:
        rank: Any = self.rank
        if isinstance(rank, np.integer | np.floating):
            rank = rank.item()
        share = isinstance(rank, float) and 0 < rank <= 1
        number = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if not (share or number or rank == "null"):
            raise ValueError(
                f"{self._name}: rank must be a positive integer, a share of energy in (0, 1] or "
                f"'null'; got {self.rank!r}"
            )
        found: int | float | str = rank
        return found

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return declare(tags, HeadTags(("pairs",)))


def _label_text(label: Any) -> str:
    """A label in words; whole numbers alike, whatever their type."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)
