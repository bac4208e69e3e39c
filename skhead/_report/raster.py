"""Matrices as small PNG pictures in a data URI, and their values packed for the page's script."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scale", "colour_bar", "pack_values", "picture", "shrink", "spread"]

#: A range narrower than this share of its ends is rounding, and gets one colour.
_FLAT = 1e-5
#: Undefined entry in packed values.
_UNDEFINED = 65535


@dataclass(frozen=True)
class Scale:
    """Colours of a range of values.

    Attributes
    ----------
    low, high : float
        Ends of the range; values beyond take the colour of the end.
    colours : str
        Name of a matplotlib colour map.
    """

    low: float
    high: float
    colours: str = "viridis"

    def rgba(self, values: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Colours of values, transparent where undefined."""
        from matplotlib import colormaps

        width = self.high - self.low
        flat = width <= _FLAT * max(abs(self.low), abs(self.high))
        share = np.full(values.shape, 0.5) if flat else (values - self.low) / width
        colours = colormaps[self.colours](np.nan_to_num(share).clip(0, 1), bytes=True)
        colours[np.isnan(values)] = 0
        return np.ascontiguousarray(colours)


def spread(parts: list[NDArray[np.floating]], share: float = 0.002) -> Scale:
    """Scale from the low to the high quantile of all values together, outliers left out."""
    values = np.concatenate([part[~np.isnan(part)].ravel() for part in parts])
    low, high = np.quantile(values, [share, 1 - share])
    return Scale(float(low), float(high))


def picture(values: NDArray[np.floating], scale: Scale) -> str:
    """PNG of a matrix, one pixel per entry, as a data URI."""
    rgba = scale.rgba(values)
    height, width = rgba.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rgba.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def colour_bar(scale: Scale) -> str:
    """PNG of the scale from low to high, as a data URI."""
    return picture(np.linspace(scale.low, scale.high, 128)[None, :], scale)


def shrink(values: NDArray[np.floating], largest: int) -> tuple[NDArray[np.floating], int]:
    """Matrix of at most `largest` rows and columns, of the maxima of blocks.

    Returns
    -------
    values : ndarray
    block : int
        Rows and columns per entry, 1 if nothing was shrunk.
    """
    block = -(-max(values.shape) // largest)
    if block <= 1:
        return values, 1
    rows, columns = (-(-size // block) for size in values.shape)
    padded = np.full((rows * block, columns * block), -np.inf, dtype=values.dtype)
    padded[: values.shape[0], : values.shape[1]] = np.where(np.isnan(values), -np.inf, values)
    largest_of = padded.reshape(rows, block, columns, block).max(axis=(1, 3))
    return np.where(np.isneginf(largest_of), np.nan, largest_of).astype(values.dtype), block


def pack_values(values: NDArray[np.floating]) -> str:
    """Values as JSON for the page's script: range, width and 16-bit steps in base64.

    One step is 1/65534 of the range, far below what the page prints.
    """
    defined = ~np.isnan(values)
    low = float(values[defined].min()) if defined.any() else 0.0
    high = float(values[defined].max()) if defined.any() else 0.0
    share = (np.where(defined, values, low) - low) / ((high - low) or 1.0)
    steps = np.where(defined, np.rint(share * (_UNDEFINED - 1)), _UNDEFINED).astype("<u2")
    packed = base64.b64encode(steps.tobytes()).decode("ascii")
    return json.dumps({"low": low, "high": high, "width": values.shape[1], "steps": packed})
