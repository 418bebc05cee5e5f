"""Among what is searched in a retrieval: the distinct images of a data set and their texts, read for any model."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.data.collate import stack
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import encode
from fastm3ae.errors import BadSample
from fastm3ae.model.build import Model

__all__ = ["Pool", "ReadyModel"]


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
    """The images and texts of a data set among which is searched.

    Attributes:
        image_of_text_T: (T,) int64, the number of each text's image.
        is_good_I: (I,) bool, whether each image can be used, as far as is known.
        bad_samples: Those that cannot.
        ids_without_text: Images of the data set that have no text, and so no part in this.

    Args:
        dataset: The pairs.
        max_images: Only the first so many images with their texts; None: all.
        on_bad_sample: stop: raise the first image that cannot be used. skip: note it.
    """

    def __init__(self, dataset: PairDataset, max_images: int | None, on_bad_sample: Literal["stop", "skip"]) -> None:
        self._dataset, self._on_bad_sample = dataset, on_bad_sample
        # A pair of each image, and each text's own pair.
        rows, self._pair_of_image_I, image_of_pair = np.unique(dataset.row, return_index=True, return_inverse=True)
        self._pair_of_image_I = self._pair_of_image_I[:max_images]
        self._pair_of_text_T = np.flatnonzero(image_of_pair < len(self._pair_of_image_I))
        self.image_of_text_T = image_of_pair[self._pair_of_text_T]
        self.is_good_I = np.ones(len(self._pair_of_image_I), dtype=bool)
        self.bad_samples: list[BadSample] = []
        without_text = np.setdiff1d(np.arange(len(dataset.table)), rows)
        self.ids_without_text = [dataset.table.row(int(row), "image_id") for row in without_text]

    @property
    def num_images(self) -> int:
        """I, all images with a text."""
        return len(self._pair_of_image_I)

    @property
    def num_texts(self) -> int:
        """T, all their texts."""
        return len(self._pair_of_text_T)

    def images(self, ready: ReadyModel, numbers: range) -> tuple[Tensor, np.ndarray]:
        """Returns those of the images that can be used, as the model wants them, and their numbers.

        Raises:
            BadSample: An image cannot be used, and the pool does not skip it.
        """
        model, found, good = ready.model, [], []
        transform = make_transform(ready.transform, model.config.image_size_px)
        for number in np.array(numbers)[self.is_good_I[numbers.start : numbers.stop]]:
            try:
                found.append(transform(self._dataset.image(self._pair_of_image_I[number])))
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

    def image_id(self, number: int) -> str:
        """Returns an image's id."""
        return self._dataset.image_id(self._pair_of_image_I[number])

    def text(self, number: int) -> str:
        """Returns a text as it stands in the file."""
        return self._dataset.text(self._pair_of_text_T[number])

    def token_ids(self, ready: ReadyModel) -> list[list[int]]:
        """Returns the token ids of all texts."""
        texts = map(self.text, range(self.num_texts))
        return [encode(ready.tokenizer, text, ready.max_text_tokens).ids for text in texts]
