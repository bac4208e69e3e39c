"""Objects in lettered boxes, with a question for the box of one of them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from skhead._checks import check_count
from skhead.datasets._prompt_text import (
    MarkedText,
    PromptWriter,
    as_prompts,
    checked_words,
    joined,
    load_prompt_words,
    split_at,
)

__all__ = ["make_binding_prompts"]


def make_binding_prompts(
    tokenizer: Any,
    n_prompts: int = 3000,
    *,
    contrast: str = "order",
    n_items: int = 9,
    objects: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    queried: str | None = None,
    statement: str = "The {object} is in Box {label}.",
    template: str = "{statements} Which box has the {object} in it? Box",
    bos_token: int | str | None = "auto",
    random_state: int | np.random.Generator | None = None,
) -> Any:
    """Objects in lettered boxes, with the question in which box one of them is.

    Heads that bind an object to its box look from the end of such a prompt, which is where the
    letter follows, at the letter of the object [1]_. The query is the last token of the prompt,
    the keys are the last tokens of letters. All prompts are about the first `n_items` objects;
    these and the letters are shuffled in every prompt, so that none goes with a place.

    Parameters
    ----------
    tokenizer : tokenizer, path or callable
        As for :func:`make_category_prompts`.
    n_prompts : int, default=3000
        Number of prompts.
    contrast : {"order", "lexical"}, default="order"
        What queries and keys are to agree on: the place of the object among all, or the object
        itself. See the notes.
    n_items : int, default=9
        Boxes in a prompt.
    objects : sequence of str or None, default=None
        Names of objects; those of :func:`load_prompt_words` by default. The first `n_items` are
        used, and what follows is unused.
    labels : sequence of str or None, default=None
        Labels of boxes, of which `n_items` are drawn for each prompt; by default the first
        `n_items` capital letters.
    queried : str or None, default=None
        The object that every prompt asks for; an unused one takes the place of the first. By
        default the first for the contrast "order", and any of those used for "lexical".
    statement : str, default="The {object} is in Box {label}."
        Text for each box.
    template : str, default="{statements} Which box has the {object} in it? Box"
        Text that ends right in front of the label.
    bos_token : int, "auto" or None, default="auto"
        As for :func:`make_category_prompts`.
    random_state : int, Generator or None, default=None
        Seed of objects, labels and places.

    Returns
    -------
    QKPrompts or (QKPrompts, QKPrompts)
        For "order" prompts with the feature "order". For "lexical" two sets with the feature
        "lexical": prompts, and the counterfactual of each.

    Raises
    ------
    ValueError
        If there are too few objects or labels, a template does not hold its fields, or a label has
        no token that ends where it ends.
    TypeError
        If the tokenizer is of no known kind.

    Notes
    -----
    "order": queries are labelled with the place of the queried object, from 0, and each key with
    its own. All prompts ask for one object, which therefore tells no places apart.

    "lexical": the counterfactual of a prompt has an unused object instead of the queried one, in
    its statement and in the question, and is the same otherwise. Both sets have one key in each
    prompt, the letter of the queried object. The queries and keys of the first set are the
    positive pairs and those of the second the negative ones: with the `QKPairs` ``used`` and
    ``unused`` that `collect_qk` makes of them,
    ``QKPairs.from_pairs(used.queries, used.keys, unused.queries, unused.keys)``.

    This is the contrast of the code that was released with [1]_. As both query and key come from
    the counterfactual, negative pairs match lexically too, and are labelled so: the contrast shows
    how second moments of used objects differ from those of unused ones at equal places, not how
    keys that match differ from those that do not.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> from skhead.datasets import make_binding_prompts
    >>> encode = lambda text: list(text.encode())
    >>> prompts = make_binding_prompts(encode, 1, n_items=2, random_state=0)
    >>> print(prompts.texts[0])
    The cup is in Box A. The lamp is in Box B. Which box has the cup in it? Box
    >>> prompts.query_labels.tolist(), prompts.key_labels[0].tolist(), prompts.key_names
    ([0], [0, 1], (('A', 'B'),))
    >>> used, unused = make_binding_prompts(
    ...     encode, 1, contrast="lexical", n_items=2, random_state=0
    ... )
    >>> print(used.texts[0])
    The cup is in Box A. The lamp is in Box B. Which box has the cup in it? Box
    >>> print(unused.texts[0])
    The teapot is in Box A. The lamp is in Box B. Which box has the teapot in it? Box
    """
    caller = "make_binding_prompts"
    if contrast not in ("order", "lexical"):
        raise ValueError(f'{caller}: contrast must be "order" or "lexical"; got {contrast!r}')
    check_count("n_prompts", n_prompts, caller)
    check_count("n_items", n_items, caller, smallest=2)
    lexical = contrast == "lexical"
    known = load_prompt_words()["objects"] if objects is None else objects
    used, unused = _split_objects(
        checked_words(known, "objects", n_items + lexical, caller), n_items, queried, caller
    )
    boxes = checked_words(
        list(string.ascii_uppercase)[:n_items] if labels is None else labels,
        "labels",
        n_items,
        caller,
    )
    write = _BoxWriter(statement, template, caller)
    writer = PromptWriter(tokenizer, bos_token, caller)
    rng = np.random.default_rng(random_state)
    asked = queried if queried is not None or lexical else used[0]
    draws = [_drawn_boxes(rng, used, boxes, asked) for _ in range(n_prompts)]
    if not lexical:
        marked = [write(*draw) for draw in draws]
        places = [list(range(n_items))] * n_prompts
        return as_prompts(writer, marked, [draw[2] for draw in draws], places, contrast)
    others = [_with_object(draw, str(rng.choice(unused))) for draw in draws]
    return tuple(
        as_prompts(
            writer,
            [_only(write(*draw), draw[2]) for draw in group],
            [draw[0][draw[2]] for draw in group],
            [[draw[0][draw[2]]] for draw in group],
            contrast,
        )
        for group in (draws, others)
    )


#: Objects, labels of their boxes, and the place of the object that is asked for.
_Draw = tuple[list[str], list[str], int]


def _split_objects(
    objects: list[str], n_items: int, queried: str | None, caller: str
) -> tuple[list[str], list[str]]:
    """Objects that prompts use, the queried one among them, and all others."""
    if queried is not None and queried not in objects:
        raise ValueError(f"{caller}: queried must be one of the objects; got {queried!r}")
    used = objects[:n_items]
    if queried is not None and queried not in used:
        used = [queried, *used[1:]]
    return used, [name for name in objects if name not in used]


def _drawn_boxes(
    rng: np.random.Generator, objects: list[str], labels: list[str], asked: str | None
) -> _Draw:
    listed = [objects[i] for i in rng.permutation(len(objects))]
    boxes = [labels[i] for i in rng.choice(len(labels), len(listed), replace=False)]
    place = int(rng.integers(len(listed))) if asked is None else listed.index(asked)
    return listed, boxes, place


def _with_object(draw: _Draw, name: str) -> _Draw:
    """The same boxes, with another object in the one that is asked for."""
    objects, labels, place = draw
    return [*objects[:place], name, *objects[place + 1 :]], labels, place


class _BoxWriter:
    """Texts of statements and a question; the labels in the statements are marked."""

    def __init__(self, statement: str, template: str, caller: str) -> None:
        self._statement = split_at(statement, "{label}", "statement", caller)
        self._question = split_at(template, "{statements}", "template", caller)
        for name, text in (("statement", statement), ("template", template)):
            if "{object}" not in text:
                raise ValueError(f"{caller}: {name} must hold {{object}} as well; got {text!r}")

    def __call__(self, objects: list[str], labels: list[str], place: int) -> MarkedText:
        before, after = (half.replace("{object}", objects[place]) for half in self._question)
        pieces = [(before, False)]
        for i, (name, label) in enumerate(zip(objects, labels, strict=True)):
            head, tail = (half.replace("{object}", name) for half in self._statement)
            pieces += [(" " + head if i else head, False), (label, True), (tail, False)]
        return joined([*pieces, (after, False)])


def _only(marked: MarkedText, place: int) -> MarkedText:
    return MarkedText(marked.text, [marked.spans[place]])
