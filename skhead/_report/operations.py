"""Operations on tokens in a report: which ones, with which tokenizer, and which heads do them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from skhead._report.text import json_value, listed
from skhead.datasets import copying_operation, list_operations, load_operations
from skhead.exceptions import SourceNotFoundError, UnsupportedLayoutError
from skhead.operations import OperationMapper
from skhead.weights import SourceInfo

__all__ = [
    "COPYING",
    "LARGEST_Q",
    "LEAST_LIFT",
    "SIGNS",
    "HeadOperations",
    "Said",
    "operation_mapper",
    "operation_numbers",
    "operation_words",
    "score_operations",
]

#: False discovery rate and lift from which a head is said to carry out an operation.
LARGEST_Q, LEAST_LIFT = 0.01, 0.15
#: By the key of either sign: its mark in columns, and what is said of a head.
SIGNS = {"carried_out": ("", "carries out"), "suppressed": ("-", "suppresses")}
#: Operation made of the model's own vocabulary.
COPYING = "token_copying"
_LISTED = 8
_TEXTS = "tokens.json"
_CALLER = "write_report"


@dataclass(frozen=True)
class Said:
    """What is said of one head and operation.

    Attributes
    ----------
    words : str
    score, lift, q : float
    """

    words: str
    score: float
    lift: float
    q: float


@dataclass(frozen=True)
class HeadOperations:
    """Scores of heads at operations.

    Attributes
    ----------
    mapper : OperationMapper
        Fitted to the heads.
    names : tuple of str
        Operations that keep enough pairs.
    tables : mapping of str to DataFrame
        ``score, null_expectation, lift, log10_p, q, mrr, auc, median_rank``: one row per head, one
        column per operation and sign.
    remarks : tuple of str
        What a reader must know about how the operations were read.
    """

    mapper: OperationMapper
    names: tuple[str, ...]
    tables: Mapping[str, pd.DataFrame]
    remarks: tuple[str, ...]

    def called(self, column: str) -> list[str]:
        """Heads of which an operation, or its suppression, is said, by falling lift."""
        lift = self.tables["lift"][column]
        reached = (lift >= LEAST_LIFT) & (self.tables["q"][column] <= LARGEST_Q)
        return [
            str(head) for head in lift[reached].sort_values(ascending=False, kind="stable").index
        ]

    def said(self) -> dict[str, list[Said]]:
        """What is said of heads, by their labels."""
        found: dict[str, list[Said]] = {}
        for name in self.names:
            for sign, verb in SIGNS.values():
                for head in self.called(column := sign + name):
                    figures = (
                        float(self.tables[kind][column][head]) for kind in ("score", "lift", "q")
                    )
                    found.setdefault(head, []).append(Said(f"{verb} {name}", *figures))
        return found

    def columns(self) -> pd.DataFrame:
        """Scores and lifts to six decimals, and false discovery rates, as one table of heads."""
        shown = {kind: self.tables[kind].round(6) for kind in ("score", "lift")}
        shown["q"] = self.tables["q"]
        return pd.concat(
            [table.add_prefix(f"operation_{kind}_") for kind, table in shown.items()], axis=1
        )


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer: what encodes, what lists the texts of tokens, and its name for readers."""

    encoder: Any
    vocabulary: Any
    name: str

    @property
    def remark(self) -> str:
        """What the page says of it."""
        return f"Words were turned into tokens by {self.name}."


def operation_mapper(
    asked: Any, tokenizer: Any, info: SourceInfo, options: Mapping[str, Any]
) -> tuple[OperationMapper, tuple[str, ...]]:
    """Turn what the user asks for into an estimator, before anything is computed.

    Parameters
    ----------
    asked : OperationMapper, mapping, str, path or sequence of str
        See `skhead.report.write_report`.
    tokenizer : tokenizer, path, callable or None
    info : SourceInfo
    options : mapping
        Parameters of `OperationMapper` that the report sets.

    Returns
    -------
    mapper : OperationMapper
    remarks : tuple of str

    Raises
    ------
    ValueError
        If the heads attend across streams, an operation is unknown, or there is no tokenizer.
    """
    if info.part == "cross":
        raise ValueError(
            f"{_CALLER}: operations cannot be read off cross-attention, which reads another stream "
            "than it writes to; leave out operations, or choose part='encoder' or 'decoder'"
        )
    if isinstance(asked, OperationMapper):
        mapper = clone(asked)
    elif isinstance(asked, Mapping):
        mapper = OperationMapper(asked, **options)
    else:
        tokens = _find_tokens(tokenizer, info.source)
        operations, remarks = _by_name(asked, tokens)
        return OperationMapper(operations, tokens.encoder, **options), (*remarks, tokens.remark)
    if tokenizer is None and (mapper.tokenizer is not None or not _has_words(mapper.operations)):
        return mapper, ()
    tokens = _find_tokens(tokenizer, info.source)
    return mapper.set_params(tokenizer=tokens.encoder), (tokens.remark,)


def _has_words(operations: Mapping[str, Any]) -> bool:
    """Whether any pair begins with a word, so that a tokenizer is needed."""
    return any(isinstance(pair[0], str) for pairs in operations.values() for pair in pairs)


def _find_tokens(tokenizer: Any, source: str) -> _Tokens:
    """The tokenizer that is given, or the one beside the model."""
    if tokenizer is not None and not isinstance(tokenizer, str | PathLike):
        return _Tokens(tokenizer, tokenizer, f"the {type(tokenizer).__name__} that was given")
    place = Path(source if tokenizer is None else fspath(tokenizer))
    if tokenizer is None and place.is_file():
        place = place.parent
    if (place / "tokenizer.json").is_file() or (place / "merges.txt").is_file():
        name = "tokenizer.json" if (place / "tokenizer.json").is_file() else "vocab.json"
        return _Tokens(place, place, name)
    texts = place if place.name == _TEXTS else place / _TEXTS
    if texts.is_file():
        return _read_texts(texts)
    if tokenizer is None:
        raise SourceNotFoundError(
            f"{_CALLER}: operations are made of words, and none of tokenizer.json, vocab.json with "
            f"merges.txt and {_TEXTS} lies beside {source}; name the model's tokenizer (parameter "
            "tokenizer, on the command line --tokenizer)"
        )
    return _Tokens(place, place, place.name)


def _read_texts(path: Path) -> _Tokens:
    """A list with the text of every token; a word counts if it is the text of one."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = stored if isinstance(stored, list) else []
    texts: list[Any] = [row.get("text") if isinstance(row, dict) else row for row in rows]
    ids = [row.get("id", i) if isinstance(row, dict) else i for i, row in enumerate(rows)]
    if not rows or not all(isinstance(text, str) for text in texts) or ids != [*range(len(rows))]:
        raise ValueError(
            f"{_CALLER}: {path} must be a list of the texts of all tokens in the order of their "
            'ids, or of {"id": 0, "text": "..."}'
        )
    token_of: dict[str, int] = {}
    for token, text in enumerate(texts):
        token_of.setdefault(text, token)

    def encode(text: str) -> list[int]:
        return [token_of[text]] if text in token_of else []

    return _Tokens(encode, texts, f"exact match with the texts in {path.name}")


def _by_name(asked: Any, tokens: _Tokens) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Operations of the package, of the vocabulary, or of a path."""
    if isinstance(asked, str | PathLike):
        text = fspath(asked)
        names = [part.strip() for part in text.split(",") if part.strip()]
    elif isinstance(asked, Sequence) and all(isinstance(name, str) for name in asked):
        text, names = None, list(asked)
    else:
        raise TypeError(
            f"{_CALLER}: operations must be 'all', names, a path, a mapping from names to pairs, "
            f"or an OperationMapper; got {type(asked).__name__}"
        )
    if names == ["all"]:
        return _everything(tokens)
    known = [*list_operations(), COPYING]
    unknown = [name for name in names if name not in known]
    if text is not None and unknown and Path(text).exists():
        return dict(load_operations(text)), ()
    if unknown or not names:
        what = f"{unknown[0]!r} is neither a path nor" if unknown else "is empty: it takes"
        raise ValueError(f"{_CALLER}: operations: {what} one of all, {', '.join(known)}")
    shipped = [name for name in names if name != COPYING]
    operations: dict[str, Any] = dict(load_operations(names=shipped)) if shipped else {}
    if COPYING in names:
        operations[COPYING] = copying_operation(tokens.vocabulary)
    return operations, ()


def _everything(tokens: _Tokens) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All operations of the package, and copying if the vocabulary has words."""
    operations: dict[str, Any] = dict(load_operations())
    try:
        operations[COPYING] = copying_operation(tokens.vocabulary)
    except (TypeError, ValueError) as error:
        why = str(error).removeprefix("copying_operation: ")
        return operations, (f"{COPYING} is left out: {why}.",)
    return operations, ()


def score_operations(
    heads: pd.DataFrame, mapper: OperationMapper, remarks: tuple[str, ...]
) -> HeadOperations:
    """Score heads; a first block without an MLP is told, and heads then read embeddings.

    Parameters
    ----------
    heads : DataFrame
        Rows of the heads table of one source, by unique labels.
    mapper : OperationMapper
        Not fitted.
    remarks : tuple of str
        From `operation_mapper`.

    Returns
    -------
    HeadOperations

    Raises
    ------
    SkheadError
        If the model has no embedding or no unembedding.
    ValueError
        If no operation keeps enough pairs, or hits are asked for at several k.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OperationMapper: operations that keep fewer")
        try:
            mapper.fit(heads)
        except UnsupportedLayoutError as error:
            if mapper.source_embedding == "raw":
                raise
            mapper.set_params(source_embedding="raw").fit(heads)
            remarks = (*remarks, f"All heads are taken to read embeddings: {_reason(error)}.")
    names = tuple(mapper.token_ids_)
    if list(mapper.scores_.columns) != list(mapper.mrr_.columns):
        raise ValueError(
            f"{_CALLER}: an OperationMapper for a report must have one k and one copying_k; got "
            f"{mapper.settings_['k']} and {mapper.settings_['copying_k']}"
        )
    medians = {column: np.median(ranks, axis=1) for column, ranks in mapper.rank_of_target_.items()}
    tables = {
        "score": mapper.scores_,
        "null_expectation": mapper.null_expectation_,
        "lift": mapper.lift_,
        "log10_p": mapper.log10_p_,
        "q": mapper.q_,
        "mrr": mapper.mrr_,
        "auc": mapper.auc_,
        "median_rank": pd.DataFrame(medians, heads.index),
    }
    return HeadOperations(mapper, names, tables, remarks)


def _reason(error: UnsupportedLayoutError) -> str:
    """First sentence of an error about a first block, without parameter and directories."""
    sentence = str(error).partition(". ")[0].removeprefix("OperationMapper: ")
    named = re.sub(r"^source_embedding='\w+': ", "", sentence)
    return re.sub(r"(^|(?<=\s))/\S*/", "", named)


def operation_numbers(found: HeadOperations) -> dict[str, Any]:
    """What the page says of operations, ready for JSON.

    Parameters
    ----------
    found : HeadOperations

    Returns
    -------
    dict
        ``settings``, the limits ``fdr`` and ``least_lift``, ``remarks``, ``counts`` of pairs of
        every operation, and by operation and sign the ``heads`` that are called and the ``top``
        heads by lift.
    """
    counts = found.mapper.pair_counts_
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.mapper.settings_.items()
    }
    return {
        "settings": settings,
        "fdr": LARGEST_Q,
        "least_lift": LEAST_LIFT,
        "remarks": list(found.remarks),
        "counts": {
            str(name): {str(key): json_value(value) for key, value in row.items()}
            for name, row in counts.to_dict("index").items()
        },
        "operations": {
            name: {key: _one_sign(found, sign + name) for key, (sign, _) in SIGNS.items()}
            for name in found.names
        },
    }


def _one_sign(found: HeadOperations, column: str) -> dict[str, Any]:
    """Heads of one operation and sign, those above expectation first by lift."""
    lift = found.tables["lift"][column]
    best = lift[lift > 0].sort_values(ascending=False, kind="stable").index[:_LISTED]
    null = found.tables["null_expectation"][column]
    return {
        "heads": found.called(column),
        "mean_null": float(null.mean()),
        "largest_null": float(null.max()),
        "top": [
            {"head": str(head)}
            | {kind: json_value(table.at[head, column]) for kind, table in found.tables.items()}
            for head in best
        ],
    }


def operation_words(found: HeadOperations) -> str:
    """One paragraph on the operations that heads carry out or suppress."""
    sentences = []
    for sign, verb in (("", "carry out"), ("-", "suppress")):
        told = [
            f"{name} ({len(heads)}, most of all {heads[0]})"
            for name in found.names
            if (heads := found.called(sign + name))
        ]
        if told:
            sentences.append(f"Heads {verb} {listed(told)}.")
    if not sentences:
        sentences = ["No head carries out or suppresses any of them."]
    count = len(found.names)
    return (
        f"Of {count} operation{'s' * (count != 1)} on tokens, with the number of heads at a lift "
        f"of {LEAST_LIFT} or more and a false discovery rate of {LARGEST_Q:.0%}: "
        f"{' '.join(sentences)}"
    )
