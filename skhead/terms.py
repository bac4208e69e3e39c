"""How much of a model's loss its direct path, its heads and its virtual heads account for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from skhead._html import SHOWN, Listing, ShowsSummary, Summary
from skhead.exceptions import UnsupportedLayoutError
from skhead.weights.running import attention_layers, evaluating, open_bridge, token_batches

__all__ = ["TermImportance", "term_importance"]

_CALLER = "term_importance"
#: Numbers that what is stored of one batch may have (float32, 256 MiB).
_STORED = 1 << 26
_TOLERANCE = 1e-4

Hook = Callable[..., torch.Tensor | None]
Activations = dict[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TermImportance(ShowsSummary):
    """Losses in nats per predicted token, by the longest path through heads that is kept.

    Attributes
    ----------
    loss : float
        Mean next-token cross-entropy of the model as it is.
    order_losses : ndarray of shape (n_attention_layers + 1,), float64
        Loss with paths through at most 0, 1, 2, ... heads; the last one is the model's loss.
    uniform_loss : float
        Loss of a guess that gives every token the same probability.
    heads : Series or None
        For every head, the change of the first-order loss that it brings: the loss with every
        head's direct contribution, less that with every head's but its own. Negative lowers the
        loss. None if it was not asked for.
    n_predictions : int
        Tokens that were predicted.

    See Also
    --------
    term_importance : Makes it.

    Examples
    --------
    >>> import numpy as np
    >>> import skhead
    >>> tokens = np.tile(np.arange(20), (2, 2))
    >>> terms = skhead.term_importance("skhead/induction-2l", tokens)
    >>> terms.order_losses.shape, terms.n_predictions
    ((3,), 78)
    """

    loss: float
    order_losses: NDArray[np.float64]
    uniform_loss: float
    heads: pd.Series | None
    n_predictions: int

    @property
    def direct_path(self) -> float:
        """Change of the loss, against a uniform guess, that the path without heads brings."""
        return float(self.order_losses[0] - self.uniform_loss)

    @property
    def individual_heads(self) -> float:
        """Change of the loss that paths through one head bring."""
        return float(self.order_losses[1] - self.order_losses[0])

    @property
    def virtual_heads(self) -> float:
        """Change of the loss that paths through two heads bring; 0 where one layer attends."""
        if len(self.order_losses) < 3:
            return 0.0
        return float(self.order_losses[2] - self.order_losses[1])

    def to_frame(self) -> pd.DataFrame:
        """Every term as a row: the loss up to it, and the change that it brings, in nats.

        Returns
        -------
        DataFrame
            Index ``term``, columns ``order`` (heads on the path, -1 for the uniform guess),
            ``loss`` and ``effect``. The effects add up to the model's loss.

        Examples
        --------
        >>> import numpy as np
        >>> import pandas as pd
        >>> import skhead
        >>> terms = skhead.TermImportance(1.5, np.array([3.0, 2.0, 1.5]), 4.0, None, 78)
        >>> terms.to_frame()["effect"].to_dict()
        {'uniform guess': 4.0, 'direct path': -1.0, 'individual heads': -1.0, 'virtual heads': -0.5}
        """
        names = ["uniform guess", "direct path", "individual heads", "virtual heads"]
        n_orders = len(self.order_losses)
        names += [f"paths through {order} heads" for order in range(3, n_orders)]
        losses = np.concatenate([[self.uniform_loss], self.order_losses])
        return pd.DataFrame(
            {
                "order": np.arange(-1, n_orders),
                "loss": losses,
                "effect": np.diff(losses, prepend=0.0),
            },
            index=pd.Index(names[: n_orders + 1], name="term"),
        )

    def _summary(self) -> Summary:
        facts = {
            "loss": f"{self.loss:.4f} nats per predicted token",
            "predicted tokens": f"{self.n_predictions:,}",
        }
        terms = self.to_frame().reset_index().drop(columns="order")
        listings = [Listing("loss up to each term, in nats", terms)]
        if self.heads is not None:
            largest = self.heads.sort_values(key=np.abs, ascending=False).head(SHOWN)
            frame = pd.DataFrame({"head": largest.index, "change of the loss": largest.to_numpy()})
            listings.append(Listing("heads of largest direct contribution, in nats", frame))
        return Summary(facts, listings)

    def __repr__(self) -> str:
        terms = [
            f"{name} {value:+.3f}" for name, value in self.to_frame()["effect"].iloc[1:].items()
        ]
        return (
            f"TermImportance(loss {self.loss:.3f} nats over {self.n_predictions} tokens: uniform "
            f"guess {self.uniform_loss:.3f}, {', '.join(terms)})"
        )


def term_importance(model: Any, tokens: Any, *, individual: bool = True) -> TermImportance:
    """Split a model's loss into what its direct path, its heads and its virtual heads account for.

    The model runs once, and its attention patterns are stored. Then it runs with these patterns
    frozen and every head's output replaced: at order 0 by nothing, at order n by what the head
    wrote when it ran at order n - 1. So at order n a token reaches the prediction through at most n
    heads, and the loss falls by what composition through n heads adds. With as many orders as
    layers the model is itself again. Attention patterns are those of the whole model throughout:
    what composition does for queries and keys counts for the head whose pattern it makes.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        A causal language model; what `skhead.weights.running.open_bridge` opens.
    tokens : array of shape (n_sequences, length), or list of sequences of token ids
        Of any lengths of at least 2.
    individual : bool, default=True
        Measure every head on its own as well, which takes one more run per head.

    Returns
    -------
    TermImportance

    Raises
    ------
    TypeError
        If `tokens` are not integers.
    ValueError
        If a sequence does not fit the model, or the losses are not finite.
    UnsupportedLayoutError
        If the model attends to later tokens, so that next tokens cannot be predicted, if its
        heads write anything but their pattern times their values, or if its bridge does not let
        the outputs of heads be replaced.

    Notes
    -----
    MLPs and norms act at every order on the stream that is there: in a model that has them the
    direct path means everything that is computed without moving information between positions,
    output biases of the attention layers included, and the orders count heads on a path whatever
    lies between them. The value biases of a head belong to the head. The effects of single heads do
    not add up to that of all individual heads, because the loss is not linear.

    References
    ----------
    .. [1] N. Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer
       Circuits Thread, 2021, section on term importance analysis.

    Examples
    --------
    >>> import numpy as np
    >>> import skhead
    >>> block = np.random.default_rng(0).permuted(np.tile(np.arange(64), (8, 1)), axis=1)[:, :30]
    >>> tokens = np.concatenate([np.full((8, 1), 64), block, block], axis=1)
    >>> terms = skhead.term_importance("skhead/induction-2l", tokens)
    >>> terms.to_frame().index.tolist()
    ['uniform guess', 'direct path', 'individual heads', 'virtual heads']
    >>> bool(abs(terms.to_frame()["effect"].sum() - terms.loss) < 1e-5)
    True
    >>> terms.heads.idxmin()
    'L1H1'
    """
    bridge = open_bridge(model)
    layers = attention_layers(bridge, _CALLER)
    batches = _batches(bridge, tokens, len(layers))
    with evaluating(bridge):
        _Frozen(bridge, layers, batches[0][:1]).check_replaceable()
        total = _Sums()
        for batch in batches:
            total.add(_Frozen(bridge, layers, batch).sums(individual))
    means = {name: value / total.n_predictions for name, value in total.losses.items()}
    orders = np.array([means["order", order] for order in range(len(layers) + 1)])
    own = means["model", 0]
    heads = None
    if individual:
        rows = {f"L{k[1]}H{k[2]}": orders[1] - v for k, v in means.items() if k[0] == "head"}
        heads = pd.Series(rows, name="effect", dtype=np.float64)
    uniform = math.log(bridge.cfg.d_vocab)
    return TermImportance(own, orders, uniform, heads, total.n_predictions)


def _batches(bridge: Any, tokens: Any, n_layers: int) -> list[torch.Tensor]:
    """Batches of which the patterns of all layers, and the logits, fit into memory at once."""
    return token_batches(bridge, tokens, _CALLER, least=2, numbers=_STORED // n_layers)


@dataclass
class _Sums:
    """Summed losses by what was left of the model."""

    losses: dict[Any, float] = field(default_factory=dict)
    n_predictions: int = 0

    def add(self, other: _Sums) -> None:
        for name, value in other.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.n_predictions += other.n_predictions


class _Frozen:
    """One batch with the attention patterns of the whole model."""

    def __init__(self, bridge: Any, layers: list[int], tokens: torch.Tensor) -> None:
        self._bridge = bridge
        self._layers = layers
        self._tokens = tokens.to(bridge.cfg.device)
        self._patterns: Activations = {}
        self._own_loss = self._run_and_keep()

    def sums(self, individual: bool) -> _Sums:
        """The loss of the model, of every order and, if asked for, without each head."""
        losses: dict[Any, float] = {("model", 0): self._own_loss}
        losses["order", 0], first = self._replaced({})
        outputs = first
        for order in range(1, len(self._layers) + 1):
            losses["order", order], outputs = self._replaced(outputs)
        if individual:
            for layer in self._layers:
                for head in range(first[layer].shape[2]):
                    left = first[layer].clone()
                    left[:, :, head] = 0
                    losses["head", layer, head], _ = self._replaced(first | {layer: left})
        return _Sums(losses, self._tokens[:, 1:].numel())

    def check_replaceable(self) -> None:
        """Refuse a bridge whose hooks show what heads write but do not change it.

        Without what heads write, the last position knows nothing of the first one.
        """
        hooks = [(_name(layer, "z"), _zeroing) for layer in self._layers]
        other = self._tokens.clone()
        other[:, 0] = (other[:, 0] + 1) % self._bridge.cfg.d_vocab
        first, second = (
            self._bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[:, -1]
            for tokens in (self._tokens, other)
        )
        if not torch.allclose(first, second, rtol=1e-6, atol=1e-6, equal_nan=True):
            raise UnsupportedLayoutError(
                f"{_CALLER}: the bridge ({self._bridge.cfg.architecture}) does not let the outputs "
                "of its heads be replaced"
            )

    def _run_and_keep(self) -> float:
        """Run the model as it is, keep its patterns, and check what the hooks show."""
        values: Activations = {}
        written: Activations = {}
        kept = (("pattern", self._patterns), ("v", values), ("z", written))
        loss = self._loss(
            [
                (_name(layer, what), _keeping(to, layer))
                for what, to in kept
                for layer in self._layers
            ]
        )
        for layer in self._layers:
            if not all(layer in to and to[layer].ndim == 4 for _, to in kept):
                raise UnsupportedLayoutError(
                    f"{_CALLER}: the bridge ({self._bridge.cfg.architecture}) does not show "
                    f"pattern, values and outputs of the heads of layer {layer}"
                )
            later = float(self._patterns[layer].triu(1).abs().max())
            if later > _TOLERANCE:
                raise UnsupportedLayoutError(
                    f"{_CALLER}: a head of layer {layer} pays {later:.3g} of its attention to a "
                    "later token; the loss of next tokens is that of causal models only"
                )
            again = _written(self._patterns[layer], values[layer])
            scale = float(written[layer].abs().max())
            if again.shape != written[layer].shape or not torch.allclose(
                again, written[layer], rtol=_TOLERANCE, atol=_TOLERANCE * scale
            ):
                raise UnsupportedLayoutError(
                    f"{_CALLER}: pattern times values is not what the heads of layer {layer} write "
                    f"({self._bridge.cfg.architecture}), so that their pattern cannot be frozen"
                )
        return loss

    def _replaced(self, outputs: Mapping[int, torch.Tensor]) -> tuple[float, Activations]:
        """Loss with given outputs of heads (none: zero), and what the heads would write."""
        values: Activations = {}
        written: Activations = {}
        hooks = []
        for layer in self._layers:
            hooks.append((_name(layer, "v"), _keeping(values, layer)))
            hooks.append((_name(layer, "z"), self._exchanging(layer, outputs, values, written)))
        return self._loss(hooks), written

    def _exchanging(
        self,
        layer: int,
        outputs: Mapping[int, torch.Tensor],
        values: Activations,
        written: Activations,
    ) -> Hook:
        """Keep what heads of a layer would write with their frozen pattern, and give another."""

        def exchange(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            written[layer] = _written(self._patterns[layer], values.pop(layer))
            return outputs[layer] if outputs else torch.zeros_like(value)

        return exchange

    def _loss(self, hooks: list[tuple[str, Hook]]) -> float:
        logits = self._bridge.run_with_hooks(self._tokens, return_type="logits", fwd_hooks=hooks)
        flat = logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(flat, self._tokens[:, 1:].flatten(), reduction="none")
        loss = float(losses.double().sum())
        if not math.isfinite(loss):
            raise ValueError(
                f"{_CALLER}: the loss of the model, or of a part of it, is {loss} on these tokens"
            )
        return loss


def _name(layer: int, what: str) -> str:
    return f"blocks.{layer}.attn.hook_{what}"


def _keeping(kept: Activations, layer: int) -> Hook:
    def keep(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001  bridges name the argument
        kept[layer] = value.detach().clone()

    return keep


def _zeroing(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
    return torch.zeros_like(value)


def _written(pattern: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Pattern ``(batch, head, query, key)`` times values ``(batch, key, kv_head, d_head)``."""
    by_head = values.transpose(1, 2)
    if pattern.shape[1] % by_head.shape[1] == 0:
        by_head = by_head.repeat_interleave(pattern.shape[1] // by_head.shape[1], dim=1)
    return (pattern @ by_head).transpose(1, 2)
