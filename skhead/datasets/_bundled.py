"""Models that come with the package: where their files lie and what their cards say."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from skhead.exceptions import SourceNotFoundError

_ZOO_PREFIX = "skhead/zoo/"
_ZOO = (
    "learned-attn-1",
    "learned-attn-2",
    "learned-mlp-1",
    "learned-mlp-2",
    "rope-attn-1",
    "rope-attn-2",
    "rope-attn-3",
    "rope-attn-4",
)
_DIRECTORIES = {"skhead/induction-2l": "induction-2l"} | {
    f"{_ZOO_PREFIX}{name}": f"zoo/{name}" for name in _ZOO
}


def list_models() -> list[str]:
    """Names of the bundled models.

    Returns
    -------
    list of str
        Each name is a source for :func:`skhead.load_heads`. Those that begin with
        ``"skhead/zoo/"`` are the models of :func:`load_head_zoo`.

    Examples
    --------
    >>> from skhead.datasets import list_models
    >>> list_models()[:3]
    ['skhead/induction-2l', 'skhead/zoo/learned-attn-1', 'skhead/zoo/learned-attn-2']
    """
    return sorted(_DIRECTORIES)


def zoo_names() -> list[str]:
    """Names of the bundled models that make up the zoo, in the order of its card."""
    return [f"{_ZOO_PREFIX}{name}" for name in _ZOO]


def bundled_path(name: str) -> Path:
    """Directory of a bundled model.

    Parameters
    ----------
    name : str
        One of :func:`list_models`.

    Returns
    -------
    pathlib.Path
        Directory with ``model.safetensors``; beside it ``config.json``, ``card.json`` or
        ``README.md``, or for a model of the zoo the last two one directory up, for all its models.

    Raises
    ------
    SourceNotFoundError
        If no bundled model has this name.

    Examples
    --------
    >>> from skhead.datasets import bundled_path
    >>> sorted(path.name for path in bundled_path("skhead/induction-2l").iterdir())
    ['README.md', 'card.json', 'model.safetensors']
    """
    if name not in _DIRECTORIES:
        raise SourceNotFoundError(
            f"no bundled model is named {name!r}; the bundled models are {', '.join(list_models())}"
        )
    return Path(str(files("skhead.datasets").joinpath("models", _DIRECTORIES[name])))


def load_model_card(name: str) -> dict[str, Any]:
    """Card of a bundled model: how it was trained and what was measured.

    Parameters
    ----------
    name : str
        One of :func:`list_models`.

    Returns
    -------
    dict
        Among others ``architecture``, ``training``, ``performance`` (accuracy on held-out
        sequences, against chance) and ``heads``: one entry per head with its mean attention to
        the previous token, the induction target, the duplicate token, itself and the first token,
        the accuracy that is left when it writes nothing, and the label that these give it.

    Raises
    ------
    SourceNotFoundError
        If no bundled model has this name.

    Examples
    --------
    >>> from skhead.datasets import load_model_card
    >>> card = load_model_card("skhead/induction-2l")
    >>> card["performance"]["induction"]["accuracy"] > 0.95
    True
    >>> [head["head"] for head in card["heads"] if head["label"] == "Induction"]
    ['L1H1']
    """
    directory = bundled_path(name)
    if not name.startswith(_ZOO_PREFIX):
        return _read_card(directory)
    card = _read_card(directory.parent)
    own = card.pop("models")[directory.name]
    return {**card, **own, "name": name}


def load_zoo_card() -> dict[str, Any]:
    """Card of the whole zoo: what its models have in common, and under ``models`` one of each."""
    return _read_card(bundled_path(zoo_names()[0]).parent)


def _read_card(directory: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((directory / "card.json").read_text(encoding="utf-8"))
    return card
