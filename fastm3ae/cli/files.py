"""The commands that make or read files: prepare, inspect, convert; and doctor."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fastm3ae.cli.configure import choose
from fastm3ae.cli.say import printable

__all__ = ["convert", "doctor", "inspect", "prepare"]


def prepare(arguments: Sequence[str]) -> None:
    """Turn a data set's release, or your own images and texts, into arrow files."""
    import functools

    import tyro
    from tqdm import tqdm

    from fastm3ae.data.prepare import SOURCES

    name = choose("fastm3ae prepare", arguments, {name: source.__doc__ for name, source in SOURCES.items()})
    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bars:  # not before the arguments are understood
            bars.append(tqdm(total=total, unit="image", desc=name, dynamic_ncols=True, disable=None))
        bars[0].update()

    report = tyro.cli(
        functools.partial(SOURCES[name], progress=progress, num_workers=os.cpu_count() or 1),
        args=arguments[1:],
        prog=f"fastm3ae prepare {name}",
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.SuppressFixed, tyro.conf.OmitArgPrefixes),
    )
    for bar in bars:
        bar.close()
    print(printable(report.render()))


def inspect(arguments: Sequence[str]) -> None:
    """Say what is inside an arrow file, a checkpoint or a run folder."""
    parser = argparse.ArgumentParser(prog="fastm3ae inspect", description=inspect.__doc__)
    parser.add_argument(
        "path", type=Path, help="an .arrow file, a checkpoint (folder, .safetensors, .ckpt) or a run folder"
    )
    path = parser.parse_args(arguments).path
    if path.suffix == ".arrow":
        from fastm3ae.data.describe import describe_arrow

        print(printable(describe_arrow(path).render()))
    else:
        from fastm3ae.training.describe import describe_checkpoint, describe_run

        print(printable(describe_run(path) if (path / "config.yaml").is_file() else describe_checkpoint(path)))


def convert(arguments: Sequence[str]) -> None:
    """Turn an official .ckpt into one of our checkpoints, or one of ours into an official .ckpt."""
    parser = argparse.ArgumentParser(prog="fastm3ae convert", description=convert.__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint: ours (folder or .safetensors) or an official .ckpt")
    parser.add_argument(
        "target", type=Path, help="what to write: NAME.ckpt is official, any other name a folder of ours"
    )
    chosen = parser.parse_args(arguments)

    from fastm3ae.weights.pretrained import convert_checkpoint

    convert_checkpoint(chosen.source, chosen.target)
    print(f"wrote {chosen.target}")


def doctor(arguments: Sequence[str]) -> int:
    """Say what is installed, which code serves each op, and what is missing."""
    argparse.ArgumentParser(prog="fastm3ae doctor", description=doctor.__doc__).parse_args(arguments)

    from fastm3ae.doctor import diagnose

    diagnosis = diagnose()
    print(diagnosis.render())
    return 1 if diagnosis.broken else 0
