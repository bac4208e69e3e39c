"""Operations as word pairs: what ships with the package, what users bring, what a tokenizer leaves.

An operation is a list of pairs (source, target), such as a country and its capital.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._checks import check_count
from skhead._tokenizers import as_encoder, vocabulary_texts
from skhead.exceptions import SourceNotFoundError

__all__ = [
    "FilteredOperations",
    "copying_operation",
    "filter_operations",
    "list_operations",
    "load_operations",
]

Pairs = list[tuple[str, str]]

_FACTS = (
    "adj_antonym",
    "adj_comparative",
    "adj_superlative",
    "country_to_capital",
    "country_to_nationality",
    "country_to_official_language",
    "english_to_french",
    "english_to_german",
    "english_to_spanish",
    "name_copying",
    "noun_plural",
    "noun_to_pronoun",
    "object_superclass",
    "verb_past_tense",
    "verb_present_participle",
    "word_to_homophone",
)
#: Files whose sources are the words of the operations on letters.
_WORDS = ("adj_comparative", "english_to_french", "noun_plural", "verb_past_tense")
_YEARS = range(1400, 2100)
_FOLLOWING = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "I II III IV V VI VII VIII IX X",
)
_COLUMNS = ["operation", "source", "target"]
#: Tokens that look like a whole word.
_COPIED = re.compile(r" [a-z]+")


def _years() -> Pairs:
    return [(str(year), str(year + 1)) for year in _YEARS]


def _followers() -> Pairs:
    rows = [row.split() for row in _FOLLOWING]
    return [pair for row in rows for pair in pairwise(row)]


def _words() -> list[str]:
    """English words in lower case, of two letters or more, in alphabetical order."""
    words = {source for name in _WORDS for source, _ in _facts(name)}
    return sorted(word for word in words if len(word) > 1)


_GENERATED: Mapping[str, Callable[[], Pairs]] = {
    "item_to_following": _followers,
    "word_first_letter": lambda: [(word, word[0]) for word in _words()],
    "word_last_letter": lambda: [(word, word[-1]) for word in _words()],
    "word_to_capitalized": lambda: [(word, word.capitalize()) for word in _words()],
    "year_to_following": _years,
}


def list_operations() -> list[str]:
    """Names of the operations that come with the package.

    Returns
    -------
    list of str
        Each is a key of what :func:`load_operations` returns.

    Examples
    --------
    >>> from skhead.datasets import list_operations
    >>> len(list_operations()), list_operations()[:2]
    (21, ['adj_antonym', 'adj_comparative'])
    """
    return sorted([*_FACTS, *_GENERATED])


def load_operations(
    path: str | Path | None = None, *, names: str | Sequence[str] | None = None
) -> dict[str, Pairs]:
    """Operations as word pairs: those of the package, or of a directory or table of the user's.

    The package's own are facts of geography and language (capitals, official languages,
    nationalities, inflected forms, antonyms, superclasses, pronouns, homophones, translations,
    first names) and what rules make (following year, following item of well-known series, first
    and last letter of a word, the word with a capital). Copying of any word depends on the
    tokenizer, see :func:`copying_operation`.

    Parameters
    ----------
    path : str or Path, optional
        A checkout of MAPS [1]_, its ``datasets`` directory, or any directory of JSON files, each a
        list of ``[source, target]`` and named like its operation; or a CSV file with the columns
        ``operation, source, target``. The package's own operations by default.
    names : str or sequence of str, optional
        Which operations; all by default.

    Returns
    -------
    dict of str to list of (str, str)
        Pairs in the order of the file, by the name of the operation.

    Raises
    ------
    SourceNotFoundError
        If the path does not exist or holds no operations.
    ValueError
        If an operation is unknown, or a file does not hold pairs of words.

    References
    ----------
    .. [1] A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their
       Parameters", ACL (2025), arXiv:2412.11965.

    Examples
    --------
    >>> from skhead.datasets import load_operations
    >>> operations = load_operations(names=["country_to_capital", "word_first_letter"])
    >>> {name: pairs[0] for name, pairs in operations.items()}
    {'country_to_capital': ('Afghanistan', 'Kabul'), 'word_first_letter': ('accept', 'a')}
    """
    if path is None:
        return {name: _shipped(name) for name in _chosen(names, list_operations())}
    where = Path(path)
    if where.is_dir():
        found = _json_files(where)
        return {name: _read_json(found[name]) for name in _chosen(names, found)}
    if not where.is_file():
        raise SourceNotFoundError(
            f"load_operations: {where} does not exist; give the path of a MAPS checkout, of a "
            "directory of JSON files, or of a CSV file"
        )
    operations = _read_table(where)
    return {name: operations[name] for name in _chosen(names, operations)}


def _chosen(names: str | Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names that are asked for, all of them known."""
    available = sorted(known)
    if names is None:
        return available
    asked = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    unknown = [name for name in asked if name not in available]
    if unknown or not asked:
        what = f"no operation is named {unknown[0]!r}" if unknown else "names is empty"
        raise ValueError(f"load_operations: {what}; the operations are {', '.join(available)}")
    return asked


def _shipped(name: str) -> Pairs:
    return _GENERATED[name]() if name in _GENERATED else _facts(name)


def _facts(name: str) -> Pairs:
    file = files("skhead.datasets").joinpath("operations", f"{name}.csv")
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return [(row["source"], row["target"]) for row in rows]


def _json_files(directory: Path) -> dict[str, Path]:
    """JSON files of a checkout's ``datasets``, or of a directory, by the operation's name."""
    inner = directory / "datasets"
    root = inner if inner.is_dir() else directory
    paths = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    twins = {path.stem: path for path in paths}
    if not paths:
        raise SourceNotFoundError(
            f"load_operations: {root} holds no JSON file, nor do its subdirectories; give the path "
            "of a MAPS checkout or of a directory with one JSON list of [source, target] for each "
            "operation"
        )
    if len(twins) < len(paths):
        double = next(path for path in paths if twins[path.stem] != path)
        raise ValueError(
            f"load_operations: {double} and {twins[double.stem]} are of one name; rename one"
        )
    return twins


def _read_json(path: Path) -> Pairs:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_operations: {path} is no JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"load_operations: {path} must hold a list of [source, target]")
    return check_pairs(rows, f"load_operations: {path}")


def _read_table(path: Path) -> dict[str, Pairs]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        missing = [column for column in _COLUMNS if column not in columns]
        if missing:
            raise ValueError(
                f"load_operations: {path} has no column {', '.join(missing)}; it needs a header "
                f"with {', '.join(_COLUMNS)}, but begins with {', '.join(columns)!r}"
            )
        found: dict[str, list[Any]] = {}
        for row in reader:
            found.setdefault(row["operation"], []).append((row["source"], row["target"]))
    if not found:
        raise SourceNotFoundError(f"load_operations: {path} holds no rows")
    return {
        name: check_pairs(rows, f"load_operations: {path}, {name}") for name, rows in found.items()
    }


def check_pairs(rows: Iterable[Any], where: str) -> Pairs:
    """Pairs of words as tuples; an error names `where` and the first row that is none."""
    pairs = []
    for i, row in enumerate(rows):
        whole = isinstance(row, list | tuple) and len(row) == 2
        if not whole or not all(isinstance(word, str) and word.strip() for word in row):
            raise ValueError(f"{where}: row {i} must be a pair of words, got {row!r}")
        pairs.append((row[0], row[1]))
    if not pairs:
        raise ValueError(f"{where}: holds no pairs")
    return pairs


def copying_operation(vocabulary: Any, n_pairs: int = 500, *, min_letters: int = 3) -> Pairs:
    """Words of a vocabulary, each of which leads to itself.

    Parameters
    ----------
    vocabulary : tokenizer, path, sequence or mapping
        A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, the directory of one, or the text of
        each token id. What counts are tokens that look like a word: a space and small letters a to
        z. Some are but the beginning of one, which a model copies as well.
    n_pairs : int, default=500
        At most so many: the first by token id, which in vocabularies learned by merging pairs are
        the most frequent.
    min_letters : int, default=3
        Shorter words are left out, as they may be parts of words.

    Returns
    -------
    list of (str, str)
        Fewer than `n_pairs` where the vocabulary has no more words.

    Raises
    ------
    ValueError
        If the vocabulary has no such token, or a count is not a positive integer.
    TypeError
        If the vocabulary cannot be listed, as that of a function.

    Examples
    --------
    >>> from skhead.datasets import copying_operation
    >>> copying_operation([" the", "ing", " of", " house", " The"])
    [('the', 'the'), ('house', 'house')]
    """
    for name, value in (("n_pairs", n_pairs), ("min_letters", min_letters)):
        check_count(name, value, "copying_operation")
    texts = dict.fromkeys(vocabulary_texts(vocabulary, "copying_operation"))
    words = [text[1:] for text in texts if _COPIED.fullmatch(text) and len(text) > min_letters]
    if not words:
        raise ValueError(
            f"copying_operation: none of the {len(texts)} texts is a space and {min_letters} or "
            "more small letters; make pairs of words of your own"
        )
    return [(word, word) for word in words[:n_pairs]]


class FilteredOperations(NamedTuple):
    """What a tokenizer leaves of operations.

    Attributes
    ----------
    operations : dict of str to list of (str, str)
        Pairs of which both words are one token, of the operations that keep enough of them.
    token_ids : dict of str to ndarray of shape (n_pairs, 2), int64
        The same pairs as token ids.
    counts : DataFrame
        One row for every operation that was given: ``n_pairs``, ``n_kept``, ``n_source_dropped``
        and ``n_target_dropped`` (pairs whose source or target is not one token; some are both),
        ``n_targets`` (distinct ones among the kept) and ``used`` (whether enough were kept).

    Examples
    --------
    >>> from skhead.datasets import filter_operations
    >>> pairs = {"plural": [("cat", "cats"), ("ox", "oxen")]}
    >>> numbers = {" cat": [1], " cats": [2], " ox": [3], " oxen": [4, 5]}
    >>> found = filter_operations(pairs, numbers.get, min_pairs=1)
    >>> found.operations, int(found.counts.loc["plural", "n_kept"])
    ({'plural': [('cat', 'cats')]}, 1)
    """

    operations: dict[str, Pairs]
    token_ids: dict[str, NDArray[np.int64]]
    counts: pd.DataFrame


def filter_operations(
    operations: Mapping[str, Iterable[tuple[str, str]]],
    tokenizer: Any,
    *,
    leading_space: bool = True,
    min_pairs: int = 30,
) -> FilteredOperations:
    """Keep the pairs of which both words are one token, as the code released with MAPS does.

    Words are compared as they stand: neither case nor spelling is varied, and pairs that occur
    twice count twice.

    Parameters
    ----------
    operations : mapping of str to list of (str, str)
        As from :func:`load_operations`.
    tokenizer : tokenizer, path or callable
        A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, a directory with ``tokenizer.json``
        or with ``vocab.json`` and ``merges.txt``, or a function from a text to token ids. No
        special tokens are added.
    leading_space : bool, default=True
        Put a space in front of every word. False for tokenizers that put one there themselves.
    min_pairs : int, default=30
        Operations that keep fewer pairs are left out; the counts tell.

    Returns
    -------
    FilteredOperations
        ``operations``, ``token_ids`` and ``counts``.

    Raises
    ------
    ValueError
        If there are no operations, one is empty or not made of pairs of words, or `min_pairs` is
        not a positive integer.
    TypeError
        If the tokenizer is of no known kind.

    References
    ----------
    A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their Parameters", ACL
    (2025), arXiv:2412.11965.

    Examples
    --------
    >>> from skhead.datasets import filter_operations
    >>> ids = {" hot": [7], " cold": [8], " big": [9], " small": [5, 6]}
    >>> pairs = {"antonym": [("hot", "cold"), ("big", "small")]}
    >>> found = filter_operations(pairs, lambda text: ids[text], min_pairs=1)
    >>> found.operations, found.token_ids["antonym"].tolist()
    ({'antonym': [('hot', 'cold')]}, [[7, 8]])
    >>> found.counts.loc["antonym", "n_target_dropped"].item()
    1
    """
    caller = "filter_operations"
    check_count("min_pairs", min_pairs, caller)
    if not isinstance(operations, Mapping) or not operations:
        raise ValueError(
            f"{caller}: operations must be a mapping from names to lists of (source, target) with "
            f"at least one operation; got {operations!r}"
        )
    encode = as_encoder(tokenizer, caller)
    prefix = " " if leading_space else ""
    kept: dict[str, Pairs] = {}
    token_ids: dict[str, NDArray[np.int64]] = {}
    counts = {}
    for name, rows in operations.items():
        pairs = check_pairs(rows, f"{caller}: operation {name!r}")
        encoded = [[encode(prefix + word) for word in pair] for pair in pairs]
        single = np.array([[len(ids) == 1 for ids in pair] for pair in encoded])
        rows_kept = np.flatnonzero(single.all(axis=1)).tolist()
        left = [pairs[row] for row in rows_kept]
        used = len(left) >= min_pairs
        counts[name] = {
            "n_pairs": len(pairs),
            "n_kept": len(left),
            "n_source_dropped": int((~single[:, 0]).sum()),
            "n_target_dropped": int((~single[:, 1]).sum()),
            "n_targets": len({target for _, target in left}),
            "used": used,
        }
        if used:
            kept[name] = left
            ids = [[source[0], target[0]] for source, target in (encoded[row] for row in rows_kept)]
            token_ids[name] = np.array(ids, dtype=np.int64)
    table = pd.DataFrame.from_dict(counts, orient="index")
    return FilteredOperations(kept, token_ids, table.rename_axis("operation"))
