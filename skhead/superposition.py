"""Whether a head holds more latents than it has dimensions, and how they then mix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._frozen import Frozen
from skhead._html import ShowsSummary, Summary
from skhead.datasets import PayloadEmbeddings, PayloadHead, PayloadRetrieval
from skhead.exceptions import HeadShapeError
from skhead.linalg.interaction import cross_block_ratio, diagonal_share, interaction_matrix

__all__ = ["SuperpositionReport", "analyse_superposition", "true_logits"]


@dataclass(frozen=True, eq=False)
class SuperpositionReport(ShowsSummary, Frozen):
    """How the latents of queries and keys meet in a head; from :func:`analyse_superposition`.

    Attributes
    ----------
    head : str
        Label of the head.
    interaction : ndarray of shape (n_latents, n_latents), float64
        What latent i of a query and latent j of a key add to their dot product, before it is
        scaled; the latents of the first factor come first.
    diagonal_share : float
        Share of the squared entries on the diagonal: 1 if latents only meet themselves.
    cross_block_ratio : float
        Frobenius norm between the factors over that within them: 0 if factors never meet.
    n_latents : int
        Latents of both factors.
    d_head : int
        Dimensions of the head.

    Examples
    --------
    >>> import skhead
    >>> from skhead.datasets import PayloadEmbeddings, payload_head
    >>> skhead.analyse_superposition(payload_head(PayloadEmbeddings.draw(random_state=0)))
    SuperpositionReport(closed-form: 8 latents in 16 dimensions, not superposed, diagonal share
    1.000, cross-block ratio 0.00)
    """

    head: str
    interaction: NDArray[np.float64]
    diagonal_share: float
    cross_block_ratio: float
    n_latents: int
    d_head: int

    @property
    def superposed(self) -> bool:
        """Whether there are more latents than dimensions."""
        return self.n_latents > self.d_head

    def _summary(self) -> Summary:
        return Summary(
            {
                "head": self.head,
                "latents": f"{self.n_latents} in {self.d_head} dimensions",
                "state": "superposed" if self.superposed else "not superposed",
                "diagonal share": f"{self.diagonal_share:.3f} of the squared interaction",
                "cross-block ratio": f"{self.cross_block_ratio:.3f}",
            }
        )

    def __repr__(self) -> str:
        state = "superposed" if self.superposed else "not superposed"
        return (
            f"SuperpositionReport({self.head}: {self.n_latents} latents in {self.d_head} "
            f"dimensions, {state}, diagonal share {self.diagonal_share:.3f}, cross-block ratio "
            f"{self.cross_block_ratio:.2f})"
        )


def analyse_superposition(head: PayloadHead) -> SuperpositionReport:
    """Interaction of the latents of a payload head, from its weights and true embeddings.

    Parameters
    ----------
    head : PayloadHead
        Trained or in closed form. The embeddings must be known, so this is for heads of
        ``skhead.datasets``, not for those of language models.

    Returns
    -------
    SuperpositionReport

    See Also
    --------
    skhead.datasets.load_payload_head : Heads with and without superposition.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> import skhead
    >>> from skhead.datasets import load_payload_head
    >>> report = skhead.analyse_superposition(load_payload_head("d8-r5-r5"))
    >>> report.n_latents, report.d_head, report.superposed
    (10, 8, True)
    """
    interaction = _interaction(head, head.embeddings)
    sizes = (head.embeddings.r1, head.embeddings.r2)
    return SuperpositionReport(
        head=head.name,
        interaction=interaction.numpy(),
        diagonal_share=float(diagonal_share(interaction)),
        cross_block_ratio=float(cross_block_ratio(interaction, sizes)),
        n_latents=sum(sizes),
        d_head=head.d_head,
    )


def true_logits(head: PayloadHead, task: PayloadRetrieval) -> NDArray[np.float64]:
    """What each factor truly adds to the dot products of queries and keys.

    Factor f adds ``z_f^T G_f z_f'``, with the latents of the query and the key and the block G_f
    of the interaction matrix. What the two leave of the whole dot product is where factors
    meet, payloads and noise.

    Parameters
    ----------
    head : PayloadHead
    task : PayloadRetrieval
        Sequences; directions of latents are those of ``task.embeddings``.

    Returns
    -------
    ndarray of shape (n_sequences, context, 2), float64
        Before scaling, for "z1" and "z2".

    Raises
    ------
    HeadShapeError
        If head and sequences have residual streams of different widths.

    Examples
    --------
    >>> import skhead
    >>> from skhead.datasets import load_payload_head, make_payload_retrieval
    >>> head = load_payload_head("d16-r3-r5")
    >>> task = make_payload_retrieval(embeddings=head.embeddings, random_state=0)
    >>> skhead.true_logits(head, task).shape
    (512, 16, 2)
    """
    interaction = _interaction(head, task.embeddings).numpy()
    rows, r1 = np.arange(len(task)), task.embeddings.r1
    blocks = (interaction[:r1, :r1], interaction[r1:, r1:])
    parts = []
    for latents, block in zip((task.z1, task.z2), blocks, strict=True):
        asked = latents[rows, task.i_star].astype(np.float64) @ block
        parts.append(np.einsum("nr,ncr->nc", asked, latents))
    return np.stack(parts, axis=-1)


def _interaction(head: PayloadHead, embeddings: PayloadEmbeddings) -> torch.Tensor:
    if head.embeddings.d_model != embeddings.d_model:
        raise HeadShapeError(
            f"true_logits: the head {head.name!r} reads d_model {head.embeddings.d_model} and the "
            f"sequences have {embeddings.d_model}; make them with embeddings=head.embeddings"
        )
    sides = (head.W_Q, head.W_K, embeddings.query_side, embeddings.key_side)
    return interaction_matrix(*(torch.from_numpy(np.array(side)) for side in sides))
