"""Images and texts that are scored with one another, read for any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.data.collate_pairs import stack
from fastm3ae.data.datasets import ImageDataset, PairDataset
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import encode
from fastm3ae.errors import BadSample, UserError
from fastm3ae.model.build import Model

__all__ = ["PairPool", "Pool", "ReadyModel"]


@dataclass(frozen=True, kw_only=True)
class ReadyModel:
    """A model with what makes its inputs.

    Args:
        model: The model, on the device that computes.
        tokenizer: Its tokenizer.
        transform: Name of the transform of its images (``fastm3ae.data.images.make_transform``).
        max_text_tokens: Texts are cut to so many tokens, CLS and SEP included.
    """

    model: Model
    tokenizer: PreTrainedTokenizerFast
    transform: str
    max_text_tokens: int


class Pool:
    """Images and texts, each of which is to be scored with each.

    Attributes:
        texts: The T texts.
        is_good_I: (I,) bool, whether each image can be used, as far as is known.
        bad_samples: Those that cannot.

    Args:
        dataset: What the images are in.
        item_of_image_I: (I,) int64, an item of each image.
        texts: The texts.
        on_bad_sample: stop: raise the first image that cannot be used. skip: note it.
    """

    def __init__(
        self,
        dataset: PairDataset | ImageDataset,
        item_of_image_I: np.ndarray,
        texts: Sequence[str],
        on_bad_sample: Literal["stop", "skip"],
    ) -> None:
        self.texts, self._dataset, self._item_of_image_I = texts, dataset, item_of_image_I
        self._on_bad_sample = on_bad_sample
        self.is_good_I = np.ones(len(item_of_image_I), dtype=bool)
        self.bad_samples: list[BadSample] = []

    @property
    def num_images(self) -> int:
        """I."""
        return len(self._item_of_image_I)

    @property
    def num_texts(self) -> int:
        """T."""
        return len(self.texts)

    def images(self, ready: ReadyModel, numbers: range) -> tuple[Tensor, np.ndarray]:
        """Returns those of the images that can be used, as the model wants them, and their numbers.

        Raises:
            BadSample: An image cannot be used, and the pool does not skip it.
        """
        model, found, good = ready.model, [], []
        transform = make_transform(ready.transform, model.config.image_size_px)
        for number in np.array(numbers)[self.is_good_I[numbers.start : numbers.stop]]:
            try:
                found.append(transform(self._dataset.image(self._item_of_image_I[number])))
                good.append(number)
            except BadSample as error:
                if self._on_bad_sample == "stop":
                    raise
                self.is_good_I[number] = False
                self.bad_samples.append(error)
        size, weight = model.config.image_size_px, next(model.parameters())
        mean, std = (statistic.to(weight.device) for statistic in normalization(ready.transform))
        image_BCHW = normalize(stack(found, (3, size, size)).to(weight.device), mean, std)
        return image_BCHW.to(weight.dtype), np.array(good, dtype=np.int64)

    def check_any_good(self) -> None:
        """Raises a UserError if no image can be used."""
        if not self.is_good_I.any():
            raise UserError(f"None of the {self.num_images} images can be used; the first: {self.bad_samples[0]}.")

    def image_id(self, number: int) -> str:
        """Returns an image's id."""
        return self._dataset.image_id(self._item_of_image_I[number])

    def token_ids(self, ready: ReadyModel) -> list[list[int]]:
        """Returns the token ids of all texts."""
        return [encode(ready.tokenizer, text, ready.max_text_tokens).ids for text in self.texts]


class PairPool(Pool):
    """Among what is searched in a retrieval: the distinct images of pairs, and all their texts.

    Attributes:
        image_of_text_T: (T,) int64, the number of each text's image.
        ids_without_text: Images of the data set that have no text, and so no part in this.

    Args:
        dataset: The pairs.
        max_images: Only the first so many images with their texts; None: all.
        on_bad_sample: As of ``Pool``.
    """

    def __init__(self, dataset: PairDataset, max_images: int | None, on_bad_sample: Literal["stop", "skip"]) -> None:
        rows, pair_of_image_I, image_of_pair = np.unique(dataset.row, return_index=True, return_inverse=True)
        pair_of_image_I = pair_of_image_I[:max_images]
        pair_of_text_T = np.flatnonzero(image_of_pair < len(pair_of_image_I))
        super().__init__(dataset, pair_of_image_I, [dataset.text(pair) for pair in pair_of_text_T], on_bad_sample)
        self.image_of_text_T = image_of_pair[pair_of_text_T]
        without_text = np.setdiff1d(np.arange(len(dataset.table)), rows)
        self.ids_without_text = [dataset.table.row(int(row), "image_id") for row in without_text]
