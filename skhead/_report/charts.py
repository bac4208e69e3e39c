"""Histograms and heat maps of a report, as inline SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from skhead._report.raster import Scale, colour_bar, pack_values, picture, shrink
from skhead._report.text import number
from skhead.weights import head_labels

__all__ = ["Histogram", "heat_map", "layer_map", "legend_bar", "limits_of"]

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 24, 30
_FEWEST_BINS, _MOST_BINS = 24, 96
#: With no more values than this each one is a stroke of its own.
_STROKES = 40
#: Share of the values that a histogram shows; a few far ones would squeeze the rest.
_SHOWN, _MANY = 0.999, 1000
_LARGEST_PICTURE = 400
#: Cells from this width on carry the head's label instead of the layer's.
_LABEL_WIDTH = 30
_LARGEST_PACKED = 200


@dataclass(frozen=True)
class Histogram:
    """Distribution of one pair kind with its random reference.

    Attributes
    ----------
    pair : str
    values : ndarray
    limits : (float, float)
        Of the horizontal axis, shared by the panels of a row.
    mean, sd : float or None
        Of the random reference.
    cutoff : float or None
        Score of the weakest edge in the diagram.
    what : str
        The quantity, for the description.
    """

    pair: str
    values: NDArray[np.floating]
    limits: tuple[float, float]
    mean: float | None
    sd: float | None
    cutoff: float | None
    what: str

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        low, high = self.limits
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def svg(self) -> str:
        """The drawing."""
        mean = (
            "" if self.mean is None else f"; random subspaces have {number(self.mean)} on average"
        )
        label = f"{self.what} {self.pair}, {len(self.values):,} pairs of heads{mean}"
        return (
            f'<svg class="hist pair-{self.pair}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(label)}">{self._band()}{self._bars()}{self._marks()}'
            f"{self._axis()}</svg>"
        )

    def _band(self) -> str:
        if self.mean is None or not self.sd:
            return ""
        low, high = (self.x(self.mean + sign * 3 * self.sd) for sign in (-1, 1))
        low, high = max(low, _LEFT), min(high, _WIDTH - _RIGHT)
        return (
            f'<rect class="band" x="{low:.1f}" y="{_TOP}" width="{max(high - low, 1):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
        )

    def _bins(self) -> int:
        """Number of bins by the rule of Freedman and Diaconis, within reason."""
        low, high = np.quantile(self.values, [0.25, 0.75])
        width = max(2 * (high - low) / len(self.values) ** (1 / 3), 1e-12)
        return int(np.clip((self.limits[1] - self.limits[0]) / width, _FEWEST_BINS, _MOST_BINS))

    def _bars(self) -> str:
        floor = _HEIGHT - _BOTTOM
        if len(self.values) <= _STROKES:
            strokes = "".join(f"M{self.x(float(v)):.1f} {floor}v-46" for v in self.values)
            return f'<path class="strokes" d="{strokes}"/>'
        counts, edges = np.histogram(self.values, self._bins(), range=self.limits)
        top = floor - counts / max(counts.max(), 1) * (floor - _TOP)
        path = [f"M{self.x(edges[0]):.1f} {floor}"]
        for y, right in zip(top, edges[1:], strict=True):
            path.append(f"V{y:.1f}H{self.x(float(right)):.1f}")
        return f'<path class="bars" d="{"".join(path)}V{floor}Z"/>'

    def _marks(self) -> str:
        marks = []
        if self.cutoff is not None and len(self.values) > _STROKES:
            marks.append(_mark("cutoff", self.x(self.cutoff), "top edges", _TOP + 34))
        if self.mean is not None:
            marks.append(_mark("random", self.x(self.mean), "random", _TOP - 10))
        return "".join(marks)

    def _axis(self) -> str:
        floor = _HEIGHT - _BOTTOM
        ticks = MaxNLocator(5).tick_values(*self.limits)
        shown = [float(t) for t in ticks if self.limits[0] <= t <= self.limits[1]]
        texts = "".join(
            f'<text class="tick" x="{self.x(t):.1f}" y="{floor + 18}">{_tick(t)}</text>'
            f'<path class="axis" d="M{self.x(t):.1f} {floor}v4"/>'
            for t in shown
        )
        return f'<path class="axis" d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}"/>{texts}'


def _mark(kind: str, x: float, text: str, top: float) -> str:
    anchor, shift = ("start", 4) if x < _WIDTH * 0.7 else ("end", -4)
    return (
        f'<path class="{kind}" d="M{x:.1f} {top:.1f}V{_HEIGHT - _BOTTOM}"/><text class="mark" '
        f'x="{x + shift:.1f}" y="{top + 9:.1f}" text-anchor="{anchor}">{text}</text>'
    )


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def layer_map(
    table: pd.DataFrame, column: str, scale: Scale, title: str, note: str, *, readout: bool = True
) -> str:
    """Heat map of one number per head: layers down, heads across; values told on pointing."""
    layers = sorted(table["layer"].unique())
    width = int(table["head"].max()) + 1
    grid = np.full((len(layers), width), np.nan)
    rows = np.searchsorted(layers, table["layer"].to_numpy())
    grid[rows, table["head"].to_numpy()] = table[column].to_numpy(dtype=np.float64)
    names = np.full(grid.shape, "", dtype=object)
    names[rows, table["head"].to_numpy()] = table.index.to_numpy()
    cell = min(24.0, 288 / width, 320 / len(layers))
    ticks = _every([str(layer) for layer in layers], cell)
    across = _every([str(head) for head in range(width)], cell)
    picture_svg = _framed(grid, scale, cell, ticks, across, f"{title}: {note}")
    told = names.ravel().tolist() if readout else []
    return _figure(picture_svg, title, note, grid, told, None)


def heat_map(
    values: NDArray[np.floating], rows: pd.DataFrame, columns: pd.DataFrame, scale: Scale, pair: str
) -> str:
    """Heat map of one pair kind: row heads down, column heads across."""
    small, block = shrink(values, _LARGEST_PICTURE)
    cell = min(40.0, 318 / max(small.shape))
    ticks, across = (
        [(i + 0.5, label) for i, label in enumerate(head_labels(heads))]
        if cell >= _LABEL_WIDTH
        else _layer_starts(heads, block, cell)
        for heads in (rows, columns)
    )
    label = f"{pair}: {len(rows)} writing heads down, {len(columns)} reading heads across, by layer"
    drawn = _framed(small, scale, cell, ticks, across, label)
    note = f"rows write (O), columns read ({pair[1]})"
    if block > 1:
        note += f"; each point is the largest of {block} × {block} pairs"
    names = (head_labels(rows), head_labels(columns)) if block == 1 else ([], [])
    return _figure(drawn, pair, note, small, names[0], names[1])


def legend_bar(scale: Scale, text: str) -> str:
    """Colour bar with the values of its ends."""
    return (
        f'<p class="scale"><span>{number(scale.low, 3)}</span><img alt="" '
        f'src="{colour_bar(scale)}">'
        f"<span>{number(scale.high, 3)}</span> <span>{escape(text)}</span></p>"
    )


def _framed(
    grid: NDArray[np.floating],
    scale: Scale,
    cell: float,
    down: Sequence[tuple[float, str]],
    across: Sequence[tuple[float, str]],
    label: str,
) -> str:
    left, bottom = (_LABEL_WIDTH + 8 if cell >= _LABEL_WIDTH else 26), 20
    width, height = grid.shape[1] * cell, grid.shape[0] * cell
    ticks = [
        f'<text class="tick end" x="{left - 5}" y="{y * cell + 3.5:.1f}">{text}</text>'
        for y, text in down
    ] + [
        f'<text class="tick" x="{left + x * cell:.1f}" y="{height + 14:.1f}">{text}</text>'
        for x, text in across
    ]
    return (
        f'<svg class="map" viewBox="0 0 {left + width + 8:.1f} {height + bottom:.1f}" '
        f'width="{left + width + 8:.0f}" role="img" aria-label="{escape(label)}">'
        f'<rect class="ground" x="{left}" width="{width:.1f}" height="{height:.1f}"/>'
        f'<image href="{picture(grid, scale)}" x="{left}" y="0" width="{width:.1f}" '
        f'height="{height:.1f}" preserveAspectRatio="none"/>{"".join(ticks)}</svg>'
    )


def _figure(
    drawn: str,
    title: str,
    note: str,
    grid: NDArray[np.floating],
    rows: Sequence[str],
    columns: Sequence[str] | None,
) -> str:
    packed = ""
    if max(grid.shape) <= _LARGEST_PACKED and rows:
        names = json.dumps(
            {"rows": list(rows), "columns": None if columns is None else list(columns)}
        )
        packed = f' data-values="{escape(pack_values(grid))}" data-names="{escape(names)}"'
    return (
        f"<figure{packed}><figcaption><strong>{escape(title)}</strong> "
        f'<span class="note">{escape(note)}</span></figcaption>{drawn}'
        '<p class="readout" aria-hidden="true">&nbsp;</p></figure>'
    )


def _every(names: Sequence[str], cell: float) -> list[tuple[float, str]]:
    """Ticks at cell middles, as many as fit."""
    step = max(1, int(np.ceil(17 / cell)))
    return [(i + 0.5, names[i]) for i in range(0, len(names), step)]


def _layer_starts(heads: pd.DataFrame, block: int, cell: float) -> list[tuple[float, str]]:
    """Ticks in the middle of layers, as many as fit."""
    layer = heads["layer"].to_numpy()
    ticks: list[tuple[float, str]] = []
    for value in np.unique(layer):
        place = float(np.flatnonzero(layer == value).mean() + 0.5) / block
        if not ticks or (place - ticks[-1][0]) * cell >= 17:
            ticks.append((place, str(value)))
    return ticks


def limits_of(
    values: Sequence[NDArray[np.floating]], marks: Sequence[float | None]
) -> tuple[float, float]:
    """Common range of several panels: marks and values with a little air, less the last 0.1%.

    Of fewer than a thousand values none is left out.
    """
    known = [float(mark) for mark in marks if mark is not None]
    ends = [1.0 if len(v) < _MANY else _SHOWN for v in values]
    low = min([float(v.min()) for v in values] + known)
    high = max([float(np.quantile(v, end)) for v, end in zip(values, ends, strict=True)] + known)
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(0.0, low - air) if low >= 0 else low - air), high + air
