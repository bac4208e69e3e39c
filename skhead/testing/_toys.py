"""A small random model, and changes of its weights of which the effect is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["Toy", "random_toy"]

N_LAYERS, N_HEADS, N_KV, D_MODEL, D_HEAD, N_VOCAB = 2, 4, 2, 24, 4, 68


@dataclass(frozen=True)
class Toy:
    """Weights of a model of two layers, whose heads share keys and values two by two.

    Attributes
    ----------
    q, k, v, o : Tensor of shape (n_layers, n_heads, d_model, d_head)
        `o` transposed; `k` and `v` with one entry for every key-value head.
    embedding, unembedding : Tensor of shape (n_vocab, d_model)
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    embedding: torch.Tensor
    unembedding: torch.Tensor

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return self.q.shape[2]

    @property
    def n_heads(self) -> int:
        """Query heads of all layers."""
        return self.q.shape[0] * self.q.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights under TransformerLens' names."""
        grouped = "" if self.k.shape[1] == self.q.shape[1] else "_"
        found = {
            "embed.W_E": self.embedding.contiguous(),
            "unembed.W_U": self.unembedding.T.contiguous(),
        }
        for layer in range(len(self.q)):
            attention = f"blocks.{layer}.attn"
            found[f"{attention}.W_Q"] = self.q[layer].contiguous()
            found[f"{attention}.{grouped}W_K"] = self.k[layer].contiguous()
            found[f"{attention}.{grouped}W_V"] = self.v[layer].contiguous()
            found[f"{attention}.W_O"] = self.o[layer].transpose(1, 2).contiguous()
        return found

    def stack(self, role: str) -> torch.Tensor:
        """Matrices of one role, ``(n_heads, d_model, d_head)``."""
        found = self._every_head(getattr(self, role.lower()))
        return found.flatten(0, 1).contiguous()

    def roles(self) -> torch.Tensor:
        """Matrices of all roles, ``(n_heads, 4, d_model, d_head)``."""
        return torch.stack([self.stack(role) for role in "QKVO"], dim=1)

    def ungrouped(self) -> Toy:
        """The same heads, each with keys and values of its own."""
        return replace(self, k=self._every_head(self.k), v=self._every_head(self.v))

    def rotated(self, keep_ones: bool) -> Toy:
        """The same model in another basis of the residual stream.

        Parameters
        ----------
        keep_ones : bool
            Leave the vector of ones where it is, so that centring commutes with the rotation.
        """
        turn = _orthogonal(self.d_model, 11)
        if keep_ones:
            frame = torch.eye(self.d_model, dtype=torch.float64)
            frame[:, 0] = 1.0
            frame = torch.linalg.qr(frame).Q
            inner = torch.eye(self.d_model, dtype=torch.float64)
            inner[1:, 1:] = _orthogonal(self.d_model - 1, 11)
            turn = frame @ inner @ frame.T
        heads = {
            role: (turn @ getattr(self, role).double()).float() for role in ("q", "k", "v", "o")
        }
        tokens = {
            name: (getattr(self, name).double() @ turn.T).float()
            for name in ("embedding", "unembedding")
        }
        return replace(self, **heads, **tokens)

    def gauged(self, orthogonal: bool) -> Toy:
        """The same maps ``W_Q W_K^T`` and ``W_V W_O`` in other bases of the head spaces."""
        width = self.q.shape[3]
        found = {}
        for seed, (left, right) in enumerate((("k", "q"), ("v", "o"))):
            change = _orthogonal(width, 21 + seed)
            if not orthogonal:
                change = change @ torch.diag(torch.linspace(0.5, 2.0, width, dtype=torch.float64))
            inverse = torch.linalg.inv(change).T
            found[left] = (getattr(self, left).double() @ change).float()
            found[right] = (getattr(self, right).double() @ inverse).float()
        return replace(self, **found)

    def scaled(self) -> Toy:
        """Every matrix multiplied by a positive number of its own."""
        found = {}
        for power, role in enumerate("qkvo"):
            stack = getattr(self, role)
            count = stack.shape[0] * stack.shape[1]
            factors = torch.linspace(0.5, 3.0, count).roll(power).view(*stack.shape[:2], 1, 1)
            found[role] = stack * factors
        return replace(self, **found)

    def spoiled(self, value: float) -> Toy:
        """With the matrices of the last head filled with a value."""
        found = {}
        for role in "qkvo":
            stack = getattr(self, role).clone()
            stack[-1, -1] = value
            found[role] = stack
        return replace(self, **found)

    def _every_head(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.repeat_interleave(self.q.shape[1] // stack.shape[1], dim=1)


def random_toy(seed: int = 0, d_model: int = D_MODEL) -> Toy:
    """A model of Gaussian entries with a few strong directions, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gains = torch.linspace(0.6, 1.6, D_HEAD)
    return Toy(
        q=draw(N_LAYERS, N_HEADS, d_model, D_HEAD) * gains,
        k=draw(N_LAYERS, N_KV, d_model, D_HEAD) * gains,
        v=draw(N_LAYERS, N_KV, d_model, D_HEAD) * gains,
        o=draw(N_LAYERS, N_HEADS, d_model, D_HEAD) * gains,
        embedding=draw(N_VOCAB, d_model),
        unembedding=draw(N_VOCAB, d_model),
    )


def _orthogonal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
