"""Queries, keys and attention scores of layers while a model runs.

Bridges do not agree on what their hooks of one name show: of some architectures the queries
before their rotation, of some the scores after the softmax. All compute attention from a product of
queries and keys, its softmax, and a product of that with the values; this is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from skhead.exceptions import UnsupportedLayoutError

__all__ = ["Rows", "Scores", "Visit", "run_watched", "tolerance"]

_PRODUCTS = ("matmul", "__matmul__", "bmm")
_LEAST_TOLERANCE = 1e-4
_STACK = 4


@dataclass(frozen=True)
class Rows:
    """What one head computes for one query of every prompt.

    Attributes
    ----------
    queries : Tensor of shape (n, d_head)
    keys : Tensor of shape (n, length, d_head)
    scores : Tensor of shape (n, length)
        As the softmax takes them.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor

    @property
    def visible(self) -> torch.Tensor:
        """Whether the query may attend to each position, ``(n, length)``."""
        return self.scores > torch.finfo(self.scores.dtype).min / 2

    def check(self, scale: float, label: str, model: str, caller: str) -> None:
        """Refuse scores that are anything but queries times keys times a number.

        Parameters
        ----------
        scale : float
        label, model, caller : str
            What to name in errors.

        Raises
        ------
        ValueError
            If queries or keys are not finite.
        UnsupportedLayoutError
            If the scores are another function of them.
        """
        for name, values in (("queries", self.queries), ("keys", self.keys)):
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"{caller}: {name} of {label} hold NaN or infinite values; the model's "
                    "activations overflow"
                )
        products = torch.einsum("nd,nkd->nk", self.queries.double(), self.keys.double())
        found = self.scores.double()[self.visible]
        error = (scale * products[self.visible] - found).abs().max()
        if not error <= tolerance(self.scores.dtype) * max(1.0, float(found.abs().max())):
            raise UnsupportedLayoutError(
                f"{caller}: attention scores of {label} ({model}) differ by up to {error:.2g} from "
                f"{scale:.4g} times query times key: the model adds a bias of positions to them "
                "(ALiBi, relative positions) or caps them, so that they do not come from queries "
                "and keys alone"
            )


@dataclass(frozen=True)
class Scores:
    """What all heads of a layer compute on a batch.

    Attributes
    ----------
    queries : Tensor of shape (n, n_heads, length, d_head)
    keys : Tensor of shape (n, n_heads, length, d_head)
        Those of grouped heads are there for each of them.
    scores : Tensor of shape (n, n_heads, length, length)
        As the softmax takes them: with a mask, behind the query.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor

    def rows(self, head: int, positions: torch.Tensor) -> Rows:
        """What a head computes for the query at one position of every prompt.

        Parameters
        ----------
        head : int
        positions : Tensor of shape (n,), int64
        """
        each = torch.arange(len(positions), device=positions.device)
        return Rows(
            self.queries[each, head, positions],
            self.keys[:, head],
            self.scores[each, head, positions],
        )

    def scale(self, head: int) -> float:
        """The number that comes closest to scores over products of queries and keys.

        It is ``1 / sqrt(d_head)`` or 1 exactly where it is so up to rounding, and the former where
        all products are 0.

        Parameters
        ----------
        head : int
        """
        usual = (float(self.queries.shape[-1]) ** -0.5, 1.0)
        scores = self.scores[:, head]
        visible = scores > torch.finfo(scores.dtype).min / 2
        products = self.queries[:, head].double() @ self.keys[:, head].double().mT
        products, found = products[visible], scores.double()[visible]
        size = products @ products
        if size == 0:
            return usual[0]
        scale = float(products @ found / size)
        near = [value for value in usual if abs(scale - value) <= tolerance(scores.dtype) * value]
        return near[0] if near else scale


#: Looks at a layer, and returns the scores to go on with, or None to leave them.
Visit = Callable[[Scores], torch.Tensor | None]


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute scores may differ, relative to the largest of them."""
    return max(_LEAST_TOLERANCE, 4 * torch.finfo(dtype).eps)


def run_watched(
    bridge: Any, tokens: torch.Tensor, visits: Mapping[int, Visit], caller: str, *, logits: bool
) -> torch.Tensor | None:
    """Run a model, and look at or write the attention scores of some of its layers.

    Parameters
    ----------
    bridge : TransformerBridge
    tokens : Tensor of shape (n, length), int64
    visits : mapping of int to Visit
        By layer.
    caller : str
        The function to name in errors.
    logits : bool
        Whether to run to the end, rather than to the last layer that is visited.

    Returns
    -------
    Tensor of shape (n, n_vocab), or None
        Logits at the last position.

    Raises
    ------
    UnsupportedLayoutError
        If a layer computes attention in another way, or does not read the values with what its
        softmax gives.
    """
    watch = _Watch(bridge, tokens.shape, visits, caller)
    handles = watch.attach(visits)
    try:
        with watch:
            if logits:
                return bridge.run_with_hooks(tokens, return_type="logits")[:, -1]
            bridge.run_with_hooks(tokens, return_type=None, stop_at_layer=max(visits) + 1)
    finally:
        for handle in handles:
            handle.remove()
    return None


class _Watch(TorchFunctionMode):
    """Sees products and softmaxes inside of the attention of some layers."""

    def __init__(
        self, bridge: Any, shape: torch.Size, visits: Mapping[int, Visit], caller: str
    ) -> None:
        super().__init__()
        self._bridge = bridge
        self._batch, self._length = shape
        self._visits = visits
        self._caller = caller
        self._layer: int | None = None
        self._product: tuple[Any, ...] = ()
        self._pattern: torch.Tensor | None = None
        self._read = False

    def attach(self, layers: Iterable[int]) -> list[Any]:
        """Watch these layers until the handles are removed."""
        handles = []
        for layer in layers:
            attention = self._bridge.blocks[layer].attn
            handles += [
                attention.register_forward_pre_hook(lambda *_, layer=layer: self._enter(layer)),
                attention.register_forward_hook(lambda *_: self._leave()),
            ]
        return handles

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._layer is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "softmax" and args and self._pattern is None:
            scores = self._visited(args[0])
            self._pattern = func(scores, *args[1:], **kwargs)
            return self._pattern
        if name in _PRODUCTS:
            if self._pattern is None:
                self._product = args
            elif not self._read:
                self._check_read(args[0])
        return func(*args, **kwargs)

    def _enter(self, layer: int) -> None:
        self._layer, self._product, self._pattern, self._read = layer, (), None, False

    def _leave(self) -> None:
        if not self._read:
            raise self._refusal(
                "shows no softmax of attention scores (run it with eager attention)"
            )
        self._layer = None

    def _visited(self, scores: torch.Tensor) -> torch.Tensor:
        assert self._layer is not None
        written = self._visits[self._layer](self._scores(scores))
        return scores if written is None else written

    def _scores(self, scores: torch.Tensor) -> Scores:
        stacks = [*self._product, scores]
        if len(stacks) != 3 or any(stack.ndim != _STACK for stack in stacks):
            raise self._refusal(
                "takes the softmax of what is no product of queries and keys alone, as where a "
                "bias of positions (ALiBi) is part of it"
            )
        queries, keys = stacks[0], stacks[1].mT.expand(-1, stacks[0].shape[1], -1, -1)
        square = (self._batch, queries.shape[1], self._length, self._length)
        if scores.shape != square or keys.shape != queries.shape or keys.shape[:3] != square[:3]:
            raise self._refusal("has queries or keys beside those of the tokens")
        return Scores(queries, keys, scores)

    def _check_read(self, left: torch.Tensor) -> None:
        """Refuse attention that the softmax does not decide: scores would be written in vain."""
        pattern = self._pattern
        assert pattern is not None
        if left.numel() != pattern.numel() or not torch.equal(
            left.reshape(pattern.shape), pattern.to(left.dtype)
        ):
            raise self._refusal("does not weigh its values with the softmax of its scores")
        self._read = True

    def _refusal(self, what: str) -> UnsupportedLayoutError:
        model = self._bridge.cfg.architecture
        return UnsupportedLayoutError(
            f"{self._caller}: the attention of layer {self._layer} of the model ({model}) {what}"
        )
