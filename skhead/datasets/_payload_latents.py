"""Latents of payload retrieval: their laws, their codes, and their directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead._checks import check_count
from skhead._html import ShowsSummary, Summary
from skhead.exceptions import HeadShapeError

EMBEDDINGS = ("A1", "A2", "B1", "B2", "payload")
_LATENTS = ("sign", "gaussian")
#: Codes of latents are int64.
_MOST_BITS = 62


@dataclass(frozen=True, eq=False)
class PayloadEmbeddings(ShowsSummary):
    """Directions that latents and payloads have in the residual stream.

    Parameters
    ----------
    A1 : array of shape (d_model, r1)
        Where the latents of the first factor stand in a context token.
    A2 : array of shape (d_model, r2)
        The same for the second factor.
    B1 : array of shape (d_model, r1)
        Where the latents of the first factor stand in a query.
    B2 : array of shape (d_model, r2)
        The same for the second factor.
    payload : array of shape (n_payloads, d_model)
        What each payload adds to a context token.

    Attributes
    ----------
    A1, B1 : ndarray of shape (d_model, r1), float32 or float64
    A2, B2 : ndarray of shape (d_model, r2), float32 or float64
    payload : ndarray of shape (n_payloads, d_model), float32 or float64

    Raises
    ------
    HeadShapeError
        If the shapes do not fit together.

    See Also
    --------
    make_payload_retrieval : Sequences made with them.

    Examples
    --------
    >>> from skhead.datasets import PayloadEmbeddings
    >>> embeddings = PayloadEmbeddings.draw(2, 3, n_payloads=4, d_model=16, random_state=0)
    >>> embeddings.query_side.shape, embeddings.payload.shape
    ((16, 5), (4, 16))
    """

    A1: NDArray[np.floating]
    A2: NDArray[np.floating]
    B1: NDArray[np.floating]
    B2: NDArray[np.floating]
    payload: NDArray[np.floating]

    def __post_init__(self) -> None:
        single = all(np.asarray(getattr(self, name)).dtype == np.float32 for name in EMBEDDINGS)
        for name in EMBEDDINGS:
            value = np.asarray(getattr(self, name), dtype=np.float32 if single else np.float64)
            if value.ndim != 2 or 0 in value.shape:
                raise HeadShapeError(
                    f"PayloadEmbeddings: {name} must be a matrix, got shape {value.shape}"
                )
            object.__setattr__(self, name, value)
        shapes = {name: getattr(self, name).shape for name in EMBEDDINGS}
        widths = {shape[0] for name, shape in shapes.items() if name != "payload"}
        if widths != {self.d_model} or shapes["A1"] != shapes["B1"] or shapes["A2"] != shapes["B2"]:
            raise HeadShapeError(
                "PayloadEmbeddings: A1 and B1 must both be (d_model, r1), A2 and B2 (d_model, r2) "
                "and payload (n_payloads, d_model); got "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )
        if self.r1 + self.r2 > _MOST_BITS:
            raise HeadShapeError(
                f"PayloadEmbeddings: r1 + r2 = {self.r1 + self.r2} latents; use {_MOST_BITS} at "
                "most, as their codes are 64-bit integers"
            )

    @classmethod
    def draw(
        cls,
        r1: int = 3,
        r2: int = 5,
        n_payloads: int = 10,
        d_model: int = 32,
        random_state: int | np.random.Generator | None = None,
    ) -> PayloadEmbeddings:
        """Gaussian directions, so that each token has about the norm ``sqrt(2 d_model)``.

        Parameters
        ----------
        r1 : int, default=3
            Number of latents of the first factor.
        r2 : int, default=5
            Number of latents of the second factor.
        n_payloads : int, default=10
            Number of payloads.
        d_model : int, default=32
            Width of the residual stream.
        random_state : int, Generator or None, default=None
            Where the directions come from.

        Returns
        -------
        PayloadEmbeddings
            Of float64; entries have variance ``1 / r`` for latents and ``1 / d_model`` for
            payloads.

        Raises
        ------
        ValueError
            If a size is not positive.
        """
        sizes = {"r1": r1, "r2": r2, "n_payloads": n_payloads, "d_model": d_model}
        for name, size in sizes.items():
            check_count(name, size, "PayloadEmbeddings.draw")
        rng = np.random.default_rng(random_state)
        first, second = (d_model, r1), (d_model, r2)
        return cls(
            A1=rng.standard_normal(first) * r1**-0.5,
            A2=rng.standard_normal(second) * r2**-0.5,
            B1=rng.standard_normal(first) * r1**-0.5,
            B2=rng.standard_normal(second) * r2**-0.5,
            payload=rng.standard_normal((n_payloads, d_model)) * d_model**-0.5,
        )

    @property
    def r1(self) -> int:
        """Number of latents of the first factor."""
        return int(self.A1.shape[1])

    @property
    def r2(self) -> int:
        """Number of latents of the second factor."""
        return int(self.A2.shape[1])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.payload.shape[1])

    @property
    def n_payloads(self) -> int:
        """Number of payloads."""
        return len(self.payload)

    @property
    def query_side(self) -> NDArray[np.floating]:
        """``[B1 B2]``, of shape (d_model, r1 + r2)."""
        return np.hstack([self.B1, self.B2])

    def _summary(self) -> Summary:
        return Summary(
            {
                "d_model": f"{self.d_model}",
                "latents": f"{self.r1} + {self.r2}",
                "payloads": f"{self.n_payloads}",
                "number format": str(self.payload.dtype),
            }
        )

    def __repr__(self) -> str:
        return (
            f"PayloadEmbeddings(d_model {self.d_model}, latents {self.r1} + {self.r2}, "
            f"{self.n_payloads} payloads)"
        )

    @property
    def key_side(self) -> NDArray[np.floating]:
        """``[A1 A2]``, of shape (d_model, r1 + r2)."""
        return np.hstack([self.A1, self.A2])


def check_draw(function: str, latent: str, noise: float) -> None:
    """Refuse a law that there is not, and noise that is no standard deviation."""
    if latent not in _LATENTS:
        raise ValueError(f"{function}: latent={latent!r}; use 'sign' or 'gaussian'")
    if not 0 <= noise < np.inf:
        raise ValueError(f"{function}: noise={noise!r}; it is a standard deviation, 0 or more")


def draw_latents(
    shape: tuple[int, ...], latent: str, dtype: Any, rng: np.random.Generator
) -> NDArray[np.floating]:
    """Signs or normal numbers."""
    if latent == "gaussian":
        return rng.standard_normal(shape, dtype=dtype)
    return (2 * rng.integers(2, size=shape, dtype=np.int8) - 1).astype(dtype)


def noisy(values: NDArray[Any], noise: float, rng: np.random.Generator) -> NDArray[Any]:
    """The values plus normal noise."""
    drawn: NDArray[Any] = rng.standard_normal(values.shape, dtype=values.dtype)
    return values + values.dtype.type(noise) * drawn


def codes_of(latents: ArrayLike) -> NDArray[np.int64]:
    """Number of which the signs along the last axis are the binary digits, lowest first."""
    digits = np.asarray(latents) > 0
    return digits @ (1 << np.arange(digits.shape[-1], dtype=np.int64))


def signs_of(numbers: NDArray[np.int64], n_bits: int, dtype: Any) -> NDArray[np.floating]:
    """Signs that :func:`codes_of` encodes."""
    digits = (numbers[..., None] >> np.arange(n_bits)) & 1
    return (2 * digits - 1).astype(dtype)


def distinct_codes(
    shape: tuple[int, int], n_bits: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Codes of which no two in a row are equal; each set of them is equally likely (Floyd)."""
    n_rows, length = shape
    n_codes = 1 << n_bits
    if length > n_codes:
        raise ValueError(
            f"make_payload_retrieval: context={length} tokens cannot all differ, as r1 + r2 = "
            f"{n_bits} sign latents have {n_codes} codes; use a shorter context, more latents, or "
            "unique_latents=False"
        )
    codes = np.empty(shape, dtype=np.int64)
    for column, last in enumerate(range(n_codes - length, n_codes)):
        drawn = rng.integers(last + 1, size=n_rows)
        taken = (codes[:, :column] == drawn[:, None]).any(axis=1)
        codes[:, column] = np.where(taken, last, drawn)
    return rng.permuted(codes, axis=1)
