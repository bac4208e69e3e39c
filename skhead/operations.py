"""Which operation a head carries out, read from its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skhead._base import HeadEstimator, check_option, open_door, parse_bytes
from skhead._callers import saying_once, warn_user
from skhead._checks import check_count, check_number
from skhead._devices import check_device, resolve_device, with_less_memory
from skhead._inputs import Processing, SourceHeads, of_sources
from skhead._operations.pairs import token_pairs
from skhead._operations.scoring import OperationRanks, Reading, rank_operations
from skhead._progress import reports_fit
from skhead._tags import HeadTags
from skhead._tokenizers import tokenizer_size
from skhead.exceptions import HeadShapeError
from skhead.stats import adjust_log_p
from skhead.weights import head_labels
from skhead.weights.first_block import SOURCE_EMBEDDINGS

__all__ = ["OperationMapper"]

#: What parameters that are left None stand for.
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "maps_2025": {
        "k": 10,
        "copying_k": 1,
        "source_embedding": "mlp0",
        "fold_norm": False,
        "center": False,
        "leading_space": True,
        "min_pairs": 30,
    },
    "ioi_copy_score": {
        "k": 5,
        "copying_k": 5,
        "source_embedding": "resid_post_mlp0",
        "fold_norm": True,
        "center": True,
        "leading_space": True,
        "min_pairs": 1,
    },
}
_OUTPUTS = ("score", "lift", "log10_p", "mrr", "auc")
_COPYING = "copying"
#: Bytes below which less memory does not help: token tables take more.
_SMALLEST_BUDGET = 2**24


class OperationMapper(HeadEstimator):
    """How far each head carries out given operations on tokens, read from its parameters (MAPS).

    An operation is a list of (source, target) tokens, such as countries and their capitals. A head
    maps a source token s to the logits ``E_s W_V W_O U^T``; its score is the share of pairs whose
    target is among the k largest of the vocabulary. Of the same head, suppression of the operation
    is the share whose target is among the k smallest. Nothing is run: of a checkpoint, the token
    embedding, the norm and MLP of the first block, W_V, W_O and the unembedding are read, one layer
    at a time, and neither a matrix of the vocabulary nor a row of it is held or sorted.

    A head that writes the same tokens whatever it reads scores high on any operation with few
    targets. So each score comes with what the same head gets on average if the targets are
    permuted among the sources, and with the probability of the score under such a permutation.

    Parameters
    ----------
    operations : mapping of str to sequence of (source, target)
        Words, for which the tokenizer is needed, or token ids.
    tokenizer : tokenizer, path, callable or None, default=None
        The model's: a Hugging Face tokenizer, a ``tokenizers.Tokenizer``, a path, or a function
        from a text to token ids. Pairs count if both words are a single token.
    preset : {"maps_2025", "ioi_copy_score"}, default="maps_2025"
        What the parameters below stand for where they are None.
    k : int or sequence of int, default=None
        How many extreme logits count as hits; several are scored at once. None: 10, or 5 for
        "ioi_copy_score". MAPS takes 25 for Llama 3.
    copying_k : int or sequence of int, default=None
        The same for operations with "copying" in their name. None: 1, or 5 for "ioi_copy_score".
        MAPS takes 3 for Llama 3.
    source_embedding : {"raw", "mlp0", "resid_post_mlp0"}, default=None
        What heads behind the first layer read of a token: its embedding, what the first block's MLP
        makes of it, or the sum of both. Heads of the first layer read the embedding. None: "mlp0",
        or "resid_post_mlp0" for "ioi_copy_score".
    fold_norm : bool, default=None
        Multiply the gains of the norms into W_V and the unembedding. None: False, or True for
        "ioi_copy_score".
    center : bool, default=None
        Remove the mean over residual coordinates, as LayerNorm does, from what is read and written.
        None: False, or True for "ioi_copy_score".
    leading_space : bool, default=None
        Put a space in front of every word. None: True.
    min_pairs : int, default=None
        Operations that keep fewer pairs are left out, with a warning. None: 30, or 1 for
        "ioi_copy_score".
    n_valid_tokens : int, default=None
        Tokens from this one on do not compete: rows that a padded vocabulary has and that were
        never trained. None: all compete.
    missing_mlp : {"raise", "raw"}, default="raise"
        What to do about a model whose first block has no MLP that can be read: raise, or let all
        its heads read the embedding.
    output : {"score", "lift", "log10_p", "mrr", "auc"}, default="score"
        What `transform` returns: the score, the score less its null expectation, the logarithm of
        the p-value, the mean reciprocal rank or the area under the curve. The last two have no k.
    max_memory : int or str, default="1GiB"
        For the scratch of one head. The tables of tokens and the matrices of a layer come on top.
    device : str, torch.device or None, default=None
        Where to compute; float64 is needed.

    Attributes
    ----------
    settings_ : dict
        The parameters that presets settle, as they were used.
    pair_counts_ : DataFrame
        One row per operation that was given: ``n_pairs``, ``n_kept``, ``n_source_dropped`` and
        ``n_target_dropped`` (not a single token), ``n_targets`` (distinct), ``used``.
    n_pairs_ : dict of str to int
        Pairs of the operations in use.
    token_ids_ : dict of str to ndarray of shape (n_pairs, 2)
        Sources and targets of these.
    tokenizer_size_ : int or None
        Tokens that the tokenizer has, if it tells.
    scores_ : DataFrame of shape (n_heads, n_columns)
        Scores of the fitted heads. Columns are ``"name"`` and, for suppression, ``"-name"``; with
        several k, ``"name@k"``.
    null_expectation_ : DataFrame
        Exact mean of the score over all permutations of the targets.
    lift_ : DataFrame
        Score less null expectation, -1 to 1.
    log10_p_ : DataFrame
        Upper bound of the permutation p-value, see Notes.
    q_ : DataFrame
        False discovery rates by Benjamini and Hochberg, over all heads and columns.
    rank_of_target_ : dict of str to ndarray of shape (n_heads, n_pairs), int64
        By ``"name"`` and ``"-name"``: 1 plus the number of tokens with a larger logit (for
        suppression, a smaller one) than the target.
    mrr_ : DataFrame
        Mean of 1 / rank; columns ``"name"`` and ``"-name"``.
    auc_ : DataFrame
        Mean share of other tokens that the target is above (below), ties counted half; 0.5 at
        random.

    See Also
    --------
    skhead.datasets.load_operations : Operations as data.
    CircuitScorer : Scores that need no word pairs.

    Notes
    -----
    Tokens whose logits equal the target's do not push it out of the k: a hit has fewer than k
    tokens strictly above. Logits are equal if they differ by less than 1e-12 of the norms of their
    factors in float64, which decides wherever float32 does not.

    The p-value is ``min E C(S, j) / C(h, j)`` over j, with h the hits and S those of a random
    permutation, from bounds of the factorial moments by the row and column means of the table of
    hits. It is never below the exact one, so that rates of false discovery hold, and needs no
    draws; a head with one output for all sources gets 1. The published threshold of 0.15 on the
    score says nothing by itself where few targets are distinct; see `implementing`.

    Biases and positions do not enter, and of norms their gains only. "ioi_copy_score" is the copy
    score of [2]_ for an operation of names onto themselves, up to its norms' biases.

    References
    ----------
    .. [1] A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their
       Parameters", ACL (2025).
    .. [2] K. Wang et al., "Interpretability in the Wild: a Circuit for Indirect Object
       Identification in GPT-2 small", ICLR (2023).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> copying = [(token, token) for token in range(2, 66)]
    >>> mapper = skhead.OperationMapper({"token_copying": copying}, source_embedding="raw").fit(
    ...     heads
    ... )
    >>> mapper.scores_.shape, mapper.lift_["token_copying"].idxmax()
    ((16, 2), 'L1H1')
    """

    head_tags = HeadTags(
        ("table",), invariant_to=("rotation", "head_rotation", "gauge", "scale"), any_width=True
    )

    def __init__(
        self,
        operations: Mapping[str, Any],
        tokenizer: Any = None,
        preset: str = "maps_2025",
        k: int | list[int] | None = None,
        copying_k: int | list[int] | None = None,
        source_embedding: str | None = None,
        fold_norm: bool | None = None,
        center: bool | None = None,
        leading_space: bool | None = None,
        min_pairs: int | None = None,
        n_valid_tokens: int | None = None,
        missing_mlp: str = "raise",
        output: str = "score",
        max_memory: int | str = "1GiB",
        device: str | torch.device | None = None,
    ) -> None:
        self.operations = operations
        self.tokenizer = tokenizer
        self.preset = preset
        self.k = k
        self.copying_k = copying_k
        self.source_embedding = source_embedding
        self.fold_norm = fold_norm
        self.center = center
        self.leading_space = leading_space
        self.min_pairs = min_pairs
        self.n_valid_tokens = n_valid_tokens
        self.missing_mlp = missing_mlp
        self.output = output
        self.max_memory = max_memory
        self.device = device

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> OperationMapper:
        """Turn the operations into tokens and score the heads.

        Parameters
        ----------
        X : DataFrame
            Heads table; several models may be mixed if they share one tokenizer.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        HeadShapeError
            If heads come as a stack, which has no tokens.
        UnsupportedLayoutError
            If a model lacks an embedding, an unembedding or the MLP that is asked for.
        ValueError
            If a parameter is wrong, no operation keeps enough pairs, or tokenizer and model do not
            belong together.
        """
        models = self._open(X)
        self.settings_ = self._settings()
        name = type(self).__name__
        found = token_pairs(
            self.operations,
            self.tokenizer,
            self.settings_["leading_space"],
            self.settings_["min_pairs"],
            name,
        )
        self.pair_counts_, self.token_ids_ = found.counts, found.ids
        self.n_pairs_ = {operation: len(ids) for operation, ids in found.ids.items()}
        self.tokenizer_size_ = None if self.tokenizer is None else tokenizer_size(self.tokenizer)
        self._warn_of_dropped()
        self._keep(self._rank(models), X)
        return self

    def transform(self, X: Any) -> Any:
        """Score heads at the fitted operations.

        Parameters
        ----------
        X : DataFrame
            Heads table.

        Returns
        -------
        DataFrame of shape (n_heads, n_columns), float64
            What `output` names, with the index of the heads table; what ``set_output`` asks for, if
            it has been called.
        """
        check_is_fitted(self)
        check_option("output", self.output, _OUTPUTS, type(self).__name__)
        with saying_once():
            return self._tables(self._rank(self._open(X)), X.index)[self.output]

    @reports_fit
    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """Fit and score the heads; see `fit` and `transform`.

        Parameters
        ----------
        X : DataFrame
            Heads table.
        y : ignored

        Returns
        -------
        DataFrame of shape (n_heads, n_columns), float64
        """
        self.fit(X)
        return getattr(self, {"score": "scores_"}.get(self.output, f"{self.output}_")).copy()

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_columns,)
        """
        check_is_fitted(self)
        with_k = self.output not in ("mrr", "auc")
        return np.asarray(self._columns() if with_k else self._signed(), dtype=object)

    def implementing(self, threshold: float = 0.15, fdr: float = 0.01) -> pd.DataFrame:
        """List the fitted heads that carry out an operation.

        Parameters
        ----------
        threshold : float, default=0.15
            Least score, 0 to 1; the published one.
        fdr : float, default=0.01
            Largest rate of false discoveries, 0 to 1.

        Returns
        -------
        DataFrame
            Columns ``head, operation, score, null_expectation, lift, log10_p, q``, by falling
            score.

        Raises
        ------
        ValueError
            If a limit is outside of its range.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> copying = [(token, token) for token in range(2, 66)]
        >>> mapper = skhead.OperationMapper({"token_copying": copying}, source_embedding="raw")
        >>> mapper.fit(heads).implementing()["head"].iloc[0]
        'L1H1'
        """
        check_is_fitted(self)
        for name, value in (("threshold", threshold), ("fdr", fdr)):
            if not 0 <= check_number(name, value, "OperationMapper.implementing") <= 1:
                raise ValueError(
                    f"OperationMapper.implementing: {name} must be between 0 and 1; got {value!r}"
                )
        called = (self.scores_ >= threshold) & (self.q_ <= fdr)
        rows, columns = np.nonzero(called.to_numpy())
        tables = {
            "score": self.scores_,
            "null_expectation": self.null_expectation_,
            "lift": self.lift_,
            "log10_p": self.log10_p_,
            "q": self.q_,
        }
        listed = pd.DataFrame(
            {"head": self._labels[rows], "operation": self.scores_.columns[columns]}
            | {name: table.to_numpy()[rows, columns] for name, table in tables.items()}
        )
        return listed.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    def _open(self, X: Any) -> list[SourceHeads]:
        name = type(self).__name__
        opened = open_door(X, name)
        if opened.stacks is not None:
            raise HeadShapeError(
                f"{name}: needs a heads table from load_heads, since a stack has no tokens; name "
                "weights, embedding and unembedding with register_model"
            )
        return of_sources(opened)

    def _settings(self) -> dict[str, Any]:
        """The parameters with presets in place of None, checked."""
        name = type(self).__name__
        check_option("preset", self.preset, tuple(_PRESETS), name)
        preset = _PRESETS[self.preset]
        own = {key: getattr(self, key) for key in preset}
        settings = {key: preset[key] if own[key] is None else own[key] for key in preset}
        for key in ("k", "copying_k"):
            settings[key] = self._ks(key, settings[key])
        for key in ("fold_norm", "center", "leading_space"):
            check_option(key, settings[key], (True, False), name)
        check_option("source_embedding", settings["source_embedding"], SOURCE_EMBEDDINGS, name)
        check_option("missing_mlp", self.missing_mlp, ("raise", "raw"), name)
        check_option("output", self.output, _OUTPUTS, name)
        check_count("min_pairs", settings["min_pairs"], name)
        if self.n_valid_tokens is not None:
            check_count("n_valid_tokens", self.n_valid_tokens, name)
        parse_bytes(self.max_memory, name)
        check_device(self.device, name, float64=True)
        return settings

    def _ks(self, key: str, value: Any) -> tuple[int, ...]:
        listed = list(value) if np.iterable(value) and not isinstance(value, str) else [value]
        name = type(self).__name__
        if not listed:
            raise ValueError(f"{name}: {key} is empty; name at least one number")
        return tuple(sorted({check_count(key, k, name) for k in listed}))

    def _warn_of_dropped(self) -> None:
        dropped = self.pair_counts_[~self.pair_counts_["used"].astype(bool)]
        if len(dropped):
            listed = ", ".join(
                f"{name} ({row.n_kept} of {row.n_pairs})"
                for name, row in zip(dropped.index, dropped.itertuples(), strict=True)
            )
            warn_user(
                f"{type(self).__name__}: operations that keep fewer than "
                f"{self.settings_['min_pairs']} pairs of single tokens are left out: {listed}. "
                "Lower min_pairs to keep them.",
            )

    def _rank(self, models: list[SourceHeads]) -> list[OperationRanks]:
        """Ranks of all heads, by operation, in the order of the heads table."""
        name = type(self).__name__

        def attempt(budget: int) -> list[tuple[OperationRanks, ...]]:
            reading = self._reading(budget)
            return [tuple(rank_operations(model, self.token_ids_, reading)) for model in models]

        budget = parse_bytes(self.max_memory, name)
        parts = with_less_memory(attempt, budget, name, smallest=_SMALLEST_BUDGET)
        rows = np.argsort(np.concatenate([model.rows for model in models]))
        return [_joined(of_models, rows) for of_models in zip(*parts, strict=True)]

    def _reading(self, max_memory: int) -> Reading:
        settings = self.settings_
        device = resolve_device(self.device, type(self).__name__, float64=True)
        return Reading(
            Processing(settings["fold_norm"], settings["center"], device),
            settings["source_embedding"],
            self.missing_mlp,
            {name: self._k_of(name) for name in self.token_ids_},
            self.n_valid_tokens,
            self.tokenizer_size_,
            max_memory,
            type(self).__name__,
        )

    def _k_of(self, operation: str) -> tuple[int, ...]:
        ks: tuple[int, ...] = self.settings_["copying_k" if _COPYING in operation else "k"]
        return ks

    def _signed(self) -> list[str]:
        return [sign + name for name in self.token_ids_ for sign in ("", "-")]

    def _columns(self) -> list[str]:
        columns = []
        for name in self.token_ids_:
            ks = self._k_of(name)
            for sign in ("", "-"):
                columns += [f"{sign}{name}@{k}" if len(ks) > 1 else sign + name for k in ks]
        return columns

    def _keep(self, ranked: list[OperationRanks], X: pd.DataFrame) -> None:
        self._labels = np.asarray(head_labels(X), dtype=object)
        tables = self._tables(ranked, X.index)
        self.scores_, self.lift_ = tables["score"], tables["lift"]
        self.null_expectation_, self.log10_p_ = tables["null_expectation"], tables["log10_p"]
        self.mrr_, self.auc_ = tables["mrr"], tables["auc"]
        log_q = adjust_log_p(self.log10_p_.to_numpy() * np.log(10))
        self.q_ = pd.DataFrame(np.exp(log_q), X.index, self.log10_p_.columns)
        self.rank_of_target_ = {}
        for name, operation in zip(self.token_ids_, ranked, strict=True):
            self.rank_of_target_[name] = 1 + operation.above
            self.rank_of_target_["-" + name] = 1 + operation.below

    def _tables(self, ranked: list[OperationRanks], index: pd.Index) -> dict[str, pd.DataFrame]:
        """Every kind of score as a table."""
        parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _OUTPUTS}
        expected = []
        for name, operation in zip(self.token_ids_, ranked, strict=True):
            before = np.stack([operation.above, operation.below], axis=1)
            ks = np.asarray(self._k_of(name))
            score = (before[:, :, None, :] < ks[:, None]).mean(3).reshape(len(before), -1)
            expectation = operation.expectation.reshape(len(before), -1)
            expected.append(expectation)
            others = np.maximum(operation.n_vocab - 1, 1)[:, None, None]
            parts["score"].append(score)
            parts["lift"].append(score - expectation)
            parts["log10_p"].append(operation.log_p.reshape(len(before), -1) / np.log(10))
            parts["mrr"].append((1 / (1 + before)).mean(2))
            parts["auc"].append(1 - ((before + operation.ties[:, None] / 2) / others).mean(2))
        columns, signed = self._columns(), self._signed()
        tables = {
            name: pd.DataFrame(
                np.hstack(values), index, signed if name in ("mrr", "auc") else columns
            )
            for name, values in parts.items()
        }
        return tables | {"null_expectation": pd.DataFrame(np.hstack(expected), index, columns)}


def _joined(parts: tuple[OperationRanks, ...], rows: NDArray[np.int64]) -> OperationRanks:
    """One operation for the heads of all models."""
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])[rows]
        for field in fields(OperationRanks)
    }
    return OperationRanks(**joined)
