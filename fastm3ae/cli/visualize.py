"""The command that draws: reconstructions, attention, memory, training curves."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastm3ae.cli.configure import choose
from fastm3ae.cli.say import printable, warn
from fastm3ae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from fastm3ae.visualize.subject import Subject

__all__ = ["visualize"]


def visualize(arguments: Sequence[str]) -> None:
    """Draw pictures for a paper: what a model rebuilds, where its words look, its memory, training curves."""
    name = choose("fastm3ae visualize", arguments, {name: draw.__doc__ for name, draw in PICTURES.items()})
    PICTURES[name](arguments[1:])


def _reconstruct(arguments: Sequence[str]) -> None:
    """Rebuild images of which more and more is hidden, and hidden words, if texts are given."""
    parser = _parser("reconstruct", _reconstruct, "none: images alone")
    parser.add_argument(
        "--mask-ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9], metavar="R",
        help="which fractions of the patches are hidden (default 0.5 0.75 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--token-frac", type=float, metavar="F",
        help="which fraction of a text's tokens is hidden (default: as in the checkpoint's pre-training)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of what is hidden (default 0)")
    chosen = parser.parse_args(arguments)

    from fastm3ae.visualize.reconstructions import draw_reconstructions

    subject = _subject(chosen, chosen.token_frac, chosen.seed)
    sheet = draw_reconstructions(subject, chosen.mask_ratios, has_texts=bool(chosen.texts))
    print(f"seed {chosen.seed}")
    _save(sheet, chosen.output, "reconstructions")


def _attention(arguments: Sequence[str]) -> None:
    """Lay over each image at which patches each word of its text looks, in a layer of the fusion."""
    parser = _parser("attention", _attention)
    parser.add_argument("--layer", type=int, metavar="N", help="which layer of the fusion, from 1 (default: the last)")
    parser.add_argument(
        "--heads", nargs="+", default=["mean"], metavar="H", help="mean (the default), all, or numbers from 1"
    )
    chosen = parser.parse_args(arguments)
    heads = chosen.heads[0] if chosen.heads in (["mean"], ["all"]) else chosen.heads
    if isinstance(heads, list):
        if not all(head.isdecimal() for head in heads):
            raise UserError(f"--heads must be mean, all, or numbers of heads, got {' '.join(heads)}.")
        heads = list(map(int, heads))

    from fastm3ae.visualize.attention import draw_attention

    subject = _subject(chosen)
    layer = subject.model.config.fusion.num_layers if chosen.layer is None else chosen.layer
    for number, sheet in enumerate(draw_attention(subject, layer, heads), 1):
        _save(sheet, chosen.output, f"attention_layer_{layer}_pair_{number}")


def _memory(arguments: Sequence[str]) -> None:
    """Draw which slots of MPMA's memory which words use, and how much each slot is used."""
    chosen = _parser("memory", _memory).parse_args(arguments)

    from fastm3ae.visualize.figures import save_figure
    from fastm3ae.visualize.memory import draw_memory

    maps, usage = draw_memory(_subject(chosen))
    for number, figure in enumerate(maps, 1):
        _show(save_figure(figure, chosen.output, f"memory_pair_{number}"))
    _save(usage, chosen.output, "slot_usage")


def _curves(arguments: Sequence[str]) -> None:
    """Draw losses, validation metrics and learning rate of one or several runs."""
    parser = argparse.ArgumentParser(prog="fastm3ae visualize curves", description=_curves.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="where to write (default pictures)")
    chosen = parser.parse_args(arguments)

    from fastm3ae.training.run_folder import read_metrics
    from fastm3ae.visualize.curves import curves_figure, panels, run_names
    from fastm3ae.visualize.figures import save_figure

    lines = {name: read_metrics(run) for name, run in zip(run_names(chosen.runs), chosen.runs, strict=True)}
    _show(save_figure(curves_figure(panels(lines)), chosen.output, "curves"))


PICTURES: dict[str, Callable[[Sequence[str]], None]] = {
    "reconstruct": _reconstruct,
    "attention": _attention,
    "memory": _memory,
    "curves": _curves,
}


def _parser(name: str, command: Callable, without_texts: str | None = None) -> argparse.ArgumentParser:
    """Returns the options that the pictures of a checkpoint have in common."""
    parser = argparse.ArgumentParser(prog=f"fastm3ae visualize {name}", description=command.__doc__)
    parser.add_argument("checkpoint", type=Path, help="ours (folder or .safetensors), or an official .ckpt")
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="FILE", help="image files, also DICOM")
    parser.add_argument(
        "--texts", nargs="+", default=[], required=without_texts is None, metavar="TEXT",
        help="one for each image, one for all, or several for one image" + f" ({without_texts})" * bool(without_texts),
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="where to write (default pictures)")
    parser.add_argument("--tokenizer", help="hub name or folder (default: that of the checkpoint)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    return parser


def _subject(chosen: argparse.Namespace, token_frac: float | None = None, seed: int = 0) -> "Subject":
    from fastm3ae.visualize.subject import read_subject

    subject = read_subject(
        chosen.checkpoint,
        chosen.images,
        chosen.texts,
        device=chosen.device,
        tokenizer=chosen.tokenizer,
        token_frac=token_frac,
        seed=seed,
    )
    for note in subject.notes:
        warn(note)
    return subject


def _save(sheet: "Image.Image", folder: Path, name: str) -> None:
    from fastm3ae.visualize.figures import save_sheet

    _show([save_sheet(sheet, folder, name)])


def _show(paths: Sequence[Path]) -> None:
    for path in paths:
        print(printable(f"wrote {path}"))
