"""Which rows the losses read, and so which rows must be computed: index arithmetic on the host.

A row that no loss reads is not computed. Each objective says what it reads: tokens of the text, of the image, or of
both, after so many fusion layers. An objective's pairs take part in the layers up to its deepest read. In that layer
only the rows that are read are queries; below it all rows are, because the next layer reads them as keys and values.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastm3ae.model.rows import Index, Layout, Rows, ranges, rows_of, send

__all__ = ["Images", "LayerPlan", "Plan", "Read", "Reads", "StreamPlan", "Texts", "make_plan"]


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
        num_tokens_N: How many tokens of each are not padding. Further texts, of which nothing is read, have the ids of
            the first.
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
        index: For each pair its image: the batch's B images, then its false ones; -1: none.
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


@dataclass(frozen=True)
class StreamPlan:
    """What one stream computes in a fusion layer: sequences are the pairs of which anything is computed.

    Args:
        queries: What is computed of each pair: all, and then of further pairs the rows that are read.
        num_whole: Rows of the pairs of which all is computed; they stand first in the stream.
        tail: The further rows that are queries.
        is_whole: Whether the queries' rows are the keys', in the same order.
        keys: What each pair's self-attention reads.
        key_rows: Where that stands in this stream.
        cross_keys: What each pair's cross-attention reads.
        cross_key_rows: Where that stands in the other stream.
        is_read: Whether anything reads what the layer makes of the stream. It may read no row of it: then the layer's
            parameters have gradients of zero, where otherwise they have none.
    """

    queries: Layout
    num_whole: int
    tail: Rows
    is_whole: bool
    keys: Layout
    key_rows: Rows
    cross_keys: Layout
    cross_key_rows: Rows
    is_read: bool

    def queries_of(self, x_SD: Tensor) -> Tensor:
        """Returns the rows of this stream that are computed."""
        if self.is_whole:
            return self.key_rows.of(x_SD)
        tail_QD = self.tail.of(x_SD)
        return torch.cat([x_SD[: self.num_whole], tail_QD]) if self.num_whole else tail_QD


@dataclass(frozen=True)
class LayerPlan:
    """A fusion layer."""

    text: StreamPlan
    image: StreamPlan


@dataclass(frozen=True)
class Taken:
    """What an objective reads of a stream: rows of those that are computed at a depth."""

    depth: int
    rows: Rows


@dataclass(frozen=True)
class Plan:
    """A batch's way through the model.

    Args:
        texts: The texts that are encoded: for each name, once per objective or once for all.
        text_rows: Rows of the encoded texts' padded ids, flattened and joined, that are not padding.
        text_layout: The encoded texts.
        true_images: The batch's images that are encoded whole.
        false_images: Of its false ones those that are; they follow the true ones.
        num_visible: Images, the batch's own, whose visible patches are encoded; they follow the whole ones.
        image_layout: The encoded images.
        image_runs: How many of them have how many tokens: the whole ones, then the visible patches.
        pair_text_rows: The first fusion layer's rows among those of the encoded texts, pair by pair.
        pair_image_rows: The same of the encoded images.
        layers: The fusion layers.
        taken: For each objective and stream where its rows are found.
    """

    texts: list[Texts]
    text_rows: Index
    text_layout: Layout
    true_images: Rows
    false_images: Rows
    num_visible: int
    image_layout: Layout
    image_runs: tuple[tuple[int, int], ...]
    pair_text_rows: Rows
    pair_image_rows: Rows
    layers: list[LayerPlan]
    taken: dict[str, dict[str, Taken]]

    def send(self, device: torch.device, into: Tensor | None = None) -> Tensor:
        """Copies what the device needs at once, and returns it; ``into`` what an earlier plan of this shape gave."""
        return send(self.indices(), device, into)

    def indices(self) -> list[Index]:
        """Returns what has to be sent to the device."""
        indices = [self.text_rows, *(layout.ends for layout in self._layouts()), *(rows.index for rows in self._rows())]
        return [index for index in indices if index is not None]

    @property
    def shape(self) -> Hashable:
        """What the host knows of the batch's way: plans of one shape run the same code on tensors of the same sizes."""
        layouts = [(len(layout.lengths), layout.num_tokens, layout.max_length) for layout in self._layouts()]
        rows = [(rows.first, rows.last, len(rows), rows.index is None) for rows in self._rows()]
        streams = [(stream.num_whole, stream.is_whole, stream.is_read) for stream in self._streams()]
        taken = [(name, stream, taken.depth) for name, of in self.taken.items() for stream, taken in of.items()]
        texts = [(group.name, tuple(group.ids_NT.shape)) for group in self.texts]
        parts = (texts, layouts, rows, streams, taken)
        return (*map(tuple, parts), len(self.text_rows.array), self.image_runs, len(self.layers))

    def _streams(self) -> list[StreamPlan]:
        return [stream for layer in self.layers for stream in (layer.text, layer.image)]

    def _layouts(self) -> list[Layout]:
        of_streams = [(stream.queries, stream.keys, stream.cross_keys) for stream in self._streams()]
        return [self.text_layout, self.image_layout, *(layout for three in of_streams for layout in three)]

    def _rows(self) -> list[Rows]:
        of_streams = [(stream.tail, stream.key_rows, stream.cross_key_rows) for stream in self._streams()]
        taken = [taken.rows for of in self.taken.values() for taken in of.values()]
        first = [self.true_images, self.false_images, self.pair_text_rows, self.pair_image_rows]
        return [*first, *(rows for three in of_streams for rows in three), *taken]


def make_plan(
    reads: Mapping[str, Reads],
    *,
    num_images: int,
    num_whole_tokens: int,
    num_visible_tokens: int,
    shares_texts: bool,
    num_encoded: int | None = None,
) -> Plan:
    """Plans a batch.

    Args:
        reads: For each objective what it reads.
        num_images: B, the batch's own images.
        num_whole_tokens: Tokens of a whole image.
        num_visible_tokens: Tokens of an image's visible patches, CLS included.
        shares_texts: Whether objectives that see the same texts share their encoding, which is exact where the text
            tower draws no dropout.
        num_encoded: How many images, false ones included, are encoded whole where any is; None: those that are used.
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
    whole = whole[whole >= 0]
    if num_encoded is not None and len(whole):
        whole = np.arange(num_encoded)
    num_visible = num_images if any(images.visible_only for images in using_images) else 0
    has_none = any((images.index < 0).any() for images in using_images)
    # Behind them an image without tokens, if there are pairs that have none.
    image_counts = [len(whole), num_visible, int(has_none)]
    image_layout = Layout(np.repeat([num_whole_tokens, num_visible_tokens, 0], image_counts))

    # Which encoded text and which encoded image each pair has; only pairs that are fused need both.
    fused = [name for name in deepest_first if reads[name].depth > 0]
    text_of = {
        name: first_text[_text_key(name, reads[name], shares_texts)] + reads[name].texts.index
        for name in reads
        if reads[name].uses_texts
    }
    image_of = {}
    for name, images in ((name, read.images) for name, read in reads.items() if read.uses_images):
        encoded = len(whole) + images.index if images.visible_only else np.searchsorted(whole, images.index)
        image_of[name] = np.where(images.index < 0, len(whole) + num_visible, encoded)
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
                taken[name][stream] = Taken(0, rows_of(_read_rows(layout, of[name], wanted)))
    text_lengths, image_lengths = text_layout.lengths[pairs_of_text], image_layout.lengths[pairs_of_image]
    for depth in range(1, 1 + max((reads[name].depth for name in fused), default=0)):
        present = [name for name in fused if reads[name].depth >= depth]
        text = _stream("text", depth, present, reads, text_lengths, image_lengths, taken)
        image = _stream("image", depth, present, reads, image_lengths, text_lengths, taken)
        layers.append(LayerPlan(text, image))

    return Plan(
        texts=list(texts.values()),
        text_rows=Index(_valid_rows(texts.values())),
        text_layout=text_layout,
        true_images=rows_of(whole[whole < num_images]),
        false_images=rows_of(whole[whole >= num_images] - num_images),
        num_visible=num_visible,
        image_layout=image_layout,
        image_runs=((len(whole), num_whole_tokens), (num_visible, num_visible_tokens)),
        pair_text_rows=rows_of(text_layout.rows(pairs_of_text)),
        pair_image_rows=rows_of(image_layout.rows(pairs_of_image)),
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
        text_N = np.arange(len(group.num_tokens_N))
        rows.append(ranges(first + np.where(text_N < num_texts, text_N, 0) * num_tokens, group.num_tokens_N))
        first += num_texts * num_tokens
    return np.concatenate(rows)


def _read_rows(layout: Layout, sequences: np.ndarray, read: Read) -> np.ndarray:
    if read.positions is None:
        return layout.rows(sequences)
    starts = layout.ends.array
    rows = [starts[sequence] + np.asarray(p, np.int64) for sequence, p in zip(sequences, read.positions, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _stream(
    stream: str,
    depth: int,
    present: Sequence[str],
    reads: Mapping[str, Reads],
    pair_lengths: np.ndarray,
    other_lengths: np.ndarray,
    taken: dict[str, dict[str, Taken]],
) -> StreamPlan:
    """Plans a stream in the layer that leads to ``depth``, and notes where what is read there will stand."""
    num_pairs = {name: len(reads[name].images.index) for name in present}
    num_present = sum(num_pairs.values())
    here, other = Layout(pair_lengths[:num_present]), Layout(other_lengths[:num_present])
    first_pair = dict(zip(present, np.cumsum([0, *num_pairs.values()]), strict=False))
    nothing = np.zeros(0, np.int64)
    computed, query_lengths, tails, num_whole = [nothing], [nothing], [nothing], 0
    for name in present:  # the deepest first, so that what goes on stands in front of what ends here
        pairs = first_pair[name] + np.arange(num_pairs[name])
        read = getattr(reads[name], stream)
        is_read = read is not None and read.depth == depth
        rows = _read_rows(here, pairs, read) if is_read else nothing
        if reads[name].depth > depth:
            if is_read:
                taken[name][stream] = Taken(depth, rows_of(rows))
            num_whole += int(here.lengths[pairs].sum())
            query_lengths.append(here.lengths[pairs])
        elif is_read:
            first = num_whole + sum(map(len, tails))
            taken[name][stream] = Taken(depth, Rows(first, first + len(rows)))
            tails.append(rows)
            is_all = read.positions is None
            query_lengths.append(
                here.lengths[pairs] if is_all else np.array([len(p) for p in read.positions], np.int64)
            )
        else:
            continue
        computed.append(pairs)
    pairs, tail = np.concatenate(computed), np.concatenate(tails)
    key_rows = here.rows(pairs)
    return StreamPlan(
        queries=Layout(np.concatenate(query_lengths)),
        num_whole=num_whole,
        tail=rows_of(tail),
        is_whole=np.array_equal(np.concatenate([np.arange(num_whole), tail]), key_rows),
        keys=Layout(here.lengths[pairs]),
        key_rows=rows_of(key_rows),
        cross_keys=Layout(other.lengths[pairs]),
        cross_key_rows=rows_of(other.rows(pairs)),
        is_read=len(computed) > 1,
    )
