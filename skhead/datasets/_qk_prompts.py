"""Lists of words of several categories, with a question for the words of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from skhead.qk_prompts import QKPrompts

__all__ = ["make_category_prompts"]

_CHAT_QUESTION = (
    "Below is a list of words.\n\n{items}\n\n"
    "Which words of the list belong to the category {category}? Write down all of them and "
    "nothing else."
)
_QUESTION = f"{_CHAT_QUESTION}\nAnswer:"


def make_category_prompts(
    tokenizer: Any,
    n_prompts: int = 2000,
    *,
    categories: Mapping[str, Sequence[str]] | None = None,
    n_per_category: int = 5,
    n_asked: int | None = None,
    template: str | None = None,
    chat: bool = False,
    bos_token: int | str | None = "auto",
    random_state: int | np.random.Generator | None = None,
) -> QKPrompts:
    """Lists of words of several categories, with a question for those of one category.

    Heads that filter a list look from the end of such a prompt at the words of the category that
    is asked for [1]_. The query is the last token of the prompt, the keys are the last tokens of
    the words. Queries are labelled with the category that is asked for, keys with their own.

    Parameters
    ----------
    tokenizer : tokenizer, path or callable
        A Hugging Face tokenizer, a ``tokenizers.Tokenizer``, a directory with ``tokenizer.json``
        or with ``vocab.json`` and ``merges.txt``, or a function from a text to token ids.
    n_prompts : int, default=2000
        Number of prompts. Every category is asked for equally often, or once more.
    categories : mapping of str to sequence of str or None, default=None
        Words by category; those of :func:`load_prompt_words` by default.
    n_per_category : int, default=5
        Words of each category in a prompt, drawn without repetition.
    n_asked : int or None, default=None
        Words of the category that is asked for, as many as of the others by default. With 1 there
        is one right key, as interventions on the model need it.
    template : str or None, default=None
        Text with ``{items}``, which becomes a line ``- word`` for each word, and ``{category}``.
        A plain question by default.
    chat : bool, default=False
        Put the text into the chat template of a Hugging Face tokenizer, so that the query is the
        token from which the assistant begins its answer.
    bos_token : int, "auto" or None, default="auto"
        Token in front of every prompt; "auto" takes those that a tokenizer object puts there by
        itself (a path or a function: none; a chat template brings its own).
    random_state : int, Generator or None, default=None
        Seed of the words and their order.

    Returns
    -------
    QKPrompts
        With the feature "category"; its `key_names` are the words.

    Raises
    ------
    ValueError
        If a category has too few words or shares one with another, a count or the template does
        not fit, or a word has no token that ends where it ends.
    TypeError
        If the tokenizer is of no known kind, or has no chat template.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    >>> from skhead.datasets import make_category_prompts
    >>> prompts = make_category_prompts(
    ...     lambda text: list(text.encode()),
    ...     n_prompts=1,
    ...     categories={"colour": ["red", "blue"], "number": ["two", "six"]},
    ...     n_per_category=1,
    ...     template="{items}. Name each {category}:",
    ...     random_state=0,
    ... )
    >>> print(prompts.texts[0])
    - blue
    - six. Name each colour:
    >>> prompts.key_positions, prompts.query_labels.tolist(), prompts.key_labels[0].tolist()
    (((5, 11),), ['colour'], ['colour', 'number'])
    """
    caller = "make_category_prompts"
    known = load_prompt_words()["categories"] if categories is None else categories
    n_own = n_per_category if n_asked is None else n_asked
    for name, value in (
        ("n_prompts", n_prompts),
        ("n_per_category", n_per_category),
        ("n_asked", n_own),
    ):
        check_count(name, value, caller)
    words = _checked_categories(known, max(n_per_category, n_own), caller)
    text = template if template is not None else _CHAT_QUESTION if chat else _QUESTION
    halves = split_at(text, "{items}", "template", caller)
    if "{category}" not in text:
        raise ValueError(f"{caller}: template must hold {{category}} as well; got {text!r}")
    writer = PromptWriter(tokenizer, bos_token, caller, chat=chat)
    rng = np.random.default_rng(random_state)
    names = list(words)
    asked = [names[i] for i in rng.permutation(np.arange(n_prompts) % len(names))]
    listed = [_drawn_items(rng, words, own, n_per_category, n_own) for own in asked]
    marked = [
        _category_text(halves, own, [word for word, _ in items])
        for own, items in zip(asked, listed, strict=True)
    ]
    labels = [[category for _, category in items] for items in listed]
    return as_prompts(writer, marked, asked, labels, "category")


def _checked_categories(categories: Any, least: int, caller: str) -> dict[str, list[str]]:
    if not isinstance(categories, Mapping) or len(categories) < 2:
        raise ValueError(
            f"{caller}: categories must map two names or more to lists of words; got {categories!r}"
        )
    owner: dict[str, str] = {}
    words: dict[str, list[str]] = {}
    for name, listed in categories.items():
        words[name] = checked_words(listed, f"category {name!r}", least, caller)
        for word in words[name]:
            if word in owner:
                raise ValueError(
                    f"{caller}: {word!r} is in the categories {owner[word]!r} and {name!r}; leave "
                    "it out of one"
                )
            owner[word] = name
    return words


def _drawn_items(
    rng: np.random.Generator, words: Mapping[str, list[str]], asked: str, n_others: int, n_own: int
) -> list[tuple[str, str]]:
    """Words with their categories, in random order."""
    items = [
        (listed[i], name)
        for name, listed in words.items()
        for i in rng.choice(len(listed), n_own if name == asked else n_others, replace=False)
    ]
    return [items[i] for i in rng.permutation(len(items))]


def _category_text(halves: tuple[str, str], asked: str, words: Sequence[str]) -> MarkedText:
    before, after = (half.replace("{category}", asked) for half in halves)
    pieces = [(before, False)]
    for i, word in enumerate(words):
        pieces += [("\n- " if i else "- ", False), (word, True)]
    return joined([*pieces, (after, False)])
