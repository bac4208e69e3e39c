"""Tokenizers of any make as plain functions between texts and token ids."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from skhead.exceptions import SourceNotFoundError, UnsupportedLayoutError

__all__ = ["as_encoder", "as_vocabulary", "front_tokens", "tokenizer_size", "vocabulary_texts"]

Encoder = Callable[[str], list[int]]

_ACCEPTED = (
    "a Hugging Face tokenizer, a tokenizers.Tokenizer, a directory with tokenizer.json or with "
    "vocab.json and merges.txt, or a function from a text to a list of token ids"
)
#: What SentencePiece writes for a space.
_SPACE = "\u2581"


def as_encoder(tokenizer: Any, caller: str = "as_encoder") -> Encoder:
    """Turn a tokenizer into a function from a text to its token ids, without special tokens.

    Parameters
    ----------
    tokenizer : tokenizer object, path or callable
        A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, the path of a ``tokenizer.json``, a
        directory that holds one or ``vocab.json`` with ``merges.txt`` (byte-level BPE), or a
        function from a text to a list of token ids.
    caller : str, default="as_encoder"
        Whom errors name.

    Returns
    -------
    callable
        Takes a text, returns a list of int.

    Raises
    ------
    TypeError
        If `tokenizer` is none of these, or gives something else than integers.
    SourceNotFoundError, UnsupportedLayoutError
        If the path holds no tokenizer, or one of another kind.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = _open(Path(tokenizer), caller)
    if hasattr(tokenizer, "encode"):
        return _encoder_of_object(tokenizer, caller)
    if not callable(tokenizer):
        raise TypeError(f"{caller}: tokenizer must be {_ACCEPTED}; got {type(tokenizer).__name__}")

    def encode(text: str) -> list[int]:
        return _checked(tokenizer(text), text, caller)

    return encode


def _encoder_of_object(tokenizer: Any, caller: str) -> Encoder:
    """The ``encode`` method of a tokenizer that can be told to add no special tokens."""
    try:
        _encoded(tokenizer, "a", caller)
    except TypeError as error:
        raise TypeError(
            f"{caller}: encode of {type(tokenizer).__name__} does not take add_special_tokens; "
            "pass a function from a text to a list of token ids instead, which adds no special "
            "tokens"
        ) from error

    def encode(text: str) -> list[int]:
        found = _encoded(tokenizer, text, caller)
        return _checked(getattr(found, "ids", found), text, caller)

    return encode


def _encoded(tokenizer: Any, text: str, caller: str) -> Any:
    """What a tokenizer gives."""
    what = f"{caller}: the {type(tokenizer).__name__} cannot encode {text!r}"
    with _refusing(what, "give one that has a token for what it does not know", (TypeError,)):
        return tokenizer.encode(text, add_special_tokens=False)


def _checked(ids: Any, text: str, caller: str) -> list[int]:
    """Token ids as a list of int."""
    listed = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
    wrong = [x for x in listed if not isinstance(x, int | np.integer) or isinstance(x, bool)]
    if wrong or not isinstance(ids, Iterable):
        raise TypeError(
            f"{caller}: the tokenizer must give a flat list of integers; for {text!r} it gave "
            f"{ids!r}"
        )
    return [int(x) for x in listed]


def front_tokens(tokenizer: Any, bos_token: Any, caller: str = "front_tokens") -> list[int]:
    """Tokens that go in front of every prompt.

    Parameters
    ----------
    tokenizer : tokenizer object, path, callable or None
    bos_token : int, "auto" or None
        "auto" takes those that a tokenizer object puts in front by itself, and none for a path or
        a function.
    caller : str, default="front_tokens"
        Whom errors name.

    Returns
    -------
    list of int

    Raises
    ------
    TypeError
        If `bos_token` is something else.
    """
    if bos_token is None:
        return []
    if isinstance(bos_token, int | np.integer) and not isinstance(bos_token, bool):
        return [int(bos_token)]
    if bos_token != "auto":
        raise TypeError(
            f'{caller}: bos_token must be a token id, "auto" or None, got {bos_token!r}'
        )
    if isinstance(tokenizer, str | Path) or not hasattr(tokenizer, "encode"):
        return []
    plain, found = as_encoder(tokenizer, caller)("a"), tokenizer.encode("a")
    whole = list(getattr(found, "ids", found))
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def tokenizer_size(tokenizer: Any, caller: str = "tokenizer_size") -> int | None:
    """Number of token ids that a tokenizer knows, added tokens included.

    Parameters
    ----------
    tokenizer : tokenizer object, path or callable
        As for `as_encoder`.
    caller : str, default="tokenizer_size"
        Whom errors name.

    Returns
    -------
    int or None
        One more than the largest id; None for a function, which does not say.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = _open(Path(tokenizer), caller)
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def as_vocabulary(vocabulary: Any, caller: str = "as_vocabulary") -> Any:
    """Turn a tokenizer into a function from a token id to its text; leave anything else as it is.

    A token keeps its leading space. An id beyond the tokenizer's, as padded vocabularies have, and
    one of no text become ``"<id 50400>"``.

    Parameters
    ----------
    vocabulary : tokenizer object, path, callable, sequence, mapping or None
        A tokenizer as for `as_encoder`, other than a function, or what already gives texts.
    caller : str, default="as_vocabulary"
        Whom errors name.

    Returns
    -------
    callable, sequence, mapping or None

    Raises
    ------
    SourceNotFoundError, UnsupportedLayoutError
        If a path holds no tokenizer, or one of another kind.
    """
    if isinstance(vocabulary, str | Path):
        vocabulary = _open(Path(vocabulary), caller)
    if not (hasattr(vocabulary, "decode") and hasattr(vocabulary, "get_vocab")):
        return vocabulary
    names = {number: name for name, number in vocabulary.get_vocab().items()}

    def text(token: int) -> str:
        if token not in names:
            return f"<id {token}>"
        if _SPACE in names[token]:
            return names[token].replace(_SPACE, " ")
        return vocabulary.decode([token], skip_special_tokens=False) or f"<id {token}>"

    return text


def vocabulary_texts(vocabulary: Any, caller: str = "vocabulary_texts") -> list[str]:
    """Texts of all tokens in the order of their ids.

    Parameters
    ----------
    vocabulary : tokenizer object, path, sequence or mapping
        A tokenizer as for `as_encoder`, other than a function; or the text of each token id.
    caller : str, default="vocabulary_texts"
        Whom errors name.

    Returns
    -------
    list of str

    Raises
    ------
    TypeError
        If `vocabulary` cannot list its tokens, as a function.
    SourceNotFoundError, UnsupportedLayoutError
        If a path holds no tokenizer, or one of another kind.
    """
    if isinstance(vocabulary, str | Path):
        vocabulary = _open(Path(vocabulary), caller)
    if hasattr(vocabulary, "get_vocab"):
        text = as_vocabulary(vocabulary, caller)
        return [text(token) for token in sorted(vocabulary.get_vocab().values())]
    if callable(vocabulary) or not isinstance(vocabulary, Iterable):
        raise TypeError(
            f"{caller}: the vocabulary must be listed: a tokenizer that is not a function, or a "
            f"sequence or mapping with the text of each token id; got {type(vocabulary).__name__}"
        )
    if isinstance(vocabulary, Mapping):
        return [str(vocabulary[token]) for token in sorted(vocabulary)]
    return [str(text) for text in vocabulary]


def _open(path: Path, caller: str) -> Any:
    """The tokenizer that a file or directory holds."""
    file = path / "tokenizer.json" if path.is_dir() else path
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not file.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise SourceNotFoundError(
            f"{caller}: {path} holds neither tokenizer.json nor vocab.json with merges.txt; "
            f"tokenizer may be {_ACCEPTED}"
        )
    library = _library(caller)
    if file.is_file():
        with _readable(file, caller):
            tokenizer = library.Tokenizer.from_file(str(file))
        if not tokenizer.get_vocab():
            raise UnsupportedLayoutError(f"{caller}: the tokenizer of {file} knows no token")
        return tokenizer
    with _readable(vocabulary, caller):
        known = set(json.loads(vocabulary.read_text(encoding="utf-8")))
    absent = set(library.pre_tokenizers.ByteLevel.alphabet()) - known
    if absent:
        raise UnsupportedLayoutError(
            f"{caller}: {vocabulary} lacks {len(absent)} of the 256 single bytes, so that it is no "
            "byte-level BPE; open it with the library that wrote it and pass that tokenizer"
        )
    with _readable(merges, caller):
        model = library.models.BPE.from_file(str(vocabulary), str(merges))
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


@contextmanager
def _refusing(what: str, remedy: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Say what is wrong; the package tokenizers raises bare exceptions, and panics beyond them."""
    try:
        yield
    except passing:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UnsupportedLayoutError(f"{what} ({error}); {remedy}") from error


def _readable(file: Path, caller: str) -> AbstractContextManager[None]:
    what = f"{caller}: {file} is damaged, or of a kind that the package tokenizers does not read"
    return _refusing(what, "download or save it again")


def _library(caller: str) -> Any:
    """The package ``tokenizers``, if it is installed."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            f"{caller}: reading a tokenizer from files needs the package tokenizers: pip install "
            "'skhead[lens]', or pass a function from a text to a list of token ids"
        ) from error
