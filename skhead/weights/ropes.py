"""Frequencies of rotary positions, from what a configuration says of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skhead.exceptions import ConfigMismatchError, UnsupportedLayoutError
from skhead.weights.token_layouts import Pairing, Positions, Rope

__all__ = ["Rotary", "read_rotaries"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: how the queries and keys of a head turn with their position.

    Attributes
    ----------
    frequencies : Tensor of shape (n_dims / 2,), float64
        Radians per position, one for each pair of coordinates.
    n_dims : int
        How many leading coordinates of each head turn.
    pairing : {"half", "adjacent"}
        ``"half"``: coordinate i turns with i + n_dims / 2 (Llama, GPT-NeoX). ``"adjacent"``: 2 i
        turns with 2 i + 1 (GPT-J, TransformerLens' own models).
    scaling : float
        Factor of the turned coordinates of queries and of keys (YaRN, LongRoPE); 1 otherwise.
    """

    frequencies: torch.Tensor
    n_dims: int
    pairing: Pairing
    scaling: float = 1.0


def read_rotaries(
    config: Config, positions: Positions, d_head: int, n_layers: int, label: str
) -> tuple[Rotary, ...]:
    """Return the rotary positions of a model: one where all layers agree, else one per layer.

    Scalings that depend on the length of the text are those of a text within the context of
    pretraining.

    Parameters
    ----------
    config : mapping
    positions : Positions
        Of the kind ``"rotary"``.
    d_head : int
    n_layers : int
    label : str
        The model to name in errors.

    Returns
    -------
    tuple of Rotary

    Raises
    ------
    UnsupportedLayoutError
        If the configuration names a scaling that is not known, or says something else for some
        layers.
    ConfigMismatchError
        If a number is missing or out of range.
    """
    rotaries = [_read(config, rope, d_head, label) for rope in positions.ropes]
    if positions.pattern is None:
        return (rotaries[0],)
    by_entry = {rope.entry: rotary for rope, rotary in zip(positions.ropes, rotaries, strict=True)}
    kinds = _layer_kinds(config, positions, n_layers, label)
    return tuple(by_entry[kind] for kind in kinds)


def _layer_kinds(
    config: Config, positions: Positions, n_layers: int, label: str
) -> list[str | None]:
    entries = [rope.entry for rope in positions.ropes]
    listed = config.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list | tuple) or len(listed) != n_layers:
            raise ConfigMismatchError(
                f"{label}: the configuration's layer_types={reprlib.repr(listed)} does not name "
                f"the kind of each of the {n_layers} layers."
            )
        strange = [kind for kind in listed if kind not in entries]
        if strange:
            raise UnsupportedLayoutError(
                f"{label}: layers of the kind {reprlib.repr(strange[0])} are not known; skhead "
                f"reads {', '.join(map(repr, entries))}."
            )
        return list(listed)
    key, default = positions.pattern or ("", 1)
    every = config.get(key, default)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ConfigMismatchError(
            f"{label}: the configuration's {key}={reprlib.repr(every)} is not a positive integer."
        )
    return [entries[0] if (layer + 1) % every == 0 else entries[1] for layer in range(n_layers)]


class _Settings:
    """The numbers that a configuration states for one rope, with the words for errors."""

    def __init__(self, config: Config, rope: Rope, label: str) -> None:
        self._config, self._rope, self._label = config, rope, label
        self.entries = self._own_entries()

    def _own_entries(self) -> Config:
        given = self._config.get("rope_scaling") if self._rope.legacy_scaling else None
        given = given or self._config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise self._bad("rope_parameters", given, "a mapping")
        if any(isinstance(value, Mapping) for value in given.values()):
            if self._rope.entry is None:
                raise UnsupportedLayoutError(
                    f"{self._label}: the configuration's rope_parameters differ from layer to "
                    f"layer ({', '.join(map(str, given))}), which is not known of this "
                    "architecture."
                )
            given = given.get(self._rope.entry) or {}
            if not isinstance(given, Mapping):
                raise self._bad(f"rope_parameters.{self._rope.entry}", given, "a mapping")
        return given

    def kind(self) -> str:
        named = self.entries.get("rope_type", self.entries.get("type")) or "default"
        if not isinstance(named, str):
            raise self._bad("rope_type", named, "a text")
        kind = (self._rope.renamed or {}).get(named, named)
        if kind not in self._rope.scalings:
            raise UnsupportedLayoutError(
                f"{self._label}: rotary positions of the kind {named!r} are not known; skhead "
                f"reads {', '.join(map(repr, self._rope.scalings))}."
            )
        return kind

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigMismatchError(
                f"{self._label}: the configuration's rotary positions lack the number {key}."
            )
        return default

    def optional(self, key: str, *around: str) -> float | None:
        """Return the number under `key` of its own entries, else under a key around them."""
        if self.entries.get(key) is not None:
            return self._positive(key, self.entries[key])
        for name in around:
            if self._config.get(name) is not None:
                return self._positive(name, self._config[name])
        return None

    def factor(self) -> float:
        """Return by how much the context was stretched."""
        factor = self.optional("factor")
        if factor is not None:
            return factor
        return self._around("max_position_embeddings") / self.context()

    def factors(self, key: str, count: int) -> torch.Tensor:
        values = self.entries.get(key)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self._bad(key, values, f"a list of {count} positive numbers")
        factors = [self._positive(key, value) for value in values]
        return torch.tensor(factors, dtype=torch.float64)

    def context(self) -> float:
        """Return the context length of pretraining."""
        key, default = "original_max_position_embeddings", self._rope.default_context
        around = self._config.get(key, default)
        if around is not None:
            return self._positive(key, around)
        inside = self.optional(key)
        return self._around("max_position_embeddings") if inside is None else inside

    def n_dims(self, d_head: int) -> int:
        """Return the stated number of turned coordinates; an odd one turns one more."""
        rope = self._rope
        if rope.n_dims is None:
            share = self.optional("partial_rotary_factor", *rope.share)
            n_dims = int(d_head * (rope.default_share if share is None else share))
        else:
            stated = self.optional(rope.n_dims, rope.n_dims)
            n_dims = int(rope.default_n_dims or d_head) if stated is None else int(stated)
        if n_dims < 1 or n_dims + n_dims % 2 > d_head:
            raise ConfigMismatchError(
                f"{self._label}: the configuration turns {n_dims} of the {d_head} coordinates of "
                "a head by its position; they turn in pairs, at least one and at most all."
            )
        return n_dims

    def base(self) -> float:
        stated = self.optional("rope_theta", *self._rope.base)
        return self._rope.default_base if stated is None else stated

    def _around(self, key: str) -> float:
        if self._config.get(key) is None:
            raise ConfigMismatchError(
                f"{self._label}: the configuration lacks {key}, which its rotary positions need."
            )
        return self._positive(key, self._config[key])

    def _positive(self, key: str, value: Any) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not 0 < value < math.inf:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def senseless(self, why: str) -> ConfigMismatchError:
        """The error for numbers that are in range one by one, and give no frequencies together."""
        return ConfigMismatchError(
            f"{self._label}: the configuration's rotary positions of the kind {self.kind()!r} give "
            f"no frequencies ({why}): {reprlib.repr(dict(self.entries))}."
        )

    def _bad(self, key: str, value: object, wanted: str) -> ConfigMismatchError:
        return ConfigMismatchError(
            f"{self._label}: the configuration's {key}={reprlib.repr(value)} is not {wanted}."
        )


def _read(config: Config, rope: Rope, d_head: int, label: str) -> Rotary:
    settings = _Settings(config, rope, label)
    scale = _SCALINGS[settings.kind()]
    n_dims = settings.n_dims(d_head)
    exponents = torch.arange(0, n_dims, 2, dtype=torch.float64) / n_dims
    plain = settings.base() ** -exponents
    try:
        frequencies, scaling = scale(plain, settings)
    except ArithmeticError as error:
        raise settings.senseless(str(error)) from error
    if not bool(torch.isfinite(frequencies).all()) or not math.isfinite(scaling):
        raise settings.senseless("a frequency is NaN or infinite")
    return Rotary(frequencies, 2 * len(frequencies), rope.pairing, scaling)


Scaled = tuple[torch.Tensor, float]


def _unscaled(plain: torch.Tensor, _settings: _Settings) -> Scaled:
    return plain, 1.0


def _linear(plain: torch.Tensor, settings: _Settings) -> Scaled:
    return plain / settings.number("factor"), 1.0


def _llama3(plain: torch.Tensor, settings: _Settings) -> Scaled:
    """Slow frequencies divided by the factor, fast ones kept, those between interpolated."""
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    turns = settings.context() * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / settings.number("factor"), 1.0


def _yarn(plain: torch.Tensor, settings: _Settings) -> Scaled:
    """Frequencies that turn often within the context kept, rare ones divided, a ramp between."""
    context, base, count = settings.context(), settings.base(), len(plain)
    factor = settings.factor()

    def place(turns: float) -> float:
        return 2 * count * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = place(settings.number("beta_fast", default=32.0))
    last = place(settings.number("beta_slow", default=1.0))
    if settings.entries.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    width = last - first or 1e-3
    divided = ((torch.arange(count, dtype=torch.float64) - first) / width).clamp(0, 1)
    frequencies = divided * plain / factor + (1 - divided) * plain
    scaling = settings.optional("attention_factor")
    if scaling is None:
        scale, all_dims = settings.optional("mscale"), settings.optional("mscale_all_dim")
        scaling = _magnitude(factor, 1.0)
        if scale and all_dims:
            scaling = _magnitude(factor, scale) / _magnitude(factor, all_dims)
    return frequencies, scaling


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(plain: torch.Tensor, settings: _Settings) -> Scaled:
    context, factor = settings.context(), settings.factor()
    scaling = settings.optional("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return plain / settings.factors("short_factor", len(plain)), scaling


_SCALINGS: Mapping[str, Callable[[torch.Tensor, _Settings], Scaled]] = {
    "default": _unscaled,
    "dynamic": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
