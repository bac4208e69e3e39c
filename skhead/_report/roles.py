"""The section on what single heads do: words, thresholds, what random heads get, and the heads."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from skhead._report.data import Analysis, Cards
from skhead._report.glossary import WORDS
from skhead._report.text import because, listed
from skhead._report.verdicts import Rule

__all__ = ["head_link", "missing_words", "plain", "roles", "roles_words"]

#: What cannot be told without a score.
_TOPICS = (
    ("copying of tokens", "ov_copying"),
    ("matching of tokens", "qk_matching"),
    ("tokens led to themselves first", "ov_top1_self"),
    ("attention by position", "previous_token"),
    ("induction", "induction_strength"),
)


def head_link(label: str, carded: frozenset[str]) -> str:
    """A head's label, as a link to its card if it has one."""
    text = escape(label)
    return f'<a href="#{text}">{text}</a>' if label in carded else text


def plain(rule: Rule, label: str, partners: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """The words of a rule for one head."""
    if not rule.pair:
        return rule.words
    one = "an earlier head" if rule.side == "in" else "a later head"
    partner = partners.get(rule.side, {}).get(rule.pair, {}).get(label, one)
    return rule.words.format(partner=partner)


def missing_words(cards: Cards, source: str) -> list[str]:
    """One sentence for each ingredient that the model's file lacks."""
    topics: dict[str, list[str]] = {}
    for words, name in _TOPICS:
        if name in cards.scores.missing:
            topics.setdefault(cards.scores.missing[name], []).append(words)
    return [
        because("Cannot be told here", f"{listed(words)}; {reason}", source)
        for reason, words in topics.items()
    ]


def roles(analysis: Analysis, cards: Cards) -> str:
    """Plain words with their thresholds, and the heads that they are said of."""
    called = _called(cards)
    rows = []
    for rule in cards.rules:
        labels = called[rule.key]
        needs = "<br>".join(
            f"{escape(WORDS[condition.score])} {escape(condition.words)}"
            for condition in rule.conditions
        )
        random = "<br>".join(escape(condition.random) for condition in rule.conditions)
        heads = ", ".join(head_link(label, analysis.carded) for label in labels) or "none"
        rows.append(
            f"<tr><th scope=row>{escape(rule.words.format(partner='one head'))}</th>"
            f'<td>{needs}</td><td class="random">{random}</td><td class="n">{len(labels)}</td>'
            f'<td class="wrap">{heads}</td></tr>'
        )
    lacking = "".join(
        f'<p class="lacking">{escape(text)}</p>'
        for text in missing_words(cards, analysis.info.source)
    )
    words = (
        "Each row is something that a head can do, the scores that say so, and the heads that "
        "reach them. Random is what heads of independent random weights get. The thresholds are "
        "conventions: a head just below one differs little from a head just above. Scores are read "
        "from weights alone: copying and matching are those of bare tokens, attention by position "
        "that of the stored positions, whatever other layers make of them. Biases are left out, "
        "and gains of norms unless they are folded in, so that a head may attend elsewhere on text."
    )
    table = (
        '<table id="role-table" aria-label="What single heads do"><thead><tr><th scope=col>What a '
        "head does</th><th scope=col>Said from</th><th scope=col>Random</th>"
        "<th scope=col class=n>Heads</th><th scope=col>Which</th></tr></thead>"
        f"<tbody>\n{''.join(rows)}</tbody></table>"
    )
    if not rows:
        table = "<p>None of the scores that plain words rest on is defined for this model.</p>"
    return f'<p>{words}</p>{lacking}<div class="scroll">{table}</div>'


def roles_words(cards: Cards) -> str:
    """One sentence on how many heads do what."""
    told = [
        f"{rule.words} ({len(labels)})"
        for rule in cards.rules
        if not rule.pair and (labels := _called(cards)[rule.key])
    ]
    if not told:
        return ""
    return f"Head by head, with the number of heads that reach the thresholds: {listed(told)}."


def _called(cards: Cards) -> dict[str, list[str]]:
    """By key of a rule, the heads that it holds of."""
    return {
        rule.key: [label for label, held in cards.verdicts.items() if rule in held]
        for rule in cards.rules
    }
