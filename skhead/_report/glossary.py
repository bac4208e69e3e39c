"""The figures of a head's card: their names, what they are, and what random heads get."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = [
    "BEST_PARTNER",
    "COMPOSITION",
    "MAPS",
    "PLACES",
    "RATIO_SPREAD",
    "WORDS",
    "figures",
    "random_figures",
]

#: Figures of both circuits: what they are called, the columns of OV and QK, and what they are.
MAPS: tuple[tuple[str, str | None, str | None, str], ...] = (
    (
        "copying, matching",
        "ov_copying",
        "qk_matching",
        "eigenvalue ratio of the token circuits E W_OV U and E W_QK Eᵀ, −1 to 1",
    ),
    (
        "own token above others",
        "ov_diagonal",
        "qk_diagonal",
        "mean diagonal of the token circuit above its other entries, in their standard deviations",
    ),
    (
        "own token first",
        "ov_top1_self",
        "qk_top1_self",
        "share of tokens that the token circuit leads to themselves before all others",
    ),
    (
        "signed identity",
        "identity_signed",
        None,
        "trace of W_OV over its norm and √rank: 1 copies its subspace, −1 writes the negative",
    ),
    (
        "overlap",
        "pk_vo",
        "pk_qk",
        "projection kernel of V with O, and of Q with K, 0 to d_head",
    ),
    (
        "eigenvalue ratio",
        "ov_eigenvalue_ratio",
        "qk_eigenvalue_ratio",
        "sum of the map's eigenvalues over the sum of their moduli, −1 to 1",
    ),
    (
        "positive share",
        "ov_positive_share",
        "qk_positive_share",
        "share of the map's eigenvalues of positive real part, 0 to 1",
    ),
    (
        "mean phase",
        "ov_mean_phase",
        "qk_mean_phase",
        "mean angle of the map's eigenvalues over π, weighted by modulus, 0 to 1",
    ),
    ("symmetric share", None, "qk_symmetric", "of the squared norm of W_QK, 0 to 1"),
    ("norm", "ov_norm", "qk_norm", "Frobenius norm of the map"),
    (
        "effective rank",
        "ov_effective_rank",
        "qk_effective_rank",
        "exponential of the entropy of the map's singular values, 1 to d_head",
    ),
    (
        "stable rank",
        "ov_stable_rank",
        "qk_stable_rank",
        "squared Frobenius norm over squared spectral norm, 1 to d_head",
    ),
    (
        "spectral entropy",
        "ov_spectral_entropy",
        "qk_spectral_entropy",
        "entropy of the squared singular values over log d_head, 0 to 1",
    ),
)

#: Figures on where a head attends and on induction: name, column, and what they are.
PLACES: tuple[tuple[str, str, str], ...] = (
    (
        "previous token",
        "previous_token",
        "attention to it by position alone, above uniform attention, at most 1",
    ),
    (
        "own position",
        "current_token",
        "attention to the token itself by position alone, above uniform attention",
    ),
    (
        "first position",
        "first_token",
        "attention to the first token by position alone, above uniform attention",
    ),
    (
        "induction",
        "induction_strength",
        "least of matching through an earlier head, its attention to the previous token, copying",
    ),
    (
        "matching through a head",
        "induction_matching",
        "eigenvalue ratio of E W_Q (W_OV W_K)ᵀ Eᵀ with W_OV of an earlier head, the largest",
    ),
    (
        "feeding a later head",
        "induction_feeding",
        "the same ratio with W_OV of this head and a later head's queries and keys, the largest",
    ),
)

#: Standard deviation of the eigenvalue ratio of random heads, and mean of the largest ratio among
#: the partners that are tried, both times d_head.
RATIO_SPREAD, BEST_PARTNER = 1.6, 3

#: Composition by what is read, first letter of the column and name.
COMPOSITION = (("q", "queries"), ("k", "keys"), ("v", "values"))
_SIDES = {"in": "earlier heads", "out": "later heads"}
_HOWS = {"max": "largest", "mean": "mean"}

#: What the scores that rules rest on are called in a sentence.
WORDS = (
    {name: word for word, name, _ in PLACES}
    | {
        "ov_copying": "copying",
        "qk_matching": "matching",
        "ov_diagonal": "own token above others (OV)",
        "qk_diagonal": "own token above others (QK)",
        "identity_signed": "signed identity",
    }
    | {
        f"{kind}_composition_{side}_max": f"composition of {reads} with one {which}"
        for kind, reads in COMPOSITION
        for side, which in (("in", "earlier head"), ("out", "later head"))
    }
)


def figures() -> Iterator[tuple[str, str, str]]:
    """Column, name and account of every figure."""
    for word, ov, qk, what in MAPS:
        for column, circuit in ((ov, "OV"), (qk, "QK")):
            if column is not None:
                yield column, WORDS.get(column, f"{word} ({circuit})"), what
    for word, column, what in PLACES:
        yield column, word, what
    for kind, reads in COMPOSITION:
        for side, which in _SIDES.items():
            for how, word in _HOWS.items():
                what = f"{word} composition with {which}, over its value for random maps"
                yield f"{kind}_composition_{side}_{how}", f"{reads}, {which}, {word}", what


def random_figures(d_model: int, d_head: int) -> dict[str, str]:
    """What a random head gets, by column; without those of which nothing short can be said.

    Parameters
    ----------
    d_model, d_head : int

    Returns
    -------
    dict of str to str
    """
    ratio, overlap = f"0 ± {RATIO_SPREAD / d_head:.2g}", f"{d_head**2 / d_model:.3g}"
    best = f"about {BEST_PARTNER / d_head:.2g}"
    known = {"identity_signed": "0", "qk_symmetric": "0.5", "pk_vo": overlap, "pk_qk": overlap}
    known |= dict.fromkeys(
        ("ov_copying", "qk_matching", "ov_eigenvalue_ratio", "qk_eigenvalue_ratio"), ratio
    )
    known |= dict.fromkeys(("previous_token", "current_token", "first_token"), "0")
    known |= {"induction_strength": "about 0"}
    known |= dict.fromkeys(("induction_matching", "induction_feeding"), best)
    for circuit in ("ov", "qk"):
        known |= {f"{circuit}_diagonal": "0", f"{circuit}_top1_self": "1 / vocabulary"}
        known |= {f"{circuit}_positive_share": "0.5", f"{circuit}_mean_phase": "0.5"}
    return known | {name: "1" for name, _, _ in figures() if "_composition_" in name}
