"""A batch divided among processes, and a process's share among its passes, so that none waits long for another.

A step lasts as long as the slowest share takes. Pairs are unlike in two things: image-text matching shows some of them
a second image, and texts differ in length. Each part is given as many pairs, as many further images and as much text as
the next one, each of the three by itself. So nobody has to know what an image costs beside a token, which another model
or another GPU would change, and the parts are alike in memory and in decoding, too.

A division depends on nothing but the batch: every process finds the same one by itself. No image is decoded for it and
no text is split into tokens; how long a text is, the arrow file's offsets say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Work", "divide"]


@dataclass(frozen=True)
class Work:
    """In what the pairs of a batch are unlike.

    Args:
        further_images_B: Images of each pair besides its own.
        text_bytes_B: About how long its text is.
        image_B: Pairs of the same number have the same image, which is decoded and encoded once in each part; None:
            each its own.
    """

    further_images_B: np.ndarray
    text_bytes_B: np.ndarray
    image_B: np.ndarray | None = None


def divide(pairs: Sequence[int], num_parts: int, work: Work | None = None) -> list[list[int]]:
    """Returns the pairs in parts of equal size but for one pair, each in the order of the batch.

    Args:
        pairs: Places in the batch.
        num_parts: How many parts.
        work: In what the pairs of the batch are unlike; None: in nothing, and parts are consecutive pairs.
    """
    bounds = [len(pairs) * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    if work is None or num_parts < 2:
        return [list(pairs[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    pairs_P, sizes = np.asarray(pairs, np.int64), np.diff(bounds)
    further_P, bytes_P = work.further_images_B[pairs_P], work.text_bytes_B[pairs_P]
    if work.image_B is None:
        part_P = _deal(further_P, bytes_P, sizes)
    else:
        part_P = _deal_images(work.image_B[pairs_P], bytes_P, sizes)
    return [pairs_P[part_P == part].tolist() for part in range(num_parts)]


def _deal(first_N: np.ndarray, second_N: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns for each thing its part, such that both sums over a part are about the same for all parts.

    The things are dealt in rounds, the largest first. In each round the part that has least so far chooses first.

    Args:
        first_N: What is to be equal before all.
        second_N: What is then to be equal.
        sizes: Things of each part, equal but for one.
    """
    part_N, room, load = np.empty(len(first_N), np.int64), sizes.copy(), np.zeros(len(sizes))
    rest = np.lexsort((-second_N, -first_N))
    while len(rest):
        # A part that is to have a thing less than others takes larger ones.
        parts = np.lexsort((load, room))
        parts = parts[room[parts] > 0]
        now, rest = rest[: len(parts)], rest[len(parts) :]
        part_N[now] = parts
        load[parts] += second_N[now]
        room[parts] -= 1
    return part_N


def _deal_images(image_P: np.ndarray, bytes_P: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns for each pair its part, such that pairs with the same image are in the same one, as far as sizes allow.

    The images are dealt, those with most pairs first; what is too much for a part goes where there is room.
    """
    num_parts = len(sizes)
    _, image_P, num_pairs_I = np.unique(image_P, return_inverse=True, return_counts=True)
    num_images, bytes_I = len(num_pairs_I), np.bincount(image_P, bytes_P)
    part_I = _deal(num_pairs_I, bytes_I, np.diff(np.arange(num_parts + 1) * num_images // num_parts))
    part_P = part_I[image_P]
    # In each part the images with most pairs first, so that few are torn apart.
    order = np.lexsort((image_P, -num_pairs_I[image_P], part_P))
    place = np.arange(len(order)) - np.searchsorted(part_P[order], part_P[order])
    is_too_much = place >= sizes[part_P[order]]
    num_kept = np.bincount(part_P[order][~is_too_much], minlength=num_parts)
    part_P[order[is_too_much]] = np.repeat(np.arange(num_parts), sizes - num_kept)
    return part_P
