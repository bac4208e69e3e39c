"""Payload retrieval: sequences in which a query looks for the key that shares its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skhead._checks import check_count
from skhead._html import ShowsSummary, Summary
from skhead.datasets._payload_latents import (
    PayloadEmbeddings,
    check_draw,
    codes_of,
    distinct_codes,
    draw_latents,
    noisy,
    signs_of,
)

if TYPE_CHECKING:
    from skhead.datasets._payload_heads import PayloadHead
    from skhead.qk_pairs import QKPairs

FACTORS = ("z1", "z2")
_SIZES = {"r1": 3, "r2": 5, "n_payloads": 10, "d_model": 32}


@dataclass(frozen=True, eq=False)
class PayloadRetrieval(ShowsSummary):
    """Sequences of :func:`~skhead.datasets.make_payload_retrieval`, with all that made them.

    Attributes
    ----------
    context : ndarray of shape (n_sequences, context, d_model)
        Tokens that hold latents and a payload.
    query : ndarray of shape (n_sequences, d_model)
        Token that holds the latents of one of them.
    target : ndarray of shape (n_sequences,), int64
        Payload of that one.
    z1 : ndarray of shape (n_sequences, context, r1)
        Latents of the first factor.
    z2 : ndarray of shape (n_sequences, context, r2)
        Latents of the second factor.
    i_star : ndarray of shape (n_sequences,), int64
        Position that the query looks for.
    payloads : ndarray of shape (n_sequences, context), int64
        Payload at each position.
    embeddings : PayloadEmbeddings
        Directions of latents and payloads.
    latent : {"sign", "gaussian"}
        Law of the latents.

    Examples
    --------
    >>> from skhead.datasets import load_payload_head, make_payload_retrieval
    >>> head = load_payload_head("d16-r3-r5")
    >>> task = make_payload_retrieval(30, embeddings=head.embeddings, random_state=0)
    >>> task.pairs(head)
    QKPairs(d16-r3-r5: 30 queries, 480 keys, d_head 16, z1: ...)
    """

    context: NDArray[np.floating]
    query: NDArray[np.floating]
    target: NDArray[np.int64]
    z1: NDArray[np.floating]
    z2: NDArray[np.floating]
    i_star: NDArray[np.int64]
    payloads: NDArray[np.int64]
    embeddings: PayloadEmbeddings
    latent: str

    def __len__(self) -> int:
        return len(self.query)

    def _summary(self) -> Summary:
        return Summary(
            {
                "sequences": f"{len(self):,} of {self.context.shape[1]} context tokens",
                "d_model": f"{self.embeddings.d_model}",
                "latents": f"{self.embeddings.r1} + {self.embeddings.r2}, {self.latent}",
                "payloads": f"{self.embeddings.n_payloads}",
            }
        )

    def __repr__(self) -> str:
        return (
            f"PayloadRetrieval({len(self)} sequences of {self.context.shape[1]} tokens, "
            f"{self.latent} latents {self.embeddings.r1} + {self.embeddings.r2})"
        )

    def pairs(self, head: PayloadHead) -> QKPairs:
        """Queries and keys of a head on these sequences, labelled by both factors.

        Sign latents are labelled by their code, the binary number of which they are the digits,
        lowest first; a feature's groups are the codes of the other factor. Normal latents never
        repeat, so there is one label, the position, and only `i_star` agrees with the query; to
        contrast a single factor of them see :func:`make_contrast_pairs`.

        Parameters
        ----------
        head : PayloadHead

        Returns
        -------
        skhead.QKPairs
            A query for each sequence, with the features "z1" and "z2", or "position" alone.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> task.pairs(head).features
        ('z1', 'z2')
        """
        from skhead.qk_pairs import QKPairs

        n, length = self.payloads.shape
        groups = None
        features: tuple[str, ...] = FACTORS
        if self.latent == "sign":
            labels = np.stack([codes_of(self.z1), codes_of(self.z2)], axis=-1)
            groups = labels[..., ::-1].reshape(n * length, 2)
        else:
            labels = np.tile(np.arange(length)[:, None], (n, 1, 1))
            features = ("position",)
        return QKPairs(
            head.queries(self.query),
            head.keys(self.context).reshape(n * length, -1),
            np.repeat(np.arange(n), length),
            labels[np.arange(n), self.i_star],
            labels.reshape(n * length, -1),
            key_groups=groups,
            features=features,
            head=head.name,
            scale=head.scale,
        )


def make_payload_retrieval(
    n_sequences: int = 512,
    *,
    r1: int | None = None,
    r2: int | None = None,
    context: int = 16,
    n_payloads: int | None = None,
    d_model: int | None = None,
    noise: float = 0.01,
    latent: str = "sign",
    unique_latents: bool = False,
    embeddings: PayloadEmbeddings | None = None,
    random_state: int | np.random.Generator | None = None,
) -> PayloadRetrieval:
    """Sequences in which a query looks for the token that shares its latents.

    A context token is ``A1 z1 + A2 z2`` plus the direction of its payload, a query ``B1 z1 +
    B2 z2`` with the latents of one context token, chosen evenly, whose payload is the target.
    Noise is added to both. An attention head solves the task if its queries match keys on both
    factors, which makes the subspace of either factor known.

    Parameters
    ----------
    n_sequences : int, default=512
        Number of sequences, each with one query.
    r1 : int or None, default=None
        Number of latents of the first factor; None is that of `embeddings`, or 3 without them.
    r2 : int or None, default=None
        Number of latents of the second factor; None is that of `embeddings`, or 5.
    context : int, default=16
        Number of context tokens of a sequence.
    n_payloads : int or None, default=None
        Number of payloads; None is that of `embeddings`, or 10.
    d_model : int or None, default=None
        Width of the residual stream; None is that of `embeddings`, or 32.
    noise : float, default=0.01
        Standard deviation of the noise in every coordinate of every token.
    latent : {"sign", "gaussian"}, default="sign"
        Latents are -1 or +1, evenly, or standard normal.
    unique_latents : bool, default=False
        Whether no two tokens of a sequence share all their latents. Otherwise sign latents repeat
        now and then, and no head can tell which of the tokens is meant.
    embeddings : PayloadEmbeddings or None, default=None
        Directions of latents and payloads; if None they are drawn first.
    random_state : int, Generator or None, default=None
        Where everything random comes from.

    Returns
    -------
    PayloadRetrieval

    Raises
    ------
    ValueError
        If a size contradicts the embeddings, or there are fewer codes than tokens that must differ.

    See Also
    --------
    make_contrast_pairs : Pairs that differ in one factor only.
    payload_head : A head that solves the task.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> from skhead.datasets import make_payload_retrieval, payload_head
    >>> task = make_payload_retrieval(100, unique_latents=True, random_state=0)
    >>> task
    PayloadRetrieval(100 sequences of 16 tokens, sign latents 3 + 5)
    >>> payload_head(task.embeddings).accuracy(task)
    1.0
    """
    rng = np.random.default_rng(random_state)
    name = "make_payload_retrieval"
    check_draw(name, latent, noise)
    check_count("n_sequences", n_sequences, name)
    check_count("context", context, name)
    wanted = {"r1": r1, "r2": r2, "n_payloads": n_payloads, "d_model": d_model}
    embeddings = _embeddings(wanted, embeddings, rng)
    r1, n_latents = embeddings.r1, embeddings.r1 + embeddings.r2
    shape = (n_sequences, context)
    dtype = embeddings.payload.dtype
    if latent == "sign" and unique_latents:
        latents = signs_of(distinct_codes(shape, n_latents, rng), n_latents, dtype)
    else:
        latents = draw_latents((*shape, n_latents), latent, dtype, rng)
    payloads = rng.integers(embeddings.n_payloads, size=shape)
    i_star = rng.integers(context, size=n_sequences)
    rows = np.arange(n_sequences)
    query = latents[rows, i_star] @ embeddings.query_side.T
    return PayloadRetrieval(
        context=noisy(latents @ embeddings.key_side.T + embeddings.payload[payloads], noise, rng),
        query=noisy(query, noise, rng),
        target=payloads[rows, i_star],
        z1=latents[..., :r1],
        z2=latents[..., r1:],
        i_star=i_star,
        payloads=payloads,
        embeddings=embeddings,
        latent=latent,
    )


def make_contrast_pairs(
    factor: str,
    n_pairs: int = 40960,
    *,
    head: PayloadHead,
    embeddings: PayloadEmbeddings | None = None,
    noise: float = 0.01,
    latent: str = "sign",
    random_state: int | np.random.Generator | None = None,
) -> QKPairs:
    """Queries with two keys each, one that shares the query's factor and one that need not.

    Both keys share the latents of the other factor, drawn independently of the query's; payloads
    and noise are independent. The negative key's latents of `factor` are drawn afresh. So sign
    latents of the negative equal the query's once in ``2 ** r``; it is labelled as a negative
    nevertheless, which leaves the difference of second moments unbiased.

    Parameters
    ----------
    factor : {"z1", "z2"}
        Factor that tells the keys apart.
    n_pairs : int, default=40960
        Number of queries, each with a positive and a negative key.
    head : PayloadHead
        Head that makes queries and keys of the tokens.
    embeddings : PayloadEmbeddings or None, default=None
        Directions of latents and payloads; None are those of `head`.
    noise : float, default=0.01
        Standard deviation of the noise in every coordinate of every token.
    latent : {"sign", "gaussian"}, default="sign"
        Latents are -1 or +1, evenly, or standard normal.
    random_state : int, Generator or None, default=None
        Where everything random comes from.

    Returns
    -------
    skhead.QKPairs
        With `factor` as its one feature. Queries have the label 1; keys, which follow each other
        as positive and negative of each query, 1 and 0.

    Raises
    ------
    ValueError
        If there is no such factor or law, or `n_pairs` is not positive.

    See Also
    --------
    make_payload_retrieval : Sequences of the task.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> from skhead.datasets import PayloadEmbeddings, make_contrast_pairs, payload_head
    >>> head = payload_head(PayloadEmbeddings.draw(random_state=0))
    >>> make_contrast_pairs("z1", 1000, head=head, random_state=0)
    QKPairs(closed-form: 1000 queries, 2000 keys, d_head 16, z1: 1000 positive, 1000 negative)
    """
    from skhead.qk_pairs import QKPairs

    name = "make_contrast_pairs"
    if factor not in FACTORS:
        raise ValueError(f"{name}: factor={factor!r}; use 'z1' or 'z2'")
    check_draw(name, latent, noise)
    check_count("n_pairs", n_pairs, name)
    rng = np.random.default_rng(random_state)
    embeddings = head.embeddings if embeddings is None else embeddings
    at, dtype = FACTORS.index(factor), embeddings.payload.dtype
    ranks = (embeddings.r1, embeddings.r2)
    asked = [draw_latents((n_pairs, rank), latent, dtype, rng) for rank in ranks]
    fresh = [draw_latents((n_pairs, rank), latent, dtype, rng) for rank in ranks]
    other = fresh[1 - at]
    keys = []
    for contrasted in (asked[at], fresh[at]):
        parts = (contrasted, other) if at == 0 else (other, contrasted)
        payload = embeddings.payload[rng.integers(embeddings.n_payloads, size=n_pairs)]
        token = parts[0] @ embeddings.A1.T + parts[1] @ embeddings.A2.T + payload
        keys.append(head.keys(noisy(token, noise, rng)))
    query = noisy(asked[0] @ embeddings.B1.T + asked[1] @ embeddings.B2.T, noise, rng)
    return QKPairs(
        head.queries(query),
        np.stack(keys, axis=1).reshape(2 * n_pairs, -1),
        np.repeat(np.arange(n_pairs), 2),
        np.ones(n_pairs, dtype=np.int64),
        np.tile([1, 0], n_pairs),
        features=(factor,),
        head=head.name,
        scale=head.scale,
    )


def _embeddings(
    wanted: dict[str, int | None], embeddings: PayloadEmbeddings | None, rng: np.random.Generator
) -> PayloadEmbeddings:
    """The embeddings given, if the sizes that were asked for are theirs, or else new ones."""
    if embeddings is None:
        sizes = {k: _SIZES[k] if size is None else size for k, size in wanted.items()}
        return PayloadEmbeddings.draw(**sizes, random_state=rng)
    for size, value in wanted.items():
        own = getattr(embeddings, size)
        if value is not None and value != own:
            raise ValueError(
                f"make_payload_retrieval: {size}={value}, and the embeddings have {size}={own}; "
                f"leave {size} out, or draw other embeddings"
            )
    return embeddings
