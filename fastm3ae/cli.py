"""The ``fastm3ae`` command.

Each command imports what it needs when it runs, so that help and mistakes in the arguments answer at once.
"""

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastm3ae.errors import Interrupted, UserError, nearest

if TYPE_CHECKING:
    from fastm3ae.config import PretrainConfig

__all__ = ["main"]


def pretrain(arguments: Sequence[str]) -> None:
    """Pre-train a model on arrow files, or on the embedded demo corpus (--preset demo, --preset mpma-demo)."""
    import yaml

    from fastm3ae.configfile import to_dict

    config, header = _configure("pretrain", "Pre-trains a model.", arguments, _options("pretrain"))[:2]
    if header is not None:
        print(header + yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return
    _run(config)


def profile(arguments: Sequence[str]) -> None:
    """Measure the steps of a pre-training: time by phase, FLOPs by part of the model, utilisation, memory."""
    options = _options("profile")
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--warm-up", type=int, default=3)
    options.add_argument("--trace", type=Path)
    description = (
        "Measures the steps of a pre-training, in one process, with random weights; writes no run folder. Three more "
        "options: --steps N, of which the time is taken (default 10; a slow loader shows when it has no batches in "
        "store any more, of which it has 2 for each train.num-workers), --warm-up N before (default 3), and --trace "
        "DIR, where a trace of one step is written."
    )
    config, _, chosen = _configure("profile", description, arguments, options)

    from fastm3ae.training.profile import profile

    measured = profile(config, num_steps=chosen.steps, num_warm_up=chosen.warm_up, trace_folder=chosen.trace)
    print(measured.render())


def _options(command: str) -> argparse.ArgumentParser:
    """Returns the options that are no part of a run's configuration, but say where it starts."""
    parser = argparse.ArgumentParser(prog=f"fastm3ae {command}", add_help=False, allow_abbrev=False)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", default="m3ae")
    start.add_argument("--from-official")
    parser.add_argument("--config", type=Path)
    return parser


def _configure(
    command: str, description: str, arguments: Sequence[str], options: argparse.ArgumentParser
) -> tuple["PretrainConfig", str | None, argparse.Namespace]:
    """Returns a run's configuration, comments to head it where it is translated, and the options that are none of it.

    Args:
        command: Name of the command.
        description: What the command does, for its help.
        arguments: Its arguments.
        options: Those of ``_options``, and the command's own.
    """
    import tyro
    import yaml

    from fastm3ae.config import PretrainConfig
    from fastm3ae.configfile import from_dict
    from fastm3ae.presets import PRESETS, preset

    chosen, overrides = options.parse_known_args(arguments)
    header = None
    if chosen.from_official is None:
        base, source = preset(chosen.preset), f"--preset {chosen.preset}"
    else:
        base, header = _translate(chosen.from_official)
        source = "--from-official ..."
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
        prog=f"fastm3ae {command} {source}",
        config=(tyro.conf.AvoidSubcommands,),  # the model is of the kind that the preset or the file has
        description=(
            f"{description} A run's configuration is a preset (--preset {' | '.join(PRESETS)}), then a YAML file "
            "with any of the keys below (--config FILE), then these options. The defaults shown are those of "
            f"{source} and that file. --from-official 'python main.py with ...' takes the place of the preset; "
            "fastm3ae pretrain then prints the configuration, ready for --config, instead of running it."
        ),
    )
    return config, header, chosen


def _translate(command_line: str) -> tuple["PretrainConfig", str]:
    """Returns our configuration of an official command line, and comments to head it in YAML."""
    from fastm3ae.official.arguments import arguments_of, parse_official
    from fastm3ae.official.translate import to_pretrain_config

    arguments = arguments_of(command_line)
    run = parse_official(arguments)
    config, notes = to_pretrain_config(run)
    command = f"{_torchrun(run.num_gpus, run.config['num_nodes'])} pretrain --config THIS_FILE"
    lines = [f"python main.py with {shlex.join(arguments)}", f"to run it: {command}", *notes]
    return config, "".join(f"# {line}\n" for line in lines)


def official(arguments: Sequence[str]) -> int:
    """Run a command line of the original M3AE as it stands: with KEY=VALUE ... NAMED_CONFIGURATION ..."""
    from fastm3ae.official.arguments import DEFAULTS, NAMED_CONFIGS, parse_official
    from fastm3ae.official.translate import to_pretrain_config

    if not arguments or {"-h", "--help"} & set(arguments):
        print(OFFICIAL_HELP.format(named=_listed(NAMED_CONFIGS), keys=_listed(DEFAULTS)))
        return 0
    run = parse_official(arguments)
    # Fine-tuning and testing will branch off here, by run.config["loss_names"] and run.config["test_only"].
    config, notes = to_pretrain_config(run)

    from fastm3ae.training.launch import is_one_of_several, launch, processes_for

    if not is_one_of_several():
        if run.config["num_nodes"] > 1:
            command = f"{_torchrun(run.num_gpus, run.config['num_nodes'])} with {shlex.join(arguments)}"
            raise UserError(f"num_nodes is {run.config['num_nodes']}: start this on each machine by {command}")
        num_processes, missing = processes_for(run.num_gpus, config.train.device)
        if missing:
            _warn(f"{missing}; a step still takes {config.train.batch_size} pairs.")
        if num_processes > 1:
            # All processes write into one folder: the one that was free before the first of them had started.
            again = ["with", *arguments, f"output={config.output!r}"]
            return launch([sys.executable, "-m", "fastm3ae", *again], num_processes)
    for note in notes:
        _warn(note)
    _run(config)
    return 0


OFFICIAL_HELP = """usage: fastm3ae with KEY=VALUE ... NAMED_CONFIGURATION ...

Runs what `python main.py with ...` of the original M3AE runs. KEY=VALUE beats every named configuration wherever it
stands, and a later named configuration beats an earlier one. VALUE is a Python literal or else a text; quote lists:
'datasets=["roco"]'; a dotted key reaches into a dictionary: loss_names.mim=0. With num_gpus=N this starts N processes,
one per GPU. Only pre-training runs in this version. Results go to LOG_DIR/EXP_NAME-seedS-from_LOAD_PATH/version_N.

named configurations:
{named}

keys:
{keys}

Keys of our own configuration may stand beside them and are applied last; `fastm3ae pretrain --help` lists them:
model.text.weights=random model.vision.weights=random train.num_steps=20 output=runs/x resume=auto

`fastm3ae pretrain --from-official "python main.py with ..."` prints the same run as a file for --config."""


def _torchrun(num_gpus: int, num_nodes: int) -> str:
    """Returns the words that start this program with one process per GPU, to be followed by its arguments."""
    if num_nodes > 1:
        meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500"
        return f"torchrun --nnodes {num_nodes} --nproc-per-node {num_gpus} {meeting} -m fastm3ae"
    return f"torchrun --nproc-per-node {num_gpus} -m fastm3ae" if num_gpus > 1 else "python -m fastm3ae"


def _listed(names: Iterable[str]) -> str:
    return textwrap.fill(" ".join(names), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _run(config: "PretrainConfig") -> None:
    """Pre-trains, and prints the summary in the process that has one."""
    from fastm3ae.training.pretrain import pretrain

    summary = pretrain(config)
    if summary is None:
        return
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
    else:
        from fastm3ae.training.describe import describe_checkpoint, describe_run

        print(describe_run(path) if (path / "config.yaml").is_file() else describe_checkpoint(path))


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


def doctor(arguments: Sequence[str]) -> int:
    """Say what is installed, which code serves each op, and what is missing."""
    argparse.ArgumentParser(prog="fastm3ae doctor", description=doctor.__doc__).parse_args(arguments)

    from fastm3ae.doctor import diagnose

    diagnosis = diagnose()
    print(diagnosis.render())
    return 1 if diagnosis.broken else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "pretrain": pretrain,
    "with": official,
    "profile": profile,
    "prepare": prepare,
    "inspect": inspect,
    "convert": convert,
    "doctor": doctor,
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

    `doctor` returns 1 where it finds something broken.

    Args:
        arguments: The command line without the program's name; None: that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = _choose("fastm3ae", arguments, {name: command.__doc__ for name, command in COMMANDS.items()})
        return COMMANDS[name](arguments[1:]) or 0
    except UserError as error:
        _say(f"error: {error}", each=True)
        return 2
    except Interrupted as error:
        _say(str(error))
        return 128 + error.signal_number
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else Python's last flush fails, too
        return 141  # 128 + SIGPIPE, as a program says that this signal ended


def _warn(message: str) -> None:
    _say(f"warning: {message}")


def _say(message: str, *, each: bool = False) -> None:
    """Prints a sentence on stderr: the first of several processes, or ``each`` that has met the others.

    What goes wrong before they have met goes wrong in all of them.
    """
    rank = os.environ.get("RANK", "0")
    distributed = sys.modules.get("torch.distributed")  # what was not imported was not initialised either
    if each and distributed is not None and distributed.is_initialized():
        print(f"rank {rank}: {message}", file=sys.stderr)
    elif rank == "0":
        print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
