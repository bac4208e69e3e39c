"""Scores of single heads: their maps, their token circuits, their attention by position."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.circuits import (
    eigenvalue_ratios,
    phase_summaries,
    small_circuits,
    symmetric_shares,
)
from skhead.linalg.factored import map_spectra, product_norms, signed_identity, spectrum_summaries
from skhead.linalg.positions import (
    learned_position_logits,
    position_scores,
    rotary_position_logits,
)
from skhead.linalg.rotary import rotate
from skhead.linalg.vocabulary import Vocabulary, diagonal_lifts, top_self_shares
from skhead.weights.tokens import Rotary

__all__ = ["GROUPS", "HeadStacks", "Surroundings", "TokenEnds", "identity_parts", "score_heads"]

#: Names of the scores, by what they need beside the four matrices of a head.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "maps": (
        "ov_norm",
        "ov_effective_rank",
        "ov_stable_rank",
        "ov_spectral_entropy",
        "ov_eigenvalue_ratio",
        "ov_positive_share",
        "ov_mean_phase",
        "identity_signed",
        "pk_vo",
        "qk_norm",
        "qk_effective_rank",
        "qk_stable_rank",
        "qk_spectral_entropy",
        "qk_eigenvalue_ratio",
        "qk_positive_share",
        "qk_mean_phase",
        "qk_symmetric",
        "pk_qk",
    ),
    "tokens": (
        "ov_copying",
        "ov_diagonal",
        "ov_top1_self",
        "qk_matching",
        "qk_diagonal",
        "qk_top1_self",
    ),
    "positions": ("previous_token", "current_token", "first_token"),
    "composition": tuple(
        f"{kind}_composition_{side}_{how}"
        for kind in "qkv"
        for side in ("in", "out")
        for how in ("mean", "max")
    ),
    "induction": ("induction_matching", "induction_feeding", "induction_strength"),
}

#: Scores of a map by its singular values, and by its eigenvalues.
_SPECTRAL = ("effective_rank", "stable_rank", "spectral_entropy")
_ANGULAR = ("eigenvalue_ratio", "positive_share", "mean_phase")

#: Bytes of float64 copies of one role's matrices that are worked on at once.
_BLOCK = 2**26

Scores = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HeadStacks:
    """Heads of one layer, or of a stack, in memory.

    Attributes
    ----------
    roles : mapping of str to Tensor of shape (n_heads, d_model, d_head)
        W_Q, W_K, W_V and W_O transposed, one matrix for every head.
    eps : mapping of str to Tensor of shape (n_heads,), float64
        Rounding error of the stored numbers.
    rotary : Rotary or None
        How queries and keys of the layer turn with their position.
    """

    roles: Mapping[str, torch.Tensor]
    eps: Mapping[str, torch.Tensor]
    rotary: Rotary | None = None

    def __len__(self) -> int:
        return len(self.roles["Q"])

    def __getitem__(self, rows: slice) -> HeadStacks:
        roles = {role: stack[rows] for role, stack in self.roles.items()}
        return HeadStacks(roles, {role: e[rows] for role, e in self.eps.items()}, self.rotary)

    def queries_at(self, offset: int) -> torch.Tensor:
        """W_Q for keys that lie `offset` positions back; as stored without rotary positions."""
        return turned(self.roles["Q"], offset, self.rotary)


def turned(w_q: torch.Tensor, offset: int, rotary: Rotary | None) -> torch.Tensor:
    """Query matrices as rotary positions turn them at a relative offset."""
    if rotary is None or offset == 0:
        return w_q
    return rotate(w_q, offset, rotary.frequencies, rotary.n_dims, rotary.pairing)


@dataclass(frozen=True)
class TokenEnds:
    """Both ends of circuits from token to token.

    Attributes
    ----------
    inputs, outputs : Vocabulary
        Of the same tokens.
    core : Tensor of shape (d_model, d_model)
        ``outputs^T inputs`` in float64.
    asked : Tensor of shape (n_tokens,), int64
        Tokens that the top-1 shares ask.
    """

    inputs: Vocabulary
    outputs: Vocabulary
    core: torch.Tensor
    asked: torch.Tensor


@dataclass(frozen=True)
class Surroundings:
    """What the heads of one model stand in, as far as its files say.

    Attributes
    ----------
    matching : TokenEnds or None
        Both ends of the circuits of QK: the embedding.
    copying : TokenEnds or None
        Both ends of the circuits of OV: embedding and unembedding.
    positions : Tensor of shape (n_positions, d_model) or None
        Learned positions, normalised as the model's norm would.
    mean_token : Tensor of shape (d_model,) or None
        Mean of the token embeddings, each normalised likewise; for rotary positions.
    n_positions : int
        Positions between which attention is scored.
    missing : mapping of str to str
        By score, a sentence that says which ingredient the model lacks.
    """

    matching: TokenEnds | None = None
    copying: TokenEnds | None = None
    positions: torch.Tensor | None = None
    mean_token: torch.Tensor | None = None
    n_positions: int = 0
    missing: Mapping[str, str] = field(default_factory=dict)


def score_heads(
    heads: HeadStacks, names: Collection[str], around: Surroundings, relative_position: int
) -> Scores:
    """Scores of the groups "maps", "tokens" and "positions".

    Parameters
    ----------
    heads : HeadStacks
    names : collection of str
        Which to compute; those in ``around.missing`` are left out.
    around : Surroundings
    relative_position : int
        Offset of the key behind the query in QK scores under rotary positions.

    Returns
    -------
    dict of str to Tensor of shape (n_heads,), float64
    """
    wanted = [name for name in names if name not in around.missing]
    d_model, d_head = heads.roles["Q"].shape[1:]
    step = max(_BLOCK // (8 * d_model * d_head), 1)
    parts = [
        _score_block(heads[start : start + step], wanted, around, relative_position)
        for start in range(0, len(heads), step)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score_block(
    heads: HeadStacks, names: Collection[str], around: Surroundings, relative_position: int
) -> Scores:
    queries = heads.queries_at(relative_position)
    k, v, o = (heads.roles[role] for role in "KVO")
    ov, qk = _Circuit("ov", v, o), _Circuit("qk", queries, k)
    found: Scores = {}
    for circuit in (ov, qk):
        found |= _map_scores(circuit, names)
    found |= _overlap_scores(heads, names)
    if "qk_symmetric" in names:
        found["qk_symmetric"] = symmetric_shares(queries, k)
    if around.copying is not None:
        found |= _token_scores(ov, "ov_copying", names, around.copying)
    if around.matching is not None:
        found |= _token_scores(qk, "qk_matching", names, around.matching)
    if any(name in GROUPS["positions"] for name in names):
        found |= _position_scores(heads, around)
    return {name: found[name] for name in names if name in found}


@dataclass(frozen=True)
class _Circuit:
    """One of the two maps of heads: what it reads, and what faces its other end."""

    name: str
    left: torch.Tensor
    right: torch.Tensor


def _map_scores(circuit: _Circuit, names: Collection[str]) -> Scores:
    """Scores of the maps themselves; of those that share a decomposition all or none."""
    name, left, right = circuit.name, circuit.left, circuit.right
    found: Scores = {}
    if f"{name}_norm" in names:
        found[f"{name}_norm"] = product_norms(left, right)
    if any(f"{name}_{score}" in names for score in _SPECTRAL):
        spectrum = spectrum_summaries(map_spectra(left, right))
        parts = (spectrum.effective_rank, spectrum.stable_rank, spectrum.entropy)
        found |= {f"{name}_{score}": part for score, part in zip(_SPECTRAL, parts, strict=True)}
    if any(f"{name}_{score}" in names for score in _ANGULAR):
        small = small_circuits(left, right)
        parts = (eigenvalue_ratios(small), *phase_summaries(small))
        found |= {f"{name}_{score}": part for score, part in zip(_ANGULAR, parts, strict=True)}
    return found


def _overlap_scores(heads: HeadStacks, names: Collection[str]) -> Scores:
    found: Scores = {}
    if "pk_vo" in names or "identity_signed" in names:
        v, o = (orthonormal_bases(heads.roles[r], eps=heads.eps[r]) for r in "VO")
        ranks = torch.minimum(v.ranks, o.ranks)
        found["pk_vo"], found["identity_signed"] = identity_parts(
            v.vectors, o.vectors, heads.roles["V"], heads.roles["O"], ranks
        )
    if "pk_qk" in names:
        q, k = (orthonormal_bases(heads.roles[r], eps=heads.eps[r]).vectors for r in "QK")
        found["pk_qk"] = (q.double().mT @ k.double()).square().sum((1, 2))
    return found


def identity_parts(
    basis_v: torch.Tensor,
    basis_o: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    ranks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projection kernel between what heads read as values and what they write, and its sign.

    Parameters
    ----------
    basis_v, basis_o : Tensor of shape (n_heads, d_model, rank)
    w_v, w_o : Tensor of shape (n_heads, d_model, d_head)
    ranks : Tensor of shape (n_heads,)
        Of the OV maps.

    Returns
    -------
    pk_vo, identity_signed : Tensor of shape (n_heads,), float64
    """
    overlap = (basis_v.double().mT @ basis_o.double()).square().sum((1, 2))
    return overlap, signed_identity(w_v, w_o, ranks)


def _token_scores(
    circuit: _Circuit, ratio_name: str, names: Collection[str], ends: TokenEnds
) -> Scores:
    left, right = circuit.left, circuit.right
    diagonal, top = f"{circuit.name}_diagonal", f"{circuit.name}_top1_self"
    found: Scores = {}
    if ratio_name in names or diagonal in names:
        small = small_circuits(left, right, ends.core)
        if ratio_name in names:
            found[ratio_name] = eigenvalue_ratios(small)
        if diagonal in names:
            found[diagonal] = diagonal_lifts(left, right, small, ends.inputs, ends.outputs)
    if top in names:
        vectors = ends.inputs.vectors, ends.outputs.vectors
        found[top] = top_self_shares(left, right, *vectors, ends.asked)
    return found


def _position_scores(heads: HeadStacks, around: Surroundings) -> Scores:
    logits = _position_logits(heads, around)
    parts = [position_scores(block) for block in logits]
    return {
        "previous_token": torch.cat([part.previous for part in parts]),
        "current_token": torch.cat([part.current for part in parts]),
        "first_token": torch.cat([part.first for part in parts]),
    }


def _position_logits(heads: HeadStacks, around: Surroundings) -> Iterator[torch.Tensor]:
    """Logits between positions, some heads at a time."""
    rotary, n_positions = heads.rotary, around.n_positions
    step = max(_BLOCK // (8 * n_positions**2), 1)
    for start in range(0, len(heads), step):
        q, k = (heads.roles[role][start : start + step] for role in "QK")
        if around.positions is not None:
            yield learned_position_logits(around.positions, q, k)
        elif rotary is not None and around.mean_token is not None:
            stretched = q.clone()
            stretched[..., : rotary.n_dims] *= rotary.scaling**2
            yield rotary_position_logits(
                around.mean_token,
                stretched,
                k,
                n_positions,
                frequencies=rotary.frequencies,
                n_dims=rotary.n_dims,
                pairing=rotary.pairing,
            )
