"""Orthonormal bases of what heads read and write, as they flow between estimators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._frozen import Frozen, row_positions
from skhead._html import Listing, ShowsSummary, Summary, models_of, processing, span
from skhead.exceptions import HeadShapeError
from skhead.linalg.stacks import Stack, dense

__all__ = ["RoleBases", "Subspaces"]


@dataclass(frozen=True, eq=False)
class RoleBases(Frozen):
    """Orthonormal bases of one role: each distinct basis once, and which head uses which.

    Attributes
    ----------
    vectors : Tensor or StoredStack of shape (n_distinct, d_model, max_rank)
        Orthonormal columns; those past the rank are zero. Bases that lie in a cache are read when
        they are used.
    ranks : ndarray of shape (n_distinct,), int64
    index : ndarray of shape (n_heads,), int64
        Row of `vectors` that each head uses: grouped-query heads share keys and values, and layers
        may share all their weights.
    """

    vectors: Stack
    ranks: NDArray[np.int64]
    index: NDArray[np.int64]

    @property
    def tensor(self) -> torch.Tensor:
        """`vectors` in memory, all of them."""
        return dense(self.vectors)

    @property
    def place(self) -> str:
        """The device that holds the bases, or "cache" if they are read from there."""
        return str(self.vectors.device) if isinstance(self.vectors, torch.Tensor) else "cache"

    def take(self, rows: NDArray[np.int64]) -> RoleBases:
        """Bases of some of the heads, without those that none of them uses."""
        used, index = np.unique(self.index[rows], return_inverse=True)
        vectors = self.vectors
        part: Stack
        if isinstance(vectors, torch.Tensor):
            part = vectors[torch.as_tensor(used, device=vectors.device)]
        else:
            part = vectors.take(used)
        return RoleBases(part, self.ranks[used], index.astype(np.int64))

    def __repr__(self) -> str:
        return (
            f"RoleBases({len(self.index)} heads, {len(self.ranks)} distinct bases, ranks "
            f"{span(self.ranks)}, {self.place})"
        )

    @staticmethod
    def _thaw(name: str, value: Any) -> Any:
        in_memory = name == "vectors" and isinstance(value, np.ndarray)
        return torch.from_numpy(value) if in_memory else value


@dataclass(frozen=True, eq=False)
class Subspaces(ShowsSummary, Frozen):
    """Orthonormal bases of the subspaces that heads read from and write to.

    Made by `SubspaceExtractor`; indexing selects heads.

    Attributes
    ----------
    heads : DataFrame
        Heads table, one row per head.
    bases : mapping of str to RoleBases
        One entry per role.
    record : mapping
        How the weights were processed: ``fold_norm``, ``center``, ``rank``.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    >>> subspaces
    Subspaces(16 heads, roles Q K V O, d_model 128, ranks 16)
    >>> subspaces.numpy("O").shape
    (16, 128, 16)
    """

    heads: pd.DataFrame
    bases: Mapping[str, RoleBases]
    record: Mapping[str, Any]

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have bases, in order."""
        return tuple(self.bases)

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return int(next(iter(self.bases.values())).vectors.shape[1])

    @property
    def rereadable(self) -> bool:
        """Whether the weights can be read again from where the heads table says they are."""
        return bool((self.heads["layer"] >= 0).all())

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_heads, d_model)``."""
        return len(self), self.d_model

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, key: Any) -> Subspaces:
        rows = row_positions(key, len(self))
        bases = {role: basis.take(rows) for role, basis in self.bases.items()}
        return replace(self, heads=self.heads.iloc[rows], bases=bases)

    def role(self, role: str) -> RoleBases:
        """Bases of one role.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        RoleBases

        Raises
        ------
        HeadShapeError
            If the role was not extracted.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> subspaces = skhead.SubspaceExtractor().fit_transform(heads)
        >>> subspaces.role("K")
        RoleBases(16 heads, 16 distinct bases, ranks 16, cpu)
        """
        if role not in self.bases:
            raise HeadShapeError(
                f"Subspaces holds the roles {' '.join(self.roles)}, not {role!r}; "
                f"extract it with SubspaceExtractor(roles=...)"
            )
        return self.bases[role]

    def ranks(self, role: str) -> NDArray[np.int64]:
        """Rank of every head's subspace.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        ndarray of shape (n_heads,), int64

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> subspaces = skhead.SubspaceExtractor().fit_transform(heads)
        >>> subspaces.ranks("Q")[:4].tolist()
        [16, 16, 16, 16]
        """
        basis = self.role(role)
        return basis.ranks[basis.index]

    def numpy(self, role: str) -> NDArray[np.floating]:
        """Bases of every head.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        ndarray of shape (n_heads, d_model, max_rank)
            Orthonormal columns; those past a head's rank are zero.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> subspaces = skhead.SubspaceExtractor().fit_transform(heads)
        >>> import numpy as np
        >>> bases = subspaces.numpy("O")
        >>> bool(np.allclose(bases[3].T @ bases[3], np.eye(16), atol=1e-5))
        True
        """
        basis = self.role(role)
        return basis.tensor.cpu().numpy()[basis.index]

    def _summary(self) -> Summary:
        layers = self.heads.loc[self.heads["layer"] >= 0, "layer"]
        facts = {
            "heads": f"{len(self):,}",
            "models": models_of(self.heads),
            "layers": span(layers),
            "d_model": f"{self.d_model:,}",
            "weights": processing(self.record),
        }
        roles = [
            {
                "role": role,
                "bases": len(basis.ranks),
                "rank": span(self.ranks(role)),
                "number format": str(basis.vectors.dtype).removeprefix("torch."),
                "kept": basis.place,
            }
            for role, basis in self.bases.items()
        ]
        return Summary(facts, [Listing("distinct bases by role", pd.DataFrame(roles))])

    def __repr__(self) -> str:
        ranks = np.concatenate([basis.ranks for basis in self.bases.values()])
        if not ranks.size:
            return f"Subspaces(0 heads, roles {' '.join(self.roles)}, d_model {self.d_model})"
        return (
            f"Subspaces({len(self)} heads, roles {' '.join(self.roles)}, "
            f"d_model {self.d_model}, ranks {span(ranks)})"
        )
