"""What a report says, computed once: kernels, scores, hubs and edges of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._report.chance import CONSTANT, STANDS_OUT, Verdict, hold_against_nulls
from skhead._report.classes import Guess, guess_from_labels, guess_from_zoo
from skhead._report.induction import InductionPairs, find_induction
from skhead._report.labels import HeadClasses, find_classes
from skhead._report.operations import HeadOperations, operation_mapper, score_operations
from skhead._report.scores import HeadScores, score_heads
from skhead._report.tokens import Nearest, nearest_tokens
from skhead._report.verdicts import Rule, called, rules_for
from skhead.circuits import identity_scores
from skhead.containers import CALIBRATED, Similarity, Subspaces
from skhead.exceptions import HeadTableError
from skhead.extraction import SubspaceExtractor
from skhead.graph import hub_table
from skhead.kernels import CompositionScore, ProjectionKernel
from skhead.weights import SourceInfo, describe_sources, head_labels, load_heads

__all__ = [
    "MOST_CARDS",
    "Analysis",
    "Cards",
    "Options",
    "analyse",
    "expected_of",
    "named_after_null",
    "ratios_of",
    "scores_of",
]

#: Heads up to which every one gets a card; of more, those of the diagram and some by score.
MOST_CARDS = 200
#: Heads of every rule that get a card in a large model.
_BEST = 6


@dataclass(frozen=True)
class Options:
    """What the user may choose about a report; see `skhead.report.write_report`."""

    revision: str | None = None
    part: str | None = None
    k: int = 20
    labels: str | None = None
    fold_norm: bool = False
    center: bool = False
    null: str = "anisotropic"
    composition: bool = True
    cards: bool = True
    max_memory: int | str = "1GiB"
    device: str | None = None
    operations: Any = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Cards:
    """What single heads do.

    Attributes
    ----------
    scores : HeadScores
        Of every head that is compared.
    rules : tuple of Rule
        Those that the model's file allows to judge.
    verdicts : dict of str to tuple of Rule
        By label, the rules that hold.
    labels : tuple of str
        Heads that have a card, in table order.
    tokens : Nearest
        Of heads that have a card.
    """

    scores: HeadScores
    rules: tuple[Rule, ...]
    verdicts: dict[str, tuple[Rule, ...]]
    labels: tuple[str, ...]
    tokens: Nearest


@dataclass(frozen=True)
class Analysis:
    """Everything that a report is written from.

    Attributes
    ----------
    info : SourceInfo
    options : Options
    n_heads : int
        Heads of the whole model; `heads` may hold fewer.
    heads : DataFrame
        Heads that are compared, indexed by unique label.
    scope : {"forward", "all", "shared"}
        Earlier layers against later ones; all heads against each other; or one use of shared layers
        against the next.
    classes : HeadClasses or None
    subspaces : Subspaces
    kernel : Similarity
        Calibrated by the chosen null law, if that can be computed; the values stay as they are.
    composition : Similarity or None
    verdicts : dict of str to Verdict
        What each null law says, by its name.
    table : DataFrame
        One row per head in table order: degrees, strengths, ranks, circuit scores, class.
    edges : DataFrame
        The k strongest pairs of every kind, with ``expected``, ``ratio``, whether they are
        ``above`` the band of random subspaces, what the chosen null law says of them (columns that
        end in its name, NaN where it says nothing), and their composition scores if computed.
    cards : Cards or None
        If asked for.
    operations : HeadOperations or None
        If asked for.
    guesses : dict of str to Guess
        Probabilities of classes by what they are learned from, "zoo" and "labels"; empty without
        the scores of single heads.
    induction : InductionPairs or None
        If single heads are scored and layers follow each other.
    """

    info: SourceInfo
    options: Options
    n_heads: int
    heads: pd.DataFrame
    scope: str
    classes: HeadClasses | None
    subspaces: Subspaces
    kernel: Similarity
    composition: Similarity | None
    verdicts: dict[str, Verdict]
    table: pd.DataFrame
    edges: pd.DataFrame
    cards: Cards | None
    operations: HeadOperations | None
    guesses: dict[str, Guess]
    induction: InductionPairs | None

    @property
    def carded(self) -> frozenset[str]:
        """Heads that have a card."""
        return frozenset() if self.cards is None else frozenset(self.cards.labels)

    @property
    def within_head(self) -> bool:
        """Whether values are read from the stream that the head writes to."""
        return self.info.part != "cross"


def analyse(
    source: str | PathLike[str], options: Options, stage: Callable[[str], None]
) -> Analysis:
    """Read a model and compute what its report says.

    Parameters
    ----------
    source : str or path-like
        Anything that `load_heads` takes, one model.
    options : Options
    stage : callable
        Told one line at the start of every stage.

    Returns
    -------
    Analysis
    """
    stage(f"reading the headers of {source}")
    everything = load_heads(source, revision=options.revision, part=options.part)
    described = describe_sources(everything)
    if len(described) != 1:
        raise HeadTableError(f"report: describes one model at a time, got {len(described)} sources")
    info = described[0]
    everything.index = pd.Index(head_labels(everything), dtype=object)
    processing: dict[str, Any] = {
        "fold_norm": options.fold_norm,
        "center": options.center,
        "device": options.device,
    }
    mapper = None
    if options.operations is not None:
        own_way = processing | {"max_memory": options.max_memory}
        mapper = operation_mapper(options.operations, options.tokenizer, info, own_way)
    stage(f"extracting the subspaces of {len(everything)} heads")
    subspaces = SubspaceExtractor(**processing).fit_transform(everything)
    kept, scope = _compared(subspaces, info)
    subspaces = subspaces[kept]
    heads = everything.iloc[kept]
    classes = find_classes(options.labels, heads, info)
    operations = None
    if mapper is not None:
        stage("scoring the operations on tokens")
        operations = score_operations(heads, *mapper)
    kernel, composition, verdicts, edges = _pairs(
        heads, subspaces, scope, info, options, processing, stage
    )
    scores, own = _scores(heads, info, options, processing, stage)
    table = _head_table(heads, kernel, subspaces, own, classes, options.k)
    guesses = _guesses(scores, subspaces, classes, info.source, processing, stage)
    for name, guess in guesses.items():
        if guess.probabilities is not None:
            table = table.join(guess.probabilities.add_prefix(f"p_{name}: "))
    induction, cards = None, None
    if scores is not None and scope == "forward" and info.part != "cross":
        stage("looking for pairs of heads that carry out induction")
        induction = find_induction(heads, processing)
    if scores is not None:
        stage("reading the tokens nearest to what heads write")
        cards = _cards(heads, scores, edges, info, processing, operations)
    return Analysis(
        info, options, len(everything), heads, scope, classes, subspaces, kernel, composition,
        verdicts, table, edges, cards, operations, guesses, induction,
    )  # fmt: skip


def _pairs(
    heads: pd.DataFrame,
    subspaces: Subspaces,
    scope: str,
    info: SourceInfo,
    options: Options,
    processing: dict[str, Any],
    stage: Callable[[str], None],
) -> tuple[Similarity, Similarity | None, dict[str, Verdict], pd.DataFrame]:
    """Overlaps and composition of pairs, what null laws say of them, and the strongest pairs."""
    rows, columns = _sides(heads, scope)
    shared: dict[str, Any] = {
        "pairs": ("OQ", "OK", "OV") if info.part != "cross" else ("OQ",),
        "layer_order": "all" if scope == "all" else "forward",
        "max_memory": options.max_memory,
    }
    stage(f"comparing {len(rows)} writing with {len(columns)} reading heads: projection kernel")
    kernel = _fit_apply(ProjectionKernel(**shared, device=options.device), subspaces, rows, columns)
    places = _edge_places(kernel, options.k)
    verdicts, calibration = hold_against_nulls(
        kernel, subspaces, options.null, places, options.k, stage
    )
    kernel = replace(kernel, calibration=calibration)
    composition = None
    if options.composition:
        stage("comparing them again: composition scores")
        estimator = CompositionScore(**shared, **processing)
        composition = _fit_apply(estimator, heads, rows, columns)
    edges = _edge_table(kernel, composition, verdicts[STANDS_OUT], places, options)
    return kernel, composition, verdicts, edges


def _scores(
    heads: pd.DataFrame,
    info: SourceInfo,
    options: Options,
    processing: dict[str, Any],
    stage: Callable[[str], None],
) -> tuple[HeadScores | None, pd.DataFrame | None]:
    """Circuit scores if asked for, and the columns on single heads that the tables show."""
    across = info.part == "cross"
    if options.cards:
        stage("scoring what single heads do")
        scores = score_heads(
            heads,
            across=across,
            composition=options.composition,
            max_memory=options.max_memory,
            processing=processing,
        )
        return scores, scores.table
    if across:
        return None, None
    stage("scoring what single heads do: V against O")
    return None, identity_scores(heads, **processing)


def _guesses(
    scores: HeadScores | None,
    subspaces: Subspaces,
    classes: HeadClasses | None,
    source: str,
    processing: dict[str, Any],
    stage: Callable[[str], None],
) -> dict[str, Guess]:
    """Probabilities of classes by what they are learned from."""
    found = {}
    if scores is not None:
        stage("asking what classes heads may have: zoo of labelled models")
        found["zoo"] = guess_from_zoo(scores, source, processing)
        if classes is not None:
            stage("asking what classes heads may have: labelled heads of this model")
            found["labels"] = guess_from_labels(subspaces, classes)
    return found


def _cards(
    heads: pd.DataFrame,
    scores: HeadScores,
    edges: pd.DataFrame,
    info: SourceInfo,
    processing: dict[str, Any],
    operations: HeadOperations | None,
) -> Cards:
    """Judge every head, and choose those that get a card."""
    composition = "k_composition_in_max" in scores.table
    rules = tuple(
        rule
        for rule in rules_for(info.d_model, info.d_head, composition)
        if not any(condition.score in scores.missing for condition in rule.conditions)
    )
    wanted = set(heads.index)
    if len(heads) > MOST_CARDS:
        wanted = {*edges["source"], *edges["target"]}
        for rule in rules:
            first = rule.conditions[0]
            towards = scores.table[first.score] * (1 if first.threshold > 0 else -1)
            wanted |= set(towards.nlargest(_BEST).index)
        if operations is not None:
            wanted |= set(operations.said())
    labels = tuple(str(label) for label in heads.index if label in wanted)
    tokens = nearest_tokens(heads.loc[list(labels)], processing)
    return Cards(scores, rules, called(scores.table, rules), labels, tokens)


def _compared(subspaces: Subspaces, info: SourceInfo) -> tuple[NDArray[np.int64], str]:
    """Positions of the heads to compare, and the scope.

    Where every layer uses the same weights, two uses stand for all.
    """
    layer = subspaces.heads["layer"].to_numpy()
    layers = np.unique(layer)
    everyone = np.arange(len(subspaces))
    if len(layers) == 1:
        return everyone, "all"
    distinct = max(len(subspaces.role(role).ranks) for role in subspaces.roles)
    if info.shared_layers and distinct <= (layer == layers[0]).sum():
        return np.flatnonzero(np.isin(layer, layers[:2])), "shared"
    return everyone, "forward"


def _sides(heads: pd.DataFrame, scope: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the heads that write and that read; one array where they are the same."""
    if scope != "shared":
        everyone = np.arange(len(heads))
        return everyone, everyone
    first = (heads["layer"] == heads["layer"].min()).to_numpy()
    return np.flatnonzero(first), np.flatnonzero(~first)


def _fit_apply(
    estimator: ProjectionKernel | CompositionScore,
    X: Subspaces | pd.DataFrame,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> Similarity:
    if rows is columns:
        return estimator.fit_transform(X)
    take = X.iloc if isinstance(X, pd.DataFrame) else X
    return estimator.fit(take[columns]).transform(take[rows])


def _head_table(
    heads: pd.DataFrame,
    kernel: Similarity,
    subspaces: Subspaces,
    own: pd.DataFrame | None,
    classes: HeadClasses | None,
    k: int,
) -> pd.DataFrame:
    hubs = hub_table(kernel, k).reindex(heads.index)
    table = heads[["layer", "head", "kv_head"]].copy()
    if classes is not None:
        table["class"] = classes.values.to_numpy()
    for role in subspaces.roles:
        table[f"rank_{role}"] = subspaces.ranks(role)
    hubs = hubs.drop(columns=["layer", "head"])
    table = pd.concat([table, hubs], axis=1)
    if own is not None:
        table = pd.concat([table, own.reindex(heads.index)], axis=1)
    return table


def _edge_places(kernel: Similarity, k: int) -> tuple[NDArray[np.integer], ...]:
    """Row, column and kind of the k strongest pairs of every kind."""
    edges = kernel.top_pairs(k)
    row_of = {label: i for i, label in enumerate(head_labels(kernel.rows))}
    column_of = {label: i for i, label in enumerate(head_labels(kernel.columns))}
    return (
        edges["source"].map(row_of).to_numpy(dtype=np.int64),
        edges["target"].map(column_of).to_numpy(dtype=np.int64),
        np.array([kernel.pairs.index(pair) for pair in edges["pair"]], dtype=np.int64),
    )


def _edge_table(
    kernel: Similarity,
    composition: Similarity | None,
    outstanding: Verdict,
    places: tuple[NDArray[np.integer], ...],
    options: Options,
) -> pd.DataFrame:
    edges = named_after_null(kernel.top_pairs(options.k), options.null)
    rows, columns, kinds = places
    expected = np.broadcast_to(kernel.null_mean, kernel.values.shape)[rows, columns, kinds]
    spread = np.broadcast_to(kernel.null_sd, kernel.values.shape)[rows, columns, kinds]
    scores = edges["score"].to_numpy(dtype=np.float64)
    edges["expected"] = expected
    edges["ratio"] = scores / expected
    edges["above"] = scores - expected > np.maximum(3 * spread, CONSTANT * expected)
    known = outstanding.at_edges
    edges[f"q_{STANDS_OUT}"] = np.nan if known is None else known
    if composition is not None:
        edges["composition"] = composition.values[rows, columns, kinds]
    return edges


def named_after_null(pairs: pd.DataFrame, null: str) -> pd.DataFrame:
    """Pairs with the null law's name in the columns that it gives; NaN where it gives nothing."""
    for name in CALIBRATED:
        column = pairs.pop(name) if name in pairs else np.nan
        pairs[f"{name}_{null}"] = column
    return pairs


def expected_of(similarity: Similarity, pair: str) -> tuple[NDArray[np.floating], ...]:
    """Random mean and standard deviation of every listed pair, in the order of `scores_of`."""
    p = similarity.pairs.index(pair)
    defined = ~np.isnan(similarity.listed(pair))
    shape = similarity.values.shape
    return tuple(
        np.broadcast_to(values, shape)[:, :, p][defined]
        for values in (similarity.null_mean, similarity.null_sd)
    )


def ratios_of(similarity: Similarity, pair: str) -> NDArray[np.floating]:
    """Every listed value over its random mean, in the order of `scores_of`."""
    return scores_of(similarity, pair) / expected_of(similarity, pair)[0]


def scores_of(similarity: Similarity, pair: str) -> NDArray[np.float32]:
    """Every listed value of one pair kind, flat."""
    listed = similarity.listed(pair)
    return listed[~np.isnan(listed)]
