"""Which slots of its memory MPMA uses for which word, and how much each slot is used."""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from fastm3ae.config import MPMAConfig
from fastm3ae.errors import UserError
from fastm3ae.model.fusion_use import FusionUse
from fastm3ae.visualize.attention import words_of
from fastm3ae.visualize.sheets import Usage, usage_chart
from fastm3ae.visualize.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MAX_ROWS", "draw_memory", "memory_use", "usage_rows", "words_by_slot"]

MAX_ROWS = 64
"""Of a top-k memory, which has thousands of rows, the map shows so many: those that the text's words use most."""


@torch.no_grad()
def memory_use(subject: Subject) -> FusionUse:
    """Returns what the words of the whole, unmasked texts use.

    Raises:
        UserError: The model has no memory.
    """
    model = subject.model
    if model.config.kind != "mpma":
        raise UserError(
            f"{subject.checkpoint} is a model of {model.config.kind.upper()}, which has no memory; MPMA has."
        )
    if not hasattr(model, "fusion") or model.config.memory == "none":
        raise UserError(f"{subject.checkpoint} is an MPMA without a memory (model.memory none, or no fusion).")
    with FusionUse(model, subject.batch, is_whole=True) as use:
        model.fuse_whole(subject.batch)
    return use


def words_by_slot(subject: Subject, use: FusionUse) -> list[dict[str, Tensor]]:
    """Returns for each pair, for each place of its memory, what its tokens give to the slots: (T, M), mean over heads.

    Of slots the places are the layers; what a token gives to slots and patches together is 1. Of topk it is one place
    before the layers, and what a token gives to its rows is 1.
    """
    if subject.model.config.memory == "topk":
        return [{"before the layers": weights_TM} for weights_TM in use.topk_weights()]
    num_slots = subject.model.config.num_slots
    by_layer = [[w_HTK[..., :num_slots].mean(dim=0) for w_HTK in of_pairs] for of_pairs in use.cross_weights()]
    names = [f"layer {number}" for number in range(1, len(by_layer) + 1)]
    return [dict(zip(names, of_pair, strict=True)) for of_pair in zip(*by_layer, strict=True)]


def draw_memory(subject: Subject) -> tuple[list["Figure"], Image.Image]:
    """Draws for each pair which slots its words use, and for all of them together how much each slot is used.

    Raises:
        UserError: The model has no memory, or a text has no word.
    """
    use = memory_use(subject)
    maps = []
    for pair, by_place in enumerate(words_by_slot(subject, use)):
        words = words_of(subject.encodings[pair], subject.batch.texts[pair])
        if not words:
            raise UserError(f"Text {pair + 1} has no word that could use a memory, got {subject.batch.texts[pair]!r}.")
        by_word = {
            place: torch.stack([weights_TM[tokens].mean(dim=0) for _, tokens in words])
            for place, weights_TM in by_place.items()
        }
        maps.append(_heat_map(subject.caption(pair), [word for word, _ in words], by_word))
    return maps, usage_chart(usage_rows(subject.model.config, use, "tokens"))


def usage_rows(config: MPMAConfig, use: FusionUse, who: str) -> list[Usage]:
    """Returns how much each slot is used.

    Args:
        config: The model's configuration.
        use: What was used.
        who: Whose use this is: "hidden words".
    """
    if config.memory == "topk":
        what = f"each head keeps {config.num_topk_kept} of {config.num_topk_slots} rows; how many heads keep which"
        by_side = zip(("words", "patches"), use.kept_rows(), strict=True)
        return [Usage(f"{side}: {what}", frac_M) for side, frac_M in by_side]
    even = config.num_slots / (config.num_slots + use.plan.layers[0].cross_keys.lengths[0])
    rows = []
    for number, weights_QM in enumerate(use.slot_weights(), 1):
        share = f"{weights_QM.sum(dim=1).mean():.1%} to {config.num_slots} slots ({even:.1%} if all keys weighed alike)"
        rows.append(Usage(f"layer {number}: {who} give {share}", weights_QM.mean(dim=0)))
    return rows


def _heat_map(caption: str, words: list[str], by_place: dict[str, Tensor]) -> "Figure":
    """Returns a map for each place of the memory, words by slots, all in the same colours."""
    from matplotlib.figure import Figure  # slow to import

    num_slots = next(iter(by_place.values())).shape[1]
    shown = min(num_slots, MAX_ROWS)
    height = 0.7 + len(by_place) * (0.5 + 0.2 * len(words))
    figure = Figure(figsize=(max(6.0, 2.0 + 0.11 * shown), height), layout="constrained")
    most = max(float(weights_WM.max()) for weights_WM in by_place.values())
    all_axes = figure.subplots(len(by_place), 1, squeeze=False)[:, 0]
    for axes, (place, weights_WM) in zip(all_axes, by_place.items(), strict=True):
        slots, share = slice(None), weights_WM.sum(dim=1).mean()
        title = f"{place}: {share:.1%} of the words' attention"
        if shown < num_slots:
            slots = weights_WM.sum(dim=0).topk(shown).indices.sort().values
            part = weights_WM[:, slots].sum(dim=1).mean() / share
            title = f"{place}: the {shown} most used of {num_slots} rows, {part:.0%} of what all rows get"
        image = axes.imshow(
            weights_WM[:, slots].float().cpu().numpy(),
            cmap="Blues",
            vmin=0,
            vmax=most,
            aspect="auto",
            extent=(0.5, shown + 0.5, len(words) - 0.5, -0.5),  # slots are numbered from 1
        )
        axes.set_yticks(range(len(words)), words, parse_math=False)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        if shown < num_slots:
            axes.set_xticks([])
    all_axes[-1].set_xlabel("slot" if shown == num_slots else "rows of the memory, in their order", fontsize=8)
    bar = figure.colorbar(image, ax=list(all_axes), shrink=min(1.0, 4 / height))
    bar.set_label("weight, mean over heads", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(caption if len(caption) <= 90 else f"{caption[:87]}...", fontsize=9, parse_math=False)
    return figure
