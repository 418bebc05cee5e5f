"""From arguments to a run's configuration: a preset or a checkpoint, then a YAML file, then options."""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastm3ae.errors import UserError, nearest

if TYPE_CHECKING:
    from fastm3ae.config import RunConfig

__all__ = ["choose", "configure", "run_options", "torchrun"]

AnyRun = TypeVar("AnyRun", bound="RunConfig")


def choose(program: str, arguments: Sequence[str], choices: dict[str, str | None], more: str = "") -> str:
    """Returns the first argument if it is one of the choices; prints them and more, and ends, where help is asked."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, choices))
        lines = [f"  {name:<{width}}  {(text or '').strip().splitlines()[0]}" for name, text in choices.items()]
        print(f"usage: {program} {{{','.join(choices)}}} ...\n\n" + "\n".join(lines))
        print(f"\n{program} NAME --help says more.{more}")
        raise SystemExit(0)
    if arguments[0] not in choices:
        raise UserError(
            f"{program}: {arguments[0]!r} is not one of {', '.join(choices)}.{nearest(arguments[0], choices)}"
        )
    return arguments[0]


def run_options(command: str, default_preset: str) -> argparse.ArgumentParser:
    """Returns the options that are no part of a run's configuration, but say where it starts."""
    parser = argparse.ArgumentParser(prog=f"fastm3ae {command}", add_help=False, allow_abbrev=False)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", default=default_preset)
    start.add_argument("--from-official")
    parser.add_argument("--config", type=Path)
    return parser


def configure(
    command: str,
    description: str,
    presets: Mapping[str, Callable[[], AnyRun]],
    overrides: Sequence[str],
    chosen: argparse.Namespace,
    starts_from: Callable[[AnyRun, Mapping[str, Any]], AnyRun] | None = None,
) -> tuple[AnyRun, str | None]:
    """Returns a run's configuration, and comments to head it where it is translated.

    Args:
        command: Name of the command.
        description: What the command does, for its help.
        presets: What its runs may start from.
        overrides: The arguments that are fields of the configuration.
        chosen: Those that are none: what ``run_options`` parsed.
        starts_from: Changes a preset by what the YAML file says, before that is laid over it.
    """
    import tyro

    from fastm3ae.config.files import from_dict, read_yaml
    from fastm3ae.config.presets import preset

    header = None
    if chosen.from_official is None:
        base, source = preset(chosen.preset, presets), f"--preset {chosen.preset}"
    else:
        base, header = _translate(chosen.from_official, command)
        source = "--from-official ..."
    values = {} if chosen.config is None else read_yaml(chosen.config) or {}
    if starts_from is not None:
        base = starts_from(base, values)
    try:
        base = from_dict(base, values)
    except UserError as error:
        raise UserError(f"{chosen.config}: {error}") from error
    config = tyro.cli(
        type(base),
        default=base,
        args=overrides,
        prog=f"fastm3ae {command} {source}",
        config=(tyro.conf.AvoidSubcommands,),  # the model is of the kind that the preset or the file has
        description=(
            f"{description} A run's configuration is a preset (--preset {' | '.join(presets)}), then a YAML file "
            "with any of the keys below (--config FILE), then these options. The defaults shown are those of "
            f"{source} and that file. --from-official 'python main.py with ...' takes the place of the preset"
            + (
                "."
                if command == "profile"
                else f"; fastm3ae {command} then prints the configuration, ready for --config, instead of running it."
            )
        ),
    )
    return config, header


def _translate(command_line: str, command: str) -> tuple["RunConfig", str]:
    """Returns our configuration of an official command line, and comments to head it in YAML."""
    from fastm3ae.official.arguments import arguments_of, parse_official
    from fastm3ae.official.translate import to_run_config

    arguments = arguments_of(command_line)
    run = parse_official(arguments)
    config, notes = to_run_config(run)
    if run.command != ("pretrain" if command == "profile" else command):
        raise UserError(f"{run.config['exp_name']} is for `fastm3ae {run.command} --from-official`, not {command}.")
    words = f"{torchrun(run.num_gpus, run.config['num_nodes'])} {run.command} --config THIS_FILE"
    lines = [f"python main.py with {shlex.join(arguments)}", f"to run it: {words}", *notes]
    return config, "".join(f"# {line}\n" for text in lines for line in text.splitlines())


def torchrun(num_gpus: int, num_nodes: int) -> str:
    """Returns the words that start this program with one process per GPU, to be followed by its arguments."""
    if num_nodes > 1:
        meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500"
        return f"torchrun --nnodes {num_nodes} --nproc-per-node {num_gpus} {meeting} -m fastm3ae"
    return f"torchrun --nproc-per-node {num_gpus} -m fastm3ae" if num_gpus > 1 else "python -m fastm3ae"
