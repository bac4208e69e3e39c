"""Pairs of heads that carry out induction, found in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from skhead._base import ROLES, defined_pairs
from skhead._callers import saying_once, warn_user
from skhead._checks import check_count, check_number
from skhead._devices import check_device
from skhead._inputs import (
    LayerReader,
    Processing,
    SourceHeads,
    models_with_tokens,
    refuse_zero_maps,
    token_ends,
)
from skhead._progress import progress_bar
from skhead.exceptions import UnsupportedLayoutError
from skhead.linalg.circuits import eigenvalue_ratios, paired_matching, small_circuits
from skhead.linalg.factored import product_norms
from skhead.linalg.inputs import mean_inputs
from skhead.linalg.paths import head_maps, induction_statistics
from skhead.linalg.positions import (
    learned_position_logits,
    position_scores,
    rotary_position_logits,
)
from skhead.linalg.topk import largest_entries
from skhead.linalg.vocabulary import row_products
from skhead.weights import describe_sources
from skhead.weights.offsets import read_offsets
from skhead.weights.tokens import TokenSpace

__all__ = ["induction_pairs"]

_CALLER = "induction_pairs"
#: Pairs whose composed circuits are decomposed at once.
_BLOCK = 64


def induction_pairs(
    heads: Any,
    *,
    min_score: float = 0.5,
    alpha: float = 0.01,
    top: int | None = 1000,
    n_positions: int = 64,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Pairs of a previous-token head and an induction head that reads what it wrote.

    Induction continues a repeated text: at a token, it looks for the place after the token's
    earlier occurrence, and copies what stands there. It takes two heads. The first attends to the
    previous position and writes there what it found; the second compares its own token with what
    the first has written, ``E W_Q2 (W_V1 W_O1 W_K2)^T E^T``, and copies. A pair is called
    where all three parts are read off the weights: attention to the previous token by the first
    head, matching of equal tokens by the pair, copying by the second head; and where the matching
    is more than chance allows among all pairs of the model.

    Composition in the Frobenius norm is reported, but not used: it sees how much of what the first
    head writes is read, and not whether it is compared with the same token.

    Parameters
    ----------
    heads : DataFrame
        Heads table, of one or several models. Partners are sought among its rows.
    min_score : float, default=0.5
        Smallest ``score`` of a pair that is called.
    alpha : float, default=0.01
        Probability of calling any pair of a model where the earlier heads' maps are rotated at
        random: ``matching_z`` must exceed the normal quantile at ``alpha`` divided by the number of
        pairs of different layers.
    top : int or None, default=1000
        Largest number of pairs of each model to decompose and return, those of largest
        ``matching_z``; None for all.
    n_positions : int, default=64
        Number of first positions over which attention to the previous token is averaged; at least
        3, and at most the context of a model with learned positions.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`, applied to embedding and unembedding too. With folded gains,
        ``previous_token`` also takes in the biases of queries, keys and norm, as far as the source
        holds them, and comes close to what the head does on random tokens.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row for each pair whose three parts are all positive, by falling score:

        ``source``, ``previous_head``, ``induction_head``
            The model, and the labels of both heads.
        ``k_composition``, ``k_ratio``
            ``||W_OV1 W_K2 W_Q2^T||_F / (||W_OV1||_F ||W_Q2 W_K2^T||_F)``, and the same over its
            value at random, ``d_model^-1/2``.
        ``previous_token``
            Attention of the first head to the previous position by position alone, above uniform
            attention: 1 is all attention, 0 as much as uniform. The head sees at each position the
            mean over all tokens of the normalised sum of token and position. Under rotary positions
            the mean token stands everywhere, and the scores turn with the offset.
        ``matching``
            Sum of the eigenvalues of ``E W_Q2 (W_OV1 W_K2)^T E^T`` over the sum of their moduli, in
            [-1, 1]. The mean token is taken off E, as what all keys have in common has no effect on
            attention. Rotary positions are left out, which is exact at an offset of 0.
        ``matching_z``
            The sum of these eigenvalues in standard deviations of its law when the OV map of the
            first head keeps its subspaces and singular values but is rotated at random in between;
            of mean 0 and standard deviation 1, and at most d_head.
        ``copying``
            Sum of the eigenvalues of ``E W_OV2 U`` over the sum of their moduli, in [-1, 1].
        ``score``
            The smallest of ``previous_token``, ``matching`` and ``copying``.
        ``is_induction``
            Whether the pair is called.

    Raises
    ------
    HeadTableError
        If `heads` is no heads table, so that there are no tokens to read.
    UnsupportedLayoutError
        If a model's file holds no embedding or unembedding, or its positions are neither learned
        nor rotary.
    DegenerateHeadError
        If an OV or QK map is zero.
    ValueError
        If a parameter is out of range.

    Warns
    -----
    UserWarning
        If a norm acts on queries and keys within the heads, which the circuits leave out.

    Notes
    -----
    MLPs between the heads are no part of these circuits, so that pairs are missed that need them.
    Where few directions dominate a circuit, its eigenvalue ratio reaches 0.9 between unrelated
    heads, which `matching_z` tells apart: it asks how many directions agree.

    Matrices of the heads are read a few layers at a time, 256 MiB of each role or one layer. The
    embedding, the unembedding and a few matrices of d_model x d_model in float64 come on top.

    References
    ----------
    N. Elhage et al., "A mathematical framework for transformer circuits", Transformer Circuits
    Thread (2021): induction heads by K-composition, and their two eigenvalue scores. C. Olsson et
    al., "In-context learning and induction heads", Transformer Circuits Thread (2022).

    Examples
    --------
    >>> import skhead
    >>> from skhead.induction import induction_pairs
    >>> pairs = induction_pairs(skhead.load_heads("skhead/induction-2l"))
    >>> pairs.loc[pairs["is_induction"], ["previous_head", "induction_head"]].values.tolist()
    [['L0H0', 'L1H1']]
    """
    smallest = check_number("min_score", min_score, _CALLER)
    level = check_number("alpha", alpha, _CALLER)
    if not 0 < level < 1:
        raise ValueError(f"{_CALLER}: alpha must lie between 0 and 1; got {alpha!r}")
    limit = None if top is None else check_count("top", top, _CALLER)
    places = check_count("n_positions", n_positions, _CALLER, smallest=3)
    process = Processing(fold_norm, center, check_device(device, _CALLER, float64=True))
    tables = []
    with saying_once():
        for model in models_with_tokens(heads, process, _CALLER):
            found = _pairs_of_model(model, limit, places, process)
            beyond = -ndtri(level / max(found.n_pairs, 1))
            called = (found.table["score"] >= smallest) & (found.table["matching_z"] > beyond)
            tables.append(found.table.assign(is_induction=called))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Found:
    """Pairs of one model, and among how many they were sought."""

    table: pd.DataFrame
    n_pairs: int


def _pairs_of_model(
    model: SourceHeads, top: int | None, n_positions: int, process: Processing
) -> _Found:
    space = process.tokens(model.name)
    embedding, unembedding = token_ends(space, _CALLER)
    if space.query_key_norm:
        warn_user(
            f"{_CALLER}: the heads of {space.source} normalise their queries and keys, which the "
            "circuits leave out",
        )
    reader = LayerReader(model, process)
    form, gram = row_products(unembedding, embedding), _centred_gram(embedding)
    inputs = _inputs_by_position(model, space, embedding, n_positions)
    previous, copies = (np.empty(len(model.labels)) for _ in range(2))
    for rows in reader.layers:
        stacks = {role: reader.read(role, rows) for role in ROLES}
        layer = model.table.iloc[rows]
        refuse_zero_maps(product_norms(stacks["V"], stacks["O"]), layer, "OV", _CALLER)
        refuse_zero_maps(product_norms(stacks["Q"], stacks["K"]), layer, "QK", _CALLER)
        logits = _position_logits(layer, space, inputs, stacks, n_positions, process.fold_norm)
        previous[rows] = position_scores(logits).previous.cpu().numpy()
        small = small_circuits(stacks["V"], stacks["O"], form)
        copies[rows] = eigenvalue_ratios(small).cpu().numpy()
    allowed = defined_pairs(model.table, model.table, True, "forward")
    composition, deviations = _statistics(reader, allowed, gram)
    possible = (deviations > 0) & (previous[:, None] > 0) & (copies[None, :] > 0)
    ranked = np.where(possible, deviations, np.nan)
    first, second = largest_entries(ranked, ranked.size if top is None else top)
    matching = _matching(reader, first, second, gram)
    table = {
        "source": model.name,
        "previous_head": model.labels[first],
        "induction_head": model.labels[second],
        "k_composition": composition[first, second],
        "k_ratio": composition[first, second] * model.heads.d_model**0.5,
        "previous_token": previous[first],
        "matching": matching,
        "matching_z": deviations[first, second],
        "copying": copies[second],
        "score": np.minimum(np.minimum(previous[first], matching), copies[second]),
    }
    ordered = pd.DataFrame(table).sort_values("score", ascending=False, kind="stable")
    return _Found(ordered, int(allowed.sum()))


def _centred_gram(embedding: torch.Tensor) -> torch.Tensor:
    """``E^T E`` of the embedding without its mean token."""
    mean = embedding.mean(0, dtype=torch.float64)
    return row_products(embedding, embedding) - len(embedding) * torch.outer(mean, mean)


def _inputs_by_position(
    model: SourceHeads, space: TokenSpace, embedding: torch.Tensor, n_positions: int
) -> torch.Tensor:
    """What heads see on average at each position; one row for rotary positions."""
    norm = describe_sources(model.table)[0].norm.removesuffix("+1")
    if space.position_kind == "learned":
        if space.positions is None:
            raise UnsupportedLayoutError(f"{_CALLER}: {space.missing['positions']}")
        return mean_inputs(embedding, space.positions[:n_positions], norm)
    if space.position_kind == "rotary":
        return mean_inputs(embedding, None, norm)
    raise UnsupportedLayoutError(
        f"{_CALLER}: {space.source} has positions of the kind {space.position_kind!r}; "
        "attention to the previous token is read only off learned and rotary positions"
    )


def _position_logits(
    layer: pd.DataFrame,
    space: TokenSpace,
    inputs: torch.Tensor,
    stacks: Mapping[str, torch.Tensor],
    n_positions: int,
    fold_norm: bool,
) -> torch.Tensor:
    """Attention logits between positions, of the heads of one layer."""
    w_q, w_k = stacks["Q"], stacks["K"]
    if fold_norm:
        w_q, w_k = (
            torch.cat([w, read_offsets(layer, role, device=w.device)[:, None].to(w)], dim=1)
            for role, w in (("Q", w_q), ("K", w_k))
        )
    inputs = _widened(inputs, w_q)
    if space.position_kind == "learned":
        return learned_position_logits(inputs, w_q, w_k)
    rotary = space.rotary_at(int(layer["layer"].iloc[0]))
    queries = w_q.clone()
    queries[..., : rotary.n_dims] *= rotary.scaling**2
    return rotary_position_logits(
        inputs[0],
        queries,
        w_k,
        n_positions,
        frequencies=rotary.frequencies,
        n_dims=rotary.n_dims,
        pairing=rotary.pairing,
    )


def _widened(inputs: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Inputs with a coordinate 1 for stacks that have a row of constants."""
    ones = inputs.new_ones(len(inputs), stack.shape[1] - inputs.shape[1])
    return torch.cat([inputs, ones], dim=1)


def _statistics(
    reader: LayerReader, allowed: NDArray[np.bool_], gram: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """K-composition and deviation of the matching, of all pairs of different layers."""
    composition, deviations = np.full(allowed.shape, np.nan), np.full(allowed.shape, np.nan)
    for earlier in progress_bar(reader.groups, _CALLER, unit="group"):
        if not allowed[earlier].any():
            continue
        maps = head_maps(reader.read("V", earlier), reader.read("O", earlier))
        for later in reader.layers:
            inside = np.flatnonzero(allowed[np.ix_(earlier, later)].any(axis=1))
            if inside.size:
                queries, keys = reader.read("Q", later), reader.read("K", later)
                found = induction_statistics(maps.take(inside), queries, keys, gram)
                block = np.ix_(earlier[inside], later)
                composition[block], deviations[block] = (part.cpu().numpy() for part in found)
    return composition, deviations


def _matching(
    reader: LayerReader,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    gram: torch.Tensor,
) -> NDArray[np.float64]:
    """Eigenvalue ratios of the composed circuits of chosen pairs, later head by later head."""
    found = np.empty(len(first))
    for earlier in reader.groups:
        in_group = np.isin(first, earlier)
        if not in_group.any():
            continue
        values, outputs = reader.read("V", earlier), reader.read("O", earlier)
        places = {int(row): i for i, row in enumerate(earlier)}
        for later in np.unique(second[in_group]):
            one = np.array([later])
            queries = gram @ reader.read("Q", one)[0].double()
            keys = reader.read("K", one)[0].double()
            pairs = np.flatnonzero(in_group & (second == later))
            for chosen in np.array_split(pairs, -(-len(pairs) // _BLOCK)):
                at = [places[int(row)] for row in first[chosen]]
                ratios = paired_matching(
                    queries.expand(len(chosen), -1, -1),
                    keys.expand(len(chosen), -1, -1),
                    values[at],
                    outputs[at],
                )
                found[chosen] = ratios.cpu().numpy()
    return found
