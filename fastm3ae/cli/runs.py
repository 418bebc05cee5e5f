"""The commands that train and evaluate."""

import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastm3ae.cli.configure import choose, configure, run_options, torchrun
from fastm3ae.cli.say import warn
from fastm3ae.errors import UserError

if TYPE_CHECKING:
    from fastm3ae.config import FinetuneConfig, RunConfig
    from fastm3ae.tasks.evaluation import Evaluation

__all__ = ["evaluate", "finetune", "official", "pretrain", "profile"]


def pretrain(arguments: Sequence[str]) -> None:
    """Pre-train a model on arrow files, or on the embedded demo corpus (--preset demo, --preset mpma-demo)."""
    from fastm3ae.config.presets import PRESETS

    chosen, overrides = run_options("pretrain", "m3ae").parse_known_args(arguments)
    config, header = configure("pretrain", "Pre-trains a model.", PRESETS, overrides, chosen)
    if header is not None:
        _print_yaml(header, config)
        return
    _run(config)


def profile(arguments: Sequence[str]) -> None:
    """Measure the steps of a pre-training: time by phase, FLOPs by part of the model, utilisation, memory."""
    from fastm3ae.config.presets import PRESETS

    options = run_options("profile", "m3ae")
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--warm-up", type=int, default=3)
    options.add_argument("--trace", type=Path)
    description = (
        "Measures the steps of a pre-training, in one process, with random weights; writes no run folder. Three more "
        "options: --steps N, of which the time is taken (default 10; a slow loader shows when it has no batches in "
        "store any more, of which it has 2 for each train.num-workers), --warm-up N before (default 3), and --trace "
        "DIR, where a trace of one step is written."
    )
    chosen, overrides = options.parse_known_args(arguments)
    config, _ = configure("profile", description, PRESETS, overrides, chosen)

    from fastm3ae.training.profile import profile

    measured = profile(config, num_steps=chosen.steps, num_warm_up=chosen.warm_up, trace_folder=chosen.trace)
    print(measured.render())


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a pre-trained model for a task, and test it."""
    from fastm3ae.config.presets import FINETUNE_PRESETS

    task = choose(
        "fastm3ae finetune", arguments, {name: of[next(iter(of))].__doc__ for name, of in FINETUNE_PRESETS.items()}
    )
    presets = FINETUNE_PRESETS[task]
    options = run_options(f"finetune {task}", next(iter(presets)))
    options.add_argument("--init-from")
    options.add_argument("--seeds", type=int, nargs="+")
    chosen, overrides = options.parse_known_args(arguments[1:])
    description = (
        "Fine-tunes a model, and tests it. --init-from CHECKPOINT takes the model and the tokenizer (without texts: "
        "the vision tower) of one of our checkpoints, or the weights of an official .ckpt; without it the model "
        "starts from its towers. --seeds 1 2 3 makes a run of each into OUTPUT/seed_N, and a table of them."
    )

    def starts_from(preset: Any, values: Mapping[str, Any]) -> Any:
        from fastm3ae.training.finetune import start_from

        checkpoint = chosen.init_from or values.get("init_from")
        return preset if checkpoint is None else start_from(preset, checkpoint)

    config, header = configure(f"finetune {task}", description, presets, overrides, chosen, starts_from)
    if (kind := config.task.kind.replace("_", "-")) != task:
        raise UserError(
            f"fastm3ae finetune {task}: the configuration is of the task {kind}; fastm3ae finetune {kind} takes it."
        )
    if header is not None:
        _print_yaml(header, config)
        return

    if chosen.seeds is None:
        _run(config)
        return

    from fastm3ae.training.finetune import finetune_seeds

    print(finetune_seeds(config, chosen.seeds))


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate a checkpoint on a split: metrics with intervals, predictions, pictures."""
    import tyro

    from fastm3ae.config import EvaluateConfig

    config = tyro.cli(
        EvaluateConfig,
        args=arguments,
        prog="fastm3ae evaluate",
        config=(tyro.conf.PositionalRequiredArgs,),
        description="Evaluates a checkpoint on a split of its task's data, and writes metrics.json, results.md, the "
        "predictions as CSV and JSON lines, and pictures.",
    )

    from fastm3ae.training.evaluate import evaluate

    _show_evaluation(evaluate(config), config.output)


def official(arguments: Sequence[str]) -> int:
    """Run a command line of the original M3AE as it stands: with KEY=VALUE ... NAMED_CONFIGURATION ..."""
    from fastm3ae.official.arguments import DEFAULTS, NAMED_CONFIGS, parse_official
    from fastm3ae.official.translate import to_run_config

    if not arguments or {"-h", "--help"} & set(arguments):
        print(OFFICIAL_HELP.format(named=_listed(NAMED_CONFIGS), keys=_listed(DEFAULTS)))
        return 0
    run = parse_official(arguments)
    config, notes = to_run_config(run)

    from fastm3ae.training.launch import is_one_of_several, launch, processes_for

    is_test = run.config["test_only"]
    if not is_one_of_several() and not is_test:
        if run.config["num_nodes"] > 1:
            command = f"{torchrun(run.num_gpus, run.config['num_nodes'])} with {shlex.join(arguments)}"
            raise UserError(f"num_nodes is {run.config['num_nodes']}: start this on each machine by {command}")
        num_processes, missing = processes_for(run.num_gpus, config.train.device)
        if missing:
            warn(f"{missing}; a step still takes {config.train.batch_size} pairs.")
        if num_processes > 1:
            # All processes write into one folder: the one that was free before the first of them had started.
            again = ["with", *arguments, f"output={config.output!r}"]
            return launch([sys.executable, "-m", "fastm3ae", *again], num_processes)
    for note in notes:
        warn(note)
    if is_test:
        _test(config)
    else:
        _run(config)
    return 0


OFFICIAL_HELP = """usage: fastm3ae with KEY=VALUE ... NAMED_CONFIGURATION ...

Runs what `python main.py with ...` of the original M3AE runs. KEY=VALUE beats every named configuration wherever it
stands, and a later named configuration beats an earlier one. VALUE is a Python literal or else a text; quote lists:
'datasets=["roco"]'; a dotted key reaches into a dictionary: loss_names.mim=0. With num_gpus=N this starts N processes,
one per GPU. Results go to LOG_DIR/EXP_NAME-seedS-from_LOAD_PATH/version_N.

named configurations:
{named}

keys:
{keys}

Keys of our own configuration may stand beside them and are applied last; `fastm3ae pretrain --help` lists them:
model.text.weights=random model.vision.weights=random train.num_steps=20 output=runs/x resume=auto

`fastm3ae pretrain --from-official "python main.py with ..."` prints the same run as a file for --config, and so does
`fastm3ae finetune TASK --from-official "..."`."""


def _listed(names: Iterable[str]) -> str:
    return textwrap.fill(" ".join(names), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _test(config: "FinetuneConfig") -> None:
    """Evaluates the checkpoint of a test line."""
    from fastm3ae.config import EvaluateConfig
    from fastm3ae.training.evaluate import evaluate

    if config.init_from is None:
        raise UserError("test_only=True needs the checkpoint to test: load_path=CHECKPOINT.")
    asked = EvaluateConfig(
        checkpoint=config.init_from,
        output=config.output,
        batch_size=32 if config.train.micro_batch == "auto" else config.train.micro_batch,
        precision=config.train.precision,
        device=config.train.device,
        num_workers=config.train.num_workers,
        on_bad_sample=config.data.on_bad_sample,
    )
    _show_evaluation(evaluate(asked, config), config.output)


def _run(config: "RunConfig") -> None:
    """Trains, and prints the summary in the process that has one."""
    from fastm3ae.config import FinetuneConfig

    if isinstance(config, FinetuneConfig):
        from fastm3ae.training.finetune import finetune as train
    else:
        from fastm3ae.training.pretrain import pretrain as train

    summary = train(config)
    if summary is None:
        return
    for name, value in summary.items():
        print(f"{name:<28} {value:.4g}" if isinstance(value, float) else f"{name:<28} {value}")
    print(f"{'run folder':<28} {config.output}")


def _show_evaluation(evaluation: "Evaluation", output: str) -> None:
    from fastm3ae.tasks.evaluation import percent

    for note in evaluation.notes:
        warn(note)
    for name, interval in evaluation.metrics.items():
        print(f"{name:<28} {percent(interval)} %")
    print(f"{'results':<28} {output}")


def _print_yaml(header: str, config: "RunConfig") -> None:
    import yaml

    from fastm3ae.config.files import to_dict

    print(header + yaml.safe_dump(to_dict(config), sort_keys=False), end="")
