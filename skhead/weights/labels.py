"""Labels of heads and short names of sources."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

import pandas as pd

from skhead.weights.sources import cut_part

__all__ = ["head_labels", "prefixed_labels", "short_names"]


def head_labels(heads: pd.DataFrame) -> list[str]:
    """Return one unique label per row.

    Parameters
    ----------
    heads : pandas.DataFrame

    Returns
    -------
    list of str
        The index where it is unique as text; else ``"NAME:L4H7"`` with the short name of the
        source; a row that is there again gets its number of occurrence, ``"NAME:L4H7 (2)"``.
    """
    labels = [str(label) for label in heads.index]
    if len(set(labels)) == len(labels):
        return labels
    labels = prefixed_labels(heads)
    seen: Counter[str] = Counter()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return unique


def prefixed_labels(heads: pd.DataFrame) -> list[str]:
    """Return ``"NAME:L4H7"`` for every row, with the short name of its source."""
    names = short_names(heads["source"].unique())
    rows = zip(heads["source"], heads["layer"], heads["head"], strict=True)
    return [f"{names[source]}:L{layer}H{head}" for source, layer, head in rows]


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """Return for each source the fewest trailing parts of its path that tell it from the others.

    Where no number of parts does, the name is the whole address.
    """
    pieces = {source: _pieces(source) for source in sources}
    lengths = dict.fromkeys(pieces, 1)
    while True:
        names = {source: "/".join(parts[-lengths[source] :]) for source, parts in pieces.items()}
        counts = Counter(names.values())
        unclear = [
            source
            for source, name in names.items()
            if counts[name] > 1 and lengths[source] < len(pieces[source])
        ]
        if not unclear:
            return {source: name if counts[name] == 1 else source for source, name in names.items()}
        for source in unclear:
            lengths[source] += 1


def _pieces(source: str) -> list[str]:
    address, part = cut_part(source)
    commit = re.fullmatch(r"([^@]+)@[0-9a-f]{40}", address)
    parts = list(PurePath(commit[1] if commit else address).parts) or [address]
    last = PurePath(parts[-1].removesuffix(".index.json"))
    if last.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        whole = last.stem in ("model", "pytorch_model") and len(parts) > 1
        parts = parts[:-1] if whole else [*parts[:-1], last.stem]
    if commit:
        parts = [address, *parts]
    if part:
        parts[-1] += f"#{part}"
    return parts
