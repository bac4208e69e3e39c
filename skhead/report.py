"""The report: one page on how a model's attention heads are wired, with its numbers beside it."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from skhead._base import check_option
from skhead._devices import check_device
from skhead._report.data import Options, analyse
from skhead._report.files import write_files
from skhead._report.numbers import summarize
from skhead._report.page import render
from skhead.calibration import NULLS

__all__ = ["write_report"]


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
        model of more than 400 heads, those of the diagram and those of largest scores have one.
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
    if isinstance(k, bool) or int(k) != k or k < 1:
        raise ValueError(f"write_report: k must be a positive integer, got {k!r}")
    check_option("null", null, NULLS, "write_report")
    check_device(device, "write_report")
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


def _quiet(line: str) -> None:
    """Take a stage's line and say nothing."""
