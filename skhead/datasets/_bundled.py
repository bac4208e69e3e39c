"""Models that come with the package: where their files lie and what their cards say."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from skhead.exceptions import SourceNotFoundError

_DIRECTORIES = {"skhead/induction-2l": "induction-2l"}


def list_models() -> list[str]:
    """Names of the bundled models.

    Returns
    -------
    list of str
        Each name is a source for :func:`skhead.load_heads`.

    Examples
    --------
    >>> from skhead.datasets import list_models
    >>> list_models()
    ['skhead/induction-2l']
    """
    return sorted(_DIRECTORIES)


def bundled_path(name: str) -> Path:
    """Directory of a bundled model.

    Parameters
    ----------
    name : str
        One of :func:`list_models`.

    Returns
    -------
    pathlib.Path
        Directory with ``model.safetensors``, ``card.json`` and ``README.md``.

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
        Among others ``architecture``, ``training``, ``performance`` (accuracy and loss in nats on
        held-out sequences, against chance) and ``heads``: one entry per head with its mean
        attention to the previous token, the induction target, the duplicate token, itself and the
        first token, the accuracy that is left when it writes nothing, and the label that these
        give it.

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
    path = bundled_path(name) / "card.json"
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
