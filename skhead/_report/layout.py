"""Where the heads of the wiring diagram stand: columns by layer, few crossings between them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from skhead._report.data import Analysis

__all__ = ["BOX_HEIGHT", "Layout", "Node", "lay_out"]

BOX_HEIGHT = 22
#: Width of a head's box: of a letter of its label, and around the label.
_LETTER, _AROUND = 8.2, 14
_TOP, _SIDE = 34, 14
#: Height given to a head, to a head in columns of many, and to an edge that passes a column.
_ROW, _TIGHT_ROW, _MANY_ROWS, _PASSING_ROW = 38, 28, 16, 13
#: Distance of neighbouring columns, the width they fill where they can, least space between boxes.
_LEAST_PITCH, _MOST_PITCH, _PREFERRED_WIDTH, _GAP = 104, 250, 1140, 44
_SWEEPS = 24
#: Side of the members that stand for an edge and not for a head.
_PASSING = "passes"


@dataclass(frozen=True)
class Node:
    """A head at its place; one that both writes and reads may stand twice.

    Attributes
    ----------
    label : str
    x, y : float
        Left and upper end of its box.
    """

    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Layout:
    """Places of everything in the diagram.

    Attributes
    ----------
    nodes : dict of (str, str) to Node
        By side ("writes" or "reads") and label; one node under both where sides are not apart.
    routes : dict of (str, str) to list of (float, float)
        By labels of writer and reader, where an edge passes the columns between them: left end and
        height.
    headings : list of (float, str)
        Middle and name of every column.
    box : float
        Width of a head's box.
    width, height : float
    """

    nodes: dict[tuple[str, str], Node]
    routes: dict[tuple[str, str], list[tuple[float, float]]]
    headings: list[tuple[float, str]]
    box: float
    width: float
    height: float


_Key = tuple[str, str]
_Chain = list[_Key]


def lay_out(analysis: Analysis) -> Layout:
    """Place every head that has an edge, and lead long edges between the heads that they pass.

    Parameters
    ----------
    analysis : Analysis

    Returns
    -------
    Layout
    """
    names, columns, chains = _columns(analysis)
    heads = [[key for key in keys if key[0] != _PASSING] for keys in columns]
    box = _AROUND + _LETTER * max(len(label) for keys in heads for _, label in keys)
    room = (_PREFERRED_WIDTH - 2 * _SIDE - box) / max(len(columns) - 1, 1)
    pitch = min(max(room, _LEAST_PITCH, box + _GAP), _MOST_PITCH)
    row = _ROW if max(map(len, heads)) < _MANY_ROWS else _TIGHT_ROW
    centre = _straighten(columns, chains, row)
    top = min(centre.values()) - row / 2
    place = {
        key: (_SIDE + i * pitch, _TOP + centre[key] - top)
        for i, keys in enumerate(columns)
        for key in keys
    }
    nodes = {
        key: Node(key[1], place[key][0], place[key][1] - BOX_HEIGHT / 2)
        for keys in heads
        for key in keys
    }
    if analysis.scope != "all":
        nodes |= {("reads", label): node for (_, label), node in nodes.items()}
    routes = {(chain[0][1], chain[-1][1]): [place[key] for key in chain[1:-1]] for chain in chains}
    headings = [(_SIDE + box / 2 + i * pitch, name) for i, name in enumerate(names)]
    width = 2 * _SIDE + box + (len(columns) - 1) * pitch
    height = max(y for _, y in place.values()) + row / 2 + 4
    return Layout(nodes, routes, headings, box, width, height)


def _columns(analysis: Analysis) -> tuple[list[str], list[list[_Key]], list[_Chain]]:
    """Names and members of the columns from left to right, and the members that each edge links.

    Members are heads, and the places where edges pass a column.
    """
    edges = analysis.edges
    order = {str(label): i for i, label in enumerate(analysis.table.index)}
    ends = list(dict.fromkeys(zip(edges["source"], edges["target"], strict=True)))
    if analysis.scope == "all":
        chains = [[("writes", a), ("reads", b)] for a, b in ends]
        sides = [{chain[side] for chain in chains} for side in (0, 1)]
        columns = [sorted(side, key=lambda key: order[key[1]]) for side in sides]
        return ["writes", "reads"], columns, chains
    layer = {label: int(analysis.table["layer"][label]) for pair in ends for label in pair}
    layers = sorted(set(layer.values()))
    columns = [
        [("writes", a) for a in sorted(layer, key=order.__getitem__) if layer[a] == i]
        for i in layers
    ]
    column_of = {label: layers.index(value) for label, value in layer.items()}
    chains = []
    for a, b in ends:
        passed = range(column_of[a] + 1, column_of[b])
        passing = [(_PASSING, f"{a} {b} {i}") for i in passed]
        for i, key in zip(passed, passing, strict=True):
            columns[i].append(key)
        chains.append([("writes", a), *passing, ("writes", b)])
    return [f"layer {value}" for value in layers], columns, chains


def _straighten(columns: list[list[_Key]], chains: list[_Chain], row: float) -> dict[_Key, float]:
    """Height of every member about the middle, with linked ones near the same height.

    Sorts each column by the mean height of its neighbours, in sweeps to and fro.
    """
    neighbours: dict[_Key, list[_Key]] = defaultdict(list)
    for chain in chains:
        for start, end in pairwise(chain):
            neighbours[start].append(end)
            neighbours[end].append(start)
    centre: dict[_Key, float] = {}
    for keys in columns:
        centre |= _stack(keys, row)
    for sweep in range(_SWEEPS):
        for keys in columns[:: -1 if sweep % 2 else 1]:
            wanted = {
                key: float(np.mean([centre[other] for other in neighbours[key]])) for key in keys
            }
            keys.sort(key=wanted.__getitem__)
            centre |= _stack(keys, row)
    return centre


def _stack(keys: list[_Key], row: float) -> dict[_Key, float]:
    """Heights of members on top of each other, about zero."""
    sizes = np.array([_PASSING_ROW if key[0] == _PASSING else row for key in keys])
    centres = np.cumsum(sizes) - sizes / 2 - sizes.sum() / 2
    return dict(zip(keys, centres.tolist(), strict=True))
