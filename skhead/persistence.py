"""Fitted estimators in a file that holds numbers and texts, and no code."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from packaging.version import Version

import skhead
from skhead._stored.classes import name_of
from skhead._stored.reading import Reader
from skhead._stored.writing import Writer
from skhead.exceptions import EstimatorFileError, UnstorableError
from skhead.weights.archive import read_archive, write_archive

__all__ = ["load", "save"]

#: Number of the format of files; a file of a larger one is not understood.
_FORMAT = 1


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Save an estimator, fitted or not, to one safetensors file without pickled code.

    The file is whole or not there at all: an interrupted run leaves what was there before. Weights
    that a heads table points to are not copied; `load` needs them where they were when a
    transform reads them. Bases that lie in a cache are copied into the file.

    Parameters
    ----------
    estimator : estimator or container
        An estimator of skhead, a scikit-learn ``Pipeline`` or ``FeatureUnion`` of such steps and of
        those of scikit-learn that are listed in the notes, or a `Similarity`, `Subspaces`,
        `QKPairs`, `VirtualHeads` or `SalientMappings`.
    path : path-like
        File to write, such as ``"classifier.safetensors"``. A file that is there is replaced.

    Raises
    ------
    UnstorableError
        If the estimator holds something else than numbers, texts, tables and estimators that are
        listed, such as a tokenizer or a function. The attribute is named.
    OSError
        If the file cannot be written.

    See Also
    --------
    load : Reads the file.

    Notes
    -----
    What scikit-learn's estimators may be part of it: PCA, LinearDiscriminantAnalysis,
    LogisticRegression, Ridge, RidgeClassifier, LinearSVC, LabelBinarizer, LabelEncoder,
    MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler and StandardScaler.

    Attributes are a JSON document in the header, and arrays are tensors, so that every program that
    reads safetensors shows what is in there. Tensors of a GPU are stored, and come back, on the
    CPU.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> kernel = skhead.ProjectionKernel().fit(heads)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "kernel.safetensors"
    ...     skhead.save(kernel, path)
    ...     again = skhead.load(path)
    >>> bool((again.transform(heads).pair("OV") == kernel.transform(heads).pair("OV")).any().any())
    True
    """
    if name_of(type(estimator)) is None:
        raise UnstorableError(
            f"skhead.save: a {type(estimator).__name__} is no estimator or container that can be "
            "saved; see the notes of skhead.save for those that can"
        )
    writer = Writer("skhead.save")
    try:
        document = json.dumps(writer.write(estimator, type(estimator).__name__), allow_nan=False)
    except RecursionError as error:
        raise UnstorableError("skhead.save: the estimator is nested too deeply") from error
    facts = {
        "format": f"skhead-estimator-{_FORMAT}",
        "skhead_version": skhead.__version__,
    }
    write_archive(Path(path).expanduser(), document, writer.tensors, facts)


def load(path: str | os.PathLike[str]) -> Any:
    """Load what `save` has written; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
        File of `save`.

    Returns
    -------
    estimator or container
        With the numbers that it had when it was saved, bit by bit.

    Raises
    ------
    EstimatorFileError
        If the file is truncated, was damaged or altered, is another file, names a class that is
        not listed, or was written by a later version of skhead.
    OSError
        If there is no file, or it may not be read.

    Warns
    -----
    UserWarning
        If an earlier version of skhead has written the file.
    InconsistentVersionWarning
        If another version of scikit-learn has fitted an estimator of its own in there.

    See Also
    --------
    save : Writes the file.

    Notes
    -----
    The checksum tells that a file is as it was written, not who wrote it: a file of a stranger may
    hold wrong numbers, but no code.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import skhead
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "extractor.safetensors"
    ...     skhead.save(skhead.SubspaceExtractor(rank=4), path)
    ...     skhead.load(path)
    SubspaceExtractor(rank=4)
    """
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():
        kind = "a directory" if file.is_dir() else "no ordinary file"
        raise EstimatorFileError(f"{file} is {kind}; give the file that skhead.save wrote.")
    document, tensors, facts = read_archive(file)
    _check_version(file, facts)
    try:
        found = Reader(tensors, f"{file}: it is no file of skhead.save").read(json.loads(document))
    except EstimatorFileError:
        raise
    except _MALFORMED as error:
        raise EstimatorFileError(
            f"{file}: what it says of the estimator cannot be read ({type(error).__name__}: "
            f"{error}); save the estimator again."
        ) from error
    if name_of(type(found)) is None:
        raise EstimatorFileError(f"{file} holds a {type(found).__name__}, and no estimator.")
    return found


#: What a document that `save` did not write can make Python, numpy or pandas raise.
_MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _check_version(path: Path, facts: dict[str, str]) -> None:
    """Refuse files of later versions, and warn of earlier ones."""
    own = Version(skhead.__version__)
    found = re.fullmatch(r"skhead-estimator-([0-9]{1,9})", facts.get("format", ""))
    try:
        written = Version(facts.get("skhead_version", ""))
    except ValueError:  # no version, or one of more digits than Python reads
        written = None
    if found is None or written is None:
        raise EstimatorFileError(f"{path} is no file of skhead.save.")
    if int(found[1]) > _FORMAT or written > own:
        raise EstimatorFileError(
            f"{path} was written by skhead {written}, and this is skhead {own}, which does not "
            "know files of later versions. Upgrade skhead, or save with this version."
        )
    if written < own:
        warnings.warn(
            f"{path} was written by skhead {written}, and this is skhead {own}: if results differ, "
            "fit and save again",
            UserWarning,
            stacklevel=3,
        )
