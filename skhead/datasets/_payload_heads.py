"""Heads that retrieve payloads: one in closed form, and trained ones that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from skhead._html import Listing, ShowsSummary, Summary
from skhead.datasets._payload_latents import EMBEDDINGS, PayloadEmbeddings
from skhead.exceptions import HeadShapeError, SourceNotFoundError

if TYPE_CHECKING:
    from skhead.datasets._payload import PayloadRetrieval

WEIGHTS = ("W_Q", "W_K", "W_V", "W_out")


@dataclass(frozen=True, eq=False)
class PayloadHead(ShowsSummary):
    """Attention head that reads a query and its context, and names a payload.

    It has no biases, norms, positions or residual: attention is the softmax over the context of
    ``scale * (query @ W_Q) @ (token @ W_K)``, and the logits of the payloads are the attended
    ``token @ W_V`` times `W_out`.

    Parameters
    ----------
    W_Q, W_K, W_V : array of shape (d_model, d_head)
        What makes queries, keys and values of tokens.
    W_out : array of shape (d_head, n_payloads)
        What makes logits of an attended value.
    embeddings : PayloadEmbeddings
        Directions of latents and payloads that the head is made for.
    name : str, default="head"
        Label of the head.

    Attributes
    ----------
    W_Q, W_K, W_V : ndarray of shape (d_model, d_head)
    W_out : ndarray of shape (d_head, n_payloads)
    embeddings : PayloadEmbeddings
    name : str

    Raises
    ------
    HeadShapeError
        If the shapes of weights and embeddings do not fit together.

    See Also
    --------
    payload_head : A head in closed form.
    load_payload_head : A trained head.

    Examples
    --------
    >>> from skhead.datasets import load_payload_head, make_payload_retrieval
    >>> head = load_payload_head("d16-r3-r5")
    >>> task = make_payload_retrieval(embeddings=head.embeddings, random_state=0)
    >>> head.attention(task).shape
    (512, 16)
    """

    W_Q: NDArray[np.floating]
    W_K: NDArray[np.floating]
    W_V: NDArray[np.floating]
    W_out: NDArray[np.floating]
    embeddings: PayloadEmbeddings
    name: str = "head"

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        read = (self.embeddings.d_model, self.d_head)
        wanted = dict.fromkeys(WEIGHTS[:3], read) | {
            "W_out": (self.d_head, self.embeddings.n_payloads)
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise HeadShapeError(
                    f"PayloadHead {self.name!r}: {name} must have shape {shape}, by the embeddings "
                    f"and the columns of W_Q; got {found}"
                )

    @property
    def d_head(self) -> int:
        """Width of queries, keys and values."""
        return int(self.W_Q.shape[-1])

    @property
    def scale(self) -> float:
        """What dot products are multiplied with, ``1 / sqrt(d_head)``."""
        return float(self.d_head**-0.5)

    def _summary(self) -> Summary:
        shapes = pd.DataFrame(
            [
                {"weights": name, "shape": " × ".join(map(str, getattr(self, name).shape))}
                for name in WEIGHTS
            ]
        )
        facts = {
            "name": self.name,
            "d_head": f"{self.d_head}",
            "latents": f"{self.embeddings.r1} + {self.embeddings.r2}",
        }
        return Summary(facts, [Listing("weights", shapes)])

    def __repr__(self) -> str:
        return (
            f"PayloadHead({self.name}: d_head {self.d_head}, latents {self.embeddings.r1} + "
            f"{self.embeddings.r2})"
        )

    def _tokens(self, x: ArrayLike) -> NDArray[np.floating]:
        tokens = np.asarray(x)
        if tokens.shape[-1:] != (self.embeddings.d_model,):
            raise HeadShapeError(
                f"PayloadHead {self.name!r}: reads tokens of d_model {self.embeddings.d_model}, "
                f"got shape {tokens.shape}; make them with the embeddings of the head"
            )
        return tokens

    def queries(self, x: ArrayLike) -> NDArray[np.floating]:
        """Queries of tokens.

        Parameters
        ----------
        x : array of shape (..., d_model)

        Returns
        -------
        ndarray of shape (..., d_head)

        Raises
        ------
        HeadShapeError
            If tokens have another width than the head reads.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> head.queries(task.query).shape
        (500, 16)
        """
        return self._tokens(x) @ self.W_Q

    def keys(self, x: ArrayLike) -> NDArray[np.floating]:
        """Keys of tokens.

        Parameters
        ----------
        x : array of shape (..., d_model)

        Returns
        -------
        ndarray of shape (..., d_head)

        Raises
        ------
        HeadShapeError
            If tokens have another width than the head reads.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> head.keys(task.context).shape
        (500, 16, 16)
        """
        return self._tokens(x) @ self.W_K

    def attention(self, task: PayloadRetrieval) -> NDArray[np.floating]:
        """Attention of each query to the tokens of its context.

        Parameters
        ----------
        task : PayloadRetrieval

        Returns
        -------
        ndarray of shape (n_sequences, context)
            Rows sum to one.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> import numpy as np
        >>> bool(np.allclose(head.attention(task).sum(axis=1), 1))
        True
        """
        keys, queries = self.keys(task.context), self.queries(task.query)
        attention: NDArray[np.floating] = softmax(
            self.scale * np.einsum("nd,ncd->nc", queries, keys), axis=-1
        )
        return attention

    def predict(self, task: PayloadRetrieval) -> NDArray[np.int64]:
        """Payload that the head names.

        Parameters
        ----------
        task : PayloadRetrieval

        Returns
        -------
        ndarray of shape (n_sequences,), int64

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> head.predict(task).shape
        (500,)
        """
        attended = np.einsum("nc,ncd->nd", self.attention(task), task.context)
        logits = attended @ self.W_V @ self.W_out
        return np.asarray(logits.argmax(axis=-1), dtype=np.int64)

    def accuracy(self, task: PayloadRetrieval) -> float:
        """Share of sequences of which the head names the payload.

        Parameters
        ----------
        task : PayloadRetrieval

        Returns
        -------
        float

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> head.accuracy(task) > 0.9
        True
        """
        return float(np.mean(self.predict(task) == task.target))


def payload_head(
    embeddings: PayloadEmbeddings, d_head: int = 16, sharpness: float = 5.5
) -> PayloadHead:
    """Head that solves payload retrieval, in closed form.

    Its queries and keys are the latents themselves, behind pseudo-inverses of the embeddings, and
    its keys are blind to payloads. So the interaction matrix of latents is `sharpness` times the
    identity, and ``W_Q^T B_f A_f^T W_K`` has exactly the rank of factor f.

    Parameters
    ----------
    embeddings : PayloadEmbeddings
        Directions of latents and payloads, linearly independent.
    d_head : int, default=16
        Width of queries, keys and values; no fewer than there are latents.
    sharpness : float, default=5.5
        Dot product, before scaling, that one agreeing sign latent adds.

    Returns
    -------
    PayloadHead

    Raises
    ------
    HeadShapeError
        If the head has fewer dimensions than there are latents, or the residual stream fewer than
        there are latents and payloads.

    Examples
    --------
    >>> from skhead.datasets import PayloadEmbeddings, payload_head
    >>> payload_head(PayloadEmbeddings.draw(3, 5, random_state=0), d_head=8)
    PayloadHead(closed-form: d_head 8, latents 3 + 5)
    """
    n_latents = embeddings.r1 + embeddings.r2
    n_payloads, d_model = embeddings.n_payloads, embeddings.d_model
    if n_latents > d_head:
        raise HeadShapeError(
            f"payload_head: d_head={d_head} dimensions cannot hold r1 + r2 = {n_latents} latents "
            "without mixing them, so there is no closed form; raise d_head, or use a trained head "
            "of load_payload_head"
        )
    if n_latents + n_payloads > d_model:
        raise HeadShapeError(
            f"payload_head: d_model={d_model} dimensions cannot tell {n_latents} latents and "
            f"{n_payloads} payloads apart; draw embeddings with d_model of "
            f"{n_latents + n_payloads} or more"
        )
    read_query = np.linalg.pinv(embeddings.query_side.astype(np.float64)).T
    known = np.hstack([embeddings.key_side, embeddings.payload.T]).astype(np.float64)
    read_token = np.linalg.pinv(known).T
    code = _payload_code(n_payloads, d_head)
    weights = {
        "W_Q": _padded(sharpness * read_query, d_head),
        "W_K": _padded(read_token[:, :n_latents], d_head),
        "W_V": read_token[:, n_latents:] @ code,
        "W_out": code.T,
    }
    dtype = embeddings.payload.dtype
    return PayloadHead(
        **{name: value.astype(dtype) for name, value in weights.items()},
        embeddings=embeddings,
        name="closed-form",
    )


def _padded(matrix: NDArray[np.floating], width: int) -> NDArray[np.floating]:
    return np.pad(matrix, ((0, 0), (0, width - matrix.shape[1])))


def _payload_code(n_payloads: int, d_head: int) -> NDArray[np.floating]:
    """Unit vectors, one for each payload, at equal distances or else spread over harmonics."""
    if n_payloads <= d_head:
        return np.eye(n_payloads, d_head)
    n_waves = d_head // 2
    angles = 2 * np.pi / n_payloads * np.outer(np.arange(n_payloads), 1 + np.arange(n_waves))
    waves = np.hstack([np.cos(angles), np.sin(angles)]) * n_waves**-0.5
    return _padded(waves, d_head)


def list_payload_heads() -> list[str]:
    """Names of the trained heads that come with the package.

    Returns
    -------
    list of str
        Sources for :func:`load_payload_head`. ``"d16-r3-r5"`` has 16 dimensions and was trained
        on factors of 3 and 5 sign latents; the latents of those that say so are normal.

    Examples
    --------
    >>> from skhead.datasets import list_payload_heads
    >>> "d8-r5-r5" in list_payload_heads()
    True
    """
    return list(_card()["heads"])


def load_payload_head(name: str) -> PayloadHead:
    """Trained head for payload retrieval, with the embeddings that it was trained on.

    Parameters
    ----------
    name : str
        One of :func:`list_payload_heads`.

    Returns
    -------
    PayloadHead
        Of float32.

    Raises
    ------
    SourceNotFoundError
        If no head has this name.

    See Also
    --------
    load_payload_card : How it was trained, and what was measured.

    Examples
    --------
    >>> from skhead.datasets import load_payload_head
    >>> load_payload_head("d8-r5-r5")
    PayloadHead(d8-r5-r5: d_head 8, latents 5 + 5)
    """
    _known(name)
    return read_payload_head(payload_directory() / f"{name}.npz")


def load_payload_card(name: str) -> dict[str, Any]:
    """Card of a trained head: how it was trained and what was measured.

    Parameters
    ----------
    name : str
        One of :func:`list_payload_heads`.

    Returns
    -------
    dict
        Among others ``latent``, ``training``, ``accuracy`` on sequences that training never used,
        mean ``attention`` to the position that is looked for, ``ranks``, ``spectra``, ``swaps``,
        and ``diagonal_share`` and ``cross_block_ratio`` of the interaction matrix.

    Raises
    ------
    SourceNotFoundError
        If no head has this name.

    Examples
    --------
    >>> from skhead.datasets import load_payload_card
    >>> load_payload_card("d16-r3-r5")["accuracy"] > 0.96
    True
    """
    _known(name)
    card = _card()
    heads = card.pop("heads")
    return {"name": name, **card, **heads[name]}


def read_payload_head(file: Path) -> PayloadHead:
    """Head of a file of arrays, named as the file is."""
    with np.load(file, allow_pickle=False) as stored:
        embeddings = PayloadEmbeddings(**{key: stored[key] for key in EMBEDDINGS})
        weights = {key: stored[key] for key in WEIGHTS}
    return PayloadHead(**weights, embeddings=embeddings, name=file.stem)


def payload_directory() -> Path:
    """Directory of the trained heads and their card."""
    return Path(str(files("skhead.datasets").joinpath("models", "payload")))


def _known(name: str) -> None:
    known = list_payload_heads()
    if name not in known:
        raise SourceNotFoundError(
            f"no bundled payload head is named {name!r}; there are {', '.join(known)}"
        )


def _card() -> dict[str, Any]:
    card: dict[str, Any] = json.loads((payload_directory() / "card.json").read_text("utf-8"))
    return card
