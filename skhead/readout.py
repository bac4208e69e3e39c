"""Which tokens the subspaces of heads point at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils import TransformerTags
from sklearn.utils.validation import check_is_fitted

from skhead._base import (
    ANONYMOUS,
    ROLES,
    HeadEstimator,
    HeadInput,
    check_option,
    check_processable,
    check_same_record,
    extract_subspaces,
    open_door,
)
from skhead._checks import check_count
from skhead._devices import check_device
from skhead._inputs import (
    Processing,
    check_ids,
    given_vectors,
    token_columns,
    token_matrix,
    token_texts,
)
from skhead._progress import progress_bar, reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags
from skhead.containers import Subspaces
from skhead.exceptions import HeadTableError
from skhead.linalg.precision import fast_float32_matmul
from skhead.weights import head_labels

__all__ = ["SubspaceReadout"]

ORDERS = ("center-normalize", "normalize-center", "center", "normalize", "none")
#: Bytes of scratch for the tokens that are handled at once.
_SCRATCH = 2**27

Vocabulary = Callable[[int], str] | Sequence[str] | Mapping[int, str]


class SubspaceReadout(HeadEstimator):
    """Tokens nearest the subspaces of heads.

    A token t with the vector e_t scores ``||B^T e_t||`` against a head whose subspace has the
    orthonormal basis B. In which order the token vectors are centred (their mean over the
    vocabulary taken off) and normalised (brought to length 1) decides what comes out. Logits are
    compared between tokens, so that the mean vector, common to all, says nothing: it must go first.
    Normalised afterwards, every score is the cosine of the angle between token and subspace, from 0
    to 1, and long vectors, mostly of frequent tokens, have no advantage. Normalised first, the mean
    that is taken off is that of directions, and the result has no fixed length. The other orders
    are there to be compared.

    Parameters
    ----------
    role : {"O", "Q", "K", "V"}, default="O"
        Whose subspace: O is what a head writes, Q, K and V what it reads.
    order : str, default="center-normalize"
        "center-normalize", "normalize-center", "center", "normalize" or "none".
    n_tokens : int, default=10
        How many tokens `top_tokens` lists for each head.
    matrix : {"auto", "unembedding", "embedding"}, default="auto"
        Which vectors tokens have: those that read logits off the stream, or those that tokens put
        on it. "auto" takes the unembedding for O and the embedding for Q, K and V.
    tokens : sequence of int or None, default=None
        Token ids that are scored; all by default. Mean vectors are always those of all tokens.
    vocabulary : callable, sequence, mapping or None, default=None
        Text of each token id, for the tables and for the names of features.
    rank : int, float or None, default=None
        As for `SubspaceExtractor`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`, applied to the token vectors too.
    device : str, torch.device or None, default=None
        Where to compute.

    Attributes
    ----------
    source_ : str or None
        Model of the fitted heads, whose tokens are read; None for vectors given to `fit`.
    tokens_ : ndarray of shape (n_scored_tokens,), int64
        Token ids that are scored.
    n_vocab_ : int
        Number of tokens of the model.
    d_model_ : int
        Dimension of the residual stream.

    References
    ----------
    The projection of the unembedding on head subspaces, centred before it is normalised, is that of
    the projection kernel's paper; see `ProjectionKernel`.

    Examples
    --------
    >>> import skhead
    >>> from skhead.readout import SubspaceReadout
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> readout = SubspaceReadout(n_tokens=2).fit(heads)
    >>> readout.transform(heads).shape
    (16, 68)
    >>> readout.top_tokens(heads.loc[["L1H0"]])[["head", "rank", "token"]].values.tolist()
    [['L1H0', 1, 65], ['L1H0', 2, 66]]
    """

    head_tags = HeadTags(
        ("table", "subspaces", "roles", "stack"),
        invariant_to=("rotation", "head_rotation", "gauge", "scale"),
        one_model=True,
    )

    def __init__(
        self,
        role: str = "O",
        order: str = "center-normalize",
        n_tokens: int = 10,
        *,
        matrix: str = "auto",
        tokens: Sequence[int] | None = None,
        vocabulary: Vocabulary | None = None,
        rank: int | float | None = None,
        fold_norm: bool = False,
        center: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.role = role
        self.order = order
        self.n_tokens = n_tokens
        self.matrix = matrix
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.rank = rank
        self.fold_norm = fold_norm
        self.center = center
        self.device = device

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float32"])
        return tags

    @reports_fit
    def fit(self, X: Any, y: Any = None, vectors: Any = None) -> SubspaceReadout:
        """Take the tokens of the heads' model.

        Parameters
        ----------
        X : Subspaces, DataFrame, array or Tensor
            Subspaces or a heads table of one model; or a stack ``(n_heads, d_model, d_head)`` or
            ``(n_heads, 4, d_model, d_head)``, which needs `vectors`.
        y : ignored
        vectors : array or Tensor of shape (n_vocab, d_model), default=None
            Token vectors to use in place of the model's.

        Returns
        -------
        SubspaceReadout

        Raises
        ------
        HeadTableError
            If the heads are of several models, or of none and no vectors are given.
        HeadShapeError
            If the vectors have another width than the heads.
        UnsupportedLayoutError
            If the model's file holds no such vectors; the error names the tensor.
        ValueError
            If a parameter is out of range, or a stack is to be processed as only a model's weights
            can be.
        """
        name = type(self).__name__
        check_device(self.device, name, float64=True)
        check_option("role", self.role, tuple(ROLES), name)
        check_option("order", self.order, ORDERS, name)
        check_option("matrix", self.matrix, ("auto", "unembedding", "embedding"), name)
        check_count("n_tokens", self.n_tokens, name)
        heads = X.heads if isinstance(X, Subspaces) else self._open(X).heads
        self.d_model_ = int(heads["d_model"].iloc[0])
        self._vectors = (
            None if vectors is None else given_vectors(vectors, "vectors", self.d_model_, name)
        )
        self.source_ = self._only_source(heads) if vectors is None else None
        self.n_vocab_ = len(self._token_vectors())
        self.tokens_ = check_ids(self.tokens, self.n_vocab_, "tokens", name)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Score every token against every head.

        Parameters
        ----------
        X : Subspaces, DataFrame, array or Tensor
            As for `fit`, of the same model or width.

        Returns
        -------
        ndarray of shape (n_heads, n_scored_tokens), float32
            A DataFrame after ``set_output(transform="pandas")``. With many heads and a large
            vocabulary, name the tokens in question, or use `top_tokens`, which holds no such
            table.

        Raises
        ------
        HeadTableError, HeadShapeError, ProvenanceMismatchError
            If the heads are of another model or width, or were processed in another way.
        """
        bases, index, _ = self._bases(X)
        found = np.empty((len(index), len(self.tokens_)), dtype=np.float32)
        for columns, scores in self._score_blocks(bases):
            found[:, columns] = scores.float().cpu().numpy()[index]
        return found

    def top_tokens(self, X: Any, n_tokens: int | None = None) -> pd.DataFrame:
        """List the tokens of largest score for every head.

        Parameters
        ----------
        X : Subspaces, DataFrame, array or Tensor
            As for `transform`.
        n_tokens : int or None, default=None
            How many for each head; the parameter of the estimator by default.

        Returns
        -------
        DataFrame
            Columns ``head``, ``rank`` (from 1), ``token``, ``text`` (if there is a vocabulary) and
            ``score``. Listed tokens of equal score come in the order of their ids.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> readout = skhead.SubspaceReadout(role="O").fit(heads)
        >>> readout.top_tokens(heads.loc[["L1H1"]], n_tokens=3).columns.tolist()
        ['head', 'rank', 'token', 'score']
        """
        name = type(self).__name__
        wanted = self.n_tokens if n_tokens is None else n_tokens
        bases, index, heads = self._bases(X)
        kept = min(check_count("n_tokens", wanted, name), len(self.tokens_))
        scores = torch.empty(len(bases), 0, dtype=bases.dtype, device=bases.device)
        places = torch.empty(len(bases), 0, dtype=torch.int64, device=bases.device)
        for columns, block in self._score_blocks(bases):
            _, inside = block.topk(min(kept, block.shape[1]), dim=1)
            inside = inside.sort(dim=1).values
            joined = torch.cat([scores, block.gather(1, inside)], dim=1)
            numbers = torch.cat([places, inside + columns.start], dim=1)
            order = joined.argsort(dim=1, descending=True, stable=True)[:, :kept]
            scores, places = joined.gather(1, order), numbers.gather(1, order)
        tokens = self.tokens_[places.cpu().numpy()[index]]
        table: dict[str, Any] = {
            "head": np.repeat(np.asarray(head_labels(heads), dtype=object), kept),
            "rank": np.tile(np.arange(1, kept + 1), len(index)),
            "token": tokens.ravel(),
        }
        if self.vocabulary is not None:
            table["text"] = token_texts(tokens.ravel(), self.vocabulary, name)
        table["score"] = scores.cpu().numpy()[index].ravel()
        return pd.DataFrame(table)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns: token ids, followed by their text if there is a vocabulary.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_scored_tokens,)
        """
        check_is_fitted(self)
        return token_columns(self.tokens_, self.vocabulary, type(self).__name__)

    @property
    def _process(self) -> Processing:
        return Processing(self.fold_norm, self.center, self.device)

    def _open(self, X: Any) -> HeadInput:
        name = type(self).__name__
        source = open_door(X, name)
        check_processable(source, name, fold_norm=self.fold_norm, center=self.center)
        return source

    def _only_source(self, heads: pd.DataFrame) -> str:
        sources = heads["source"].unique()
        name = type(self).__name__
        if (heads["layer"] < 0).any():
            raise HeadTableError(
                f"{name}: a stack has no tokens; pass fit(X, vectors=...) with one vector of "
                "d_model numbers for each token, or a heads table"
            )
        if len(sources) > 1:
            raise HeadTableError(
                f"{name}: the heads are of {len(sources)} models ({', '.join(sources)}), which "
                "share no tokens; fit one estimator for each"
            )
        return str(sources[0])

    def _token_vectors(self) -> torch.Tensor:
        """Vectors of all tokens as they are stored."""
        if self._vectors is not None:
            return self._vectors
        matrix = self.matrix
        if matrix == "auto":
            matrix = "unembedding" if self.role == "O" else "embedding"
        space = self._process.tokens(str(self.source_), [matrix])
        return token_matrix(space, matrix, type(self).__name__)

    def _bases(self, X: Any) -> tuple[torch.Tensor, NDArray[np.int64], pd.DataFrame]:
        """Distinct bases of the role, which head uses which, and the heads table."""
        check_is_fitted(self)
        name = type(self).__name__
        role = self.role
        if isinstance(X, Subspaces):
            record = {"fold_norm": self.fold_norm, "center": self.center}
            check_same_record(record, X.record, name)
            subspaces = X
        else:
            source = self._open(X)
            role = ANONYMOUS if source.anonymous else role
            subspaces = extract_subspaces(
                source, [role], rank=self.rank, caller=name, **self._process.options
            )
        self._check_width(subspaces.d_model)
        others = [s for s in subspaces.heads["source"].unique() if s != self.source_]
        if self.source_ is not None and subspaces.rereadable and others:
            raise HeadTableError(
                f"{name}: was fitted on the tokens of {self.source_}, but these heads are of "
                f"{others[0]}; fit another one for them"
            )
        basis = subspaces.role(role)
        return basis.tensor, basis.index, subspaces.heads

    def _score_blocks(self, bases: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns and scores ``(n_bases, n_columns)`` of some tokens at a time."""
        vectors = self._token_vectors().to(bases.device)
        means = _means(vectors, self.order)
        n_bases, d_model, rank = bases.shape
        flat = bases.permute(1, 0, 2).reshape(d_model, n_bases * rank)
        step = max(_SCRATCH // (8 * (n_bases * rank + d_model)), 1)
        wanted = torch.as_tensor(self.tokens_, device=vectors.device)
        starts = range(0, len(wanted), step)
        for start in progress_bar(starts, type(self).__name__, unit="block"):
            some = _directions(vectors[wanted[start : start + step]], means, self.order)
            with fast_float32_matmul(bases.device):
                cross = (some.to(bases.dtype) @ flat).view(len(some), n_bases, rank)
            yield slice(start, start + len(some)), torch.linalg.vector_norm(cross, dim=2).T


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > 0, lengths, 1.0)


def _means(vectors: torch.Tensor, order: str) -> torch.Tensor:
    """What centring takes off: the mean vector, or with "normalize-center" the mean direction."""
    if order != "normalize-center":
        return vectors.mean(0, dtype=torch.float64)
    total = vectors.new_zeros(vectors.shape[1], dtype=torch.float64)
    for rows in vectors.split(4096):
        total += (rows.double() / _lengths(rows.double())).sum(0)
    return total / len(vectors)


def _directions(rows: torch.Tensor, mean: torch.Tensor, order: str) -> torch.Tensor:
    """Token vectors after the steps that the order names, one by one."""
    found = rows.double()
    for step in order.split("-"):
        if step == "center":
            found = found - mean
        elif step == "normalize":
            found = found / _lengths(found)
    return found
