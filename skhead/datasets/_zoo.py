"""The bundled zoo: tiny models whose heads were labelled by what they attend to."""

from __future__ import annotations

from typing import Any

import pandas as pd
from sklearn.utils import Bunch

from skhead.datasets._bundled import bundled_path, load_zoo_card, zoo_names


def load_head_zoo(*, return_X_y: bool = False) -> Any:
    """Heads of all models of the bundled zoo, with their classes, for work across models.

    The models are tiny transformers of one width and one head size, trained on the same mixture
    of copying, question and look-up tasks from different random weights. They differ in depth
    (2 or 3 layers), positions (learned or RoPE), norm (LayerNorm or RMSNorm) and MLP (none, plain
    or gated). A head's class is what it was seen to do on held-out sequences: on
    blocks of random words that come twice, its mean attention to the previous token, the earlier
    occurrence of the same word, the token after that (induction), the first token, and the token
    itself; the largest of these names the class if it reaches the threshold that the card states.

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(heads, target)`` in place of the Bunch.

    Returns
    -------
    sklearn.utils.Bunch or (DataFrame, Series)
        With the attributes

        - ``heads``: the heads table of all models, as :func:`skhead.load_heads` makes it; its
          column ``source`` groups the heads by model;
        - ``target``: Series of class names aligned to ``heads``, ``"None"`` where no measure
          reaches the threshold;
        - ``groups``: Series with the family of each head's model: ``"learned-attn"``,
          ``"learned-mlp"`` or ``"rope-attn"``;
        - ``scores``: DataFrame aligned to ``heads``, the mean attention for every measure, from 0
          to 1;
        - ``target_names``: the classes, without ``"None"``;
        - ``card``: training, held-out accuracies against chance, measures and thresholds;
        - ``DESCR``: the same for people.

    See Also
    --------
    load_head_classes : Published classes of the heads of GPT-2 small.
    load_model_card : The card of one model.

    Notes
    -----
    No basis of the residual stream is common to two models that were trained from different random
    weights, so a kernel between heads of two models compares unrelated directions. What carries
    over are properties without a basis: spectra, products within a head, circuit scores against
    the model's own tokens and positions.

    Examples
    --------
    >>> from skhead.datasets import load_head_zoo
    >>> zoo = load_head_zoo()
    >>> zoo.heads["source"].nunique()
    8
    >>> len(zoo.heads) == len(zoo.target) == len(zoo.scores)
    True
    >>> zoo.target_names[:2]
    ['First Token', 'Induction']
    """
    from skhead.weights import load_heads

    card = load_zoo_card()
    tables, labels, families, scores = [], [], [], []
    for source in zoo_names():
        directory = bundled_path(source)
        entry = card["models"][directory.name]
        table = load_heads(source)
        measured = {(head["layer"], head["index"]): head for head in entry["heads"]}
        places = zip(table["layer"].tolist(), table["head"].tolist(), strict=True)
        aligned = [measured[place] for place in places]
        tables.append(table)
        labels += [head["label"] for head in aligned]
        scores += [head["attention"] for head in aligned]
        families += [entry["family"]] * len(table)
    heads = pd.concat(tables)
    target = pd.Series(labels, index=heads.index, name="head_class", dtype=object)
    if return_X_y:
        return heads, target
    return Bunch(
        heads=heads,
        target=target,
        groups=pd.Series(families, index=heads.index, name="family", dtype=object),
        scores=pd.DataFrame(scores, index=heads.index),
        target_names=sorted(set(labels) - {"None"}),
        card=card,
        DESCR=(bundled_path(zoo_names()[0]).parent / "README.md").read_text(encoding="utf-8"),
    )
