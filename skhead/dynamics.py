"""Operations of heads when the model runs, beside what their parameters say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._checks import check_count
from skhead._heads import running_labels
from skhead._prompts import Batch, Prompter, batches, labelled_pairs
from skhead._tokenizers import as_encoder
from skhead.exceptions import UnsupportedLayoutError
from skhead.linalg.ranks import count_above
from skhead.weights.running import attention_layers, evaluating, open_bridge

__all__ = ["TEMPLATES", "dynamic_scores", "multi_token_pairs"]

#: The four prompts of the published runs.
TEMPLATES = (
    "No <X> means no",
    "The story of <X> contains",
    "This is a document about <X>",
    "When I think about <X> I think about",
)
CONTEXTS = ("without", "with")
SIGNS = ("", "-")
_CALLER = "dynamic_scores"
_TOLERANCE = 1e-4

#: Logits of one head that are held at once (float32, 64 MiB).
_LOGITS = 1 << 24
#: What the check of a bridge looks at.
_SHOWN = ("pattern", "v", "z")

Hook = Callable[..., None]
Activations = dict[int, torch.Tensor]


def dynamic_scores(
    model: Any,
    operation: Any,
    templates: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    k: Any = 10,
    leading_space: bool = True,
    bos_token: int | str | None = "auto",
    unembedding: Any = None,
    n_valid_tokens: int | None = None,
) -> pd.DataFrame:
    """Share of an operation's pairs that each head carries out while the model runs.

    The model reads a prompt with the source word in it. What a head writes at the last position is
    multiplied with the unembedding, without any norm or bias, and the pair counts as a hit if the
    target is among the `k` largest logits; for suppression among the `k` smallest. "With" context
    the head attends as it does in the model. "Without" it attends to nothing but the last token
    of the source; the layers above still read what the model computes by itself, so that what
    remains is what the head makes of the source when it looks there.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        What `skhead.weights.running.open_bridge` opens: a source that holds a complete model, a
        Hugging Face module, or a bridge.
    operation : sequence of (source, target), or mapping of str to such
        Words, or token ids; a source may be several tokens (as a word, or a sequence of ids), a
        target must be one. A mapping holds several operations by name; else the name is
        ``"operation"``.
    templates : sequence of str or (before, after), or None, default=None
        Texts that hold ``<X>`` once, with the space that belongs in front of it, or pairs of
        sequences of token ids in front of and behind the source. None takes the four of the
        published runs, ``skhead.dynamics.TEMPLATES``.
    tokenizer : tokenizer object, path, callable or None, default=None
        A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, a directory with the files of one, or
        a function from a text to a list of token ids. Not needed where all is token ids.
    k : int, sequence of int, or mapping of str to these, default=10
        How many logits count, at least 1; a mapping goes by the name of the operation and holds
        all of them.
    leading_space : bool, default=True
        Whether the target is a word with a space in front; and the source in a template of ids.
    bos_token : int, "auto" or None, default="auto"
        Token in front of every prompt. "auto" takes what a tokenizer object puts there by itself,
        and nothing for a path or a function.
    unembedding : array of shape (n_vocab, d_model) or None, default=None
        Rows that give logits; the model's own, raw, by default. That of
        ``read_token_space(source, fold_norm=True)`` holds the gain of the final norm.
    n_valid_tokens : int or None, default=None
        Tokens that compete, from the first on; all by default. Vocabularies are often padded with
        rows that were never trained.

    Returns
    -------
    DataFrame
        Index ``head`` ("L4H7"); columns ``feature`` (the operation's name, with ``"-"`` in front
        for suppression), ``template``, ``context`` ("without" or "with"), ``k`` and ``score`` in
        [0, 1]. ``attrs["n_pairs"]`` holds the number of pairs by operation.

    Raises
    ------
    TypeError
        If pairs, templates or the tokenizer are of another kind.
    ValueError
        If a parameter is out of range, a target is not one token, a template has no place for the
        source, or a prompt does not fit the model.
    CheckpointError, SourceNotFoundError
        If the model cannot be opened; a checkpoint that lacks tensors is never filled up.
    UnsupportedLayoutError
        If the heads' output is not their pattern times their values, or the bridge does not show
        it.

    See Also
    --------
    compare_scores : How scores read from parameters agree with these.
    ablate : What the model loses without the heads.

    Notes
    -----
    The target is among the `k` largest logits if fewer than `k` are strictly larger; ties speak for
    it, so that a head that writes exactly nothing scores 1 with either sign. A head that writes the
    same tokens whatever the source scores high on operations with few targets. The model itself is
    not changed. Logits are computed layer by layer as the model runs, in blocks of bounded size.

    References
    ----------
    .. [1] A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their
       Parameters", ACL 2025.

    Examples
    --------
    >>> import skhead
    >>> copying = [(token, token) for token in range(40)]
    >>> scores = skhead.dynamic_scores("skhead/induction-2l", copying, [([64], [])], k=1)
    >>> alone = scores[(scores["context"] == "without") & (scores["feature"] == "operation")]
    >>> alone["score"].idxmax(), bool(alone["score"].max() > 0.9)
    ('L1H1', True)
    """
    templates = TEMPLATES if templates is None else templates
    prompter = Prompter(tokenizer, leading_space, bos_token, _CALLER)
    operations = labelled_pairs(operation, _CALLER)
    counts = {name: _counts(k, name) for name in operations}
    prompts = {name: prompter.write(pairs, templates, name) for name, pairs in operations.items()}
    bridge = open_bridge(model)
    weights = _Weights.of(bridge, unembedding, n_valid_tokens)
    heads = [(layer, head) for layer, size in weights.sizes.items() for head in range(size)]
    labels = running_labels(model, heads, _CALLER)
    names = [_template_name(template, place) for place, template in enumerate(templates)]
    frames = []
    with evaluating(bridge):
        for name, written in prompts.items():
            shape = (len(names), len(labels), len(CONTEXTS), len(SIGNS), len(counts[name]))
            scores = torch.zeros(shape, dtype=torch.float64)
            for number, batch in enumerate(batches(bridge, written, _CALLER)):
                if number == 0:
                    _check_values(bridge, weights, batch.tokens[:1])
                hits = _hits(bridge, weights, batch, counts[name])
                scores.index_add_(0, batch.templates.cpu(), hits)
            scores /= len(written) // len(names)
            frames.append(_long(scores.numpy(), labels, name, names, counts[name]))
    table = pd.concat(frames)
    table.attrs = {"n_pairs": {name: len(p) // len(names) for name, p in prompts.items()}}
    return table


def multi_token_pairs(
    operation: Any, tokenizer: Any, *, leading_space: bool = True
) -> list[tuple[tuple[int, ...], int]]:
    """Pairs of an operation whose source, without a space in front, is several tokens.

    They are what parameters alone cannot score, because they tell of single tokens. With the
    template ``(encode("This is a document about "), [])`` the prompts are those of the published
    runs.

    Parameters
    ----------
    operation : sequence of (source, target)
        Words.
    tokenizer : tokenizer object, path or callable
        As for `dynamic_scores`.
    leading_space : bool, default=True
        Whether the target is a word with a space in front.

    Returns
    -------
    list of (tuple of int, int)
        Token ids, of pairs with at least two source tokens and exactly one target token.

    Examples
    --------
    >>> import skhead
    >>> pairs = [("ab", "c"), ("a", "b"), ("abc", "de")]
    >>> skhead.multi_token_pairs(pairs, lambda text: list(text.encode()), leading_space=False)
    [((97, 98), 99)]
    """
    encode = as_encoder(tokenizer, "multi_token_pairs")
    space = " " if leading_space else ""
    encoded = [(tuple(encode(source)), encode(space + target)) for source, target in operation]
    return [(source, to[0]) for source, to in encoded if len(source) > 1 and len(to) == 1]


def _counts(k: Any, name: str) -> list[int]:
    if isinstance(k, Mapping):
        if name not in k:
            raise ValueError(f"{_CALLER}: k names no number for operation {name!r}")
        k = k[name]
    listed = [k] if np.ndim(k) == 0 else list(k)
    counts = [check_count("k", value, _CALLER) for value in listed]
    if not counts or len(set(counts)) != len(counts):
        raise ValueError(f"{_CALLER}: k must hold distinct numbers, got {counts}")
    return counts


def _template_name(template: Any, place: int) -> str:
    return template if isinstance(template, str) else f"template {place}"


@dataclass(frozen=True)
class _Weights:
    """What turns the outputs of heads into logits: the layers' W_O, and the unembedding."""

    bridge: Any
    sizes: Mapping[int, int]
    unembedding: torch.Tensor

    @classmethod
    def of(cls, bridge: Any, unembedding: Any, n_valid_tokens: int | None) -> _Weights:
        layers = attention_layers(bridge, _CALLER)
        shapes = {layer: _output_matrices(bridge, layer).shape for layer in layers}
        d_model, device = shapes[layers[0]][-1], bridge.cfg.device
        if unembedding is None:
            rows = bridge.unembed.W_U.detach().T
        else:
            rows = torch.as_tensor(unembedding, dtype=torch.float32, device=device)
        n_vocab = int(bridge.cfg.d_vocab)
        if tuple(rows.shape) != (n_vocab, d_model):
            raise ValueError(
                f"{_CALLER}: unembedding has shape {tuple(rows.shape)}; expected "
                f"{(n_vocab, d_model)}, a row per token"
            )
        if n_valid_tokens is not None and (
            check_count("n_valid_tokens", n_valid_tokens, _CALLER) > n_vocab
        ):
            raise ValueError(
                f"{_CALLER}: n_valid_tokens must be from 1 to {n_vocab}, got {n_valid_tokens}"
            )
        sizes = {layer: int(shape[0]) for layer, shape in shapes.items()}
        return cls(bridge, sizes, rows[:n_valid_tokens].float())

    def outputs_of(self, layer: int) -> torch.Tensor:
        """W_O of the heads of a layer, ``(n_heads, d_head, d_model)``."""
        return _output_matrices(self.bridge, layer).detach().float()


def _output_matrices(bridge: Any, layer: int) -> torch.Tensor:
    try:
        matrices: torch.Tensor = bridge.blocks[layer].attn.W_O
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedLayoutError(
            f"{_CALLER}: the bridge ({bridge.cfg.architecture}) shows no W_O per head of layer "
            f"{layer}: {error}"
        ) from error
    return matrices


def _long(
    scores: NDArray[np.float64],
    labels: list[str],
    name: str,
    templates: list[str],
    counts: list[int],
) -> pd.DataFrame:
    """Scores ``(template, head, context, sign, k)`` of an operation as rows."""
    features = [sign + name for sign in SIGNS]
    axes = [templates, labels, list(CONTEXTS), features, counts]
    names = ["template", "head", "context", "feature", "k"]
    places = np.indices(scores.shape).reshape(len(axes), -1)
    table = pd.DataFrame(
        {
            column: np.asarray(axis, dtype=object if column != "k" else np.int64)[place]
            for column, axis, place in zip(names, axes, places, strict=True)
        }
    )
    table["score"] = scores.ravel()
    table = table.set_index("head")
    return table[["feature", "template", "context", "k", "score"]]


def _hits(bridge: Any, weights: _Weights, batch: Batch, counts: list[int]) -> torch.Tensor:
    """Hits of every prompt and head, ``(n, n_heads, context, sign, k)``, from one run."""
    outside = batch.targets >= len(weights.unembedding)
    if outside.any():
        raise ValueError(
            f"{_CALLER}: target {int(batch.targets[outside][0])} is beyond "
            f"n_valid_tokens={len(weights.unembedding)}"
        )
    values: Activations = {}
    ranks: Activations = {}
    hooks = []
    for layer in weights.sizes:
        hooks.append((_hook_name(layer, "v"), _keeping(values, layer, batch.sources)))
        hooks.append((_hook_name(layer, "z"), _ranking(layer, weights, batch, values, ranks)))
    bridge.run_with_hooks(batch.tokens, return_type=None, fwd_hooks=hooks)
    found = torch.cat([ranks[layer] for layer in weights.sizes], dim=1)
    return (found[..., None] < torch.tensor(counts)).double()


def _hook_name(layer: int, what: str) -> str:
    return f"blocks.{layer}.attn.hook_{what}"


def _keeping(kept: Activations, layer: int, sources: torch.Tensor) -> Hook:
    """Keep the values of the sources, ``(n, kv_head, d_head)``."""

    def keep(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001  bridges name the argument
        kept[layer] = value[torch.arange(len(value), device=value.device), sources]

    return keep


def _ranking(
    layer: int,
    weights: _Weights,
    batch: Batch,
    values: Activations,
    ranks: Activations,
) -> Hook:
    """Rank the targets by what every head of a layer writes, without and with context."""
    targets = batch.targets.repeat_interleave(2)

    def rank(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
        alone = _per_head(values.pop(layer), value.shape[2], dim=1)
        outputs = torch.stack([alone, value[:, -1]], dim=2).float()
        _check_finite(outputs, layer)
        matrices = weights.outputs_of(layer)
        found = torch.stack(
            [
                _ranks(outputs[:, head].flatten(0, 1), matrices[head], weights, targets)
                for head in range(len(matrices))
            ]
        )
        ranks[layer] = found.unflatten(1, (-1, 2)).transpose(0, 1).cpu()

    return rank


def _check_finite(outputs: torch.Tensor, layer: int) -> None:
    if not torch.isfinite(outputs).all():
        raise ValueError(
            f"{_CALLER}: heads of layer {layer} write NaN or infinite values; the model's "
            "activations overflow"
        )


def _ranks(
    outputs: torch.Tensor, w_o: torch.Tensor, weights: _Weights, targets: torch.Tensor
) -> torch.Tensor:
    """How many tokens have larger and smaller logits than the target, ``(n, sign)``."""
    n_vocab = len(weights.unembedding)
    if len(outputs) < len(w_o):
        left, right = outputs @ w_o, weights.unembedding.T
    else:
        left, right = outputs, w_o @ weights.unembedding.T
    size = max(1, _LOGITS // n_vocab)
    counts = [
        torch.stack(count_above(rows @ right, asked)[:2], dim=1)
        for rows, asked in zip(left.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(counts)


def _per_head(values: torch.Tensor, n_heads: int, dim: int) -> torch.Tensor:
    """Values of every query head, where heads share them in groups."""
    return values.repeat_interleave(n_heads // values.shape[dim], dim=dim)


def _check_values(bridge: Any, weights: _Weights, tokens: torch.Tensor) -> None:
    """Refuse a bridge of which heads write anything but their pattern times their values."""
    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        kept[name] = value.detach().float()

    names = [_hook_name(layer, what) for layer in weights.sizes for what in _SHOWN]
    hooks = [(name, partial(keep, name=name)) for name in names]
    bridge.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks)
    for layer, n_heads in weights.sizes.items():
        found = [kept.get(_hook_name(layer, what)) for what in _SHOWN]
        if any(value is None or value.ndim != 4 for value in found):
            raise UnsupportedLayoutError(
                f"{_CALLER}: the bridge ({bridge.cfg.architecture}) does not show pattern, values "
                f"and outputs of the heads of layer {layer}"
            )
        pattern, values, written = cast("list[torch.Tensor]", found)
        _check_finite(written, layer)
        again = (pattern @ _per_head(values, n_heads, dim=2).transpose(1, 2)).transpose(1, 2)
        if again.shape != written.shape or not torch.allclose(
            again, written, rtol=_TOLERANCE, atol=_TOLERANCE * float(written.abs().max())
        ):
            raise UnsupportedLayoutError(
                f"{_CALLER}: pattern times values is not what the heads of layer {layer} write "
                f"({bridge.cfg.architecture}), so that their attention cannot be redirected"
            )
