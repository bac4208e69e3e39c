"""What single heads do to the residual stream, read from their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skhead._base import (
    HeadEstimator,
    HeadInput,
    check_option,
    check_processable,
    extract_subspaces,
    open_door,
    parse_bytes,
)
from skhead._callers import saying_once, warn_user
from skhead._checks import check_count, check_number
from skhead._circuits.models import ScoredHeads, missing_in_stack, score_model, score_stack
from skhead._circuits.scores import GROUPS, identity_parts
from skhead._circuits.surroundings import ModelReader, Reading
from skhead._devices import check_device, resolve_device, with_less_memory
from skhead._progress import reports_fit
from skhead._tags import HeadTags
from skhead.exceptions import CheckpointError, DegenerateHeadError, HeadShapeError
from skhead.weights import HEAD_COLUMNS, check_heads, head_labels

__all__ = ["CircuitScorer", "identity_scores"]

#: Heads per float64 work block.
_CHUNK = 64
#: Bytes below which less memory does not help: token tables take more.
_SMALLEST_BUDGET = 2**24
_EVERY = tuple(name for group in GROUPS.values() for name in group)


class CircuitScorer(HeadEstimator):
    """Classic circuit measures of every head, as features: one row per head, one column per score.

    Everything is read from the weights, without running the model, and through ``d_head x d_head``
    matrices: no ``d_model x d_model`` map and no ``n_vocab x n_vocab`` circuit is formed whole.
    A score never depends on which other heads are in the table: partners of composition and
    induction are looked for among all heads of the head's own model.

    Parameters
    ----------
    scores : str or sequence of str, default="all"
        Names of scores, of groups of scores ("maps", "tokens", "positions", "composition",
        "induction"), or "all". Of a stack, "all" is the group "maps", as it has no tokens and no
        layers.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`; the same is done to embedding, unembedding and positions: the
        final norm's gain is folded into the unembedding, and rows are centred.
    errors : {"warn", "raise", "ignore"}, default="warn"
        What to do about scores whose ingredients the model lacks, such as a checkpoint without
        token embedding, or the gain of a norm to fold: leave NaN columns with a warning that names
        what is missing, raise, or leave them in silence. `missing_scores` lists the reasons.
    relative_position : int, default=0
        How many positions the key lies behind the query in all QK scores of models with rotary
        positions, whose queries are turned accordingly. Other models do not depend on it.
    n_positions : int, default=64
        First positions between which the positional scores are taken; fewer if the model has fewer.
    position_scale : float, default=0.5
        Root mean square of learned positions behind the norm: their share of a normalised stream
        that holds tokens and the work of other heads as well, of which 1 would be all. Larger
        values sharpen attention by position. Without effect on models without norms or with rotary
        positions.
    n_tokens : int or None, default=2048
        Tokens, evenly spread over the vocabulary, that ``ov_top1_self`` and ``qk_top1_self`` ask,
        each against the whole vocabulary; None asks all.
    max_memory : int or str, default="1GiB"
        For the matrices of heads and scratch; the least that is read at once are three layers. The
        embedding and unembedding come on top, with three matrices of d_model by d_model and a few
        blocks of 64 MiB.
    device : str, torch.device or None, default=None
        Where to compute; float64 is needed.

    Attributes
    ----------
    scores_ : tuple of str
        Names of the columns.

    See Also
    --------
    CompositionScore : The composition of every pair of heads.
    identity_scores : Two of the scores, as a function.

    Notes
    -----
    E and U have one row per token, W_OV = W_V W_O and W_QK = W_Q W_K^T. "Random" is what heads of
    independent Gaussian entries get on average. Biases do not enter, and of norms nothing but their
    gains, and these only with ``fold_norm=True``. A norm on queries and keys inside the head (Qwen
    3) is left out too: QK scores then say what the head would match without it.

    Group "maps", for OV and QK each; nothing but the four matrices, raw or folded:

    - ``ov_norm, qk_norm``: Frobenius norms of W_OV and W_QK.
    - ``ov_effective_rank, qk_effective_rank``: exponential of the entropy of the singular values,
      1 to d_head.
    - ``ov_stable_rank, qk_stable_rank``: squared Frobenius over squared spectral norm, 1 to d_head.
    - ``ov_spectral_entropy, qk_spectral_entropy``: entropy of the squared singular values over
      log(d_head), 0 to 1.
    - ``ov_eigenvalue_ratio, qk_eigenvalue_ratio``: sum of the eigenvalues over the sum of their
      moduli, -1 to 1; random 0, with standard deviation 1.6 / d_head.
    - ``ov_positive_share, qk_positive_share``: share of eigenvalues of positive real part, 0 to 1;
      random 0.5.
    - ``ov_mean_phase, qk_mean_phase``: mean angle of the eigenvalues to the positive axis over pi,
      weighted by modulus, 0 to 1; random 0.5.
    - ``identity_signed``: trace of W_OV over its norm and sqrt(rank), -1 to 1; random 0.
    - ``pk_vo, pk_qk``: overlap of the subspaces of V and O, of Q and K, 0 to d_head; random
      d_head^2 / d_model.
    - ``qk_symmetric``: symmetric share of the squared norm of W_QK, 0 to 1; random 0.5.

    Group "tokens"; embedding and, for OV, unembedding, final gain folded or not:

    - ``ov_copying, qk_matching``: the eigenvalue ratio of E W_OV U^T and of E W_QK E^T, -1 to 1;
      random 0, with standard deviation 1.6 / d_head or a little more.
    - ``ov_diagonal, qk_diagonal``: mean diagonal entry of these circuits above the mean of all
      entries, in standard deviations of the entries; random 0.
    - ``ov_top1_self, qk_top1_self``: share of tokens that the circuit leads to themselves before
      all others, 0 to 1; random 1 / n_vocab.

    Group "positions"; learned or rotary positions, see `n_positions`:

    - ``previous_token, current_token, first_token``: attention by position alone, as (attention -
      uniform) / (1 - uniform), at most 1; random 0. The logits are those of P W_QK P^T for learned
      positions P, each row at root mean square `position_scale` if the model has norms; for rotary
      ones the mean over independent pairs of tokens, each row at 1, at every offset. Learned
      positions are those as stored, which later layers of a deep model see rewritten. On models
      whose gains differ much between coordinates, such as GPT-2, fold them for these scores.

    Group "composition"; the other heads of the model:

    - ``{q,k,v}_composition_{in,out}_{mean,max}``: composition score over its baseline
      1 / sqrt(d_model), mean or maximum over the heads of earlier layers (in) or of later ones
      (out), 0 up; random 1. 0 where there are none.

    Group "induction"; embedding and earlier heads, ``induction_strength`` what "positions" and
    ``ov_copying`` need as well:

    - ``induction_matching``: largest eigenvalue ratio of E W_Q (W_OV' W_K)^T E^T over earlier heads
      ': does the head look for tokens that follow its own? -1 to 1; 0 in the first layer. A maximum
      over the some 8 to 16 of largest cosine, so that a random head gets about 3 / d_head.
    - ``induction_feeding``: the same for the earlier head, over later ones.
    - ``induction_strength``: largest over earlier heads of the least of that ratio, the earlier
      head's ``previous_token`` and the own ``ov_copying``, -1 to 1; random about 0.

    Tables of several models may be mixed, of any widths.

    References
    ----------
    .. [1] N. Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer
       Circuits Thread (2021).
    .. [2] O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality",
       EUSIPCO (2007).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> scorer = skhead.CircuitScorer(scores=["ov_copying", "induction_strength"])
    >>> features = scorer.fit_transform(heads)
    >>> features.shape, features["induction_strength"].idxmax()
    ((16, 2), 'L1H1')
    """

    head_tags = HeadTags(
        ("table", "roles"), invariant_to=("rotation", "head_rotation", "gauge"), any_width=True
    )

    def __init__(
        self,
        scores: str | Sequence[str] = "all",
        fold_norm: bool = False,
        center: bool = False,
        errors: str = "warn",
        relative_position: int = 0,
        n_positions: int = 64,
        position_scale: float = 0.5,
        n_tokens: int | None = 2048,
        max_memory: int | str = "1GiB",
        device: str | torch.device | None = None,
    ) -> None:
        self.scores = scores
        self.fold_norm = fold_norm
        self.center = center
        self.errors = errors
        self.relative_position = relative_position
        self.n_positions = n_positions
        self.position_scale = position_scale
        self.n_tokens = n_tokens
        self.max_memory = max_memory
        self.device = device

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> CircuitScorer:
        """Check the heads and settle the columns; nothing is learned from weights.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
            Heads table, or W_Q, W_K, W_V and W_O transposed.
        y : ignored

        Returns
        -------
        self
        """
        self._fit(X)
        return self

    def _fit(self, X: Any) -> list[HeadInput]:
        self._check_parameters()
        inputs = self._open(X)
        self.scores_ = self._names(stack=inputs[0].stacks is not None)
        return inputs

    def transform(self, X: Any) -> Any:
        """Score the heads.

        Parameters
        ----------
        X : DataFrame, or array or Tensor
            As for `fit`; of any width.

        Returns
        -------
        DataFrame or ndarray of shape (n_heads, n_scores), float64
            A DataFrame with the index of a heads table; an array for a stack. What
            ``set_output`` asks for, if it has been called.

        Raises
        ------
        DegenerateHeadError
            If the OV or QK map of a head is zero.
        CheckpointError
            If an ingredient is missing and ``errors="raise"``.
        """
        check_is_fitted(self)
        self._check_parameters()
        with saying_once():
            return self._transform(X, self._open(X))

    @reports_fit
    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """Fit and score the heads; see `fit` and `transform`.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
            As for `fit`.
        y : ignored

        Returns
        -------
        DataFrame or ndarray of shape (n_heads, n_scores), float64
        """
        return self._transform(X, self._fit(X))

    def _transform(self, X: Any, inputs: Sequence[HeadInput]) -> Any:
        values = np.full((sum(len(part.heads) for part in inputs), len(self.scores_)), np.nan)
        columns = {name: i for i, name in enumerate(self.scores_)}
        sources = X["source"].to_numpy() if isinstance(X, pd.DataFrame) else None
        for part in inputs:
            scored = self._score(part)
            self._report_missing(scored.missing, part)
            rows = slice(None) if sources is None else sources == part.heads["source"].iloc[0]
            for name, scores in scored.scores.items():
                values[rows, columns[name]] = scores
        if sources is None:
            return values
        return pd.DataFrame(values, X.index, list(self.scores_))

    def missing_scores(self, X: Any) -> pd.DataFrame:
        """Which scores are NaN for want of an ingredient, and what is missing.

        Parameters
        ----------
        X : DataFrame, or array or Tensor
            As for `transform`.

        Returns
        -------
        DataFrame
            One row per source and missing score, with columns ``source`` ("array" for a stack),
            ``score`` and ``reason``; no rows if all scores are defined.

        Examples
        --------
        >>> import numpy as np
        >>> from skhead.circuits import CircuitScorer
        >>> stack = np.random.default_rng(0).normal(size=(3, 4, 8, 2))
        >>> scorer = CircuitScorer(["ov_norm", "ov_copying"], errors="ignore").fit(stack)
        >>> scorer.missing_scores(stack).values.tolist()
        [['array', 'ov_copying', 'a stack has no tokens, no positions and no layers']]
        """
        check_is_fitted(self)
        self._check_parameters()
        rows = []
        for part in self._open(X):
            if part.stacks is not None:
                source, missing = "array", missing_in_stack(self.scores_)
            else:
                source = str(part.heads["source"].iloc[0])
                missing = ModelReader(part.heads, self._reading()).missing(self.scores_)
            rows += [(source, name, reason) for name, reason in missing.items()]
        return pd.DataFrame(rows, columns=["source", "score", "reason"], dtype=object)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the scores.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_scores,)
        """
        check_is_fitted(self)
        return np.asarray(self.scores_, dtype=object)

    def _check_parameters(self) -> None:
        name = type(self).__name__
        check_option("errors", self.errors, ("warn", "raise", "ignore"), name)
        parse_bytes(self.max_memory, name)
        check_device(self.device, name, float64=True)
        if not check_number("position_scale", self.position_scale, name) > 0:
            raise ValueError(f"{name}: position_scale must be above 0; got {self.position_scale!r}")
        check_count("relative_position", self.relative_position, name, smallest=0)
        check_count("n_positions", self.n_positions, name, smallest=3)
        if self.n_tokens is not None:
            check_count("n_tokens", self.n_tokens, name)

    def _open(self, X: Any) -> list[HeadInput]:
        """The heads of each source; one part for a stack."""
        name = type(self).__name__
        if isinstance(X, pd.DataFrame) and _has_sources(X):
            groups = X.groupby("source", sort=False, dropna=False)
            return [HeadInput(check_heads(part, name), None) for _, part in groups]
        source = open_door(X, name)
        if source.anonymous:
            raise HeadShapeError(
                f"{name}: needs all four matrices of every head; pass a heads table or a stack of "
                "shape (n_heads, 4, d_model, d_head) for Q, K, V, O"
            )
        check_processable(source, name, fold_norm=self.fold_norm, center=self.center)
        if self.relative_position:
            raise ValueError(
                f"{name}: relative_position needs the model's positions; a stack has none, so pass "
                "a heads table or turn the queries yourself"
            )
        return [source]

    def _names(self, stack: bool) -> tuple[str, ...]:
        if isinstance(self.scores, str):
            asked = [self.scores]
        else:
            asked = list(self.scores) if np.iterable(self.scores) else []
        names: list[str] = []
        for entry in asked:
            if entry == "all":
                names += GROUPS["maps"] if stack else _EVERY
            elif entry in GROUPS:
                names += GROUPS[entry]
            elif entry in _EVERY:
                names.append(entry)
            else:
                raise ValueError(
                    f"{type(self).__name__}: scores holds {entry!r}; it may hold 'all', the groups "
                    f"{', '.join(GROUPS)}, or names of scores such as 'ov_copying' (all of them: "
                    f"{', '.join(_EVERY)})"
                )
        if not names:
            raise ValueError(
                f"{type(self).__name__}: scores is {self.scores!r}; name at least one score"
            )
        return tuple(dict.fromkeys(names))

    def _score(self, part: HeadInput) -> ScoredHeads:
        """Scores of the heads of one source, and what is missing for the others."""
        name = type(self).__name__
        if part.stacks is not None:
            return score_stack(part, self.scores_, self.device, name)
        return with_less_memory(
            partial(score_model, part.heads, self.scores_, self._reading(), caller=name),
            parse_bytes(self.max_memory, name),
            name,
            smallest=_SMALLEST_BUDGET,
        )

    def _reading(self) -> Reading:
        return Reading(
            fold_norm=self.fold_norm,
            center=self.center,
            device=resolve_device(self.device, type(self).__name__, float64=True),
            n_positions=int(self.n_positions),
            position_scale=float(self.position_scale),
            n_tokens=None if self.n_tokens is None else int(self.n_tokens),
            relative_position=int(self.relative_position),
        )

    def _report_missing(self, missing: Mapping[str, str], part: HeadInput) -> None:
        """Say once for a source which scores are not defined, and why."""
        if not missing or self.errors == "ignore":
            return
        where = "the stack" if part.stacks is not None else str(part.heads["source"].iloc[0])
        reasons = "; ".join(
            f"{', '.join(name for name in missing if missing[name] == reason)}: {reason}"
            for reason in dict.fromkeys(missing.values())
        )
        message = f"{type(self).__name__}: {where} lacks what some scores need. {reasons}."
        if self.errors == "raise":
            raise CheckpointError(f"{message} Choose other scores, or errors='warn' for NaN.")
        warn_user(
            f"{message} These columns are NaN; choose other scores, or errors='ignore'.",
        )


def _has_sources(heads: pd.DataFrame) -> bool:
    """Whether a heads table can be taken apart by source; if not, its check says why."""
    columns = list(heads.columns)
    complete = len(heads) > 0 and all(columns.count(name) == 1 for name in HEAD_COLUMNS)
    return complete and all(isinstance(source, str) for source in heads["source"])


def identity_scores(
    X: Any,
    *,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Whether heads write back to the subspace that they read values from, and with which sign.

    ``pk_vo`` is the projection kernel between W_V and W_O^T of one head: high for a head that moves
    a subspace onto itself, blind to sign. ``identity_signed``, ``tr(W_V W_O) / (||W_V W_O||_F
    sqrt(rank))``, is +1 for a head that copies its subspace unchanged, -1 for one that erases it
    and near 0 for unrelated directions.

    Parameters
    ----------
    X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, or W_Q, W_K, W_V and W_O transposed.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row per head, columns ``pk_vo`` and ``identity_signed``.

    Raises
    ------
    HeadShapeError
        If a stack does not hold all four roles.
    DegenerateHeadError
        If the OV map of a head is zero.
    ValueError
        If a stack is to be processed as only a model's weights can be.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.identity_scores(heads).columns.tolist()
    ['pk_vo', 'identity_signed']
    """
    source = open_door(X, "identity_scores")
    if source.anonymous:
        raise HeadShapeError(
            "identity_scores: needs W_V and W_O of every head; pass a heads table or a stack of "
            "shape (n_heads, 4, d_model, d_head) for Q, K, V, O"
        )
    check_processable(source, "identity_scores", fold_norm=fold_norm, center=center)
    place = check_device(device, "identity_scores", float64=True)
    options: dict[str, Any] = {"fold_norm": fold_norm, "center": center, "device": place}
    with saying_once():
        subspaces = extract_subspaces(source, "VO", rank=None, caller="identity_scores", **options)
        matrices = [source.read(role, **options) for role in "VO"]
    bases = [subspaces.role(role) for role in "VO"]
    ranks = np.minimum(subspaces.ranks("V"), subspaces.ranks("O"))
    parts = []
    for start in range(0, len(source.heads), _CHUNK):
        rows = slice(start, start + _CHUNK)
        v, o = (_heads_of(basis.tensor, basis.index[rows]) for basis in bases)
        w_v, w_o = (_heads_of(read.tensor, read.index[rows]) for read in matrices)
        found = identity_parts(v, o, w_v, w_o, torch.as_tensor(ranks[rows], device=w_v.device))
        parts.append(torch.stack(found, dim=1).cpu().numpy())
    labels = pd.Index(head_labels(source.heads))
    _refuse_zero_maps(np.concatenate(parts), labels)
    return pd.DataFrame(np.concatenate(parts), labels, ["pk_vo", "identity_signed"])


def _refuse_zero_maps(scores: NDArray[np.float64], labels: pd.Index) -> None:
    undefined = np.isnan(scores).any(axis=1)
    if undefined.any():
        label = labels[int(undefined.argmax())]
        raise DegenerateHeadError(
            f"identity_scores: the OV map of {label} is zero, so that it has no sign; "
            "drop the head, for example heads.drop(index=...)"
        )


def _heads_of(stack: torch.Tensor, index: NDArray[np.int64]) -> torch.Tensor:
    return stack[torch.as_tensor(index, device=stack.device)]
