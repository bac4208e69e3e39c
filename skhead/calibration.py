"""Similarities held against what random subspaces would give."""

from __future__ import annotations

import numpy as np
import pandas as pd

from skhead.containers import Similarity
from skhead.stats.divergence import gaussian_divergence
from skhead.stats.haar import haar_moments

__all__ = ["informativeness"]


def informativeness(similarity: Similarity, bins: int = 255) -> pd.Series:
    """Divergence of every pair kind's distribution from that of random subspaces.

    ``KL(random || observed)`` over equal bins between 0 and the largest value possible, with a
    normal reference of the exact Haar mean and variance. It says how little of the observed
    distribution lies where random subspaces would put it, and it depends on the number of bins.

    Parameters
    ----------
    similarity : Similarity
        From `ProjectionKernel` with ``normalize=None``, all heads of a role of one rank.
    bins : int, default=255
        Number of bins; 255 is the published choice.

    Returns
    -------
    Series
        In nats, indexed by pair kind.

    Raises
    ------
    ValueError
        If the unit is not the plain projection kernel, or ranks differ between heads.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> skhead.informativeness(similarity, bins=8).index.tolist()
    ['OQ', 'OK', 'OV']
    """
    if similarity.unit != "pk":
        raise ValueError(
            f"informativeness: needs a plain projection kernel (unit 'pk'), got "
            f"{similarity.unit!r}; use ProjectionKernel(normalize=None)"
        )
    divergences = {}
    for p, pair in enumerate(similarity.pairs):
        ranks = [np.unique(similarity.row_ranks[:, p]), np.unique(similarity.column_ranks[:, p])]
        if max(len(found) for found in ranks) > 1:
            raise ValueError(
                f"informativeness: the heads of pair {pair} have unequal ranks {ranks}, so that no "
                "single reference describes them; truncate with SubspaceExtractor(rank=...)"
            )
        r, s = (int(found[0]) for found in ranks)
        moments = haar_moments(r, s, similarity.d_model)
        listed = similarity.listed(pair)
        divergences[pair] = gaussian_divergence(
            listed[~np.isnan(listed)],
            float(moments.mean),
            float(moments.variance),
            upper=float(min(r, s)),
            bins=bins,
        )
    return pd.Series(divergences, name="informativeness")
