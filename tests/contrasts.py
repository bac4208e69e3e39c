"""Pairs of queries and keys with features that are known."""

from __future__ import annotations

import numpy as np

from skhead import QKPairs

R1, R2 = 3, 5


def codes(latents):
    """One number for each combination of signs."""
    return (latents > 0) @ (2 ** np.arange(latents.shape[-1]))


def matched_head(d_head=16, seed=0, strength=2.0):
    """Maps of both latents into queries and keys such that ``q @ k = strength * z* @ z``."""
    rng = np.random.default_rng(seed)
    into_keys = rng.normal(size=(R1 + R2, d_head))
    return strength * np.linalg.pinv(into_keys).T, into_keys


def feature_pairs(n_queries=400, context=12, d_head=16, seed=0, grouped=True, noise=0.0, **fields):
    """Contexts of keys with two latents of random signs; the query looks for those of one key."""
    rng = np.random.default_rng(seed)
    into_queries, into_keys = matched_head(d_head)
    z = rng.choice([-1.0, 1.0], size=(n_queries, context, R1 + R2))
    asked = z[:, 0]
    first, second = codes(z[..., :R1]), codes(z[..., R1:])
    labels = np.stack([first, second], axis=-1)
    queries, keys = asked @ into_queries, (z @ into_keys).reshape(-1, d_head)
    return QKPairs(
        queries + noise * rng.normal(size=queries.shape),
        keys + noise * rng.normal(size=keys.shape),
        np.repeat(np.arange(n_queries), context),
        labels[:, 0],
        labels.reshape(-1, 2),
        key_groups=labels[..., ::-1].reshape(-1, 2) if grouped else None,
        features=("z1", "z2"),
        **fields,
    )


def mapped(pairs, matrix):
    """The same head in another basis of its space: every score ``q @ k`` stays."""
    inverse = np.linalg.inv(matrix)
    return pairs_with(pairs, pairs.queries @ matrix, pairs.keys @ inverse.T)


def pairs_with(pairs, queries, keys, order=None):
    """The same labels with other queries and keys, features in another order."""
    columns = [0, 1] if order is None else order
    return QKPairs(
        queries,
        keys,
        pairs.query_index,
        pairs.query_labels[:, columns],
        pairs.key_labels[:, columns],
        None if pairs.key_groups is None else pairs.key_groups[:, columns],
        [pairs.features[c] for c in columns],
        scale=pairs.scale,
    )


def random_map(d_head=16, condition=30.0, seed=5):
    """An invertible map of a head's space."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(d_head, d_head)))
    right, _ = np.linalg.qr(rng.normal(size=(d_head, d_head)))
    return left * np.geomspace(1, condition, d_head) @ right


def one_kind_each(pairs):
    """Arguments of ``fit_pairs`` for the first feature: pairs that agree, and that differ."""
    one = pairs.feature("z1")
    kinds = one.agreement[:, 0]
    q, k = one.queries[one.query_index], one.keys
    return q[kinds == 1], k[kinds == 1], q[kinds == 0], k[kinds == 0]
