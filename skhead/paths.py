"""Paths of two and more heads: virtual heads, and the pairs that carry out induction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import check_option, defined_pairs
from skhead._callers import saying_once
from skhead._checks import check_count, check_number
from skhead._devices import check_device
from skhead._html import SHOWN, Listing, ShowsSummary, Summary
from skhead._inputs import (
    LayerReader,
    Processing,
    SourceHeads,
    copying_form,
    of_sources,
    open_maps,
    refuse_zero_maps,
)
from skhead.linalg.circuits import eigenvalue_ratios, small_circuits
from skhead.linalg.factored import (
    map_spectra,
    product_norms,
    signed_identity,
    spectrum_summaries,
)
from skhead.linalg.paths import StreamedMaps, best_paths, path_reads

__all__ = ["VirtualHeads", "virtual_heads"]

#: Singular value, relative to the largest, that float32 weights cannot tell from zero.
_ZERO = 1e-6


@dataclass(frozen=True, eq=False)
class VirtualHeads(ShowsSummary):
    """Virtual heads: paths through several heads, each of which acts as one head.

    Along a path of heads the attention patterns multiply, and the OV maps multiply to ``W_V1 (W_O1
    W_V2) ... W_On``, of no higher rank than one head's. Made by `virtual_heads`.

    Attributes
    ----------
    table : DataFrame
        One row per path, the strongest first; see `virtual_heads`.
    steps : ndarray of shape (n_paths, length), int64
        Rows of the heads table along each path.
    reads : ndarray of shape (n_paths, d_model, d_head), float32
        ``W_V1 W_O1 W_V2 ... W_Vn``: what each virtual head reads.
    ends : ndarray of shape (n_last_heads, 3, d_model, d_head), float32
        W_Q, W_K and W_O transposed of the heads that end a path, each once.
    last : ndarray of shape (n_paths,), int64
        Row of `ends` in which each path ends.

    See Also
    --------
    virtual_heads : Makes them.

    Examples
    --------
    >>> import skhead
    >>> found = skhead.virtual_heads(skhead.load_heads("skhead/induction-2l"), top=3)
    >>> len(found), found.stack().shape
    (3, (3, 4, 128, 16))
    >>> reads, writes = found.factors(0)
    """

    table: pd.DataFrame
    steps: NDArray[np.int64]
    reads: NDArray[np.float32]
    ends: NDArray[np.float32]
    last: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.table)

    def factors(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """OV map of one virtual head as ``reads @ writes.T``.

        Parameters
        ----------
        i : int
            Row of the table.

        Returns
        -------
        reads, writes : ndarray of shape (d_model, d_head)

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> reads, writes = skhead.virtual_heads(heads, top=3).factors(0)
        >>> reads.shape, writes.shape
        ((128, 16), (128, 16))
        """
        return self.reads[i], self.ends[self.last[i], 2]

    def stack(self) -> NDArray[np.float32]:
        """The virtual heads as heads, for any estimator that takes a stack of all four roles.

        V is what the path reads and O what its last head writes. Q and K are those of the last
        head, whose pattern decides where the result arrives; which token it comes from is decided
        by the product of all patterns along the path, which no single Q and K express.

        Returns
        -------
        ndarray of shape (n_paths, 4, d_model, d_head), float32
            W_Q, W_K, W_V and W_O transposed.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> stack = skhead.virtual_heads(heads, top=3).stack()
        >>> skhead.SubspaceExtractor().fit_transform(stack)
        Subspaces(3 heads, roles Q K V O, d_model 128, ranks 16)
        """
        ends = self.ends[self.last]
        return np.stack([ends[:, 0], ends[:, 1], self.reads, ends[:, 2]], axis=1)

    def _summary(self) -> Summary:
        facts = {
            "paths": f"{len(self):,}",
            "heads on a path": f"{self.steps.shape[1]}",
            "d_model": f"{self.reads.shape[1]:,}",
            "d_head": f"{self.reads.shape[2]}",
        }
        return Summary(facts, [Listing("strongest paths", self.table.head(SHOWN))])

    def __repr__(self) -> str:
        return f"VirtualHeads({len(self)} paths of {self.steps.shape[1]} heads)"


def virtual_heads(
    heads: Any,
    *,
    length: int = 2,
    top: int = 100,
    min_ratio: float = 1.0,
    beam: int = 1000,
    fold_norm: bool = False,
    center: bool = False,
    errors: str = "warn",
    device: str | torch.device | None = None,
) -> VirtualHeads:
    """The paths of heads that compose most strongly, scored as the heads that they act as.

    A head of a later layer that moves what an earlier head has written acts together with it as
    one virtual head, with the OV map ``W_OV1 W_OV2``. All pairs are compared by V-composition; for
    longer paths, each step extends the `beam` strongest ones, so that the result is exact for
    length 2 and wherever `beam` is at least the number of paths. Maps stay factored: nothing of
    size d_model x d_model is formed for any path.

    Parameters
    ----------
    heads : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, of one or several models, which are not mixed; or W_Q, W_K, W_V and W_O
        transposed, where without layers any head may follow any other.
    length : int, default=2
        Heads on a path, of strictly increasing layers.
    top : int, default=100
        Largest number of paths of each model to return.
    min_ratio : float, default=1.0
        Smallest composition to return, in units of what random heads have.
    beam : int, default=1000
        Paths that are kept and extended; at least `top`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`, applied to embedding and unembedding too. Folded gains of the
        norms between the heads change which paths are strongest.
    errors : {"warn", "raise"}, default="warn"
        What to do for a model without embedding or unembedding, or with different numbers of
        tokens in them: ``ov_copying`` is NaN with a warning that says so, or an error.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    VirtualHeads
        Its ``table`` has one row per path, with the path such as ``"L0H3>L1H1"`` as index:

        ``source``, ``head_1``, ``head_2``, ...
            The model, and the labels of the heads along the path.
        ``composition``
            ``||W_OV1 ... W_OVn||_F / (||W_OV1||_F ... ||W_OVn||_F)``, in [0, 1].
        ``ratio``
            The same over its root mean square for independent isotropic heads, ``d_model^(-(n - 1)
            / 2)``: 1 at random.
        ``ov_norm``
            ``||W_OV1 ... W_OVn||_F``.
        ``effective_rank``
            Exponential of the entropy of the map's singular values as shares of their sum, between
            1 and d_head.
        ``identity_signed``
            ``tr(W_OV) / (||W_OV||_F sqrt(rank))`` of the product: 1 for copying its subspace
            unchanged, -1 for erasing it, 0 on average at random.
        ``ov_copying``
            Sum of the eigenvalues of ``E W_OV U`` over the sum of their moduli, in [-1, 1]: near 1
            for a path that promotes the tokens that it reads, near 0 at random.

        The last three are NaN where the maps along a path cancel to zero.

    Raises
    ------
    HeadShapeError
        If a stack does not hold all four roles.
    DegenerateHeadError
        If an OV map is zero.
    UnsupportedLayoutError
        If ``errors="raise"`` and tokens are missing.
    ValueError
        If a parameter is out of range, or a stack is to be processed as only a model's weights can
        be.

    Notes
    -----
    W_V of all heads is in memory, and W_O a few layers at a time: 2.1 GB and 0.25 GB for 32 layers
    of 32 heads of 4096 x 128 numbers. With tokens, one model's embedding and unembedding come on
    top, and every path that is returned takes two matrices of d_model x d_head.

    References
    ----------
    N. Elhage et al., "A mathematical framework for transformer circuits", Transformer Circuits
    Thread (2021): virtual attention heads, composition and copying.

    Examples
    --------
    >>> import skhead
    >>> from skhead.paths import virtual_heads
    >>> virtual = virtual_heads(skhead.load_heads("skhead/induction-2l"), top=3)
    >>> virtual
    VirtualHeads(3 paths of 2 heads)
    >>> virtual.stack().shape
    (3, 4, 128, 16)
    """
    caller = "virtual_heads"
    check_option("errors", errors, ("warn", "raise"), caller)
    n_steps = check_count("length", length, caller, smallest=2)
    n_paths = check_count("top", top, caller)
    width = check_count("beam", beam, caller, smallest=n_paths)
    smallest = check_number("min_ratio", min_ratio, caller)
    process = Processing(fold_norm, center, check_device(device, caller, float64=True))
    of_model = partial(
        _of_model,
        length=n_steps,
        top=n_paths,
        beam=width,
        min_ratio=smallest,
        process=process,
        errors=errors,
    )
    with saying_once():
        parts = list(map(of_model, of_sources(open_maps(heads, process, caller))))
    starts = np.cumsum([0] + [len(part.ends) for part in parts[:-1]])
    return VirtualHeads(
        pd.concat([part.table for part in parts]),
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.reads for part in parts]),
        np.concatenate([part.ends for part in parts]),
        np.concatenate([part.last + start for part, start in zip(parts, starts, strict=True)]),
    )


def _of_model(
    model: SourceHeads,
    *,
    length: int,
    top: int,
    beam: int,
    min_ratio: float,
    process: Processing,
    errors: str,
) -> VirtualHeads:
    """Virtual heads of one model."""
    reader = LayerReader(model, process)
    w_v = reader.read("V", np.arange(len(model.labels)))
    maps = StreamedMaps.of(w_v, partial(reader.read, "O"), reader.groups)
    refuse_zero_maps(maps.norms, model.table, "OV", "virtual_heads")
    allowed = defined_pairs(model.table, model.table, True, "forward")
    steps, composition = best_paths(maps, allowed, length, beam)
    ratio = composition * model.heads.d_model ** ((length - 1) / 2)
    kept = np.flatnonzero(ratio >= min_ratio)[:top]
    steps = steps[kept]
    reads = path_reads(maps, steps)
    ends, last = np.unique(steps[:, -1], return_inverse=True)
    facing = {role: reader.read(role, ends) if ends.size else w_v[:0] for role in "QKO"}
    writes = facing["O"][torch.as_tensor(last, device=reads.device)]
    table: dict[str, Any] = {"source": model.name}
    table |= {f"head_{i + 1}": model.labels[steps[:, i]] for i in range(length)}
    table |= {"composition": composition[kept], "ratio": ratio[kept]}
    table |= _map_scores(reads, writes)
    table["ov_copying"] = _path_copying(model, reads, writes, process, errors)
    paths = [">".join(path) for path in model.labels[steps]]
    return VirtualHeads(
        pd.DataFrame(table, index=pd.Index(paths, dtype=object)),
        model.rows[steps],
        reads.float().cpu().numpy(),
        torch.stack([*facing.values()], dim=1).float().cpu().numpy(),
        last.astype(np.int64),
    )


def _map_scores(reads: torch.Tensor, writes: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    """What the maps of virtual heads are like, apart from tokens."""
    values = map_spectra(reads, writes)
    ranks = (values > _ZERO * values[:, :1]).sum(1)
    scores = {
        "ov_norm": product_norms(reads, writes),
        "effective_rank": spectrum_summaries(values).effective_rank,
        "identity_signed": signed_identity(reads, writes, ranks),
    }
    return {name: score.cpu().numpy() for name, score in scores.items()}


def _path_copying(
    model: SourceHeads,
    reads: torch.Tensor,
    writes: torch.Tensor,
    process: Processing,
    errors: str,
) -> NDArray[np.float64]:
    """Copying scores of virtual heads, NaN without tokens."""
    form = copying_form(model, process, errors, "virtual_heads")
    if form is None or not len(reads):
        return np.full(len(reads), np.nan)
    copying: NDArray[np.float64] = (
        eigenvalue_ratios(small_circuits(reads, writes, form)).cpu().numpy()
    )
    return copying
