"""Binding a family to one configuration and one set of tensors, and checking that they agree."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterable

from skhead.exceptions import CheckpointError, ConfigMismatchError, UnsupportedLayoutError
from skhead.weights.families import FAMILIES
from skhead.weights.layouts import (
    ROLES,
    Config,
    Family,
    LayerPlan,
    ModelPlan,
    Part,
    Projection,
    Slot,
    adapt_part,
    norm_facts,
    slot_shape,
)
from skhead.weights.readers import TensorReader, torch_dtype

__all__ = [
    "check_tensors",
    "choose_part",
    "family_of",
    "find_prefix",
    "plan_model",
    "resolve",
]

_FIELD = re.compile(r"\\\{(\w)\\\}")
_TOO_LARGE = 2**63


def family_of(config: Config, reader: TensorReader) -> Family:
    """Return the family that serves the configuration's ``model_type``.

    Raises
    ------
    UnsupportedLayoutError
        If none does; the model type and the tensors seen are named.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedLayoutError(
        f"{reader.label}: the layout of model_type {model_type!r} is not known. Tensors seen: "
        f"{_sample(reader.names())}. Known model types: {known}. To add a layout, add a Family "
        "entry to skhead/weights/families.py; or save the attention matrices under TransformerLens "
        "names (blocks.0.attn.W_Q of shape (heads, d_model, d_head), W_K, W_V, W_O) and pass that "
        "file."
    )


def choose_part(family: Family, part: str | None, label: str) -> Part:
    """Return the part of the family that the caller asks for.

    Raises
    ------
    ValueError
        If the model has parts and none is named, or has none and one is named.
    """
    names = [entry.name for entry in family.parts]
    if part in names:
        return family.parts[names.index(part)]
    if names == [None]:
        raise ValueError(
            f"{label}: part={part!r} was given, and a {family.name} model has one stack of layers "
            "only. Leave part out."
        )
    listed = ", ".join(repr(name) for name in names)
    if part is None:
        raise ValueError(
            f"{label} is an encoder-decoder ({family.name}): name the part whose heads you want, "
            f"part= one of {listed}."
        )
    raise ValueError(f"{label}: part={part!r} is not a part of {family.name}; it has {listed}.")


class _Dimensions:
    """The sizes that a configuration states, each with the words that state it."""

    def __init__(self, config: Config, family: Family, part: Part, label: str) -> None:
        self._config, self._family, self._label = config, family, label
        self.stated: dict[str, int] = {}
        self.d_model = self._require(family.d_model)
        self.n_heads = self._require(part.n_heads)
        self.n_layers = self._require(part.n_layers)
        self.layers_key = next(key for key in part.n_layers if key in self.stated)
        kv = family.kv_heads if family.choose_kv is None else family.choose_kv(config)
        if isinstance(kv, int):
            self.n_kv_heads = self.stated["key-value heads"] = kv
        else:
            self.n_kv_heads = self._find(kv) or self.n_heads
        self.d_head = self._find(family.d_head) or self._divide(self.d_model, self.n_heads)
        self._divide(self.n_heads, self.n_kv_heads)

    def words(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.stated.items())

    def _find(self, keys: tuple[str, ...]) -> int | None:
        given = {key: self._config[key] for key in keys if self._config.get(key) is not None}
        if not given:
            defaults = {key: self._default(key) for key in keys if key in self._family.defaults}
            given = {key: value for key, value in defaults.items() if value is not None}
        for key, value in given.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value < _TOO_LARGE:
                raise ConfigMismatchError(
                    f"{self._label}: the configuration's {key}={reprlib.repr(value)} is not a "
                    "positive integer below 2**63."
                )
        if len(set(given.values())) > 1:
            words = ", ".join(f"{key}={value}" for key, value in given.items())
            raise ConfigMismatchError(
                f"{self._label}: the configuration contradicts itself: {words} mean the same."
            )
        if not given:
            return None
        key, value = next(iter(given.items()))
        self.stated[key] = value
        return value

    def _default(self, key: str) -> int | None:
        default = self._family.defaults[key]
        return self._config.get(default) if isinstance(default, str) else default

    def _require(self, keys: tuple[str, ...]) -> int:
        value = self._find(keys)
        if value is None:
            raise ConfigMismatchError(
                f"{self._label}: the configuration of this {self._family.name} model lacks "
                f"{' or '.join(keys)}."
            )
        return value

    def _divide(self, whole: int, count: int) -> int:
        if whole % count:
            raise ConfigMismatchError(
                f"{self._label}: the configuration contradicts itself: {whole} cannot be divided "
                f"into {count} ({self.words()})."
            )
        return whole // count


def plan_model(config: Config, reader: TensorReader, part: str | None = None) -> ModelPlan:
    """Bind the configuration's family to the tensors of a checkpoint.

    Parameters
    ----------
    config : mapping
        Content of ``config.json``.
    reader : TensorReader
    part : {"encoder", "decoder", "cross"}, optional

    Returns
    -------
    ModelPlan

    Raises
    ------
    UnsupportedLayoutError
        If the architecture is unknown, or the weights are stored quantised.
    ConfigMismatchError
        If the tensors have other shapes, or other layers, than the configuration says.
    CheckpointError
        If a tensor is missing.
    """
    family, config, chosen = resolve(config, reader, part)
    sizes = _Dimensions(config, family, chosen, reader.label)
    wanted = family.places(config, sizes.n_layers, reader.label)
    prefix = find_prefix(family, chosen, reader)
    places = _check_layers(prefix, chosen, wanted, reader, sizes)
    layers = tuple(
        _plan_layer(index, place, prefix, chosen, sizes) for index, place in enumerate(places)
    )
    plan = ModelPlan(
        family=family.name,
        part=chosen.name,
        d_model=sizes.d_model,
        d_head=sizes.d_head,
        n_layers=len(layers),
        layers=layers,
        norm=norm_facts(chosen),
    )
    check_tensors(plan, reader, sizes.words())
    return plan


def resolve(config: Config, reader: TensorReader, part: str | None) -> tuple[Family, Config, Part]:
    """Return the family, the configuration of its language model, and the adapted part.

    Parameters
    ----------
    config : mapping
        Content of ``config.json``.
    reader : TensorReader
    part : {"encoder", "decoder", "cross"} or None

    Returns
    -------
    family : Family
    config : mapping
    part : Part

    Raises
    ------
    UnsupportedLayoutError
        If the architecture is unknown.
    ValueError
        If the model has parts and none is named, or has none and one is named.
    """
    family = family_of(config, reader)
    chosen = choose_part(family, part, reader.label)
    return family, *adapt_part(family, config, chosen)


def _plan_layer(
    index: int, place: dict[str, int], prefix: str, part: Part, sizes: _Dimensions
) -> LayerPlan:
    def name(template: str) -> str:
        return prefix + template.format(**place)

    slots = {
        role: Slot(
            name(projection.tensor),
            slot_shape(projection, sizes.d_model, sizes.d_head, sizes.n_heads, sizes.n_kv_heads),
            projection,
        )
        for projection in part.projections
        for role in projection.roles
    }
    norms = dict.fromkeys("QKV", part.norm) | {"O": part.writer_norm}
    if part.memory_norm is not None:
        norms |= dict.fromkeys("KV", part.memory_norm)
    gains = {role: None if norm is None else name(norm.gain) for role, norm in norms.items()}
    return LayerPlan(index, sizes.n_heads, sizes.n_kv_heads, slots, gains)


def _pattern(prefix: str, projection: Projection) -> re.Pattern[str]:
    template = re.escape(prefix + projection.tensor)
    return re.compile(_FIELD.sub(r"(?P<\1>\\d{1,18})", template))


def _layers_found(
    prefix: str, part: Part, names: Collection[str]
) -> dict[tuple[tuple[str, int], ...], str]:
    """Return the places that tensors of the part stand for, each with one such tensor."""
    found = {}
    for pattern in (_pattern(prefix, projection) for projection in part.projections):
        for name in names:
            if match := pattern.fullmatch(name):
                place = {key: int(value) for key, value in match.groupdict().items()}
                found[tuple(sorted(place.items()))] = name
    return found


def find_prefix(family: Family, part: Part, reader: TensorReader) -> str:
    """Return what stands in front of the family's tensor names in this checkpoint.

    Raises
    ------
    UnsupportedLayoutError
        If attention is found after several of the family's prefixes.
    CheckpointError
        If it is found after none.
    """
    names = reader.names()
    fitting = [prefix for prefix in family.prefixes if _layers_found(prefix, part, names)]
    if len(fitting) == 1:
        return fitting[0]
    example = part.projections[0].tensor
    where = f"the {part.name} of this {family.name} model" if part.name else f"{family.name}"
    if fitting:
        raise UnsupportedLayoutError(
            f"{reader.label} holds several models: tensors like {example!r} appear after each of "
            f"the prefixes {fitting}. Save the one that you mean in a file of its own."
        )
    raise CheckpointError(
        f"{reader.label} holds no attention tensor of {where}: expected names like "
        f"{family.prefixes[0] + example!r}. Tensors seen: {_sample(names)}."
    )


def _check_layers(
    prefix: str,
    part: Part,
    wanted: Iterable[dict[str, int]],
    reader: TensorReader,
    sizes: _Dimensions,
) -> list[dict[str, int]]:
    """Return the places that are wanted, after as many steps as tensors allow, not as stated."""
    found = _layers_found(prefix, part, reader.names())
    places = []
    for index, place in enumerate(wanted):
        key = tuple(sorted(place.items()))
        if key not in found:
            projection = part.projections[0]
            first = prefix + projection.tensor.format(**place)
            if key < max(found):
                raise _missing(reader, index, projection.roles[0], first)
            raise ConfigMismatchError(
                f"{reader.label}: the configuration says {sizes.layers_key}={sizes.n_layers}, and "
                f"the file holds {len(found)} attention layers; tensor {first!r} is the first one "
                "missing."
            )
        places.append(place)
    beyond = sorted(set(found) - {tuple(sorted(place.items())) for place in places})
    if beyond:
        raise ConfigMismatchError(
            f"{reader.label}: the configuration says {sizes.layers_key}={sizes.n_layers}, and the "
            f"file holds attention beyond that: tensor {found[beyond[0]]!r}."
        )
    return places


def _missing(reader: TensorReader, layer: int, role: str, tensor: str) -> CheckpointError:
    return CheckpointError(
        f"{reader.label}: L{layer} W_{role} is missing: there is no tensor {tensor!r}. Download or "
        "save the checkpoint again."
    )


def check_tensors(plan: ModelPlan, reader: TensorReader, stated: str) -> None:
    """Verify presence, storage and shape of every tensor of a plan.

    Parameters
    ----------
    plan : ModelPlan
    reader : TensorReader
    stated : str
        What the expected shapes were derived from, to say in the error.
    """
    names = reader.names()
    seen: set[str] = set()
    for layer in plan.layers:
        for role in ROLES:
            slot = layer.slots[role]
            if slot.tensor in seen:
                continue
            seen.add(slot.tensor)
            if slot.tensor not in names:
                raise _missing(reader, layer.layer, role, slot.tensor)
            info = reader.info(slot.tensor)
            torch_dtype(info, repr(slot.tensor))
            if info.shape != slot.shape:
                raise ConfigMismatchError(
                    f"{info.file}: tensor {slot.tensor!r} has shape {info.shape}; the "
                    f"configuration ({stated}) asks for {slot.shape}."
                )


def _sample(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names, key=lambda name: ("att" not in name.lower(), name))
    shown = ", ".join(repr(name) for name in ordered[:limit])
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (shown or "none") + more
