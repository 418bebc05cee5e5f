"""What a picture is drawn of: a checkpoint's model, and the images and texts that were given."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import DataConfig, MaskingConfig, ModelConfig
from fastm3ae.config.files import from_dict
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.collate_pairs import BatchRequest, PretrainBatches
from fastm3ae.data.given import GivenPairs, ImageSource
from fastm3ae.data.images import make_transform, normalization
from fastm3ae.data.text import encode, load_tokenizer
from fastm3ae.device import batch_mover, pick_device
from fastm3ae.errors import UserError
from fastm3ae.model.build import Model
from fastm3ae.visualize.pixels import to_unit_range
from fastm3ae.weights.pretrained import data_of, load_model, read_about

__all__ = ["Subject", "read_subject"]


class Subject(NamedTuple):
    """A model and what it is shown. It computes in float32.

    Args:
        checkpoint: Where the model was read from.
        model: On its device, in evaluation mode.
        tokenizer: Splits the texts.
        batch: The pairs on the model's device, images normalised, with masks drawn; images that pairs share repeated.
        encodings: The texts as the model sees them.
        data: How the images were made.
        notes: What a reader must know, a sentence each.
    """

    checkpoint: Path
    model: Model
    tokenizer: PreTrainedTokenizerFast
    batch: PretrainBatch
    encodings: list[Encoding]
    data: DataConfig
    notes: list[str]

    def images(self) -> Tensor:
        """Returns the images as the model sees them, in [0, 1]: (B, 3, H, W)."""
        mean, std = normalization(self.data.val_transform)
        return to_unit_range(self.batch.image_BCHW.float(), mean.flatten().tolist(), std.flatten().tolist())

    def caption(self, pair: int) -> str:
        """Returns the name of a pair's image and its text, as a line."""
        return " ".join(f"{Path(self.batch.item_ids[pair]).name}: {self.batch.texts[pair]}".split()).removesuffix(":")


def read_subject(
    checkpoint: Path,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    device: str = "auto",
    tokenizer: str | None = None,
    token_frac: float | None = None,
    seed: int = 0,
) -> Subject:
    """Reads a checkpoint, images and texts.

    Args:
        checkpoint: One of ours, its folder or file, or an official .ckpt that holds its configuration.
        images: The images.
        texts: One for each image; one for all; several for one image; or none, which gives empty texts.
        device: "auto", "cpu", "cuda" or "cuda:N".
        tokenizer: Hub name or folder; None: the one in the checkpoint's folder, or else that of its training.
        token_frac: Which fraction of a text's tokens is hidden where words are; None: as in training.
        seed: Seed of what is hidden.

    Raises:
        UserError: Something cannot be read, the model reads no texts, or there are too many or too few texts.
    """
    checkpoint = checkpoint.expanduser()
    pairs = _pairs(images, texts)
    config, about = read_about(checkpoint)
    if config is not None and not config.has_texts:
        raise UserError(f"{checkpoint} is a model of images without texts; these pictures are of M3AE and MPMA.")
    trained = about.get("config", {})
    data = data_of(about, checkpoint)
    masking = from_dict(MaskingConfig(), trained.get("masking", {}))
    if token_frac is not None:
        masking = from_dict(masking, {"token_frac": token_frac})
    if tokenizer is None and data.tokenizer == DataConfig().tokenizer and "tokenizer" not in trained.get("data", {}):
        raise UserError(f"{checkpoint} does not say which tokenizer its model reads with: give --tokenizer.")
    words = load_tokenizer(tokenizer or data.tokenizer)
    model = load_model(checkpoint)
    _check_vocabulary(words, model.config, checkpoint)
    batches = PretrainBatches(
        GivenPairs(pairs, data.alpha),
        words,
        make_transform(data.val_transform, model.config.image_size_px),
        max_text_tokens=data.max_text_tokens,
        masking=masking,
        num_patches=model.config.num_noise_patches,
        false_images=None,
        seed=seed,
    )
    batch = batches[BatchRequest(0, 0, range(len(pairs)))]
    encodings = [encode(words, text, data.max_text_tokens) for _, text in pairs]
    notes = [
        f"Text {number} is longer than the {data.max_text_tokens} tokens that the model reads; it sees the beginning."
        for number, encoding in enumerate(encodings, 1)
        if encoding.overflowing
    ]
    where = pick_device(device)
    return Subject(checkpoint, model.to(where).eval(), words, batch_mover(data, where)(batch), encodings, data, notes)


def _pairs(images: Sequence[ImageSource], texts: Sequence[str]) -> list[tuple[ImageSource, str]]:
    if not images:
        raise UserError("There is no image; expected at least one.")
    texts = list(texts) or [""]
    if 1 not in (len(images), len(texts)) and len(images) != len(texts):
        raise UserError(
            f"There are {len(images)} images and {len(texts)} texts; expected one text for each image, one for all of "
            "them, or several for one image."
        )
    number = max(len(images), len(texts))
    images = list(images) * (number if len(images) == 1 else 1)
    return list(zip(images, texts * (number if len(texts) == 1 else 1), strict=True))


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: ModelConfig, checkpoint: Path) -> None:
    text = config.text
    if len(tokenizer) > text.vocab_size or tokenizer.pad_token_id != text.pad_token_id:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} entries and pads with the id {tokenizer.pad_token_id}, the model of "
            f"{checkpoint} has {text.vocab_size} and {text.pad_token_id}: use the tokenizer that belongs to it."
        )
