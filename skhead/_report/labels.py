"""Class labels of heads for a report: published, bundled, or from a user's CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from skhead.datasets import load_head_classes
from skhead.exceptions import HeadTableError
from skhead.weights import SourceInfo

__all__ = ["HeadClasses", "find_classes"]

PUBLISHED = {
    "wang2022": "Wang et al., arXiv:2211.00593 (2022)",
    "yamagiwa2026": "Yamagiwa, Takase and Shimodaira, arXiv:2601.10266 (2026)",
    "induction-2l": "the bundled model's card, from measured attention",
}
_BUNDLED = "induction-2l"


@dataclass(frozen=True)
class HeadClasses:
    """Class of every head, and where it comes from.

    Attributes
    ----------
    name : str
    origin : str
        A sentence fragment for the page.
    values : Series of str
        Indexed like the heads table; "None" means no class.
    automatic : bool
        Chosen because the model's family and shape fit, not because the user asked.
    """

    name: str
    origin: str
    values: pd.Series
    automatic: bool


def find_classes(labels: str | None, heads: pd.DataFrame, info: SourceInfo) -> HeadClasses | None:
    """Classes that the user names, or a set that fits the model, or nothing.

    Parameters
    ----------
    labels : str or None
        Name of a set, path of a CSV file with columns ``layer, head, class``, ``"none"``, or None
        to choose automatically.
    heads : DataFrame
        Heads table.
    info : SourceInfo

    Returns
    -------
    HeadClasses or None

    Raises
    ------
    HeadTableError
        If the set or file does not fit the heads.
    """
    if labels == "none":
        return None
    if labels is None:
        name = _fitting(info)
        return None if name is None else _published(name, heads, automatic=True)
    if labels in PUBLISHED:
        return _published(labels, heads, automatic=False)
    path = Path(labels)
    if not path.is_file():
        raise HeadTableError(
            f"report: labels {labels!r} is neither a file nor one of {', '.join(PUBLISHED)}, none"
        )
    return HeadClasses(path.stem, f"the file {path.name}", _from_csv(path, heads), False)


def _fitting(info: SourceInfo) -> str | None:
    shape = (info.n_layers, info.n_heads, info.d_model)
    if info.source == f"skhead/{_BUNDLED}":
        return _BUNDLED
    return "yamagiwa2026" if info.family == "gpt2" and shape == (12, 12, 768) else None


def _published(name: str, heads: pd.DataFrame, automatic: bool) -> HeadClasses:
    return HeadClasses(name, PUBLISHED[name], load_head_classes(name, heads), automatic)


def _from_csv(path: Path, heads: pd.DataFrame) -> pd.Series:
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except ValueError as error:
        raise HeadTableError(f"report: {path} is no readable CSV file: {error}") from error
    missing = [name for name in ("layer", "head", "class") if name not in table.columns]
    if missing:
        raise HeadTableError(
            f"report: {path} lacks the column {missing[0]!r}; labels need layer, head, class "
            f"(found {', '.join(map(str, table.columns))})"
        )
    keys = list(zip(table["layer"], table["head"], strict=True))
    known = set(zip(heads["layer"], heads["head"], strict=True))
    seen = set()
    for place, key in enumerate(keys):
        if key not in known:
            raise HeadTableError(
                f"report: {path}, line {place + 2}: the model has no head L{key[0]}H{key[1]}"
            )
        if key in seen:
            raise HeadTableError(
                f"report: {path}, line {place + 2}: L{key[0]}H{key[1]} is listed a second time"
            )
        seen.add(key)
    named = dict(zip(keys, map(str, table["class"]), strict=True))
    wanted = zip(heads["layer"], heads["head"], strict=True)
    values = [named.get(key) or "None" for key in wanted]
    return pd.Series(values, index=heads.index, name=path.stem, dtype=object)
