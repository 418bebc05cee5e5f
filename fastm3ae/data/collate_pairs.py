"""From pairs of an image and a text to batches: see ``fastm3ae.data.collate``."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike
from PIL import Image
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import MaskingConfig
from fastm3ae.data.balance import Work
from fastm3ae.data.batch import ClassificationBatch, ImageTextBatch, PretrainBatch, RetrievalBatch, VqaBatch
from fastm3ae.data.collate import OF_BATCH, AnySample, Batches, BatchRequest, keyed_rng, stack
from fastm3ae.data.datasets import ClassificationDataset, PairDataset, VqaDataset
from fastm3ae.data.given import GivenPairs
from fastm3ae.data.text import encode
from fastm3ae.errors import BadSample
from fastm3ae.masking import corrupt, draw_corruption, select_tokens, select_words, select_words_official

__all__ = ["ClassificationBatches", "PretrainBatches", "RetrievalBatches", "TextBatches", "VqaBatches"]

TOKEN_MULTIPLE = 8  # texts are padded to a multiple of it: few shapes, and aligned rows
TOKEN_BYTES = 4.2  # of a caption, about: BERT's tokens and RoBERTa's


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What every kind of batch needs of one pair."""

    pair: int
    image_CHW: Tensor
    text: str
    encoding: Encoding


@dataclass(frozen=True, kw_only=True)
class PretrainSample:
    """A sample with its draws for pre-training; no false image where image-text matching sees one of the batch."""

    sample: Sample
    is_true: bool
    other: float
    """In [0, 1): which other pair of the pass has the false image."""
    false_image_CHW: Tensor | None
    is_selected_T: np.ndarray
    is_replaced_T: np.ndarray
    is_random_T: np.ndarray
    random_ids_T: np.ndarray
    patch_noise_N: np.ndarray


class PairBatches(Batches):
    """Batches of pairs of an image and a text.

    Args:
        dataset: The pairs; given ones only where nothing is expected of them.
        tokenizer: Splits the texts.
        transform: As of ``Batches``.
        max_text_tokens: Texts are cut to so many tokens, CLS and SEP included.
        seed: Seed of every draw.
        shares_images: Whether an image that several pairs of a batch have is decoded, and encoded, once: for a
            transform that draws nothing and a vision tower without dropout that is exact.
    """

    dataset: PairDataset

    def __init__(
        self,
        dataset: PairDataset | GivenPairs,
        tokenizer: PreTrainedTokenizerFast,
        transform: Callable[[Image.Image], Tensor],
        *,
        max_text_tokens: int,
        seed: int = 0,
        shares_images: bool = False,
    ) -> None:
        super().__init__(dataset, transform, seed=seed)
        self.tokenizer, self.max_text_tokens, self.shares_images = tokenizer, max_text_tokens, shares_images
        self._shared: dict[int, Tensor] = {}  # by row, of the batch that is being made

    def work(self, request: BatchRequest) -> Work | None:
        """Returns how long the texts are, up to where they are cut, and which pairs share an image."""
        return self._work(request)

    def _work(self, request: BatchRequest) -> Work:
        return Work(
            further_images_B=np.zeros(len(request.pairs), np.int64),
            text_bytes_B=np.minimum(self.dataset.text_bytes[request.pairs], self.max_text_tokens * TOKEN_BYTES),
            image_B=self.dataset.row[request.pairs] if self.shares_images else None,
        )

    def _collect(
        self, request: BatchRequest, make_sample: Callable[[int, np.random.Generator], AnySample]
    ) -> tuple[list[AnySample], list[BadSample]]:
        self._shared = {}
        return super()._collect(request, make_sample)

    def _sample(self, pair: int, rng: np.random.Generator) -> Sample:
        text = self.dataset.text(pair)
        return Sample(pair=pair, image_CHW=self._image(pair, rng), text=text, encoding=self._encode(text))

    def _image(self, pair: int, rng: np.random.Generator) -> Tensor:
        if not self.shares_images:
            return super()._image(pair, rng)
        row = int(self.dataset.row[pair])
        if row not in self._shared:
            self._shared[row] = super()._image(pair, rng)
        return self._shared[row]

    def _encode(self, text: str) -> Encoding:
        return encode(self.tokenizer, text, self.max_text_tokens)

    def _common_fields(
        self, samples: Sequence[Sample], bad_samples: list[BadSample], further_texts: Iterable[Encoding] = ()
    ) -> dict[str, Any]:
        """Returns the fields of an ``ImageTextBatch`` whose T suffices for ``further_texts``, too."""
        encodings = [sample.encoding for sample in samples]
        longest = max((len(encoding.ids) for encoding in [*encodings, *further_texts]), default=0)
        num_tokens = min(-(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE, self.max_text_tokens)
        text_ids_BT, is_padding_BT = self._pad_texts(encodings, num_tokens)
        images = {id(sample.image_CHW): sample.image_CHW for sample in samples}
        number_of = {key: number for number, key in enumerate(images)}
        index = [number_of[id(sample.image_CHW)] for sample in samples]
        return {
            "image_BCHW": stack(list(images.values()), (3, 0, 0)),
            "image_index_B": torch.tensor(index) if len(images) < len(samples) else None,
            "text_ids_BT": text_ids_BT,
            "is_padding_BT": is_padding_BT,
            "texts": [sample.text for sample in samples],
            "item_ids": [self.dataset.image_id(sample.pair) for sample in samples],
            "bad_samples": bad_samples,
            "pairs": [sample.pair for sample in samples],
        }

    def _pad_texts(self, encodings: Sequence[Encoding], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the texts' token ids and where they are padding, both (number of texts, number of tokens)."""
        ids_BT = pad([encoding.ids for encoding in encodings], num_tokens, np.int64, self.tokenizer.pad_token_id)
        is_padding_BT = pad([np.zeros(len(encoding.ids)) for encoding in encodings], num_tokens, np.bool_, True)
        return ids_BT, is_padding_BT


class TextBatches(PairBatches):
    """Pairs of which nothing is expected."""

    def __getitem__(self, request: BatchRequest) -> ImageTextBatch:
        """Returns the requested batch; pairs with an image that cannot be used are left out."""
        samples, bad_samples = self._collect(request, self._sample)
        return ImageTextBatch(**self._common_fields(samples, bad_samples))


class PretrainBatches(PairBatches):
    """Pairs with their masks and false images.

    A batch's labels for image-text matching are floor(B / 2) ones, the rest zeros, permuted. A false image is drawn
    uniformly over all pairs of the pair's own data set, which may give the true one, and decoded for label 0 only; or
    it is that of another pair of the same pass.

    Args:
        dataset: The pairs.
        tokenizer: Splits the texts.
        transform: Makes a (3, S, S) uint8 tensor of an image; may draw from torch's default generator.
        max_text_tokens: Texts are cut to so many tokens, CLS and SEP included.
        masking: Which words are to be predicted.
        num_patches: Numbers of noise per image; 0 where no patch will be hidden.
        false_images: Where they are drawn from, the data set ("data") or the pass ("batch"); None where image-text
            matching is not trained: every label is then 1.
        seed: Seed of every draw.

    Source: ``compute_itm`` in the original's modules/objectives.py, ``get_false_image`` in datasets/base_dataset.py.
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerFast,
        transform: Callable[[Image.Image], Tensor],
        *,
        max_text_tokens: int,
        masking: MaskingConfig,
        num_patches: int,
        false_images: Literal["data", "batch"] | None = "data",
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, tokenizer, transform, max_text_tokens=max_text_tokens, seed=seed)
        self.masking, self.num_patches, self.false_images = masking, num_patches, false_images
        self.vocab_size, self.special_ids = len(tokenizer), frozenset(tokenizer.all_special_ids)

    def work(self, request: BatchRequest) -> Work:
        """Returns how long the texts are, and which pairs have a false image beside the true one."""
        has_false_B = ~self._draw_is_true(request) & (self.false_images == "data")
        return replace(self._work(request), further_images_B=has_false_B.astype(np.int64))

    def __getitem__(self, request: BatchRequest) -> PretrainBatch:
        """Returns the requested batch; a pair whose true or false image cannot be used is left out."""
        is_true = dict(zip(request.pairs, self._draw_is_true(request), strict=True))
        samples, bad_samples = self._collect(request, lambda pair, rng: self._pretrain_sample(pair, rng, is_true[pair]))
        fields = self._common_fields([sample.sample for sample in samples], bad_samples)
        image_BCHW, text_ids_BT = fields["image_BCHW"], fields["text_ids_BT"]

        def padded(rows: list[np.ndarray], dtype: DTypeLike) -> Tensor:
            return pad(rows, text_ids_BT.shape[1], dtype, 0)

        mlm_ids_BT, mlm_labels_BT = corrupt(
            text_ids_BT,
            padded([sample.is_selected_T for sample in samples], np.bool_),
            padded([sample.is_replaced_T for sample in samples], np.bool_),
            padded([sample.is_random_T for sample in samples], np.bool_),
            padded([sample.random_ids_T for sample in samples], np.int64),
            self.tokenizer.mask_token_id,
        )
        false_images = [sample.false_image_CHW for sample in samples if sample.false_image_CHW is not None]
        is_true_B = np.array([sample.is_true for sample in samples], dtype=np.bool_)
        itm_index_B = None
        if self.false_images == "batch":
            own_B, num = np.arange(len(samples)), len(samples)
            steps_B = 1 + np.array([int(sample.other * (num - 1)) for sample in samples], dtype=np.int64)
            itm_index_B = torch.from_numpy(np.where(is_true_B, own_B, (own_B + steps_B) % max(1, num)))
        return PretrainBatch(
            **fields,
            mlm_ids_BT=mlm_ids_BT,
            mlm_labels_BT=mlm_labels_BT,
            itm_labels_B=torch.from_numpy(is_true_B.astype(np.int64)),
            false_image_FCHW=stack(false_images, image_BCHW.shape[1:]),
            patch_noise_BN=pad([sample.patch_noise_N for sample in samples], self.num_patches, np.float32, 0),
            itm_index_B=itm_index_B,
        )

    def _draw_is_true(self, request: BatchRequest) -> np.ndarray:
        """Returns for each pair of the request whether image-text matching sees its true image."""
        num_pairs = len(request.pairs)
        rank_B = keyed_rng(self.seed, request.epoch, OF_BATCH, request.batch).permutation(num_pairs)
        return rank_B < (num_pairs if self.false_images is None else num_pairs // 2)

    def _pretrain_sample(self, pair: int, rng: np.random.Generator, is_true: bool) -> PretrainSample:
        sample = self._sample(pair, rng)
        false_pairs = self.dataset.same_dataset(pair)
        false_pair = int(rng.integers(false_pairs.start, false_pairs.stop))
        is_replaced_T, is_random_T, random_ids_T = draw_corruption(len(sample.encoding.ids), self.vocab_size, rng)
        return PretrainSample(
            sample=sample,
            is_selected_T=self._select(sample.encoding, rng),
            is_replaced_T=is_replaced_T,
            is_random_T=is_random_T,
            random_ids_T=random_ids_T,
            patch_noise_N=rng.random(self.num_patches, dtype=np.float32),
            is_true=is_true,
            other=rng.random() if self.false_images == "batch" else 0.0,
            false_image_CHW=self._image(false_pair, rng) if not is_true and self.false_images == "data" else None,
        )

    def _select(self, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
        """Returns which tokens are to be predicted, (T,) bool; never a special one, such as the unknown token."""
        is_special = [token in self.special_ids for token in encoding.ids]
        if self.masking.words == "official":
            padding = [self.tokenizer.pad_token] * (self.max_text_tokens - len(encoding.ids))
            official_rng = random.Random(int(rng.integers(2**63)))
            is_selected = select_words_official(encoding.tokens + padding, self.masking.token_frac, official_rng)
            return is_selected[: len(encoding.ids)] & ~np.array(is_special)
        if self.masking.words == "token":
            return select_tokens(is_special, self.masking.token_frac, rng)
        word_ids = [None if special else word for word, special in zip(encoding.word_ids, is_special, strict=True)]
        return select_words(word_ids, self.masking.token_frac, rng)


class VqaBatches(PairBatches):
    """Questions with their answers."""

    dataset: VqaDataset

    def __getitem__(self, request: BatchRequest) -> VqaBatch:
        """Returns the requested batch; questions about an image that cannot be used are left out."""
        samples, bad_samples = self._collect(request, self._sample)
        questions, pairs = self.dataset, [sample.pair for sample in samples]
        num_answers = max((len(questions.answer_ids[pair]) for pair in pairs), default=0)
        return VqaBatch(
            **self._common_fields(samples, bad_samples),
            answer_ids_BA=pad([questions.answer_ids[pair] for pair in pairs], num_answers, np.int64, -1),
            answer_scores_BA=pad([questions.answer_scores[pair] for pair in pairs], num_answers, np.float32, 0),
            is_open_B=torch.tensor([questions.is_open[pair] for pair in pairs], dtype=torch.bool),
            question_ids=[questions.question_ids[pair] for pair in pairs],
            answers=[questions.answers[pair] for pair in pairs],
        )


class ClassificationBatches(PairBatches):
    """Pairs with their classes."""

    dataset: ClassificationDataset

    def __getitem__(self, request: BatchRequest) -> ClassificationBatch:
        """Returns the requested batch; pairs with an image that cannot be used are left out."""
        samples, bad_samples = self._collect(request, self._sample)
        labels = [self.dataset.labels[sample.pair] for sample in samples]
        return ClassificationBatch(
            **self._common_fields(samples, bad_samples), label_B=torch.tensor(labels, dtype=torch.int64)
        )


class RetrievalBatches(PairBatches):
    """Pairs with texts that are drawn uniformly over all pairs of the pair's own data set, itself included.

    Args:
        dataset: The pairs.
        tokenizer: Splits the texts.
        transform: Makes a (3, S, S) uint8 tensor of an image; may draw from torch's default generator.
        max_text_tokens: Texts are cut to so many tokens, CLS and SEP included.
        num_false_texts: R, texts drawn for each pair.
        seed: Seed of every draw.

    Source: ``get_false_text`` in the original's datasets/base_dataset.py.
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerFast,
        transform: Callable[[Image.Image], Tensor],
        *,
        max_text_tokens: int,
        num_false_texts: int,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, tokenizer, transform, max_text_tokens=max_text_tokens, seed=seed)
        self.num_false_texts = num_false_texts

    def work(self, request: BatchRequest) -> None:
        """Returns nothing: every image has so many drawn texts that the lengths even out."""

    def __getitem__(self, request: BatchRequest) -> RetrievalBatch:
        """Returns the requested batch; pairs with an image that cannot be used are left out."""
        drawn, bad_samples = self._collect(request, lambda pair, rng: (self._sample(pair, rng), self._draw(pair, rng)))
        samples, false_texts = [sample for sample, _ in drawn], [texts for _, texts in drawn]
        encodings = [self._encode(text) for texts in false_texts for text in texts]
        fields = self._common_fields(samples, bad_samples, encodings)
        shape = (len(samples), self.num_false_texts, fields["text_ids_BT"].shape[1])
        ids, is_padding = self._pad_texts(encodings, shape[-1])
        return RetrievalBatch(
            **fields,
            false_text_ids_BRT=ids.reshape(shape),
            is_false_text_padding_BRT=is_padding.reshape(shape),
            false_texts=false_texts,
        )

    def _draw(self, pair: int, rng: np.random.Generator) -> list[str]:
        pairs = self.dataset.same_dataset(pair)
        return [self.dataset.text(int(i)) for i in rng.integers(pairs.start, pairs.stop, size=self.num_false_texts)]


def pad(rows: Sequence[Sequence[Any] | np.ndarray], length: int, dtype: DTypeLike, value: int) -> Tensor:
    """Returns the rows one below the other, each continued with ``value`` up to ``length``."""
    padded = np.full((len(rows), length), value, dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
