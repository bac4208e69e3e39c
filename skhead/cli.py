"""The command line: ``skhead report``, ``skhead compare`` and ``skhead demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from skhead import __version__
from skhead.exceptions import SkheadError

__all__ = ["main"]

_DEMO = "skhead/induction-2l"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; those of the process by default.

    Returns
    -------
    int
        0, or 2 where the input or an option is at fault, which is said in one line on stderr.

    Examples
    --------
    >>> import tempfile
    >>> from skhead.cli import main
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     main(["demo", "-o", directory])  # doctest: +ELLIPSIS
    /...report.html
    0
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (SkheadError, ValueError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"skhead: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _report(arguments: argparse.Namespace) -> int:
    from skhead.report import write_report

    page = write_report(
        arguments.source,
        arguments.output,
        revision=arguments.revision,
        part=arguments.part,
        k=arguments.k,
        labels=arguments.labels,
        fold_norm=arguments.fold_norm,
        center=arguments.center,
        null=arguments.null,
        composition=arguments.composition,
        cards=arguments.cards,
        max_memory=arguments.max_memory,
        device=arguments.device,
        operations=arguments.operations,
        tokenizer=arguments.tokenizer,
        progress=_say,
    )
    print(page)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from skhead.report import write_comparison

    page = write_comparison(
        arguments.source,
        arguments.second,
        arguments.output,
        revision=arguments.revision,
        revision_b=arguments.revision_b,
        part=arguments.part,
        k=arguments.k,
        labels=arguments.labels,
        fold_norm=arguments.fold_norm,
        center=arguments.center,
        fold_norm_b=arguments.fold_norm or arguments.fold_norm_b,
        center_b=arguments.center or arguments.center_b,
        bases=arguments.bases,
        null=arguments.null,
        max_memory=arguments.max_memory,
        device=arguments.device,
        progress=_say,
    )
    print(page)
    return 0


def _say(line: str) -> None:
    print(f"skhead: {line}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skhead",
        description="How a transformer's attention heads are wired, read from its weights alone.",
    )
    parser.add_argument("--version", action="version", version=f"skhead {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write a page on one model",
        description="Write DIR/report.html on one model, tables beside it; print its path.",
    )
    report.set_defaults(run=_report)
    compare = commands.add_parser(
        "compare",
        help="write a page on what differs between two models or processings",
        description="Write DIR/compare.html on two models, or on one in two revisions or "
        "processings, tables beside it; print its path.",
    )
    compare.set_defaults(run=_compare)
    for command in (report, compare):
        _add_model(command)
    _add_second(compare)
    report.add_argument(
        "--operations",
        metavar="NAMES|PATH",
        help="score operations on tokens: all, names with commas between, or the path of a CSV "
        "file, of a directory of JSON files or of a MAPS checkout (default: none)",
    )
    report.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="of the operations' words: a tokenizer.json, a tokens.json, or the directory of one "
        "(default: beside the model)",
    )
    demo = commands.add_parser(
        "demo",
        help="write a page on the small bundled model",
        description="Write a report on the small bundled model; print its path.",
    )
    demo.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="skhead-demo",
        help="where to write (default: %(default)s)",
    )
    demo.set_defaults(
        source=_DEMO, revision=None, part=None, labels=None, fold_norm=False, center=False,
        operations=None, tokenizer=None, run=_report,
    )  # fmt: skip
    for command in (report, demo):
        _add_pieces(command)
    for command, null in ((report, "anisotropic"), (demo, "anisotropic"), (compare, "empirical")):
        _add_common(command, null)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a directory in Hugging Face layout, a .safetensors file, a hub id, or a bundled name",
    )
    command.add_argument("-o", "--output", metavar="DIR", required=True, help="where to write")
    command.add_argument("--revision", help="branch, tag or commit of a hub repository")
    command.add_argument(
        "--part", choices=("encoder", "decoder", "cross"), help="of an encoder-decoder"
    )
    command.add_argument(
        "--labels",
        metavar="NAME|CSV",
        help="classes of heads: wang2022, yamagiwa2026, induction-2l, none, or a CSV file with the "
        "columns layer, head, class (default: a set that fits the model, if there is one)",
    )
    command.add_argument(
        "--fold-norm", action="store_true", help="fold norm gains into the weights"
    )
    command.add_argument("--center", action="store_true", help="centre the weights over d_model")


def _add_second(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "second",
        metavar="SOURCE_B",
        nargs="?",
        help="the second model (default: the first, in another revision or processing)",
    )
    compare.add_argument("--revision-b", metavar="REVISION", help="of the second model")
    compare.add_argument(
        "--fold-norm-b", action="store_true", help="fold norm gains into the second model only"
    )
    compare.add_argument("--center-b", action="store_true", help="centre the second model only")
    compare.add_argument(
        "--bases",
        default="auto",
        metavar="NAME",
        help="whether both have one residual stream: auto, shared or unrelated (default: "
        "%(default)s, which asks the weights)",
    )


def _add_pieces(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-composition",
        dest="composition",
        action="store_false",
        help="leave out the composition scores",
    )
    command.add_argument(
        "--no-cards",
        dest="cards",
        action="store_false",
        help="leave out the scores and cards of single heads",
    )


def _add_common(command: argparse.ArgumentParser, null: str) -> None:
    command.add_argument(
        "--k", type=_positive, default=20, help="edges of each pair kind (default: %(default)s)"
    )
    command.add_argument(
        "--null",
        default=null,
        metavar="NAME",
        help="null law of the edges: haar, gaussian, anisotropic, signflip or empirical (default: "
        "%(default)s)",
    )
    command.add_argument(
        "--max-memory",
        default="1GiB",
        metavar="SIZE",
        help="scratch that each comparison may use (default: %(default)s)",
    )
    command.add_argument("--device", help="where to compute, such as cpu or cuda:0")
    command.add_argument("--traceback", action="store_true", help="show where an error arose")
