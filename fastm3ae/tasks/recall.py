"""How often the right one is among the k best of a table of scores."""

from collections.abc import Sequence
from math import comb

import numpy as np

__all__ = ["RECALL_AT", "hits"]

RECALL_AT = (1, 5, 10)


def hits(scores_C: np.ndarray, own: np.ndarray, at: Sequence[int] = RECALL_AT) -> list[float]:
    """Returns for each k the probability that the k best candidates hold one of the own ones.

    Equal scores are put in order by lot: with E candidates, o of them own, that share the best own score, and r of the
    k places left for them, 1 - C(E - o, r) / C(E, r). Without ties that is 0 or 1, and of a constant score what chance
    gives.

    Args:
        scores_C: Scores of the candidates; the largest is the best.
        own: The numbers of the right ones, at least one.
        at: The k.

    Deviation: The original's ``torch.topk`` puts equal scores in an order of its own.
    """
    best = scores_C[own].max()
    num_better, num_equal = int((scores_C > best).sum()), int((scores_C == best).sum())
    num_false = num_equal - int((scores_C[own] == best).sum())

    def probability(num_places: int) -> float:
        return 1 - comb(num_false, num_places) / comb(num_equal, num_places)

    return [probability(min(max(k - num_better, 0), num_equal)) for k in at]
