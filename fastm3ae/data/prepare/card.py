"""The data card: what a preparation wrote, in Markdown, and a sheet of samples with their texts."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastm3ae import __version__
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.decode import decode_image
from fastm3ae.data.prepare.report import NUM_EXAMPLES, PrepareReport, SplitReport
from fastm3ae.errors import printable, shown

__all__ = ["write_card"]

SAMPLES_PER_SPLIT, TILE_PX, GAP_PX = 4, 224, 8
NUM_LINES, LINE_PX, LINE_CHARACTERS = 7, 15, 32
LONGEST, LONGEST_NOTE, LONGEST_NAME = 300, 2000, 26
"""Characters of a text, a name or an option; of a note; of a name below a picture."""

_MARKUP = re.compile(r"([\\`*_\[\]<>|&#~!$])|(?<=:)(?=//)")


def write_card(folder: Path, report: PrepareReport, facts: Mapping[str, Any], text_column: str | None) -> None:
    """Writes ``{report.name}.md`` and ``{report.name}_samples.png``, in which texts are texts, whatever they hold.

    Args:
        folder: Where the arrow files are.
        report: What was written and left out.
        facts: What the arrow files say of their preparation.
        text_column: Column of the texts, if there are any.
    """
    sheet = _draw_samples(folder, report, text_column)
    sheet.save(folder / f"{report.name}_samples.png")
    (folder / f"{report.name}.md").write_text(_render(report, facts), encoding="utf-8")


def _render(report: PrepareReport, facts: Mapping[str, Any]) -> str:
    lines = [f"# {_text(report.name)}", "", f"Written by `fastm3ae prepare`, version {__version__}.", ""]
    lines += [f"Warning: {_text(warning)}\n" for warning in report.warnings]
    lines += _table(["split", "images", *([f"{report.text_name}s"] if report.text_name else []), "file"], [
        [split, part.num_images, *([part.num_texts] if report.text_name else []), part.file.name]
        for split, part in report.splits.items()
    ])  # fmt: skip
    if any(part.kinds for part in report.splits.values()):
        kinds = {split: part.kinds for split, part in report.splits.items()}
        lines += _table(["images with" if report.text_name is None else f"{report.text_name}s that are", *kinds], [
            [kind, *(counts[kind] for counts in kinds.values())] for kind in report.kinds
        ])  # fmt: skip
    measures = {"width in pixels": lambda part: [image.size_px[0] for image in part.images],
                "height in pixels": lambda part: [image.size_px[1] for image in part.images]}  # fmt: skip
    if report.text_name:
        measures |= {f"{report.text_name}s per image": lambda part: [len(image.num_words) for image in part.images],
                     f"words per {report.text_name}": lambda part: part.num_words}  # fmt: skip
    lines += _table(["", "split", "least", "a twentieth up to", "median", "a twentieth from", "most", "mean"], [
        [name, split, *_spread(measure(part))]
        for name, measure in measures.items() for split, part in report.splits.items() if measure(part)
    ])  # fmt: skip
    lines += ["## Left out", ""]
    lines += [f"- {len(items)}: {_text(reason)} ({_codes(items)})" for reason, items in report.dropped.items()]
    lines += [] if report.dropped else ["Nothing."]
    if report.moved:
        lines.append(f"- Named in several splits and put into the last: {len(report.moved)} ({_codes(report.moved)})")
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {_text(note)}" for note in report.notes)]
    if options := facts.get("options"):
        lines += [
            "",
            "## Options",
            "",
            *_table(["option", "value"], [[name, shown(value)] for name, value in options.items()])[:-1],
        ]
    return "\n".join([*lines, "", "## Samples", "", f"![samples](<{report.name}_samples.png>)", ""])


def _spread(values: Sequence[int]) -> list[str]:
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else list(values) * 19
    return [str(min(values)), f"{cuts[0]:.0f}", f"{cuts[9]:.0f}", f"{cuts[-1]:.0f}", str(max(values)),
            f"{fmean(values):.1f}"]  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table, and an empty one."""
    lines = [[_text(str(cell)) for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _plain(text: str, longest: int = LONGEST) -> str:
    """Returns a text in one line without commands, cut short."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _text(text: str, longest: int = LONGEST_NOTE) -> str:
    """Returns a text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\1", _plain(text, longest))


def _codes(items: Sequence[str]) -> str:
    """Returns the first few items, each as it is, and dots if there are more."""
    shown = [f"`{_plain(item).replace('`', chr(39))}`" for item in items[:NUM_EXAMPLES]]
    return ", ".join(shown) + (", ..." if len(items) > NUM_EXAMPLES else "")


def _draw_samples(folder: Path, report: PrepareReport, text_column: str | None) -> Image.Image:
    """Returns a row of images for each split, evenly spaced among its own, with the beginnings of their texts below."""
    step_x, step_y = TILE_PX + GAP_PX, TILE_PX + (NUM_LINES + 1) * LINE_PX + GAP_PX
    parts = {split: part for split, part in report.splits.items() if part.num_images}
    sheet = Image.new("RGB", (SAMPLES_PER_SPLIT * step_x + GAP_PX, len(parts) * step_y + GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for line, (split, part) in enumerate(parts.items()):
        table = ArrowTable([folder / part.file.name])
        num_samples = min(SAMPLES_PER_SPLIT, part.num_images)
        for column, row in enumerate(i * part.num_images // num_samples for i in range(num_samples)):
            x, y = GAP_PX + column * step_x, GAP_PX + line * step_y
            image = decode_image(table.image_bytes(row)).convert("RGB")
            sheet.paste(ImageOps.pad(image, (TILE_PX, TILE_PX), color="black"), (x, y))
            name = _plain(part.images[row].image)
            lines = [f"{split}: {name if len(name) <= LONGEST_NAME else '...' + name[3 - LONGEST_NAME :]}"]
            lines += textwrap.wrap(_describe(table, part, row, text_column), LINE_CHARACTERS)
            for number, words in enumerate(lines[: NUM_LINES + 1]):
                colour = "black" if number else "gray"
                draw.text((x, y + TILE_PX + number * LINE_PX), words, fill=colour, font=font)
    return sheet


def _describe(table: ArrowTable, part: SplitReport, row: int, text_column: str | None) -> str:
    """Returns a row's texts, or its labels."""
    if text_column is None:
        return ", ".join(name for name, count in part.images[row].kinds.items() if count) or "no label"
    return _plain(" / ".join(table.row(row, text_column)))
