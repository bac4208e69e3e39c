"""Classes of attention heads that were published, or measured on a bundled model."""

from __future__ import annotations

import csv
from importlib.resources import files

import pandas as pd

from skhead.datasets._bundled import load_model_card
from skhead.exceptions import HeadTableError

_PUBLISHED = ("wang2022", "yamagiwa2026")
_BUNDLED = {"induction-2l": "skhead/induction-2l"}
_GPT2_SMALL = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64}
_UNLABELLED = "None"


def load_head_classes(name: str, heads: pd.DataFrame) -> pd.Series:
    """Classes of the heads in a table, from a named label set.

    The sets on GPT-2 small disagree about some heads and are never merged.

    Parameters
    ----------
    name : {"wang2022", "yamagiwa2026", "induction-2l"}
        - ``"wang2022"``: the 26 heads of the circuit for indirect object identification in GPT-2
          small [1]_.
        - ``"yamagiwa2026"``: the classes coloured in the figures of [2]_, on GPT-2 small: 27 of
          its 36 classed heads, which are all that the figures show, and two Identity heads.
        - ``"induction-2l"``: the labels measured on the bundled model ``skhead/induction-2l``,
          by the thresholds that its card states.
    heads : pandas.DataFrame
        Heads table of :func:`skhead.load_heads`; any rows of it in any order. Classes are matched
        by layer and head, and the shape of the model is checked. The weights are not: whether a
        model of the same shape that was trained differently keeps the classes is for the caller
        to know.

    Returns
    -------
    pandas.Series
        Class names of shape ``(n_heads,)``, index as in ``heads``, named after the set;
        ``"None"`` where the set says nothing about a head.

    Raises
    ------
    ValueError
        If no label set has this name.
    HeadTableError
        If ``heads`` is not a heads table, is empty, or belongs to a model of another shape.

    References
    ----------
    .. [1] K. Wang, A. Variengien, A. Conmy, B. Shlegeris, J. Steinhardt, "Interpretability in the
       Wild: a Circuit for Indirect Object Identification in GPT-2 Small", arXiv:2211.00593, 2022.
    .. [2] H. Yamagiwa, Y. Takase, H. Shimodaira, arXiv:2601.10266, 2026.

    Examples
    --------
    >>> import skhead
    >>> from skhead.datasets import load_head_classes
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> classes = load_head_classes("induction-2l", heads)
    >>> classes[classes != "None"].to_dict()
    {'L0H0': 'Previous Token', 'L1H1': 'Induction'}
    """
    if name in _PUBLISHED:
        shape, classes = _GPT2_SMALL, _published_classes(name)
    elif name in _BUNDLED:
        card = load_model_card(_BUNDLED[name])
        shape = {key: card["architecture"][key] for key in _GPT2_SMALL}
        classes = {(head["layer"], head["index"]): head["label"] for head in card["heads"]}
    else:
        known = ", ".join(repr(known) for known in (*_PUBLISHED, *_BUNDLED))
        raise ValueError(f"no label set is named {name!r}; the label sets are {known}")
    _check_shape(name, heads, shape)
    positions = zip(heads["layer"].tolist(), heads["head"].tolist(), strict=True)
    values = [classes.get(position, _UNLABELLED) for position in positions]
    return pd.Series(values, index=heads.index, name=name, dtype=object)


def _published_classes(name: str) -> dict[tuple[int, int], str]:
    table = files("skhead.datasets").joinpath("data", "gpt2_head_classes.csv")
    return {
        (int(row["layer"]), int(row["head"])): row["head_class"]
        for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        if row["label_set"] == name
    }


def _check_shape(name: str, heads: pd.DataFrame, shape: dict[str, int]) -> None:
    """Refuse a table that does not describe heads of a model of the given shape."""
    caller = f"load_head_classes({name!r})"
    if not isinstance(heads, pd.DataFrame):
        raise HeadTableError(
            f"{caller} takes a heads table as load_heads returns it, got {type(heads).__name__}"
        )
    needed = ("layer", "head", "n_layers", "d_model", "d_head")
    missing = [column for column in needed if column not in heads.columns]
    if missing:
        raise HeadTableError(f"{caller}: the heads table has no column {', '.join(missing)}")
    if heads.empty:
        raise HeadTableError(f"{caller}: the heads table is empty")
    expected = (
        f"{caller} labels a model of {shape['n_layers']} layers x {shape['n_heads']} heads,"
        f" d_model {shape['d_model']}, d_head {shape['d_head']}"
    )
    for column in ("n_layers", "d_model", "d_head"):
        wrong = heads[heads[column] != shape[column]]
        if len(wrong):
            raise HeadTableError(
                f"{expected}; {wrong.index[0]} has {column} {wrong[column].iloc[0]}"
            )
    for column, count in (("layer", shape["n_layers"]), ("head", shape["n_heads"])):
        outside = heads[~heads[column].between(0, count - 1)]
        if len(outside):
            raise HeadTableError(
                f"{expected}; {outside.index[0]} has {column} {outside[column].iloc[0]}"
            )
