"""Every family against the model's own modules, and against TransformerLens where it reads it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ZOO, Spec, fresh_model

import skhead
from skhead.exceptions import UnsupportedLayoutError
from skhead.weights import describe_sources, read_role
from skhead.weights.families import FAMILIES

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

N_VECTORS = 5
CAPTURE = "skhead_capture"


FOLDABLE = [name for name, spec in ZOO.items() if spec.norm or spec.post_norm]
UNFOLDABLE = [name for name in ZOO if name not in FOLDABLE]
BRIDGED = [name for name, spec in ZOO.items() if spec.bridge]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each model of the zoo, made once: the module and the directory it was saved to."""

    @cache
    def make(name: str) -> tuple[Any, str]:
        model = fresh_model(ZOO[name])
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        return model, str(path)

    return make


def _paths(spec: Spec, template: str) -> list[str]:
    groups = spec.groups or range(spec.n_layers)
    return [template.format(i=i, g=g) for i, g in zip(range(spec.n_layers), groups, strict=True)]


class Oracle:
    """What a model's own modules make of given residual vectors and given head outputs.

    One position only, where rotary embeddings turn nothing. The input of every attention module is
    replaced by `x`, what its heads hand to the output projection by `z`.
    """

    def __init__(self, model: Any, spec: Spec) -> None:
        self.model, self.spec = model, spec
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.x = self.z = torch.zeros(0)

    def run(self, x: torch.Tensor, z: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Return per layer q, k, v (vectors, heads, d_head) and the output (vectors, d_model)."""
        self.x, self.z = x.unsqueeze(1), z.unsqueeze(1)
        self.seen.clear()
        ids = torch.ones(N_VECTORS, 1, dtype=torch.long)
        inputs = {"input_ids": ids}
        if self.model.config.is_encoder_decoder and self.spec.model != "T5EncoderModel":
            inputs["decoder_input_ids"] = ids
        with torch.no_grad():
            self.model(**inputs)
        layers = []
        for attention, out in zip(
            _paths(self.spec, self.spec.attention), _paths(self.spec, self.spec.out), strict=True
        ):
            of_layer = {r: self.seen[id(self.model.get_submodule(attention)), r] for r in "qkv"}
            of_layer["o"] = self.seen[id(self.model.get_submodule(out)), "o"].squeeze(1)
            layers.append(of_layer)
        return layers

    def _keep(self, module: Any, **states: torch.Tensor) -> None:
        for role, state in states.items():
            self.seen[id(module), role] = state.detach().clone()

    def _capture(
        self, module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if self.spec.config == "OPTConfig":
            query = query / module.scaling
        self._keep(module, q=query[:, :, 0], k=key[:, :, 0], v=value[:, :, 0])
        if query.shape[1] != self.spec.heads:
            return torch.zeros(N_VECTORS, 1, query.shape[1], value.shape[-1]), None
        return self.z, None

    def install(self) -> None:
        """Put the hooks in."""
        for path in dict.fromkeys(_paths(self.spec, self.spec.attention)):
            module = self.model.get_submodule(path)
            module.register_forward_pre_hook(self._replace_input, with_kwargs=True)
            for name in ("q_norm", "k_norm"):
                if hasattr(module, name):
                    setattr(module, name, torch.nn.Identity())
            self._patch(module)
        for path in dict.fromkeys(_paths(self.spec, self.spec.out)):
            self.model.get_submodule(path).register_forward_hook(
                lambda module, _, output: self._keep(module, o=output)
            )
        transformers.AttentionInterface.register(CAPTURE, self._capture)
        if self.spec.config == "FalconConfig":
            return
        for module in self.model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                module.config._attn_implementation_internal = CAPTURE

    def _replace_input(self, _: Any, args: Any, kwargs: Any) -> Any:
        if args:
            args = (self.x, *args[1:])
        for name in ("hidden_states", "key_value_states"):
            if kwargs.get(name) is not None:
                kwargs[name] = self.x
        return args, kwargs

    def _patch(self, module: Any) -> None:
        """Reach into the attention modules that do not go through the attention interface."""
        name = type(module).__name__
        if hasattr(module, "_attn"):
            module._attn = lambda q, k, v, *_: (
                self._capture(module, q, k, v)[0].transpose(1, 2), None,
            )  # fmt: skip
        elif name.startswith("Bloom"):
            reshape, merge = module._reshape, module._merge_heads
            module._reshape = lambda fused: self._kept(module, reshape(fused), position=2)
            flat = (N_VECTORS * self.spec.heads, 1, self.spec.d_head)
            module._merge_heads = lambda _: merge(self.z.transpose(1, 2).reshape(flat))
        elif name.startswith("Falcon"):
            split = module._split_heads
            module._split_heads = lambda fused: self._kept(module, split(fused), position=1)
            module.dense.register_forward_pre_hook(lambda *_: (self.z.flatten(2),))

    def _kept(self, module: Any, states: Any, position: int) -> Any:
        q, k, v = (state.select(position, 0) for state in states)
        self._keep(module, q=q, k=k, v=v)
        return states


@pytest.fixture(scope="module")
def oracles() -> Any:
    """Differences between two runs, so that biases cancel; per layer, by role."""
    generator = torch.Generator().manual_seed(2)

    @cache
    def measure(name: str) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
        spec = ZOO[name]
        oracle = Oracle(fresh_model(spec), spec)
        oracle.install()
        x = torch.randn(N_VECTORS, 24, generator=generator)
        z = torch.randn(N_VECTORS, spec.heads, spec.d_head, generator=generator)
        moved = oracle.run(x, z)
        still = oracle.run(torch.zeros_like(x), torch.zeros_like(z))
        layers = [
            {role: a[role] - b[role] for role in "qkvo"} for a, b in zip(moved, still, strict=True)
        ]
        return x, z, layers

    return measure


def _load(path: str, spec: Spec) -> pd.DataFrame:
    return skhead.load_heads(path, part=spec.part)


def test_every_model_type_of_every_family_is_in_the_zoo(models: Any) -> None:
    served = {name for family in FAMILIES for name in family.model_types}
    present = {getattr(transformers, spec.config).model_type for spec in ZOO.values()}
    assert served == present


@pytest.mark.parametrize("name", ZOO)
def test_table(name: str, models: Any) -> None:
    spec, (_, path) = ZOO[name], models(name)
    heads = _load(path, spec)
    per_group = spec.heads // spec.kv_heads
    expected = pd.DataFrame(
        [(i, h, h // per_group) for i in range(spec.n_layers) for h in range(spec.heads)],
        columns=["layer", "head", "kv_head"],
        index=[f"L{i}H{h}" for i in range(spec.n_layers) for h in range(spec.heads)],
    )
    pd.testing.assert_frame_equal(heads[["layer", "head", "kv_head"]], expected)
    assert set(heads["source"]) == {path if spec.part is None else f"{path}#{spec.part}"}
    assert set(heads["d_model"]) == {24}
    assert set(heads["d_head"]) == {spec.d_head}
    assert set(heads["n_layers"]) == {spec.n_layers}
    info = describe_sources(heads)[0]
    assert (info.n_heads, info.n_kv_heads, info.part) == (spec.heads, spec.kv_heads, spec.part)
    assert info.shared_layers == bool(spec.groups)


@pytest.mark.parametrize("name", ZOO)
def test_projections_equal_the_models_own(name: str, models: Any, oracles: Any) -> None:
    heads = _load(models(name)[1], ZOO[name])
    x, z, layers = oracles(name)
    stacks = {role: torch.from_numpy(skhead.load_weights(heads, role)) for role in "QKVO"}
    for row, (layer, head, kv_head) in enumerate(
        heads[["layer", "head", "kv_head"]].itertuples(index=False)
    ):
        true = layers[layer]
        torch.testing.assert_close(x @ stacks["Q"][row], true["q"][:, head], atol=1e-5, rtol=1e-5)
        for role in "KV":
            states = true[role.lower()]
            which = head if states.shape[1] == ZOO[name].heads else kv_head
            torch.testing.assert_close(
                x @ stacks[role][row], states[:, which], atol=1e-5, rtol=1e-5
            )
    for layer, true in enumerate(layers):
        rows = np.flatnonzero(heads["layer"] == layer)
        written = torch.einsum("nhd,hmd->nm", z, stacks["O"][rows])
        torch.testing.assert_close(written, true["o"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_shared_matrices_are_read_once(name: str, models: Any) -> None:
    spec = ZOO[name]
    heads = _load(models(name)[1], spec)
    distinct = len(set(spec.groups)) or spec.n_layers
    for role, count in zip(
        "QKVO", (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads), strict=True
    ):
        stack = read_role(heads, role)
        assert stack.tensor.shape == (distinct * count, 24, spec.d_head)
        np.testing.assert_array_equal(
            stack.tensor.numpy()[stack.index], skhead.load_weights(heads, role)
        )


@pytest.mark.parametrize("name", ZOO)
def test_live_model_equals_its_directory(name: str, models: Any) -> None:
    spec, (model, path) = ZOO[name], models(name)
    saved = _load(path, spec)
    skhead.register_model(model, "live-zoo")
    try:
        heads = skhead.load_heads("live-zoo", part=spec.part)
        assert set(heads["source"]) == {"live-zoo" + (f"#{spec.part}" if spec.part else "")}
        pd.testing.assert_frame_equal(heads.drop(columns="source"), saved.drop(columns="source"))
        for role in "QKVO":
            np.testing.assert_array_equal(
                skhead.load_weights(heads, role), skhead.load_weights(saved, role)
            )
    finally:
        skhead.unregister_model("live-zoo")


@pytest.mark.parametrize("name", BRIDGED)
def test_equals_transformer_lens(name: str, models: Any) -> None:
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    spec, (_, path) = ZOO[name], models(name)
    heads = _load(path, spec)
    model = fresh_model(spec)
    bridge = builder.build_bridge_from_module(model, spec.model, hf_config=model.config)
    for layer in range(spec.n_layers):
        attention = bridge.get_submodule(spec.bridge.format(i=layer))
        rows = heads[heads["layer"] == layer]
        for role in "QKVO":
            true = getattr(attention, f"W_{role}").detach().numpy()
            true = true.transpose(0, 2, 1) if role == "O" else true
            true = true[rows["kv_head" if role in "KV" else "head"]]
            np.testing.assert_allclose(skhead.load_weights(rows, role), true, atol=1e-6)


def _normalise(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_equals_the_models_own_norm(name: str, models: Any) -> None:
    spec, (model, path) = ZOO[name], models(name)
    heads = _load(path, spec)
    raw = {role: torch.from_numpy(skhead.load_weights(heads, role)) for role in "QKVO"}
    folded = {
        role: torch.from_numpy(skhead.load_weights(heads, role, fold_norm=True)) for role in "QKVO"
    }
    x = 1000 * torch.randn(N_VECTORS, 24, generator=torch.Generator().manual_seed(3))
    for layer in range(spec.n_layers):
        rows = np.flatnonzero(heads["layer"] == layer)
        for role in "QKV":
            memory = spec.part == "cross" and role in "KV"
            path = "encoder.final_layer_norm" if memory else spec.norm
            if not path:
                torch.testing.assert_close(folded[role][rows], raw[role][rows], rtol=0, atol=0)
                continue
            norm = model.get_submodule(path.format(i=layer))
            read = norm(x) - getattr(norm, "bias", torch.zeros(24))
            torch.testing.assert_close(
                _normalise(x, spec.norm_kind) @ folded[role][rows],
                read @ raw[role][rows],
                atol=1e-4, rtol=1e-4,
            )  # fmt: skip
        if not spec.post_norm:
            torch.testing.assert_close(folded["O"][rows], raw["O"][rows], rtol=0, atol=0)
            continue
        norm = model.get_submodule(spec.post_norm.format(i=layer))
        z = 1000 * torch.randn(len(rows), spec.d_head, generator=torch.Generator().manual_seed(4))
        written = torch.einsum("hd,hmd->m", z, raw["O"][rows])
        scale = written.square().mean().sqrt()
        torch.testing.assert_close(
            torch.einsum("hd,hmd->m", z, folded["O"][rows]) / scale,
            norm(written), atol=1e-4, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_folding_is_refused_where_the_stream_is_normalised(name: str, models: Any) -> None:
    heads = _load(models(name)[1], ZOO[name])
    assert describe_sources(heads)[0].norm_placement == "post"
    with pytest.raises(UnsupportedLayoutError, match="normalises the residual stream itself"):
        skhead.load_weights(heads, "Q", fold_norm=True)


@pytest.mark.parametrize("name", ZOO)
def test_centring(name: str, models: Any) -> None:
    spec, (_, path) = ZOO[name], models(name)
    heads = _load(path, spec)
    exact = spec.norm_kind == "layernorm" and bool(spec.norm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stack = skhead.load_weights(heads, "V", center=True)
    raw = skhead.load_weights(heads, "V")
    np.testing.assert_allclose(stack, raw - raw.mean(1, keepdims=True), atol=1e-6)
    assert [str(w.message).partition(":")[0] for w in caught] == ([] if exact else ["center=True"])
