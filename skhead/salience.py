"""What single heads do best: the tokens that they respond to most, and what they make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils import TransformerTags
from sklearn.utils.validation import check_is_fitted

from skhead._base import HeadEstimator, HeadInput, check_option, check_processable, open_door
from skhead._callers import saying_once
from skhead._checks import check_count
from skhead._devices import check_device
from skhead._inputs import (
    Processing,
    check_ids,
    given_vectors,
    heads_at,
    layer_rows,
    token_columns,
    token_matrix,
    token_texts,
)
from skhead._progress import progress_bar, reports_fit
from skhead._salient import DIRECTIONS, SalientMappings
from skhead._tags import HeadEstimatorTags, HeadTags
from skhead._tokenizers import as_vocabulary
from skhead.exceptions import DegenerateHeadError, HeadShapeError, HeadTableError
from skhead.linalg.salience import largest_in_rows, largest_products, map_gains, written_vectors
from skhead.weights import head_labels
from skhead.weights.first_block import SOURCE_EMBEDDINGS, read_source_embedding

__all__ = ["SalientMappings", "SalientOperations"]

#: Bytes of scratch for the tokens that are handled at once.
_SCRATCH = 2**27


class SalientOperations(HeadEstimator):
    """Tokens that heads respond to most strongly, and the tokens that they map them to.

    The saliency of a token t with the source vector e_t in a head is ``||e_t W_V W_O|| / ||e_t||``,
    how much of a token the head passes on per unit of its length. It is exact, through
    ``d_head x d_head`` Gram matrices. The rows ``e_t W_V W_O U^T`` of the most salient tokens tell
    what the head makes of them; no other rows are formed. No operation is named beforehand, so that
    this finds what lists of word pairs do not hold.

    Parameters
    ----------
    n_salient : int, default=15
        How many tokens are listed for each head.
    n_targets : int, default=5
        How many targets are listed for each of them.
    source_embedding : {"mlp0", "raw", "resid_post_mlp0"}, default="mlp0"
        Source vectors of tokens: what the first block's MLP makes of the embedding, the embedding,
        or the sum of both. Heads of the first layer always read the embedding. The first and the
        last need a model with such an MLP.
    direction : {"promote", "suppress"}, default="promote"
        List the targets whose logits the head raises most, or lowers most.
    tokens : sequence of int or None, default=None
        Token ids that are considered, as sources and as targets; all by default. Name the ids in
        use if the vocabulary is padded.
    vocabulary : tokenizer, path, callable, sequence, mapping or None, default=None
        Text of each token id: a Hugging Face tokenizer, a ``tokenizers.Tokenizer``, the directory
        of one, or texts by token id. Prompts need it.
    fold_norm : bool, default=False
        Multiply the gain of each layer's norm into W_V, and that of the final norm into the
        unembedding.
    device : str, torch.device or None, default=None
        Where to compute; float64 is needed.

    Attributes
    ----------
    source_ : str or None
        Model of the fitted heads, whose tokens are read; None for vectors given to `fit`.
    tokens_ : ndarray of shape (n_considered_tokens,), int64
        Token ids that are considered.
    n_vocab_ : int
        Number of tokens of the model.
    d_model_ : int
        Dimension of the residual stream.

    See Also
    --------
    SubspaceReadout : Which tokens the subspaces of heads point at.

    Notes
    -----
    Weights are read one layer at a time. In memory are the source vectors of the considered tokens,
    the unembedding, one layer's W_V and W_O, and some blocks of 128 MiB.

    References
    ----------
    A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their Parameters", ACL
    (2025), arXiv:2412.11965, whose notebook takes ``source_embedding="mlp0"`` for the first layer
    too.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> salient = skhead.SalientOperations(n_salient=2, n_targets=2, source_embedding="raw").fit(
    ...     heads
    ... )
    >>> salient.transform(heads).shape
    (16, 68)
    >>> found = salient.mappings(heads.loc[["L1H1"]])
    >>> found.table[["head", "rank", "target_rank"]].values.tolist()
    [['L1H1', 1, 1], ['L1H1', 1, 2], ['L1H1', 2, 1], ['L1H1', 2, 2]]
    """

    head_tags = HeadTags(
        ("table", "roles"), invariant_to=("rotation", "head_rotation", "gauge"), one_model=True
    )

    def __init__(
        self,
        n_salient: int = 15,
        n_targets: int = 5,
        *,
        source_embedding: str = "mlp0",
        direction: str = "promote",
        tokens: Sequence[int] | None = None,
        vocabulary: Any = None,
        fold_norm: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.n_salient = n_salient
        self.n_targets = n_targets
        self.source_embedding = source_embedding
        self.direction = direction
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.fold_norm = fold_norm
        self.device = device

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float32"])
        return tags

    @reports_fit
    def fit(
        self, X: Any, y: Any = None, embedding: Any = None, unembedding: Any = None
    ) -> SalientOperations:
        """Take the tokens of the heads' model.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
            Heads table of one model, or W_Q, W_K, W_V and W_O transposed, with `embedding`.
        y : ignored
        embedding : array or Tensor of shape (n_vocab, d_model), default=None
            Source vectors of all tokens for a stack.
        unembedding : array or Tensor of shape (n_vocab, d_model), default=None
            Rows that read logits off the stream; a stack's `mappings` need it.

        Returns
        -------
        SalientOperations

        Raises
        ------
        HeadTableError
            If the heads are of several models, or of none and no embedding is given.
        HeadShapeError
            If vectors have another width than the heads, or a stack lacks W_V and W_O.
        UnsupportedLayoutError
            If the model's file holds no embedding, or no first MLP that `source_embedding` asks
            for; the error names what is missing.
        ValueError
            If a parameter is out of range, or vectors are given for a heads table.
        """
        name = type(self).__name__
        self._check_parameters()
        opened = self._open(X)
        self.d_model_ = opened.d_model
        self.source_: str | None = None
        self._given: dict[str, torch.Tensor] = {}
        if opened.stacks is None:
            if embedding is not None or unembedding is not None:
                raise ValueError(
                    f"{name}: a heads table names the model whose tokens are read; leave embedding "
                    "and unembedding out"
                )
            self.source_ = self._only_source(opened.heads)
        else:
            self._given = self._given_vectors(embedding, unembedding)
        self.n_vocab_ = len(self._table("embedding"))
        self.tokens_ = check_ids(self.tokens, self.n_vocab_, "tokens", name)
        if self.source_ is not None and bool((opened.heads["layer"] > 0).any()):
            read_source_embedding(self.source_, self.source_embedding, [0], self._process.place)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Saliency of every considered token in every head.

        Parameters
        ----------
        X : DataFrame, or array or Tensor
            As for `fit`, of the same model or width.

        Returns
        -------
        ndarray of shape (n_heads, n_considered_tokens), float32
            At least 0; 0 for tokens whose vector is zero. A DataFrame after
            ``set_output(transform="pandas")``.

        Raises
        ------
        HeadTableError, HeadShapeError
            If the heads are of another model or width.
        DegenerateHeadError
            If the OV map of a head is zero.
        """
        opened = self._checked(X)
        found = np.empty((len(opened.heads), len(self.tokens_)), dtype=np.float32)
        with saying_once():
            for layer in self._layers(opened):
                found[layer.rows] = self._saliencies(layer).float().cpu().numpy()
        return found

    def mappings(self, X: Any) -> SalientMappings:
        """List the most salient tokens of every head, and the strongest targets of each.

        Parameters
        ----------
        X : DataFrame, or array or Tensor
            As for `transform`.

        Returns
        -------
        SalientMappings
            Its ``table`` is a DataFrame; ``to_text``, ``to_json`` and ``prompts`` export it.
            Tokens of equal saliency or logit come in the order of their ids.

        Raises
        ------
        HeadTableError, HeadShapeError, DegenerateHeadError
            As for `transform`, or if no unembedding was given for a stack.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> salient = skhead.SalientOperations(n_salient=1, n_targets=2, source_embedding="raw")
        >>> salient.fit(heads).mappings(heads).table["head"].nunique()
        16
        """
        opened = self._checked(X)
        unembedding = self._considered(self._table("unembedding"))
        sign = 1 if self.direction == "promote" else -1
        shape = (
            len(opened.heads),
            min(int(self.n_salient), len(self.tokens_)),
            min(int(self.n_targets), len(self.tokens_)),
        )
        sources = np.empty(shape[:2], dtype=np.int64)
        saliencies = np.empty(shape[:2])
        targets, logits = np.empty(shape, dtype=np.int64), np.empty(shape)
        with saying_once():
            for layer in self._layers(opened):
                values, places = largest_in_rows(self._saliencies(layer), shape[1])
                rows = layer.vectors[places.to(layer.vectors.device)]
                written = sign * written_vectors(layer.w_v, layer.w_o, rows).flatten(0, 1)
                best, where = largest_products(written, unembedding, shape[2], scratch=_SCRATCH)
                at = layer.rows
                sources[at], saliencies[at] = places.cpu().numpy(), values.double().cpu().numpy()
                targets[at] = where.view(-1, *shape[1:]).cpu().numpy()
                logits[at] = sign * best.double().view(-1, *shape[1:]).cpu().numpy()
        table = self._listed(opened, sources, saliencies, targets, logits)
        return SalientMappings(table, self.direction)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns: token ids, followed by their text if there is a vocabulary.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_considered_tokens,)
        """
        check_is_fitted(self)
        name = type(self).__name__
        texts = None if self.vocabulary is None else as_vocabulary(self.vocabulary, name)
        return token_columns(self.tokens_, texts, name)

    def _check_parameters(self) -> None:
        name = type(self).__name__
        check_count("n_salient", self.n_salient, name)
        check_count("n_targets", self.n_targets, name)
        check_option("source_embedding", self.source_embedding, SOURCE_EMBEDDINGS, name)
        check_option("direction", self.direction, DIRECTIONS, name)
        check_device(self.device, name, float64=True)

    @property
    def _process(self) -> Processing:
        return Processing(self.fold_norm, False, self.device)

    def _open(self, X: Any) -> HeadInput:
        """Heads of which W_V and W_O are at hand."""
        name = type(self).__name__
        opened = open_door(X, name)
        if opened.anonymous:
            raise HeadShapeError(
                f"{name}: needs W_V and W_O of every head; pass a heads table or a stack of shape "
                "(n_heads, 4, d_model, d_head) for Q, K, V, O"
            )
        check_processable(opened, name, fold_norm=self.fold_norm)
        return opened

    def _checked(self, X: Any) -> HeadInput:
        """Heads of the fitted model or width."""
        check_is_fitted(self)
        self._check_parameters()
        opened = self._open(X)
        self._check_width(opened.d_model)
        sources = ["a stack"] if opened.stacks is not None else opened.heads["source"].unique()
        others = [source for source in sources if source != (self.source_ or "a stack")]
        if others:
            raise HeadTableError(
                f"{type(self).__name__}: was fitted on {self.source_ or 'a stack'}, but these "
                f"heads are of {others[0]}; fit another one for them"
            )
        return opened

    def _only_source(self, heads: pd.DataFrame) -> str:
        sources = heads["source"].unique()
        if len(sources) > 1:
            raise HeadTableError(
                f"{type(self).__name__}: the heads are of {len(sources)} models "
                f"({', '.join(sources)}), which share no tokens; fit one estimator for each"
            )
        return str(sources[0])

    def _given_vectors(self, embedding: Any, unembedding: Any) -> dict[str, torch.Tensor]:
        """The vectors of a stack's tokens, in memory of their own."""
        name = type(self).__name__
        if embedding is None:
            raise HeadTableError(
                f"{name}: a stack has no tokens; pass fit(X, embedding=..., unembedding=...) with "
                "one row of d_model numbers for each token, or a heads table"
            )
        found = {}
        for which, values in (("embedding", embedding), ("unembedding", unembedding)):
            if values is not None:
                found[which] = given_vectors(values, which, self.d_model_, name)
        lengths = {len(vectors) for vectors in found.values()}
        if len(lengths) > 1:
            raise HeadShapeError(
                f"{name}: embedding and unembedding must have one row for each token, but have "
                f"{len(found['embedding'])} and {len(found['unembedding'])}"
            )
        return found

    def _table(self, which: str) -> torch.Tensor:
        """The embedding or unembedding of all tokens."""
        name = type(self).__name__
        if self.source_ is not None:
            return token_matrix(self._process.tokens(self.source_, [which]), which, name)
        if which not in self._given:
            raise HeadTableError(
                f"{name}: a stack has no {which}; pass fit(X, embedding=..., {which}=...)"
            )
        return self._given[which]

    @property
    def _takes_all(self) -> bool:
        return np.array_equal(self.tokens_, np.arange(self.n_vocab_))

    def _considered(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rows of the considered tokens."""
        if len(vectors) < self.n_vocab_ and self.tokens_.max() >= len(vectors):
            raise HeadShapeError(
                f"{type(self).__name__}: the unembedding has {len(vectors)} tokens, the embedding "
                f"{self.n_vocab_}; name the ids that both have, tokens=range({len(vectors)})"
            )
        if self._takes_all:
            return vectors[: self.n_vocab_]
        return vectors[torch.as_tensor(self.tokens_, device=vectors.device)]

    def _layers(self, opened: HeadInput) -> Iterator[_Layer]:
        """The heads of one layer after the other, with the source vectors of the tokens."""
        vectors: dict[str, torch.Tensor] = {}
        for rows in progress_bar(layer_rows(opened.heads), type(self).__name__, unit="layer"):
            part = heads_at(opened, rows)
            first = int(part.heads["layer"].iloc[0]) <= 0
            kind = "raw" if first else self.source_embedding
            if kind not in vectors:
                vectors = {kind: self._source_vectors(kind)}
            w_v, w_o = (self._process.stack(part, role) for role in "VO")
            yield _Layer(rows, head_labels(part.heads), w_v, w_o, vectors[kind])

    def _source_vectors(self, kind: str) -> torch.Tensor:
        """Source vectors of the considered tokens."""
        if self.source_ is None:
            return self._considered(self._given["embedding"])
        tokens = None if self._takes_all else self.tokens_.tolist()
        return read_source_embedding(
            self.source_, kind, tokens, self._process.place, fold_norm=self.fold_norm
        )

    def _saliencies(self, layer: _Layer) -> torch.Tensor:
        gains = map_gains(layer.w_v, layer.w_o, layer.vectors, scratch=_SCRATCH)
        silent = (gains == 0).all(dim=1).nonzero()
        if len(silent):
            raise DegenerateHeadError(
                f"{type(self).__name__}: {layer.labels[int(silent[0])]} W_V W_O is zero on all "
                "tokens, so that none is salient; drop the head, for example heads.drop(index=...)"
            )
        return gains

    def _texts(self, tokens: NDArray[np.int64]) -> list[str]:
        name = type(self).__name__
        return token_texts(tokens, as_vocabulary(self.vocabulary, name), name)

    def _listed(
        self,
        opened: HeadInput,
        sources: NDArray[np.int64],
        saliencies: NDArray[np.float64],
        targets: NDArray[np.int64],
        logits: NDArray[np.float64],
    ) -> pd.DataFrame:
        n_heads, n_salient, n_targets = targets.shape
        tokens, found = self.tokens_[sources].ravel(), self.tokens_[targets].ravel()
        table: dict[str, Any] = {
            "head": np.repeat(
                np.asarray(head_labels(opened.heads), dtype=object),
                tokens.size * n_targets // n_heads,
            ),
            "rank": np.tile(np.repeat(np.arange(1, n_salient + 1), n_targets), n_heads),
            "token": np.repeat(tokens, n_targets),
            "saliency": np.repeat(saliencies.ravel(), n_targets),
            "target_rank": np.tile(np.arange(1, n_targets + 1), n_heads * n_salient),
            "target": found,
            "logit": logits.ravel(),
        }
        frame = pd.DataFrame(table)
        if self.vocabulary is not None:
            texts = np.asarray(self._texts(tokens), dtype=object)
            frame.insert(3, "text", np.repeat(texts, n_targets))
            frame.insert(7, "target_text", np.asarray(self._texts(found), dtype=object))
        return frame


@dataclass(frozen=True)
class _Layer:
    """Heads of one layer, and the source vectors of the considered tokens."""

    rows: NDArray[np.int64]
    labels: Sequence[str]
    w_v: torch.Tensor
    w_o: torch.Tensor
    vectors: torch.Tensor
