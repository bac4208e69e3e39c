"""Reading the tables at both ends of a model's stream, in residual coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skhead._callers import warn_user
from skhead.exceptions import CheckpointError, ConfigMismatchError, DegenerateHeadError
from skhead.weights.readers import torch_dtype
from skhead.weights.token_layouts import NormKind
from skhead.weights.token_sources import TokenSources

__all__ = ["TableReader"]


@dataclass(frozen=True)
class TableReader:
    """Reads tables once each, as float32 copies that belong to the caller.

    Attributes
    ----------
    found : TokenSources
    d_model : int
    fold_norm, center : bool
    device : torch.device, str or None
    """

    found: TokenSources
    d_model: int
    fold_norm: bool
    center: bool
    device: torch.device | str | None

    def final_gain(self) -> torch.Tensor | None:
        """Return the gain of the final norm as it is stored, None where there is none."""
        name, why = self.found.final_gain, self.found.missing.get("final_gain")
        if name is not None:
            return self._vector(name, self.d_model)
        if self.fold_norm and why is not None and self.found.unembedding is not None:
            if self.found.tokens.final_norm is not None:
                raise CheckpointError(
                    f"fold_norm=True: {why}, the gain of the norm in front of the unembedding. Use "
                    "fold_norm=False, or a checkpoint that holds it."
                )
            warn_user(
                f"fold_norm=True: nothing was folded into the unembedding, because {why}.",
            )
        return None

    def ends(
        self, embedding: bool, unembedding: bool, final_gain: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the embedding and the unembedding, as far as they are wanted and there.

        Tied ends are read once, and stay one tensor if nothing tells them apart.
        """
        found, columns = self.found, self.found.tokens.columns
        name = found.embedding if embedding else None
        other = found.unembedding if unembedding else None
        first = None if name is None else self._table(name)
        if first is None or other is None:
            second = None if other is None else self._table(other, columns)
        elif not found.tied:
            second = self._table(other, columns)
            self._warn_of_other_size(first, second)
        elif self._tells_ends_apart(final_gain):
            second = first.clone()
        else:
            first = self._centred(first)
            return first, first
        return (
            None if first is None else self._embedding(first),
            None if second is None else self._unembedding(second, final_gain),
        )

    def positions(self) -> torch.Tensor | None:
        """Return the table of learned positions, None where there is none."""
        name, tokens = self.found.positions, self.found.tokens
        if name is None:
            return None
        rows = self._table(name)
        skip = self.found.skip()
        if skip >= len(rows):
            raise ConfigMismatchError(
                f"{self.found.reader.info(name).file}: tensor {name!r} has {len(rows)} rows, of "
                f"which the first {skip} stand for no position; none is left."
            )
        rows = rows[skip:].clone() if skip else rows
        return self._to_stream(rows, tokens.into if tokens.positions.projected else None)

    def _tells_ends_apart(self, final_gain: torch.Tensor | None) -> bool:
        tokens = self.found.tokens
        folded = self.fold_norm and (final_gain is not None or tokens.embedding_norm is not None)
        projected = tokens.into is not None or tokens.out_of is not None
        return folded or projected or tokens.scaled or tokens.logits_scaled

    def _embedding(self, rows: torch.Tensor) -> torch.Tensor:
        if self.found.tokens.scaled:
            rows.mul_(self.d_model**0.5)
        return self._to_stream(rows, self.found.tokens.into)

    def _to_stream(self, rows: torch.Tensor, projection: str | None) -> torch.Tensor:
        """Turn rows of a table into what they put on the stream; the table may be overwritten."""
        norm = self.found.tokens.embedding_norm
        if self.fold_norm and norm is not None:
            rows.mul_(self._embedding_gain(norm.kind))
        if projection is not None:
            rows = rows @ self._projection(projection, (self.d_model, rows.shape[1])).T
        return self._centred(rows)

    def _unembedding(self, rows: torch.Tensor, final_gain: torch.Tensor | None) -> torch.Tensor:
        tokens = self.found.tokens
        if tokens.out_of is not None:
            rows = rows @ self._projection(tokens.out_of, (rows.shape[1], self.d_model))
        if tokens.logits_scaled:
            rows.mul_(self.d_model**-0.5)
        if self.fold_norm and final_gain is not None and tokens.final_norm is not None:
            rows.mul_(1.0 + final_gain if tokens.final_norm.kind == "rmsnorm+1" else final_gain)
        return self._centred(rows)

    def _centred(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.sub_(rows.mean(dim=1, keepdim=True)) if self.center else rows

    def _embedding_gain(self, kind: NormKind) -> torch.Tensor:
        name = self.found.embedding_gain
        if name is None:
            raise CheckpointError(
                f"fold_norm=True: {self.found.missing['embedding_gain']}, the gain of the norm "
                "behind the embedding. Use fold_norm=False, or a checkpoint that holds it."
            )
        gain = self._vector(name, self.d_model)
        return 1.0 + gain if kind == "rmsnorm+1" else gain

    def _vector(self, name: str, length: int) -> torch.Tensor:
        info = self.found.reader.info(name)
        if info.shape != (length,):
            raise ConfigMismatchError(
                f"{info.file}: tensor {name!r} has shape {info.shape}; a gain of this model has "
                f"({length},)."
            )
        return self._read(name)

    def _projection(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = self.found.prefix + name
        info = self.found.reader.info(name)
        if info.shape != shape:
            raise ConfigMismatchError(
                f"{info.file}: tensor {name!r} has shape {info.shape}; the embedding and the "
                f"model's width ask for {shape}."
            )
        return self._read(name)

    def _table(self, name: str, columns: bool = False) -> torch.Tensor:
        info, tokens = self.found.reader.info(name), self.found.tokens
        own_width = tokens.into is not None or tokens.out_of is not None
        width = info.shape[0 if columns else -1] if len(info.shape) == 2 else None
        if width is None or 0 in info.shape or (width != self.d_model and not own_width):
            wanted = f"({self.d_model}, tokens)" if columns else f"(rows, {self.d_model})"
            raise ConfigMismatchError(
                f"{info.file}: tensor {name!r} has shape {info.shape}; beside heads of "
                f"d_model={self.d_model} it must have {wanted}."
            )
        return self._read(name, columns)

    def _read(self, name: str, columns: bool = False) -> torch.Tensor:
        """Return a float32 copy of a stored tensor."""
        reader = self.found.reader
        info = reader.info(name)
        torch_dtype(info, repr(name))
        stored = reader.tensor(name)
        stored = stored.T if columns else stored
        tensor = torch.empty(stored.shape, dtype=torch.float32, device=self.device)
        tensor.copy_(stored)
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise DegenerateHeadError(
                f"{info.file}: tensor {name!r} holds {n_bad} NaN or infinite values. The "
                "checkpoint is damaged, or its training diverged."
            )
        return tensor

    def _warn_of_other_size(self, embedding: torch.Tensor, unembedding: torch.Tensor) -> None:
        found = self.found
        if len(embedding) != len(unembedding):
            warn_user(
                f"{found.reader.label}: the unembedding {found.unembedding!r} has "
                f"{len(unembedding)} tokens, and the embedding {found.embedding!r} has "
                f"{len(embedding)}; both are kept as they are."
            )
