"""The ``fastm3ae`` command.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastm3ae.errors import Interrupted, UserError, nearest

__all__ = ["main"]


def pretrain(arguments: Sequence[str]) -> None:
    """Pre-train a model on arrow files, or on the embedded demo corpus (--preset demo)."""
    import tyro
    import yaml

    from fastm3ae.config import PretrainConfig
    from fastm3ae.configfile import from_dict
    from fastm3ae.presets import PRESETS, preset

    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sources.add_argument("--preset", default="m3ae")
    sources.add_argument("--config", type=Path)
    chosen, overrides = sources.parse_known_args(arguments)
    base = preset(chosen.preset)
    if chosen.config is not None:
        try:
            values = yaml.safe_load(chosen.config.read_text())
        except OSError as error:
            raise UserError(f"The configuration file {chosen.config} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"The configuration file {chosen.config} is not YAML: {' '.join(str(error).split())}"
            ) from error
        try:
            base = from_dict(base, values or {})
        except UserError as error:
            raise UserError(f"{chosen.config}: {error}") from error
    config = tyro.cli(
        PretrainConfig,
        default=base,
        args=overrides,
        prog=f"fastm3ae pretrain --preset {chosen.preset}",
        description=(
            f"Pre-trains a model. A run's configuration is a preset (--preset {' | '.join(PRESETS)}; "
            f"{chosen.preset} now), then a YAML file with any of the keys below (--config FILE), then these options. "
            "The defaults shown are those of the chosen preset and file."
        ),
    )

    from fastm3ae.training.pretrain import pretrain as run

    summary = run(config)
    for name, value in summary.items():
        print(f"{name:<28} {value:.4g}" if isinstance(value, float) else f"{name:<28} {value}")
    print(f"{'run folder':<28} {config.output}")


def prepare(arguments: Sequence[str]) -> None:
    """Turn a data set's release, or your own images and texts, into arrow files."""
    import functools

    import tyro
    from tqdm import tqdm

    from fastm3ae.data.prepare import SOURCES

    name = _choose("fastm3ae prepare", arguments, {name: source.__doc__ for name, source in SOURCES.items()})
    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not bars:  # not before the arguments are understood
            bars.append(tqdm(total=total, unit="image", desc=name, dynamic_ncols=True))
        bars[0].update(done - bars[0].n)

    report = tyro.cli(
        functools.partial(SOURCES[name], progress=progress),
        args=arguments[1:],
        prog=f"fastm3ae prepare {name}",
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.SuppressFixed),
    )
    for bar in bars:
        bar.close()
    print(report.render())


def inspect(arguments: Sequence[str]) -> None:
    """Say what is inside an arrow file, a checkpoint or a run folder."""
    parser = argparse.ArgumentParser(prog="fastm3ae inspect", description=inspect.__doc__)
    parser.add_argument(
        "path", type=Path, help="an .arrow file, a checkpoint (folder, .safetensors, .ckpt) or a run folder"
    )
    path = parser.parse_args(arguments).path
    if path.suffix == ".arrow":
        from fastm3ae.data.describe import describe_arrow

        print(describe_arrow(path).render())
    elif (path / "config.yaml").is_file():
        for name in ("config.yaml", "environment.json", "summary.json"):
            if (path / name).is_file():
                print(f"== {name}\n{(path / name).read_text()}")
    else:
        from fastm3ae.pretrained import describe_weights

        print(describe_weights(path))


def convert(arguments: Sequence[str]) -> None:
    """Turn an official .ckpt into one of our checkpoints, or one of ours into an official .ckpt."""
    parser = argparse.ArgumentParser(prog="fastm3ae convert", description=convert.__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint: ours (folder or .safetensors) or an official .ckpt")
    parser.add_argument(
        "target", type=Path, help="what to write: NAME.ckpt is official, any other name a folder of ours"
    )
    chosen = parser.parse_args(arguments)

    from fastm3ae.pretrained import convert_checkpoint

    convert_checkpoint(chosen.source, chosen.target)
    print(f"wrote {chosen.target}")


COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {
    "pretrain": pretrain,
    "prepare": prepare,
    "inspect": inspect,
    "convert": convert,
}


def _choose(program: str, arguments: Sequence[str], choices: dict[str, str | None]) -> str:
    """Returns the first argument if it is one of the choices; prints them, and ends, where help is asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, choices))
        lines = [f"  {name:<{width}}  {(text or '').strip().splitlines()[0]}" for name, text in choices.items()]
        print(f"usage: {program} {{{','.join(choices)}}} ...\n\n" + "\n".join(lines))
        print(f"\n{program} NAME --help says more.")
        raise SystemExit(0)
    if arguments[0] not in choices:
        raise UserError(
            f"{program}: {arguments[0]!r} is not one of {', '.join(choices)}.{nearest(arguments[0], choices)}"
        )
    return arguments[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, 2 after a user's mistake, 128 + N after signal N.

    Args:
        arguments: The command line without the program's name; None: that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = _choose("fastm3ae", arguments, {name: command.__doc__ for name, command in COMMANDS.items()})
        COMMANDS[name](arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
