"""Features of images and texts, of a data set into a file, or of what is given by hand into arrays.

embedder = Embedder("runs/m3ae/checkpoints/best")
embedder.embed(["x.png", "y.png"])["image"]  # (2, D) float32

Which features there are, ``fastm3ae.model.embed`` says. They do not depend on how items are put into batches, but for
the rounding of float32.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerFast

from fastm3ae.config import FeaturesConfig, TrainConfig
from fastm3ae.data.arrow import ArrowTable, dataset_files
from fastm3ae.data.batch import ImageBatch
from fastm3ae.data.collate import Batches
from fastm3ae.data.collate_images import ImageBatches
from fastm3ae.data.collate_pairs import TextBatches
from fastm3ae.data.datasets import PairDataset, RowsOfImages
from fastm3ae.data.given import GivenPairs, ImageSource
from fastm3ae.data.images import make_transform
from fastm3ae.data.loader import Loader
from fastm3ae.data.text import load_tokenizer
from fastm3ae.device import autocast_context, batch_mover, pick_device
from fastm3ae.errors import BadSample, UserError
from fastm3ae.model.embed import embed
from fastm3ae.model.image_model import ImageModel
from fastm3ae.weights.pretrained import data_of, load_model, read_about
from fastm3ae.weights.towers import resolve_text

__all__ = ["Embedder", "Extracted", "extract_features"]

Precision = Literal["bf16", "fp16", "fp32"]
TEXT_COLUMNS = ("questions", "caption")
KEY = b"fastm3ae"  # in the file's metadata


class Extracted(NamedTuple):
    """What was written.

    Args:
        num_items: Rows.
        widths: Of each feature, by name.
        text_column: Where the texts stood; None: the images stood alone.
        bad_samples: What was left out.
    """

    num_items: int
    widths: dict[str, int]
    text_column: str | None
    bad_samples: list[BadSample]


class Embedder:
    """A model that gives features.

    Attributes:
        model: The model, on its device, in evaluation mode.
        data: How its inputs are made.
        tokenizer: Splits its texts; None: it reads none.

    Args:
        checkpoint: One of our checkpoints (its folder or file), or an official .ckpt that holds its configuration.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: Autocast type on a GPU; a CPU always computes in fp32.

    Raises:
        UserError: The checkpoint or its tokenizer cannot be read, or the device is not here.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str = "auto", precision: Precision = "fp32") -> None:
        path, place = Path(checkpoint).expanduser(), pick_device(device)
        self.model = load_model(path).to(place).eval()
        self.data = data_of(read_about(path)[1], path)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        if not isinstance(self.model, ImageModel):
            self.tokenizer = load_tokenizer(self.data.tokenizer)
            resolve_text(dataclasses.replace(self.model.config.text, weights="random"), self.tokenizer)
        self._transform = make_transform(self.data.val_transform, self.model.config.image_size_px)
        self._to_device = batch_mover(self.data, place)
        self._autocast = autocast_context(TrainConfig(precision=precision), place)

    def embed(
        self, images: Sequence[ImageSource], texts: Sequence[str] | None = None, batch_size: int = 32
    ) -> dict[str, np.ndarray]:
        """Returns by name the features of images, or of images each with its text: float32, a row for each.

        Args:
            images: Of Pillow, encoded bytes, or paths of files.
            texts: As many; None: only what images give.
            batch_size: How many at a time.

        Raises:
            UserError: An image cannot be read, there are more or fewer texts than images, or the model reads none.
        """
        if texts is not None and len(texts) != len(images):
            raise UserError(f"There must be as many texts as images, got {len(texts)} and {len(images)}.")
        given = GivenPairs(list(zip(images, texts or [""] * len(images), strict=True)), self.data.alpha)
        loader = Loader(self.batches(given, texts is not None), batch_size=batch_size, is_training=False)
        parts = [found for _, found in self.run(loader)]
        return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def batches(self, dataset: RowsOfImages | GivenPairs, has_texts: bool) -> Batches:
        """Returns what makes batches of a data set.

        Raises:
            UserError: The texts are to be read, but the model reads none.
        """
        if not has_texts:
            return ImageBatches(dataset, self._transform)
        if self.tokenizer is None:
            raise UserError("The model reads no texts: it gives features of images alone.")
        assert isinstance(dataset, PairDataset | GivenPairs)
        return TextBatches(
            dataset,
            self.tokenizer,
            self._transform,
            max_text_tokens=self.data.max_text_tokens,
            shares_images=isinstance(dataset, PairDataset),
        )

    @torch.inference_mode()
    def run(self, loader: Loader) -> Iterator[tuple[ImageBatch, dict[str, np.ndarray]]]:
        """Yields batch after batch with its features."""
        for batch in (piece for pieces in loader.epoch(0) for piece in pieces):
            with self._autocast():
                found = embed(self.model, self._to_device(batch))
            yield batch, {name: feature.float().cpu().numpy() for name, feature in found.items()}


def extract_features(
    config: FeaturesConfig, progress: Callable[[int, int], None] = lambda num_done, num_items: None
) -> Extracted:
    """Writes the features of a split, a row for each pair of an image and a text, or for each image, in their order.

    Beside the features a row says where it comes from: ``data_file``, the zero-based ``row`` in it, ``image_id``, and
    for a pair ``text_number``, which of the row's texts it is.

    Args:
        config: Of what, and where to.
        progress: Is told how many items are done, and how many there are.

    Raises:
        UserError: The checkpoint or the data cannot be read or do not fit each other, or the file exists.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output} exists: choose another name.")
    embedder = Embedder(config.checkpoint, config.device, config.precision)
    data = embedder.data
    files = dataset_files(config.root or data.root, config.datasets or data.datasets, config.split)
    column = None if config.images_only or embedder.tokenizer is None else config.text_column or _text_column(files)
    dataset = PairDataset(files, column, alpha=data.alpha) if column else RowsOfImages(files, {}, data.alpha)
    if not len(dataset):
        raise UserError(f"There is no image in {', '.join(map(str, files))}.")
    loader = Loader(
        embedder.batches(dataset, column is not None),
        batch_size=config.batch_size,
        is_training=False,
        num_workers=min(config.num_workers, os.cpu_count() or 1),
        on_bad_sample=config.on_bad_sample,
        pin_memory=next(embedder.model.parameters()).is_cuda,
    )
    about = {"checkpoint": str(config.checkpoint), "split": config.split, "text_column": column}
    num_items, widths, bad_samples = 0, {}, []
    with _writing(output) as partial, _WRITERS[output.suffix](partial, about) as writer:
        for batch, found in embedder.run(loader):
            writer.write(_places(dataset, batch), found)
            num_items += len(batch)
            widths = {name: feature.shape[1] for name, feature in found.items()}
            progress(num_items, len(dataset))
        bad_samples = loader.bad_samples
    return Extracted(num_items, widths, column, bad_samples)


def _text_column(files: Sequence[Path]) -> str | None:
    """Returns the column of texts that all files have; None: there is none."""
    names = [set(batch.schema.names) for batch in ArrowTable(files).batches]
    return next((column for column in TEXT_COLUMNS if names and all(column in of for of in names)), None)


def _places(dataset: RowsOfImages, batch: ImageBatch) -> dict[str, list[Any]]:
    """Returns where each item of a batch comes from."""
    files, rows = zip(*(dataset.table.locate(int(dataset.row[pair])) for pair in batch.pairs), strict=True)
    places = {"data_file": [Path(file).name for file in files], "row": list(rows), "image_id": batch.item_ids}
    if isinstance(dataset, PairDataset):
        places["text_number"] = [int(dataset.position[pair]) for pair in batch.pairs]
    return places


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[Path]:
    """Gives the name under which a file is written that gets its own only when it is whole."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)


class _Parquet(contextlib.AbstractContextManager):
    """Writes batch after batch: a feature is a column of lists of its width."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.file: pq.ParquetWriter | None = None

    def write(self, places: dict[str, list[Any]], features: dict[str, np.ndarray]) -> None:
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(feature.ravel()), feature.shape[1])
            for name, feature in features.items()
        }
        table = pa.table({**places, **columns}).replace_schema_metadata({KEY: json.dumps(self.about).encode()})
        self.file = self.file or pq.ParquetWriter(self.path, table.schema)
        self.file.write_table(table)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


class _Npz(contextlib.AbstractContextManager):
    """Keeps all in memory, and writes an array for each column at the end."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.parts: list[dict[str, np.ndarray]] = []

    def write(self, places: dict[str, list[Any]], features: dict[str, np.ndarray]) -> None:
        self.parts.append({**{name: np.array(values) for name, values in places.items()}, **features})

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            columns: dict[str, Any] = {name: np.concatenate([p[name] for p in self.parts]) for name in self.parts[0]}
            columns[KEY.decode()] = json.dumps(self.about)
            with self.path.open("wb") as file:
                np.savez(file, **columns)


_WRITERS = {".parquet": _Parquet, ".npz": _Npz}
