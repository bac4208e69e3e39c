"""Pages on one model's attention heads and on what differs between two, with numbers beside."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from skhead._base import check_option
from skhead._devices import check_device
from skhead._report.comparison import BASES, compare
from skhead._report.comparison_page import render_comparison
from skhead._report.data import Options, analyse
from skhead._report.files import write_comparison_files, write_files
from skhead._report.numbers import summarize, summarize_comparison
from skhead._report.page import render
from skhead.calibration import NULLS

__all__ = ["write_comparison", "write_report"]


def write_report(
    source: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    revision: str | None = None,
    part: str | None = None,
    k: int = 20,
    labels: str | PathLike[str] | None = None,
    fold_norm: bool = False,
    center: bool = False,
    null: str = "anisotropic",
    composition: bool = True,
    cards: bool = True,
    max_memory: int | str = "1GiB",
    device: str | None = None,
    operations: Any = None,
    tokenizer: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write ``report.html`` and its tables on the attention heads of one model.

    The page is one file that loads nothing else. Beside it lie ``edges.csv``, ``heads.csv``,
    ``pairs.csv`` (up to two million rows), ``graph.graphml`` and ``summary.json``. The same input
    gives the same bytes.

    Parameters
    ----------
    source : str or path-like
        Anything that `load_heads` takes, one model.
    directory : str or path-like
        Where to write; made if it does not exist.
    revision : str, optional
        Branch, tag or commit of a hub repository.
    part : {"encoder", "decoder", "cross"}, optional
        Which heads of an encoder-decoder.
    k : int, default=20
        Edges of each pair kind.
    labels : str or path-like, optional
        Classes of heads: ``"wang2022"``, ``"yamagiwa2026"``, ``"induction-2l"``, ``"none"``, or a
        CSV file with columns ``layer, head, class``. By default a set is taken where one fits: the
        bundled model's own, and "yamagiwa2026" for a GPT-2 of 12 layers, 12 heads and d_model 768.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    null : {"haar", "gaussian", "anisotropic", "signflip", "empirical"}, default="anisotropic"
        Null law that the edges are held against; see `NullCalibrator`.
    composition : bool, default=True
        Also compute composition scores.
    cards : bool, default=True
        Also score what single heads do, as `CircuitScorer` does, and give every head a card. In a
        model of more than 200 heads, those of the diagram and those of largest scores have one.
    max_memory : int or str, default="1GiB"
        Scratch that each comparison may use.
    device : str, optional
        Where to compute.
    operations : str, path-like, sequence of str, mapping or OperationMapper, default=None
        Also score which operations on tokens heads carry out or suppress, as `OperationMapper`
        does: ``"all"`` of `skhead.datasets.list_operations` and ``"token_copying"``, the names of
        some (in a text, with commas between), a path for `skhead.datasets.load_operations`, pairs
        by name, or an estimator with settings of its own. Without an MLP in the first block heads
        are taken to read embeddings, which the page says.
    tokenizer : tokenizer, path or callable, default=None
        Turns the words of operations into tokens, as for `OperationMapper`. By default it is read
        from files beside the model: ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, or
        ``tokens.json``, the list of the texts of all tokens.
    progress : callable, optional
        Told one line at the start of every stage.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    SkheadError
        If the model cannot be read, or the labels do not fit it.
    ValueError
        If `k` is not a positive integer, the null law is unknown, the device cannot be used, no
        operation keeps enough pairs of single tokens, or another option does not apply.

    Examples
    --------
    >>> import tempfile
    >>> from skhead.report import write_report
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     page = write_report("skhead/induction-2l", directory, k=5)
    ...     print(page.name, page.stat().st_size < 3_000_000)
    report.html True
    """
    _check(k, null, device, "write_report")
    stage = progress if progress is not None else _quiet
    options = Options(
        revision=revision,
        part=part,
        k=int(k),
        labels=None if labels is None else str(labels),
        fold_norm=fold_norm,
        center=center,
        null=null,
        composition=composition,
        cards=cards,
        max_memory=max_memory,
        device=device,
        operations=operations,
        tokenizer=tokenizer,
    )
    analysis = analyse(source, options, stage)
    stage("writing the page")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    numbers = summarize(analysis)
    page = target / "report.html"
    page.write_text(
        render(analysis, numbers, write_files(analysis, numbers, target)), encoding="utf-8"
    )
    return page


def write_comparison(
    first: str | PathLike[str],
    second: str | PathLike[str] | None,
    directory: str | PathLike[str],
    *,
    revision: str | None = None,
    revision_b: str | None = None,
    part: str | None = None,
    k: int = 20,
    labels: str | PathLike[str] | None = None,
    fold_norm: bool = False,
    center: bool = False,
    fold_norm_b: bool | None = None,
    center_b: bool | None = None,
    bases: str = "auto",
    null: str = "empirical",
    max_memory: int | str = "1GiB",
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write ``compare.html`` and its tables on two models, or on one in two ways.

    Revisions and processings of one model share a residual stream, and are compared head by head:
    how far every subspace has moved, norms and circuit scores, the overlaps of all pairs, and which
    edges appear or vanish. Models that were trained apart share none: a direction of one means
    nothing in the other. Of these the page compares what every head is within its own model, and
    says why it leaves out the rest.

    Beside the page lie ``compare.csv`` (one row per head), ``summary.json`` and, where heads are
    compared one by one, ``compare_edges.csv``.

    Parameters
    ----------
    first : str or path-like
        Model A: anything that `load_heads` takes, one model.
    second : str, path-like or None
        Model B; None for A itself, in another revision or processing.
    directory : str or path-like
        Where to write; made if it does not exist.
    revision, revision_b : str, optional
        Branch, tag or commit of a hub repository, of A and B.
    part : {"encoder", "decoder", "cross"}, optional
        Which heads of encoder-decoders.
    k : int, default=20
        Edges of each pair kind that degrees and shared top pairs count.
    labels : str or path-like, optional
        Classes of heads, of both; as for `write_report`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`, of A.
    fold_norm_b, center_b : bool, optional
        The same of B; as for A by default.
    bases : {"auto", "shared", "unrelated"}, default="auto"
        Whether A and B have one residual stream. By default they have if they are of one source, or
        if more heads of A than by chance write closest to what the same head of B writes.
    null : {"haar", "gaussian", "anisotropic", "signflip", "empirical"}, default="empirical"
        Null law that tells which edges there are; see `NullCalibrator`.
    max_memory : int or str, default="1GiB"
        Scratch that each comparison may use.
    device : str, optional
        Where to compute.
    progress : callable, optional
        Told one line at the start of every stage.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    SkheadError
        If a model cannot be read, or the labels do not fit it.
    ValueError
        If A and B are the same in every way, `bases` says "shared" of models that differ in shape,
        or another option does not apply.

    Examples
    --------
    >>> import json
    >>> import tempfile
    >>> from skhead.report import write_comparison
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     page = write_comparison("skhead/induction-2l", None, directory, center_b=True)
    ...     found = json.loads(page.with_name("summary.json").read_text())
    >>> found["head_by_head"], found["mean_distances"]["O"] < 0.1
    (True, True)
    """
    name = "write_comparison"
    _check(k, null, device, name)
    check_option("bases", bases, BASES, name)
    shared: dict[str, Any] = {
        "part": part,
        "k": int(k),
        "labels": None if labels is None else str(labels),
        "null": null,
        "max_memory": max_memory,
        "device": device,
    }
    ways = (
        (revision, fold_norm, center),
        (
            revision_b if revision_b is not None or second is not None else revision,
            fold_norm if fold_norm_b is None else fold_norm_b,
            center if center_b is None else center_b,
        ),
    )
    other = first if second is None else second
    if str(first) == str(other) and ways[0] == ways[1]:
        raise ValueError(
            f"{name}: {first} would be compared with itself; name a second model, another revision "
            "(revision_b), or another processing (fold_norm_b, center_b)"
        )
    options = tuple(
        Options(revision=way[0], fold_norm=way[1], center=way[2], **shared) for way in ways
    )
    stage = progress if progress is not None else _quiet
    found = compare((first, other), (options[0], options[1]), bases, stage)
    stage("writing the page")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    downloads = write_comparison_files(found, summarize_comparison(found), target)
    page = target / "compare.html"
    page.write_text(render_comparison(found, downloads), encoding="utf-8")
    return page


def _check(k: Any, null: str, device: str | None, caller: str) -> None:
    if isinstance(k, bool) or not isinstance(k, Real) or k % 1 or k < 1:
        raise ValueError(f"{caller}: k must be a positive integer, got {k!r}")
    check_option("null", null, NULLS, caller)
    check_device(device, caller)


def _quiet(line: str) -> None:
    """Take a stage's line and say nothing."""
