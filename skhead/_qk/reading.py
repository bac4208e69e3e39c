"""What fitted features of a head say of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skhead._callers import warn_user
from skhead._checks import check_count
from skhead._estimators import SkheadEstimator
from skhead._qk.decomposition import Decomposition
from skhead._qk.doors import generator, open_pairs, open_vectors
from skhead._qk.interventions import (
    ALL,
    NONE,
    Choices,
    Swapped,
    check_conditions,
    measure_swap,
    random_conditions,
    swap_in_subspace,
)
from skhead.linalg.contrast import oblique_logits, sequential_logits, union_basis
from skhead.qk_pairs import QKPairs

__all__ = ["FeatureReader"]

#: Columns of a table of parts beside the features.
_COLUMNS = ("query", "residual", "total")
#: Cosine between query and key components below which an oblique projector is not to be trusted.
_ILL = 1e-4


class FeatureReader(SkheadEstimator):
    """Methods of an estimator that knows the query and key subspaces of features.

    Attributes
    ----------
    attribution : {"oblique", "query"}
    union_tol : float
    random_state : int, RandomState instance or None
    decompositions_ : dict of str to Decomposition
    key_components_ : ndarray of shape (n_components, d_head)
    d_head_ : int
    head_ : str
    """

    attribution: str
    union_tol: float
    random_state: Any
    decompositions_: Mapping[str, Decomposition]
    feature_names_: list[str]
    key_components_: NDArray[np.float64]
    d_head_: int
    head_: str

    def transform_keys(self, X: Any) -> NDArray[np.float64]:
        """Coordinates of keys in the key subspaces of all features.

        Parameters
        ----------
        X : QKPairs, array of shape (n_keys, d_head), or array of shape (n_pairs, 2 * d_head)

        Returns
        -------
        ndarray of shape (n_keys, n_components)

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> decomposer.transform_keys(pairs).shape
        (8000, 8)
        """
        check_is_fitted(self, "decompositions_")
        found: NDArray[np.float64] = open_vectors(self, X, "keys") @ self.key_components_.T
        return found

    def key_subspace(self, *names: str) -> NDArray[np.float64]:
        """Orthonormal basis of what the key components of some features span together.

        Directions that are weak in them all are dropped, as `union_tol` says.

        Parameters
        ----------
        *names : str
            Features; all of them if none is named.

        Returns
        -------
        ndarray of shape (d_head, rank)

        Raises
        ------
        ValueError
            If there is no such feature.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> decomposer.key_subspace("z1").shape
        (16, 3)
        """
        return self._subspace(names, "key_components")

    def attribute(
        self, X: Any, others: Sequence[FeatureReader] = (), scale: float | None = None
    ) -> pd.DataFrame:
        """Split the attention score of every pair into what each feature contributes.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
            Labels are not looked at.
        others : sequence of ContrastiveQKDecomposer, default=()
            Further features of the same head, fitted on pairs of their own.
        scale : float or None, default=None
            Multiplies ``q @ k``; that of `QKPairs` by default, or ``1 / sqrt(d_head)``.

        Returns
        -------
        DataFrame of n_keys rows
            Columns ``query`` (its number), one per feature, ``residual`` and ``total``; features
            and residual sum to the total exactly.

        Raises
        ------
        ValueError
            If two features have the same name, one has that of another column, or a decomposer is
            of another head.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> table = decomposer.attribute(pairs[:2])
        >>> table.columns.tolist()
        ['query', 'z1', 'z2', 'residual', 'total']
        >>> len(table)
        32
        """
        check_is_fitted(self, "decompositions_")
        pairs = self._own(open_pairs(self, X))
        features = self._joined(others)
        taken = set(_COLUMNS) & set(features)
        if taken:
            raise ValueError(
                f"{self._name}.attribute: feature {min(taken)!r} has the name of another column of "
                "the table; call it otherwise in QKPairs"
            )
        parts, total = self._split(pairs, features, pairs.scale if scale is None else scale)
        table = pd.DataFrame({"query": pairs.query_index})
        table[list(features)] = parts
        table["residual"] = total - parts.sum(axis=1)
        table["total"] = total
        return table

    def explained_share(self, X: Any, others: Sequence[FeatureReader] = ()) -> NDArray[np.float64]:
        """Share of the squared attention scores of each query that features account for.

        Parameters
        ----------
        X : QKPairs, or array of shape (n_pairs, 2 * d_head)
        others : sequence of ContrastiveQKDecomposer, default=()
            As for `attribute`.

        Returns
        -------
        ndarray of shape (n_queries,)
            ``1 - sum(residual**2) / sum(total**2)`` over its keys: 1 where nothing is left, NaN
            for a query without keys.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> share = decomposer.explained_share(pairs[:50])
        >>> share.shape, bool(share.mean() > 0.8)
        ((50,), True)
        """
        check_is_fitted(self, "decompositions_")
        pairs = self._own(open_pairs(self, X))
        parts, total = self._split(pairs, self._joined(others), pairs.scale)
        left, whole = (
            np.bincount(pairs.query_index, scores**2, minlength=len(pairs))
            for scores in (total - parts.sum(axis=1), total)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 - left / whole

    def swap(self, keys: Any, i: Any, j: Any, features: Sequence[str] = ()) -> NDArray[np.floating]:
        """Exchange the coordinates of two keys in the key subspaces of features.

        Parameters
        ----------
        keys : array of shape (n_keys, d_head)
        i, j : int, or array of int
            Rows to exchange, pair by pair; none twice.
        features : sequence of str, default=()
            All features by default.

        Returns
        -------
        ndarray of shape (n_keys, d_head)
            A new array.

        Raises
        ------
        ValueError
            If a row is named twice, or there is no such feature.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> import numpy as np
        >>> swapped = decomposer.swap(pairs.keys, 0, 1, ["z1"])
        >>> bool(np.allclose(swapped[0] + swapped[1], pairs.keys[0] + pairs.keys[1], atol=1e-4))
        True
        """
        check_is_fitted(self, "decompositions_")
        changed = np.array(open_vectors(self, keys, "keys"))
        first, second = (np.atleast_1d(np.arange(len(changed))[rows]) for rows in (i, j))
        named = np.concatenate([first, second])
        if len(first) != len(second) or len(np.unique(named)) != len(named):
            raise ValueError(
                f"{self._name}.swap: i and j must name equally many keys, none of them twice; got "
                f"{i!r} and {j!r}"
            )
        basis = self.key_subspace(*features)
        changed[first], changed[second] = swap_in_subspace(changed[first], changed[second], basis)
        return changed

    def intervene(
        self,
        X: Any,
        original: Any = "attended",
        target: Any = None,
        n_random: int = 10,
        random_state: Any = None,
    ) -> pd.DataFrame:
        """Exchange the attended key with another one in each feature, and see where attention goes.

        Random subspaces of equal rank are exchanged as well. They say little where the rank is a
        large share of d_head: exchanging all dimensions moves all attention whatever they mean.

        Parameters
        ----------
        X : QKPairs
            Contexts of several keys.
        original : "attended", "agreeing", int, or array of shape (n_queries,), default="attended"
            The key with the largest score; the one with the largest among those that agree with the
            query on every feature; or its place among the keys of each query.
        target : int, array of shape (n_queries,) of int, or None, default=None
            Place of the key to exchange it with; by default one drawn among those that differ from
            the query on every feature. Queries without these two keys are left out, as
            ``n_queries`` tells.
        n_random : int, default=10
            Random subspaces of each rank; 0 for none.
        random_state : int, RandomState instance, Generator or None, default=None
            Seeds targets and random subspaces; the estimator's own by default.

        Returns
        -------
        DataFrame
            Index ``condition``: "none", each feature, "all" where there are several, and
            ``"random (rank r)"``. Attention is that among the keys of the pairs; a model has other
            tokens besides. Columns ``rank``, ``rank_share`` (of d_head), mean
            ``attention_original`` and ``attention_target``, ``shift`` (mean change of the target's
            share of the attention on both), ``rate_original`` and ``rate_target`` (how often each
            has the most attention), ``flip_rate`` (the original had the most, and the target has it
            then), ``n_queries`` and ``n_draws``.

        Raises
        ------
        TypeError
            If X is no `QKPairs`.
        ValueError
            If no query has a key to exchange with, or a feature is called "none" or "all".

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head)
        >>> decomposer = skhead.ContrastiveQKDecomposer().fit(pairs)
        >>> found = decomposer.intervene(pairs[:50], random_state=0)
        >>> found.loc[["none", "z1"], "rank"].tolist()
        [0, 3]
        """
        check_is_fitted(self, "decompositions_")
        caller = f"{self._name}.intervene"
        if not isinstance(X, QKPairs):
            raise TypeError(
                f"{caller}: needs QKPairs, whose queries choose from several keys; got "
                f"{type(X).__name__}"
            )
        pairs = self._own(open_pairs(self, X))
        check_count("n_random", n_random, caller, smallest=0)
        check_conditions(self.feature_names_, caller)
        rng = generator(self.random_state if random_state is None else random_state)
        choices = Choices.of(pairs, original, target, rng, caller)
        bases = {NONE: np.zeros((self.d_head_, 0))}
        bases |= {name: self.key_subspace(name) for name in self.feature_names_}
        if len(self.feature_names_) > 1:
            bases[ALL] = self.key_subspace()
        draws: dict[str, list[NDArray[np.floating]]] = {
            name: [basis] for name, basis in bases.items()
        }
        draws |= random_conditions(bases.values(), self.d_head_, n_random, rng)
        before = measure_swap(pairs, choices, bases[NONE])
        rows = {
            name: {"rank": drawn[0].shape[1], "rank_share": drawn[0].shape[1] / self.d_head_}
            | _means([measure_swap(pairs, choices, basis) for basis in drawn], before)
            | {"n_queries": len(choices.queries), "n_draws": len(drawn)}
            for name, drawn in draws.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")

    def _own(self, pairs: QKPairs) -> QKPairs:
        """Pairs, unless they are of another head than the fitted one."""
        if pairs.head and self.head_ and pairs.head != self.head_:
            raise ValueError(
                f"{self._name}: was fitted on {self.head_}, and these pairs are of {pairs.head}; "
                "heads have no space in common"
            )
        return pairs

    def _subspace(self, names: Sequence[str], side: str) -> NDArray[np.float64]:
        """What components of some features, or of all, span together, ``(d_head, rank)``."""
        check_is_fitted(self, "decompositions_")
        chosen = names or self.feature_names_
        unknown = [name for name in chosen if name not in self.decompositions_]
        if unknown:
            raise ValueError(
                f"{self._name}: has the features {', '.join(self.feature_names_)}, not "
                f"{unknown[0]!r}"
            )
        bases = [
            torch.from_numpy(getattr(self.decompositions_[name], side).T.copy()) for name in chosen
        ]
        found: NDArray[np.float64] = union_basis(bases, self.union_tol).numpy()
        return found

    def _joined(self, others: Sequence[FeatureReader]) -> dict[str, Decomposition]:
        """Features of this and other decomposers of the same head."""
        joined = dict(self.decompositions_)
        for other in others:
            check_is_fitted(other, "decompositions_")
            if (other.d_head_, other.head_) != (self.d_head_, self.head_):
                raise ValueError(
                    f"{self._name}: others must be fitted on the same head, "
                    f"{self.head_ or 'unnamed'} of d_head {self.d_head_}; one is of "
                    f"{other.head_ or 'an unnamed one'} of d_head {other.d_head_}"
                )
            twice = set(joined) & set(other.decompositions_)
            if twice:
                raise ValueError(
                    f"{self._name}: two decomposers have a feature {min(twice)!r}; give features "
                    "different names in QKPairs"
                )
            joined |= other.decompositions_
        return joined

    def _split(
        self, pairs: QKPairs, features: Mapping[str, Decomposition], scale: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Part of every score in every feature, ``(n, n_features)``, and the scores ``(n,)``."""
        query = torch.from_numpy(pairs.queries[pairs.query_index].astype(np.float64))
        key = torch.from_numpy(pairs.keys.astype(np.float64))
        total = scale * (query * key).sum(1).numpy()
        bases = [
            tuple(torch.from_numpy(side.T) for side in (f.query_components, f.key_components))
            for f in features.values()
        ]
        if self.attribution == "query":
            parts = sequential_logits(query, key, [basis for basis, _ in bases])
            return scale * parts.numpy(), total
        for name, feature in features.items():
            if feature.least_cosine < _ILL:
                warn_user(
                    f"{self._name}: query and key components of feature {name!r} are nearly "
                    f"orthogonal somewhere (cosine {feature.least_cosine:.1g}), so that its share "
                    "of the scores is not well defined; lower the rank",
                )
        parts = torch.stack([oblique_logits(query, key, *basis) for basis in bases], dim=1)
        return scale * parts.numpy(), total

    @property
    def _name(self) -> str:
        return type(self).__name__


def _means(found: list[Swapped], before: Swapped) -> dict[str, float]:
    """Means over draws and queries of what exchanging keys has done."""
    attention = np.mean([swapped.attention for swapped in found], axis=(0, 1))
    largest = np.mean([swapped.largest for swapped in found], axis=(0, 1))
    flips = [before.largest[:, 0] & swapped.largest[:, 1] for swapped in found]
    return {
        "attention_original": float(attention[0]),
        "attention_target": float(attention[1]),
        "shift": float(np.mean([swapped.share - before.share for swapped in found])),
        "rate_original": float(largest[0]),
        "rate_target": float(largest[1]),
        "flip_rate": float(np.mean(flips)),
    }
