"""The search of a retrieval: every image with every text, and how often the right one is among the best.

M3AE scores pairs by its fusion and retrieval head (``fastm3ae.model.pair_scores``), MPMA by the products of its
alignment's features.

Source: ``compute_irtr_recall`` in the original's modules/objectives.py, which runs the whole model for every pair.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastm3ae.data.collate_pairs import pad
from fastm3ae.data.datasets import PairDataset
from fastm3ae.errors import BadSample, UserError
from fastm3ae.model.embed import embed_images, embed_reports
from fastm3ae.model.mpma import MPMA
from fastm3ae.model.pair_scores import PairScorer
from fastm3ae.tasks.pool import PairPool, Pool, ReadyModel
from fastm3ae.tasks.recall import RECALL_AT, hits

__all__ = ["Preselection", "ReadyModel", "Retrieval", "retrieve", "score_pool"]

Autocast = Callable[[], AbstractContextManager]
Progress = Callable[[int, int], None]
"""Is told how many pairs are scored, and how many will be."""

EMBEDDED_AT_A_TIME = 32


@dataclass(frozen=True, kw_only=True)
class Preselection:
    """Only the best by alignment are scored by the fusion, so that recall is not exact: a right one may be missed.

    Args:
        ready: An MPMA.
        num_preselected: So many texts of each image, and so many images of each text.
    """

    ready: ReadyModel
    num_preselected: int

    def __post_init__(self) -> None:
        if self.num_preselected < 1:
            raise UserError(f"num_preselected must be at least 1, got {self.num_preselected}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval:
    """The scores of all images with all texts.

    Args:
        scores_IT: (I, T) float32; minus infinity where a pair was not preselected, so that it ranks below all others.
        image_of_text_T: (T,) int64, which image each text belongs to.
        image_ids: The I image ids.
        texts: The T texts as they stand in the file.
        is_exact: Whether the model scored every pair; False with a preselection.
        bad_samples: Images that could not be used; neither they nor their texts are among the above.
        ids_without_text: Images of the data set that have no text and therefore no part in this.
    """

    scores_IT: np.ndarray
    image_of_text_T: np.ndarray
    image_ids: list[str]
    texts: list[str]
    is_exact: bool
    bad_samples: list[BadSample]
    ids_without_text: list[str]

    @cached_property
    def image_hits(self) -> dict[int, np.ndarray]:
        """For each k of ``RECALL_AT`` whether each image has one of its texts among its k best: (I,) float64.

        Between 0 and 1 where scores are equal: the probability, if these are put in order by lot.
        """
        own = np.split(
            np.argsort(self.image_of_text_T, kind="stable"),
            np.cumsum(np.bincount(self.image_of_text_T, minlength=len(self.image_ids)))[:-1],
        )
        return _columns([hits(scores_T, own_texts) for scores_T, own_texts in zip(self.scores_IT, own, strict=True)])

    @cached_property
    def text_hits(self) -> dict[int, np.ndarray]:
        """The same for each text and its image: (T,) float64."""
        own = self.image_of_text_T[:, None]
        return _columns([hits(scores_I, own_image) for scores_I, own_image in zip(self.scores_IT.T, own, strict=True)])

    def recall(self) -> dict[str, float]:
        """Returns the means of the hits."""
        directions = {"image_to_text": self.image_hits, "text_to_image": self.text_hits}
        return {
            f"{name}_recall_at_{k}": float(hits_of_k.mean())
            for name, of in directions.items()
            for k, hits_of_k in of.items()
        }


def _columns(rows: list[list[float]]) -> dict[int, np.ndarray]:
    return dict(zip(RECALL_AT, np.array(rows).T, strict=True))


def retrieve(
    ready: ReadyModel,
    dataset: PairDataset,
    *,
    autocast: Autocast = nullcontext,
    max_images: int | None = None,
    on_bad_sample: Literal["stop", "skip"] = "stop",
    preselection: Preselection | None = None,
    cache_mib: int = 2048,
    pairs_per_pass: int | None = None,
    progress: Progress = lambda num_scored, num_pairs: None,
) -> Retrieval:
    """Scores all images that have a text with all their texts.

    Args:
        ready: The model. Its mode (training or evaluation) is left as it was.
        dataset: The pairs; an image may have several texts.
        autocast: Gives the context in which models compute.
        max_images: Only the first so many images with their texts; None: all, as the original.
        on_bad_sample: stop: raise the first image that cannot be used. skip: leave it and its texts out, and name it.
        preselection: Score only the pairs that another model prefers, which is not exact; None: all of them.
        cache_mib: Memory for what the fusion reads, about half of it for images and half for texts. Images are encoded
            once. Texts are encoded once if all fit, else once for each block of images that fits.
        pairs_per_pass: As of ``PairScorer``.
        progress: Is told after each pass of a fusion.

    Raises:
        UserError: A model lacks the head that is needed, no image can be used, or a score is no number.
        BadSample: An image cannot be used, and ``on_bad_sample`` is "stop".
    """
    pool = PairPool(dataset, max_images, on_bad_sample)
    scores_IT = score_pool(
        ready,
        pool,
        autocast=autocast,
        preselection=preselection,
        cache_mib=cache_mib,
        pairs_per_pass=pairs_per_pass,
        progress=progress,
    )
    return _result(pool, scores_IT, is_exact=preselection is None)


def score_pool(
    ready: ReadyModel,
    pool: Pool,
    *,
    autocast: Autocast = nullcontext,
    preselection: Preselection | None = None,
    cache_mib: int = 2048,
    pairs_per_pass: int | None = None,
    progress: Progress = lambda num_scored, num_pairs: None,
) -> np.ndarray:
    """Returns the scores of a pool's images with its texts, (I, T) float32, as of ``retrieve``.

    The row of an image that cannot be used, which the pool then knows, means nothing.

    Raises:
        UserError: As ``retrieve``.
    """
    is_fused = ready.model.config.kind == "m3ae"
    if preselection is not None and not is_fused:
        raise UserError("A preselection is for a model with a fusion; the scores of an MPMA are alignment's already.")
    with torch.inference_mode(), ready.model.evaluating():
        if is_fused:
            scorer = PairScorer(ready.model, autocast, pairs_per_pass)
            selected = None if preselection is None else _select(pool, preselection, autocast)
            scores_IT = _fuse(pool, ready, scorer, selected, cache_mib * 2**20, progress)
        else:
            image_IE, text_TE = _embed(pool, ready, autocast)
            scores_IT = (image_IE @ text_TE.T).cpu().numpy()
            for image, scores_T in enumerate(scores_IT):
                _check(pool, scores_T, np.full(pool.num_texts, image), np.arange(pool.num_texts))
    pool.check_any_good()
    return scores_IT


def _result(pool: PairPool, scores_IT: np.ndarray, is_exact: bool) -> Retrieval:
    """Returns the scores without those of images that cannot be used and of their texts."""
    is_good_I, is_good_T = pool.is_good_I, pool.is_good_I[pool.image_of_text_T]
    if not is_good_I.all():
        scores_IT = scores_IT[is_good_I][:, is_good_T]
    return Retrieval(
        scores_IT=scores_IT,
        image_of_text_T=(np.cumsum(is_good_I) - 1)[pool.image_of_text_T[is_good_T]],
        image_ids=[pool.image_id(number) for number in np.flatnonzero(is_good_I)],
        texts=[pool.texts[number] for number in np.flatnonzero(is_good_T)],
        is_exact=is_exact,
        bad_samples=pool.bad_samples,
        ids_without_text=pool.ids_without_text,
    )


def _check(pool: Pool, scores_P: np.ndarray, image_P: np.ndarray, text_P: np.ndarray) -> None:
    """Raises an error that names the first pair whose score is no number, which no candidate could be ranked by."""
    for place in np.flatnonzero(~np.isfinite(scores_P))[:1]:
        raise UserError(
            f"The score of the image {pool.image_id(image_P[place])!r} with the text {pool.texts[text_P[place]]!r} "
            f"must be a finite number, got {scores_P[place]}."
        )


def _fuse(
    pool: Pool,
    ready: ReadyModel,
    scorer: PairScorer,
    selected: np.ndarray | None,
    cache_bytes: int,
    progress: Progress,
) -> np.ndarray:
    """Returns the scores (I, T) of the selected pairs (image * T + text, rising; None: all), of others -infinity."""
    num_images, num_texts = pool.num_images, pool.num_texts
    scores_IT = np.full((num_images, num_texts), -np.inf, dtype=np.float32)
    ids = pool.token_ids(ready)
    num_tokens_T = np.array([len(of_text) for of_text in ids])
    num_cached_tokens = cache_bytes // 2 // scorer.bytes_per_token
    image_blocks = _blocks(np.full(num_images, scorer.num_image_tokens), num_cached_tokens)
    text_blocks = _blocks(num_tokens_T, num_cached_tokens)
    num_scored, num_pairs = 0, num_images * num_texts if selected is None else len(selected)

    def add(num: int) -> None:
        nonlocal num_scored
        num_scored += num
        progress(num_scored, num_pairs)

    texts = None
    for image_block in image_blocks:
        image_BCHW, good = pool.images(ready, image_block)
        image_P, text_P = _pairs(image_block, num_texts, selected)
        is_good_P = pool.is_good_I[image_P]
        image_P, text_P, num_bad = image_P[is_good_P], text_P[is_good_P], int((~is_good_P).sum())
        if num_bad:
            add(num_bad)
        if not len(image_P):
            continue
        images = scorer.encode_images(image_BCHW)
        for text_block in text_blocks:
            first, last = text_block.start, text_block.stop
            if texts is None or len(text_blocks) > 1:
                lengths = num_tokens_T[first:last]
                padded = pad(ids[first:last], lengths.max(), np.int64, ready.tokenizer.pad_token_id)
                texts = scorer.encode_texts(padded.to(scorer.device), lengths)
            is_here_P = (text_P >= first) & (text_P < last)
            image_R, text_R = image_P[is_here_P], text_P[is_here_P]
            found = scorer.scores(images, texts, np.searchsorted(good, image_R), text_R - first, add)
            scores_R = found.float().cpu().numpy()
            _check(pool, scores_R, image_R, text_R)
            scores_IT[image_R, text_R] = scores_R
    return scores_IT


def _blocks(num_tokens: np.ndarray, num_at_most: int) -> list[range]:
    """Divides neighbours into blocks of so many tokens at most, or of one that has more."""
    blocks, start, ends = [], 0, np.cumsum(num_tokens)
    while start < len(ends):
        before = ends[start] - num_tokens[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + num_at_most, side="right")))
        blocks.append(range(start, stop))
        start = stop
    return blocks


def _pairs(images: range, num_texts: int, selected: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns image and text of each pair of these images that is to be scored."""
    first, last = images.start * num_texts, images.stop * num_texts
    if selected is None:
        return np.divmod(np.arange(first, last), num_texts)
    return np.divmod(selected[slice(*np.searchsorted(selected, [first, last]))], num_texts)


def _embed(pool: Pool, ready: ReadyModel, autocast: Autocast) -> tuple[Tensor, Tensor]:
    """Returns the features of the images, 0 of those that cannot be used, and of the texts: (I, E) and (T, E)."""
    model = ready.model
    if not isinstance(model, MPMA) or "global_alignment" not in model.config.objectives:
        raise UserError(
            f'model.objectives must have "global_alignment" for features of images and texts, '
            f"got {', '.join(model.config.objectives)}."
        )
    device, width = next(model.parameters()).device, model.config.alignment.width
    image_IE = torch.zeros(pool.num_images, width, dtype=torch.float32, device=device)
    text_TE = torch.zeros(pool.num_texts, width, dtype=torch.float32, device=device)
    for start in range(0, pool.num_images, EMBEDDED_AT_A_TIME):
        image_BCHW, good = pool.images(ready, range(start, min(start + EMBEDDED_AT_A_TIME, pool.num_images)))
        if len(good):
            with autocast():
                image_IE[torch.from_numpy(good).to(device)] = embed_images(model, image_BCHW).float()
    ids = pool.token_ids(ready)
    for start in range(0, pool.num_texts, EMBEDDED_AT_A_TIME):
        part = ids[start : start + EMBEDDED_AT_A_TIME]
        length = max(map(len, part))
        ids_BT = pad(part, length, np.int64, ready.tokenizer.pad_token_id)
        is_padding_BT = pad([np.zeros(len(of_text)) for of_text in part], length, np.bool_, True)
        with autocast():
            features = embed_reports(model, ids_BT.to(device), is_padding_BT.to(device))
        text_TE[start : start + len(part)] = features.float()
    return image_IE, text_TE


def _select(pool: PairPool, preselection: Preselection, autocast: Autocast) -> np.ndarray:
    """Returns the preselected pairs, image * T + text, rising."""
    with preselection.ready.model.evaluating():
        image_IE, text_TE = _embed(pool, preselection.ready, autocast)
    is_good_I, is_good_T = pool.is_good_I, pool.is_good_I[pool.image_of_text_T]
    num = preselection.num_preselected
    image_P, text_P = _nearest(image_IE, text_TE, is_good_I, is_good_T, num)
    text_R, image_R = _nearest(text_TE, image_IE, is_good_T, is_good_I, num)
    return np.unique(np.concatenate([image_P * pool.num_texts + text_P, image_R * pool.num_texts + text_R]))


def _nearest(
    x_XE: Tensor, y_YE: Tensor, is_good_X: np.ndarray, is_good_Y: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each good x its ``num`` nearest good y, as the numbers of both."""
    good_X, good_Y = np.flatnonzero(is_good_X), np.flatnonzero(is_good_Y)
    num, x_XE, y_YE = min(num, len(good_Y)), x_XE[good_X], y_YE[good_Y]
    parts = [(part @ y_YE.T).topk(num).indices.flatten().cpu().numpy() for part in x_XE.split(EMBEDDED_AT_A_TIME)]
    return np.repeat(good_X, num), good_Y[np.concatenate([np.zeros(0, np.int64), *parts])]
