"""Which rows the losses read, and so which rows must be computed: index arithmetic on the host.

A row that no loss reads is not computed. Each objective says what it reads: tokens of the text, of the image, or of
both, after so many fusion layers. An objective's pairs take part in the layers up to its deepest read. In that layer
only the rows that are read are queries; below it all rows are, because the next layer reads them as keys and values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "Index", "Layout", "LayerPlan", "Plan", "Read", "Reads", "StreamPlan", "Texts", "make_plan"]


@dataclass(frozen=True)
class Read:
    """What an objective reads of one stream.

    Args:
        depth: How many fusion layers the stream has passed.
        positions: For each pair the tokens that are read; None: all.
    """

    depth: int
    positions: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Texts:
    """The texts of an objective's pairs.

    Args:
        name: Objectives that give the same name see the same texts.
        ids_NT: (number of texts, T) int64 token ids, padded behind their end.
        num_tokens_N: How many tokens of each are not padding.
        index: For each pair its text.
    """

    name: str
    ids_NT: Tensor
    num_tokens_N: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Images:
    """The images of an objective's pairs.

    Args:
        index: For each pair its image: the batch's B images, then its false ones.
        visible_only: Whether only the visible patches are encoded; the pairs are then the batch's.
    """

    index: np.ndarray
    visible_only: bool = False


@dataclass(frozen=True)
class Reads:
    """What an objective sees and what of it it reads."""

    texts: Texts
    images: Images
    text: Read | None = None
    image: Read | None = None

    @property
    def depth(self) -> int:
        """How many fusion layers the pairs take part in."""
        return max(read.depth for read in (self.text, self.image) if read is not None)

    @property
    def uses_texts(self) -> bool:
        """Whether anything that is read depends on the texts."""
        return self.depth > 0 or self.text is not None

    @property
    def uses_images(self) -> bool:
        """Whether anything that is read depends on the images."""
        return self.depth > 0 or self.image is not None


@dataclass
class Index:
    """Numbers that are made on the host and used on the device.

    Attributes:
        array: The numbers.
        tensor: The same as int32 on the device, after ``send``.
    """

    array: np.ndarray
    tensor: Tensor | None = None


def send(indices: Sequence[Index], device: torch.device) -> None:
    """Copies all of them to the device at once."""
    sizes = [len(index.array) for index in indices]
    joined = np.concatenate([index.array for index in indices]).astype(np.int32)
    host = torch.from_numpy(joined)
    if device.type == "cuda":
        host = host.pin_memory()
    for index, tensor in zip(indices, host.to(device, non_blocking=True).split(sizes), strict=True):
        index.tensor = tensor


@dataclass(frozen=True)
class Layout:
    """Sequences whose tokens stand one after another.

    Args:
        lengths: Tokens of each sequence.
    """

    lengths: np.ndarray
    _index: Index = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", Index(np.concatenate([[0], np.cumsum(self.lengths)])))

    @property
    def offsets(self) -> Tensor:
        """(number of sequences + 1,) int32: where each begins; the last is the number of tokens."""
        return self._index.tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._index.array[-1])

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max(initial=0))

    def rows(self, sequences: np.ndarray) -> np.ndarray:
        """Returns the rows of these sequences, one sequence after another."""
        lengths = self.lengths[sequences]
        starts = self._index.array[sequences]
        skipped = np.cumsum(lengths) - lengths
        return np.repeat(starts - skipped, lengths) + np.arange(lengths.sum())


@dataclass(frozen=True)
class StreamPlan:
    """What one stream computes in a fusion layer.

    Args:
        keys: The rows that the layer reads, a sequence per pair.
        queries: The rows that it computes, a sequence per pair: whole ones, then those that are read.
        num_whole: Rows of whole sequences; they stand first in the keys, too.
        tail: Further rows of the keys that are queries.
        is_read: Whether anything reads what the layer makes of the stream. It may read no row of it: then the layer's
            parameters have gradients of zero, where otherwise they have none.
    """

    keys: Layout
    queries: Layout
    num_whole: int
    tail: Index
    is_read: bool

    @property
    def is_whole(self) -> bool:
        """Whether all rows are queries, in their order."""
        return self.queries.num_tokens == self.keys.num_tokens


@dataclass(frozen=True)
class LayerPlan:
    """A fusion layer."""

    text: StreamPlan
    image: StreamPlan


@dataclass(frozen=True)
class Taken:
    """Where an objective's rows stand among those that a stream computed at a depth: a range, or single ones of it."""

    depth: int
    first: int
    last: int
    index: Index | None


@dataclass(frozen=True)
class Plan:
    """A batch's way through the model.

    Args:
        texts: The texts that are encoded: for each name, once per objective or once for all.
        text_rows: Rows of the encoded texts' padded ids, flattened and joined, that are not padding.
        text_layout: The encoded texts.
        whole_images: Images that are encoded whole.
        num_visible: Images, the batch's own, whose visible patches are encoded; they follow the whole ones.
        image_layout: The encoded images.
        pair_text_rows: For the first fusion layer, rows of the encoded texts, pair by pair; None: as they stand.
        pair_image_rows: The same of the encoded images.
        layers: The fusion layers.
        taken: For each objective and stream where its rows are found.
    """

    texts: list[Texts]
    text_rows: Index
    text_layout: Layout
    whole_images: np.ndarray
    num_visible: int
    image_layout: Layout
    pair_text_rows: Index | None
    pair_image_rows: Index | None
    layers: list[LayerPlan]
    taken: dict[str, dict[str, Taken]]

    def send(self, device: torch.device) -> None:
        """Copies what the device needs, in one copy."""
        layouts = [self.text_layout, self.image_layout]
        indices = [self.text_rows, self.pair_text_rows, self.pair_image_rows]
        for layer in self.layers:
            for stream in (layer.text, layer.image):
                layouts += [stream.keys, stream.queries]
                indices.append(stream.tail)
        indices += [taken.index for streams in self.taken.values() for taken in streams.values()]
        send([*(layout._index for layout in layouts), *(index for index in indices if index is not None)], device)


def make_plan(
    reads: Mapping[str, Reads], *, num_whole_tokens: int, num_visible_tokens: int, shares_texts: bool
) -> Plan:
    """Plans a batch.

    Args:
        reads: For each objective what it reads.
        num_whole_tokens: Tokens of a whole image.
        num_visible_tokens: Tokens of an image's visible patches, CLS included.
        shares_texts: Whether objectives that see the same texts share their encoding, which is exact where the text
            tower draws no dropout.
    """
    deepest_first = sorted(reads, key=lambda name: -reads[name].depth)

    texts: dict[str, Texts] = {}
    for name in deepest_first:
        if reads[name].uses_texts:
            texts.setdefault(_text_key(name, reads[name], shares_texts), reads[name].texts)
    num_texts = {key: len(group.num_tokens_N) for key, group in texts.items()}
    first_text = dict(zip(texts, np.cumsum([0, *num_texts.values()]), strict=False))
    text_layout = Layout(np.concatenate([np.zeros(0, np.int64), *(group.num_tokens_N for group in texts.values())]))

    using_images = [read.images for read in reads.values() if read.uses_images]
    whole = np.unique(np.concatenate([[], *(i.index for i in using_images if not i.visible_only)]).astype(np.int64))
    num_visible = max((len(images.index) for images in using_images if images.visible_only), default=0)
    image_layout = Layout(np.repeat([num_whole_tokens, num_visible_tokens], [len(whole), num_visible]))

    # Which encoded text and which encoded image each pair has; only pairs that are fused need both.
    fused = [name for name in deepest_first if reads[name].depth > 0]
    text_of = {
        name: first_text[_text_key(name, reads[name], shares_texts)] + reads[name].texts.index
        for name in reads
        if reads[name].uses_texts
    }
    image_of = {
        name: len(whole) + images.index if images.visible_only else np.searchsorted(whole, images.index)
        for name, images in ((name, read.images) for name, read in reads.items() if read.uses_images)
    }
    pairs_of_text = np.concatenate([np.zeros(0, np.int64), *(text_of[name] for name in fused)])
    pairs_of_image = np.concatenate([np.zeros(0, np.int64), *(image_of[name] for name in fused)])

    layers = []
    taken: dict[str, dict[str, Taken]] = {name: {} for name in reads}
    for name, read in reads.items():  # what is read before the fusion
        for stream, wanted, layout, of in (
            ("text", read.text, text_layout, text_of),
            ("image", read.image, image_layout, image_of),
        ):
            if wanted is not None and wanted.depth == 0:
                rows = _read_rows(layout, of[name], wanted)
                taken[name][stream] = Taken(0, 0, layout.num_tokens, Index(rows))
    text_lengths, image_lengths = text_layout.lengths[pairs_of_text], image_layout.lengths[pairs_of_image]
    for depth in range(1, 1 + max((reads[name].depth for name in fused), default=0)):
        present = [name for name in fused if reads[name].depth >= depth]
        text = _stream("text", depth, present, reads, text_lengths, taken)
        image = _stream("image", depth, present, reads, image_lengths, taken)
        layers.append(LayerPlan(text, image))

    return Plan(
        texts=list(texts.values()),
        text_rows=Index(_valid_rows(texts.values())),
        text_layout=text_layout,
        whole_images=whole,
        num_visible=num_visible,
        image_layout=image_layout,
        pair_text_rows=_gathered(text_layout, pairs_of_text),
        pair_image_rows=_gathered(image_layout, pairs_of_image),
        layers=layers,
        taken=taken,
    )


def _text_key(name: str, reads: Reads, shares_texts: bool) -> str:
    return reads.texts.name if shares_texts else f"{reads.texts.name} of {name}"


def _valid_rows(groups) -> np.ndarray:
    """Rows of the groups' ids, each flattened and all joined, that are not padding."""
    rows, first = [np.zeros(0, np.int64)], 0
    for group in groups:
        num_texts, num_tokens = group.ids_NT.shape
        starts = first + np.arange(num_texts) * num_tokens
        lengths = group.num_tokens_N
        skipped = np.cumsum(lengths) - lengths
        rows.append(np.repeat(starts - skipped, lengths) + np.arange(lengths.sum()))
        first += num_texts * num_tokens
    return np.concatenate(rows)


def _gathered(layout: Layout, sequences: np.ndarray) -> Index | None:
    """The rows of the sequences; None where they are all rows in their order."""
    if np.array_equal(sequences, np.arange(len(layout.lengths))):
        return None
    return Index(layout.rows(sequences))


def _read_rows(layout: Layout, sequences: np.ndarray, read: Read) -> np.ndarray:
    if read.positions is None:
        return layout.rows(sequences)
    starts = np.cumsum(layout.lengths) - layout.lengths
    rows = [starts[sequence] + np.asarray(p, np.int64) for sequence, p in zip(sequences, read.positions, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _stream(
    stream: str,
    depth: int,
    present: Sequence[str],
    reads: Mapping[str, Reads],
    pair_lengths: np.ndarray,
    taken: dict[str, dict[str, Taken]],
) -> StreamPlan:
    """Plans a stream in the layer that leads to ``depth``, and notes where what is read there will stand."""
    num_pairs = {name: len(reads[name].images.index) for name in present}
    keys = Layout(pair_lengths[: sum(num_pairs.values())])
    first_pair = dict(zip(present, np.cumsum([0, *num_pairs.values()]), strict=False))
    num_whole_pairs = sum(num_pairs[name] for name in present if reads[name].depth > depth)
    num_whole = int(keys.lengths[:num_whole_pairs].sum())

    is_anything_read = num_whole_pairs > 0
    tails, tail_lengths, num_queries = [np.zeros(0, np.int64)], [keys.lengths[:num_whole_pairs]], num_whole
    for name in present:
        pairs = first_pair[name] + np.arange(num_pairs[name])
        read = getattr(reads[name], stream)
        is_read = read is not None and read.depth == depth
        rows = _read_rows(keys, pairs, read) if is_read else np.zeros(0, np.int64)
        if reads[name].depth > depth:
            if is_read:
                taken[name][stream] = Taken(depth, 0, num_whole, Index(rows))
            continue
        if not is_read:
            lengths = np.zeros(len(pairs), np.int64)
        elif read.positions is None:
            lengths = keys.lengths[pairs]
        else:
            lengths = np.array([len(positions) for positions in read.positions], np.int64)
        tails.append(rows)
        tail_lengths.append(lengths)
        is_anything_read |= is_read
        if is_read:
            taken[name][stream] = Taken(depth, num_queries, num_queries + len(rows), None)
        num_queries += len(rows)
    queries = Layout(np.concatenate(tail_lengths))
    return StreamPlan(keys, queries, num_whole, Index(np.concatenate(tails)), is_anything_read)
