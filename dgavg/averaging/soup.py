"""Soups: one model out of many that were fine-tuned from the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgavg.averaging.mixture import Mixture, Source, several, tensors_of


def uniform_soup(models: Iterable[Source]) -> dict[str, Tensor]:
    """The mean of models, by name.

    Wortsman et al. 2022, arXiv 2203.05482; over runs of one initialisation it is DiWA (Rame et al.
    2022, arXiv 2205.09739). Floating and complex tensors are averaged in at least float32 and come
    back in the dtypes of the first model, tied ones tied; integers and booleans are those of the
    last. Running statistics of batch norm are averaged as any tensor: recalibrate them.

    Memory: the mean, and one model where `models` are functions that load them.

    Raises `ValueError` for no models, and for one with other names or shapes.
    """
    soup: Mixture | None = None
    for i, model in enumerate(several(models)):
        soup = _stirred(soup, model, i)
    if soup is None:
        raise ValueError("no models: a soup needs at least one")
    return soup.weights()


def _stirred(soup: Mixture | None, model: Source, i: int) -> Mixture:
    tensors = tensors_of(model, f"models[{i}]")
    if soup is None:
        return Mixture(tensors, f"models[{i}]")
    soup.add(tensors, 1 / (i + 1), f"models[{i}]")
    return soup


@dataclass(frozen=True, eq=False)
class GreedySoup:
    """What `greedy_soup` made.

    `members` are the indices of the models in the soup in the order they were added, `score` is its
    score, `scores` those of the single models, and `tried` by index that of each candidate soup:
    of the first member its own, NaN for a model that was not tried since its own score is NaN.
    """

    weights: dict[str, Tensor]
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]
    tried: dict[int, float]


def greedy_soup(
    models: Iterable[Source],
    score: Callable[[dict[str, Tensor]], float],
    *,
    scores: Sequence[float] | None = None,
    ties: bool = False,
) -> GreedySoup:
    """The mean of the models that a validation score lets in, best first.

    Wortsman et al. 2022, arXiv 2203.05482: begin with the best model; in the order of their own
    scores, each other one joins where the mean with it scores higher than the mean without. With
    `ties`, as high is enough: DiWA's restricted selection (Rame et al. 2022, arXiv 2205.09739).

    `score(weights)` is higher for better weights, which it only reads; `scores` are those of the
    single models, where they are known. A score of NaN is a rejection. Models whose scores are
    equal keep their order. Evaluations: M − 1, and M more without `scores`. Memory: the mean, the
    candidate, and one model where `models` are functions that load them; they load twice.

    Raises `ValueError` for no models, other names or shapes, and scores that are all NaN.
    """
    models = list(several(models))
    if not models:
        raise ValueError("no models: a soup needs at least one")
    if scores is None:
        scores = [float(score(tensors_of(m, f"models[{i}]"))) for i, m in enumerate(models)]
    if len(scores) != len(models):
        raise ValueError(f"{len(scores)} scores for {len(models)} models: give one for each")
    own = tuple(map(float, scores))
    order = sorted((i for i, s in enumerate(own) if not math.isnan(s)), key=lambda i: -own[i])
    if not order:
        raise ValueError("the score of every model is nan: there is no best one to begin with")
    first, *others = order
    soup = _stirred(None, models[first], first)
    members, best, tried = [first], own[first], {first: own[first]}
    for i in others:
        tensors, rate = tensors_of(models[i], f"models[{i}]"), 1 / (len(members) + 1)
        tried[i] = float(score(soup.preview(tensors, rate, f"models[{i}]")))
        if tried[i] > best or (ties and tried[i] == best):
            soup.add(tensors, rate, f"models[{i}]")
            members.append(i)
            best = tried[i]
        del tensors  # before the next one is loaded
    skipped = {i: s for i, s in enumerate(own) if math.isnan(s)}
    return GreedySoup(soup.weights(), tuple(members), best, own, tried | skipped)
