"""The command that writes parts of a checkpoint for other programs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.cli.configure import choose
from fastm3ae.errors import UserError

__all__ = ["export"]

HELP = {
    "vision": "The vision tower as a folder of timm.",
    "text": "The language tower and its tokenizer as a folder of transformers.",
    "graph": "An encoder as a graph of torch.export.",
}
CHECKPOINT = "one of ours (folder or .safetensors), or an official .ckpt"


def export(arguments: Sequence[str]) -> None:
    """Write a tower for timm or transformers, or an encoder as a graph of torch.export."""
    what = choose("fastm3ae export", arguments, HELP)
    parser = argparse.ArgumentParser(prog=f"fastm3ae export {what}", description=HELP[what])
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    parser.add_argument("target", type=Path, help="what is written: NAME.pt2" if what == "graph" else "a new folder")
    if what == "graph":
        parser.add_argument(
            "--part", choices=["image", "text", "pair"], required=True, help="what it encodes; pair: both, fused"
        )
    chosen = parser.parse_args(arguments[1:])

    from fastm3ae.export import export_graph, export_text, export_vision

    try:
        if what == "graph":
            export_graph(chosen.checkpoint, chosen.target, chosen.part)
        else:
            {"vision": export_vision, "text": export_text}[what](chosen.checkpoint, chosen.target)
    except OSError as error:
        raise UserError(f"{chosen.target} cannot be written: {error.strerror or error}.") from error
    print(f"wrote {chosen.target}")
