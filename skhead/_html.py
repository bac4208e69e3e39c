"""What notebooks show of a container: facts and small tables, in the colours of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "SHOWN",
    "Listing",
    "ShowsSummary",
    "Summary",
    "models_of",
    "processing",
    "span",
]

#: Borders and quiet texts are made of the text's own colour, which fits light and dark pages.
_STYLE = """
.skhead-summary{color:inherit;font-size:.9em;line-height:1.4;max-width:60em}
.skhead-summary .title{font-weight:600;margin:0 0 .3em}
.skhead-summary dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em;margin:0 0 .6em}
.skhead-summary dt{opacity:.75;margin:0;font-weight:400}
.skhead-summary dd{margin:0;overflow-wrap:anywhere}
.skhead-summary .tables{display:flex;flex-wrap:wrap;gap:.4em 2em;align-items:flex-start}
.skhead-summary table{border-collapse:collapse;margin:0;color:inherit;background:none}
.skhead-summary caption{text-align:left;opacity:.75;padding:0 0 .2em;caption-side:top;color:inherit}
.skhead-summary th,.skhead-summary td{padding:.1em .6em;text-align:right;color:inherit;
background:none;border:0;border-bottom:1px solid rgba(128,128,128,.4)}
.skhead-summary th{font-weight:600}
.skhead-summary .text{text-align:left;overflow-wrap:break-word;max-width:30em}
"""

#: Rows of a long table that are shown.
SHOWN = 5
_MOST_NAMES = 3


@dataclass(frozen=True)
class Listing:
    """A small table of a summary.

    Attributes
    ----------
    caption : str
    frame : DataFrame
        Shown without its index; the first column names the row.
    """

    caption: str
    frame: pd.DataFrame


@dataclass(frozen=True)
class Summary:
    """What is told of a container.

    Attributes
    ----------
    facts : mapping of str to str
        By name, in order.
    listings : sequence of Listing
    """

    facts: Mapping[str, str]
    listings: Sequence[Listing] = ()


class ShowsSummary:
    """Shows itself in notebooks by the facts and listings of its `_summary`."""

    def _summary(self) -> Summary:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        summary, name = self._summary(), escape(type(self).__name__)
        facts = "".join(
            f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
            for key, value in summary.facts.items()
        )
        tables = "".join(_table(listing) for listing in summary.listings)
        return (
            f'<section class="skhead-summary" aria-label="{name}"><style>{_STYLE}</style>'
            f'<p class="title">{name}</p><dl>{facts}</dl><div class="tables">{tables}</div>'
            "</section>"
        )


def _table(listing: Listing) -> str:
    frame = listing.frame
    texts = [not pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    marks = [' class="text"' if text else "" for text in texts]
    head = "".join(
        f'<th scope="col"{mark}>{escape(str(name))}</th>'
        for name, mark in zip(frame.columns, marks, strict=True)
    )
    body = []
    for row in frame.itertuples(index=False):
        first, *rest = (escape(_cell(value)) for value in row)
        cells = "".join(
            f"<td{mark}>{text}</td>" for text, mark in zip(rest, marks[1:], strict=True)
        )
        body.append(f'<tr><th scope="row"{marks[0]}>{first}</th>{cells}</tr>')
    return (
        f"<table><caption>{escape(listing.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "–" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def span(values: Any) -> str:
    """The one value, or the smallest and the largest; "none" of nothing."""
    array = np.asarray(values)
    if not array.size:
        return "none"
    low, high = array.min(), array.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _first(names: Sequence[str], most: int = _MOST_NAMES) -> str:
    """The first few names and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def models_of(heads: pd.DataFrame) -> str:
    """Where the heads of a table come from."""
    named = heads.loc[heads["layer"] >= 0, "source"].astype(str)
    parts = [_first(list(dict.fromkeys(named)))] if len(named) else []
    if len(named) < len(heads):
        parts.append(f"{len(heads) - len(named):,} matrices without a model")
    return " and ".join(parts) or "none"


def processing(record: Mapping[str, Any]) -> str:
    """How weights were processed, in words."""
    done = [
        words
        for key, words in (("fold_norm", "norms folded in"), ("center", "centred"))
        if record.get(key)
    ]
    rest = [
        f"{key} {value}"
        for key, value in record.items()
        if key not in ("fold_norm", "center") and value is not None
    ]
    return ", ".join([*(done or ["as stored"]), *rest])
