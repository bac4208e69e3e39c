"""What the page says in words: statements no stronger than the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skhead._report.data import Analysis
from skhead._report.operations import operation_words
from skhead._report.roles import roles_words
from skhead._report.text import listed, number

__all__ = ["READS", "composition_words", "notes", "summary_words"]

#: Signed identity scores from which a head leans to, and comes close to, copying or erasing.
_LEANS, _CLOSE = 0.4, 0.75
READS = {"OQ": "queries", "OK": "keys", "OV": "values"}

Numbers = Mapping[str, Any]


def summary_words(analysis: Analysis, numbers: Numbers) -> list[str]:
    """Paragraphs on what stands out, most important first."""
    kernel = numbers["projection_kernel"]
    paragraphs = [_against_random(kernel)]
    if not all(found["constant"] for found in kernel.values()):
        paragraphs.insert(0, _strongest(analysis, numbers) + _hubs(analysis, numbers))
    paragraphs.append(_outstanding(numbers["nulls"]))
    if numbers["composition"] is not None:
        paragraphs.append(_composition(numbers["composition"]))
    if numbers["within_head"] is not None:
        paragraphs.append(_within_head(numbers["within_head"]))
    if analysis.cards is not None:
        paragraphs.append(roles_words(analysis.cards))
    if analysis.operations is not None:
        paragraphs.append(operation_words(analysis.operations))
    paragraphs.append(
        "All of this is read from weights. It shows which heads could pass information to each "
        "other, not whether they do so on any text."
    )
    return [paragraph for paragraph in paragraphs if paragraph]


def _against_random(kernel: Numbers) -> str:
    constant = [pair for pair, found in kernel.items() if found["constant"]]
    sentences = []
    if constant:
        what = "Every pair kind" if len(constant) == len(kernel) else listed(constant)
        sentences.append(
            f"{what} has one value for all pairs, {number(kernel[constant[0]]['mean'])}: the heads "
            "span so much of the residual stream that the overlap follows from their ranks. No "
            "pair stands above the random reference here, and the projection kernel can neither "
            "show nor rule out a circuit."
        )
    free = {pair: found for pair, found in kernel.items() if not found["constant"]}
    if free:
        chance = {number(found["null_mean"]) for found in free.values()}
        means = [
            f"{number(found['mean'])} for {pair} ({number(found['mean'] / found['null_mean'], 3)} "
            "times " + ("that)" if len(chance) == 1 else f"{number(found['null_mean'])})")
            for pair, found in free.items()
        ]
        random = chance.pop() if len(chance) == 1 else "the amount given in brackets"
        sentences.append(
            f"Random subspaces of these ranks overlap by {random} on average. Here the mean is "
            f"{listed(means)}."
        )
    for pair, found in kernel.items():
        if not found["constant"] and found["above"] == 0:
            sentences.append(
                f"No {pair} pair stands more than three standard deviations above the random "
                "reference; this does not rule out a circuit."
            )
    return " ".join(sentences)


def _outstanding(nulls: Numbers) -> str:
    """Pairs that overlap more than the bulk of the model's own pairs."""
    calls = nulls["laws"]["empirical"]["calls"]
    if not calls:
        return ""
    told = [f"{found['more']:,} of {found['pairs']:,} for {pair}" for pair, found in calls.items()]
    return (
        f"Measured by how this model's own pairs scatter (null empirical, {100 * nulls['fdr']:g}% "
        f"false discovery rate), the pairs that stand out with more overlap are {listed(told)}."
    )


def _strongest(analysis: Analysis, numbers: Numbers) -> str:
    kernel = numbers["projection_kernel"]
    best = [
        edge
        for edge in numbers["top_pairs"]
        if edge["rank"] == 1 and not kernel[edge["pair"]]["constant"]
    ]
    told = [
        f"{edge['pair']} {_named(analysis, edge['source'])} → {_named(analysis, edge['target'])} "
        f"({number(edge['score'])}, {number(edge['ratio'], 3)} × random)"
        for edge in sorted(best, key=lambda edge: -edge["ratio"])
    ]
    verb = "overlaps are" if len(told) > 1 else "overlap is"
    return f"The largest {verb} {listed(told)}. "


def _named(analysis: Analysis, label: str) -> str:
    """A head with its class, where it has one."""
    name = analysis.table["class"][label] if analysis.classes is not None else "None"
    return label if name == "None" else f"{label} ({name})"


def _hubs(analysis: Analysis, numbers: Numbers) -> str:
    hubs, total = numbers["hubs"], len(analysis.edges)
    above = int(analysis.edges["above"].sum())
    text = ""
    if above < total:
        text = (
            f"Of the {total} edges drawn, {above} lie more than three standard deviations above "
            "random; the others are dashed. "
        )
    if len(hubs) < 3 or above * 2 < total:
        return text
    first, second = hubs[:2]
    text += f"{first['label']} takes part in {first['degree']} of the {total} edges"
    if second["degree"] == first["degree"]:
        text += f", as does {second['label']}"
    elif second["degree"] * 2 > first["degree"]:
        text += f", followed by {second['label']} with {second['degree']}"
    else:
        text += (
            f", at least twice as many as any other head ({second['label']}, {second['degree']})"
        )
    classes = numbers["classes"]
    if classes is not None:
        text += (
            f". Of the {classes['nodes']} heads with an edge, {classes['in_class']} carry a class "
            f"in {classes['set']}"
        )
    return text + "."


def _composition(composition: Numbers) -> str:
    chance = next(iter(composition.values()))["chance"]
    below = {pair: found for pair, found in composition.items() if found["above_chance"] == 0}
    sentences = []
    if len(below) < len(composition):
        largest = [
            f"{number(found['max'], 3)} for {pair}"
            for pair, found in composition.items()
            if pair not in below
        ]
        sentences.append(
            f"The largest composition score is {listed(largest)}, against {number(chance, 3)} for "
            "random maps."
        )
    if below:
        values = [f"{pair} at most {number(found['max'], 2)}" for pair, found in below.items()]
        sentences.append(
            f"No pair composes above the random {number(chance, 3)} in {listed(list(below))} "
            f"({listed(values)}). Composition below chance does not rule out a circuit: the score "
            "weighs directions by gain, and a head may work through directions of small gain."
        )
    shared = [
        f"{found['shared_top']} of {found['top']} for {pair}"
        for pair, found in composition.items()
        if found["pairs"] > found["top"]
    ]
    if shared:
        sentences.append(
            "The strongest pairs by composition are also among the strongest by overlap in "
            f"{listed(shared)}."
        )
    return " ".join(sentences)


def _within_head(within: Numbers) -> str:
    if within["constant"]:
        return ""
    first = within["top"][0]
    signed = first["identity_signed"]
    what = "copying what it reads" if signed > 0 else "writing the negative of what it reads"
    if abs(signed) < _LEANS:
        meaning = "so that it neither copies nor erases that subspace as a whole"
    else:
        meaning = (
            f"so that it {'comes close to' if abs(signed) > _CLOSE else 'leans towards'} {what}"
        )
    return (
        f"Within single heads, {first['label']} writes back to the subspace that it reads values "
        f"from most completely: PK(V,O) is {number(first['pk_vo'])} of {first['largest']} possible "
        f"(random {number(first['expected'])}), its signed identity score {number(signed, 3)}, "
        f"{meaning}."
    )


def composition_words(composition: Numbers, d_model: int) -> str:
    """What the composition section says before its drawings."""
    chance = next(iter(composition.values()))["chance"]
    return (
        "The composition score weighs directions by their gain, where the projection kernel "
        f"counts shared directions alike. Independent isotropic maps have 1/√{d_model} = "
        f"{number(chance)}, drawn as a dashed line. A score on either side of the line is no "
        "proof: high composition does not show that a circuit exists, and low composition does "
        "not rule one out."
    )


def notes(analysis: Analysis, numbers: Numbers) -> list[str]:
    """What a reader must know to read the page right: scope, sharing, processing, labels."""
    info, source = analysis.info, numbers["source"]
    found = []
    if analysis.scope == "all":
        found.append(
            "All heads with attention weights are in one layer, so that no head lies before "
            "another: every head is compared with every head, itself included. Such a pair is no "
            "path of information."
        )
    if analysis.scope == "shared":
        found.append(
            f"All {info.n_layers} layers use one set of weights, so that comparing all layers "
            "would repeat every pair many times. One use (labelled layer 0) is compared with the "
            "next (layer 1), which stands for every pair of layers."
        )
    if info.shared_layers and analysis.scope != "shared":
        found.append("Some layers share their weights, so that equal pairs come up several times.")
    if info.n_kv_heads < info.n_heads:
        found.append(
            f"Groups of {info.n_heads // info.n_kv_heads} query heads share their keys and values; "
            "heads of one group have equal OK and OV overlaps and stand side by side in the lists."
        )
    if info.part == "cross":
        found.append(
            "Cross-attention reads keys and values from the encoder's stream and writes to the "
            "decoder's: only what is written can be held against later queries (OQ)."
        )
    record = numbers["comparison"]["record"]
    if record["fold_norm"] or record["center"]:
        found.append(
            "The weights were processed before comparing (see below). Folding and centring change "
            "rankings; do not hold these numbers against those of raw weights."
        )
    classes = numbers["classes"]
    if classes is not None:
        how = (
            "chosen because family and shape of the model fit; a retrained model may differ"
            if classes["automatic"] and analysis.info.family == "gpt2"
            else "chosen with the bundled model"
            if classes["automatic"]
            else "as asked for"
        )
        found.append(
            f"Class labels: {classes['set']}, {classes['origin']}; {how}. "
            f"{classes['labelled_heads']} heads carry a label."
        )
    ranks = source["numerical_ranks"]
    uneven = [role for role, (low, high) in ranks.items() if low != high]
    if uneven:
        found.append(
            "The numerical rank differs between heads in "
            f"{listed([f'W_{role}' for role in uneven])}; the random reference drawn is the "
            "mixture over all pairs, and every ratio uses its own pair's ranks."
        )
    return found
