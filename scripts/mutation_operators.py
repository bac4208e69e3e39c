"""The small changes that ``mutation_check.py`` makes: cosmic-ray's, and some that it lacks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider
from parso.python.tree import Keyword, Name

#: Of cosmic-ray's operators, one or two for each sign: with all of them, most mutants of a sum
#: would raise TypeError at once, and the share of the killed would say little.
TAKEN = (
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_FloorDiv",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_Lt_GtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_LtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_Gt_LtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_GtE_Lt",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_Invert",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "NumberReplacer",
    "ZeroIterationForLoop",
)
_PAIRS = (
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("fmin", "fmax"),
    ("clamp_min", "clamp_max"),
    ("floor", "ceil"),
    ("any", "all"),
    ("sin", "cos"),
)
SWAPPED = {**dict(_PAIRS), **{after: before for before, after in _PAIRS}}

#: Names that say how much is done at once and never what comes out: no mutants where they are set.
SCRATCH = frozenset(
    {
        *("_BLOCK", "_CHUNK", "_CLOSE_PAIRS", "_COLUMNS", "_CROSS_COPIES", "_DEVICE_BLOCK_BYTES"),
        *("_DEVICE_CHUNK", "_DEVICE_STEP", "_FIRST_BLOCK", "_GATHERED", "_GROUPS"),
        *(
            "_LARGE_MODEL",
            "_KEPT_BYTES",
            "_LAST_BLOCK",
            "_MOST_ROW_SIZES",
            "_NARROWEST_PANEL",
            "_OUTER",
        ),
        *("_PANEL", "_PANEL_BYTES", "_PROBED", "_ROWS", "_ROW_STEP", "_SCRATCH", "_SHARE"),
        *("_STEP", "_VECTOR", "_WHOLE_ROWS", "_WIDEST_TILE"),
    }
)

Place = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes
    ----------
    file : str
    operator : str
    occurrence : int
        Which of the places that suit the operator, in the order of the file.
    start, end : tuple of int
        Line, from 1, and column of what is changed.
    """

    file: str
    operator: str
    occurrence: int
    start: Place
    end: Place


class _Own(Operator):
    """An operator of ours; cosmic-ray asks for examples of its own only."""

    @classmethod
    def examples(cls):
        """No examples."""
        return ()


class SwapExtremes(_Own):
    """Calls the opposite: ``max`` for ``min``, ``all`` for ``any``."""

    def mutation_positions(self, node):
        """Where names of `SWAPPED` are called."""
        if isinstance(node, Name) and node.value in SWAPPED:
            before, after = node.get_previous_leaf(), node.get_next_leaf()
            if after is not None and after.value == "(" and getattr(before, "value", "") != "def":
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        """The other name."""
        return Name(SWAPPED[node.value], node.start_pos, prefix=node.prefix)


class DropStatement(_Own):
    """Leaves out a call made for its effect, an assignment in place, a check that raises."""

    def mutation_positions(self, node):
        """Where such statements stand."""
        if node.type == "simple_stmt" and self._acts(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    @staticmethod
    def _acts(statement) -> bool:
        if statement.type == "expr_stmt":
            return (
                statement.children[1].type == "operator" and statement.children[1].value != "="
            ) or statement.children[0].get_last_leaf().value == "]"
        if statement.type == "atom_expr":
            return statement.get_last_leaf().value == ")"
        return statement.type == "raise_stmt"

    def mutate(self, node, index):
        """``pass`` instead."""
        first = node.children[0].get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, prefix=first.prefix)
        return node


class ReturnNone(_Own):
    """Returns nothing."""

    def mutation_positions(self, node):
        """Where a value is returned."""
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        """``return None`` instead."""
        node.children[1] = Keyword("None", node.children[1].start_pos, prefix=" ")
        return node


class DropBound(_Own):
    """Slices from the beginning, or to the end."""

    def mutation_positions(self, node):
        """The bounds of slices."""
        if node.type == "subscript":
            for bound in self._bounds(node):
                yield bound.start_pos, bound.end_pos

    @staticmethod
    def _bounds(node):
        return [c for c in node.children if c.type not in ("operator", "sliceop")]

    def mutate(self, node, index):
        """The slice without one bound."""
        node.children.remove(self._bounds(node)[index])
        return node


OPERATORS: dict[str, Operator] = {
    **{name: OperatorProvider()[name]() for name in TAKEN},
    **{cls.__name__: cls() for cls in (SwapExtremes, DropStatement, ReturnNone, DropBound)},
}


def _names(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _silent(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node that no mutant is made of."""
    if isinstance(node, ast.FunctionDef):
        yield from node.decorator_list
        yield from filter(None, [node.returns])
    elif isinstance(node, ast.ClassDef):
        yield from node.decorator_list
    elif (isinstance(node, ast.arg) and node.annotation) or isinstance(node, ast.AnnAssign):
        yield node.annotation
    elif isinstance(node, ast.Assign) and _names(node.targets[0]) & (SCRATCH | {"__all__"}):
        yield node
    elif isinstance(node, ast.Raise) and node.exc:
        yield node.exc
    elif isinstance(node, ast.JoinedStr):
        yield node
    elif isinstance(node, ast.Call):
        if ast.unparse(node.func) == "warnings.warn":
            yield from node.args
        if ast.unparse(node.func) == "zip":
            yield from (word.value for word in node.keywords if word.arg == "strict")


def silent_spans(source: str) -> list[tuple[Place, Place]]:
    """Beginning and end of everything that no mutant is made of."""
    lines = source.splitlines()

    def place(line: int, offset: int) -> Place:
        return line, len(lines[line - 1].encode()[:offset].decode())

    return [
        (place(part.lineno, part.col_offset), place(part.end_lineno, part.end_col_offset))
        for node in ast.walk(ast.parse(source))
        for part in _silent(node)
    ]


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    spans = silent_spans(source)
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in OPERATORS.items():
        found = ((node, place) for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (node, (start, end)) in enumerate(found):
            # The marks of a list of parameters, `*` and `/`, are no operators.
            mark = node.type == "operator" and node.parent.type == "parameters"
            if not mark and not any(first <= start and end <= last for first, last in spans):
                yield Mutant(file, name, occurrence, start, end)


def mutated(mutant: Mutant, source: str) -> str | None:
    """The changed text, or None where it is no Python or says the same."""
    changed = mutate_code(source, OPERATORS[mutant.operator], mutant.occurrence)
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else changed


def change(mutant: Mutant, source: str, changed: str) -> str:
    """The changed line before and after."""
    line = mutant.start[0] - 1
    before, after = source.splitlines(), changed.splitlines()
    while before[line] == after[line]:
        line += 1
    return f"{before[line].strip()}  ->  {after[line].strip()}"
