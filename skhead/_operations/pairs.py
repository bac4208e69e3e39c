"""Operations as pairs of token ids, and what became of the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._checks import check_operation_names
from skhead.datasets._operations import filter_operations

__all__ = ["TokenPairs", "check_targets", "token_pairs"]


@dataclass(frozen=True)
class TokenPairs:
    """Operations of which enough pairs are left.

    Attributes
    ----------
    ids : dict of str to ndarray of shape (n_pairs, 2), int64
        Source and target tokens.
    counts : DataFrame
        One row for every operation that was given; see `skhead.datasets.filter_operations`.
    """

    ids: dict[str, NDArray[np.int64]]
    counts: pd.DataFrame


def token_pairs(
    operations: Any, tokenizer: Any, leading_space: bool, min_pairs: int, caller: str
) -> TokenPairs:
    """Turn operations of words or of token ids into pairs of token ids.

    Parameters
    ----------
    operations : mapping of str to sequence of (source, target)
        Words, or integers.
    tokenizer : tokenizer, path, callable or None
        For words.
    leading_space : bool
    min_pairs : int
    caller : str

    Raises
    ------
    ValueError
        If there are no operations, one is not made of pairs, words come without a tokenizer, or
        none keeps enough pairs.
    """
    if not isinstance(operations, Mapping) or not operations:
        raise ValueError(
            f"{caller}: operations must be a mapping from names to lists of (source, target) pairs "
            f"with at least one operation; got {type(operations).__name__} {operations!r:.60}"
        )
    check_operation_names(operations, caller)
    of_ids = {name: _ids(name, pairs, caller) for name, pairs in operations.items()}
    words = {name: operations[name] for name, ids in of_ids.items() if ids is None}
    ids, counts = {}, []
    if words:
        if tokenizer is None:
            raise ValueError(
                f"{caller}: operation {next(iter(words))!r} is made of words; pass the model's "
                "tokenizer, or pairs of token ids"
            )
        found = filter_operations(
            words, tokenizer, leading_space=leading_space, min_pairs=min_pairs
        )
        ids, counts = dict(found.token_ids), [found.counts]
    for name, pairs in of_ids.items():
        if pairs is None:
            continue
        used = len(pairs) >= min_pairs
        counts.append(_counts_of_ids(name, pairs, used))
        if used:
            ids[name] = pairs
    table = pd.concat(counts).loc[list(operations)]
    if not ids:
        listed = ", ".join(f"{n} {kept}" for n, kept in table["n_kept"].items())
        raise ValueError(
            f"{caller}: no operation keeps {min_pairs} pairs of single tokens (kept: {listed}); "
            "lower min_pairs, add pairs, or check tokenizer and leading_space"
        )
    return TokenPairs({name: ids[name] for name in operations if name in ids}, table)


def _ids(name: str, pairs: Any, caller: str) -> NDArray[np.int64] | None:
    """Pairs as token ids; None if they are made of words."""
    listed = list(pairs) if isinstance(pairs, Sequence | np.ndarray) else []
    if not listed or isinstance(pairs, str | bytes):
        raise ValueError(
            f"{caller}: operation {name!r} must be a list of at least one (source, target) pair; "
            f"got {pairs!r:.60}"
        )
    if any(isinstance(pair, str) or len(np.atleast_1d(pair)) != 2 for pair in listed):
        raise ValueError(f"{caller}: operation {name!r} holds something that is not a pair")
    kinds = {isinstance(token, str) for pair in listed for token in pair}
    if kinds == {True}:
        return None
    array = np.asarray(listed)
    if kinds != {False} or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(
            f"{caller}: operation {name!r} must be made of words alone, or of token ids alone, "
            "which are integers of at least 0"
        )
    return array.astype(np.int64)


def _counts_of_ids(name: str, pairs: NDArray[np.int64], used: bool) -> pd.DataFrame:
    row = {
        "n_pairs": len(pairs),
        "n_kept": len(pairs),
        "n_source_dropped": 0,
        "n_target_dropped": 0,
        "n_targets": len(np.unique(pairs[:, 1])),
        "used": used,
    }
    return pd.DataFrame(row, index=pd.Index([name], name="operation"))


def check_targets(
    pairs: Mapping[str, NDArray[np.int64]], n_tokens: int, what: str, caller: str
) -> None:
    """Refuse target tokens that do not compete.

    Parameters
    ----------
    pairs : mapping of str to ndarray of shape (n_pairs, 2)
    n_tokens : int
    what : str
        What has that many tokens.
    caller : str

    Raises
    ------
    ValueError
    """
    for name, ids in pairs.items():
        outside = ids[:, 1][ids[:, 1] >= n_tokens]
        if outside.size:
            raise ValueError(
                f"{caller}: operation {name!r} has the target token {outside[0]}, but {what} are "
                f"0 to {n_tokens - 1}; is the tokenizer that of another model?"
            )
