"""Going on with a run: from which checkpoint, and whether it is still the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastm3ae.config import RunConfig
from fastm3ae.configfile import differences, to_dict
from fastm3ae.errors import UserError
from fastm3ae.training.checkpoint import damage, newest_whole

__all__ = ["check_same_run", "find_checkpoint"]

# What a run does is the same whatever these are; where data and tokenizer lie says less than what they hold.
MAY_DIFFER = (
    "output", "resume", "force_resume", "data.root", "data.tokenizer", "data.draw_demo", "train.micro_batch",
    "train.device", "train.num_workers", "train.log_every_steps", "train.validate_every_steps",
    "train.validate_every_epochs", "train.max_val_batches", "train.num_pictures", "train.save_every_steps",
    "train.keep_checkpoints", "train.tensorboard", "train.patience",
)  # fmt: skip


def find_checkpoint(config: RunConfig) -> tuple[Path | None, list[str]]:
    """Returns the checkpoint that ``config.resume`` names, None to start anew; and notes for the user's log.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it is of another run than that in the run folder.
    """
    if config.resume is None:
        return None, []
    output = Path(config.output)
    if config.resume == "auto":
        path, notes = newest_whole(output / "checkpoints")
        return path, [*notes, f"{output}: " + (f"going on from {path.name}." if path else "nothing to resume yet.")]
    path = Path(config.resume)
    if not path.is_dir():
        raise UserError(
            f"There is no checkpoint {path}; resume must be auto or a checkpoint's folder, such as "
            f"{output / 'checkpoints' / 'step_005000'}."
        )
    if fault := damage(path):
        raise UserError(f"The checkpoint {path} cannot be resumed: {fault}.")
    if path.resolve().parent != (output / "checkpoints").resolve() and output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"{path} is of another run than that in the run folder {output}: give its own folder, or a new one, as "
            "--output."
        )
    return path, [f"Going on from {path}."]


def check_same_run(
    state: Mapping[str, Any], config: RunConfig, fingerprints: Mapping[str, str], num_processes: int
) -> list[str]:
    """Checks that a checkpoint was made by this run, and returns notes on what will not be exactly the same.

    Args:
        state: The training state of the checkpoint.
        config: The resolved configuration now.
        fingerprints: What the data and the tokenizer hold now.
        num_processes: How many processes train now.

    Raises:
        UserError: Configuration or data differ, and ``config.force_resume`` is not set.
    """
    # Checkpoints from before there were several models do not name theirs.
    then = {**state["config"], "model": {"kind": "m3ae", **state["config"]["model"]}}
    found = differences(then, to_dict(config))
    faults = [f"{key} is {now!r}, was {was!r}" for key, (was, now) in found.items() if key not in MAY_DIFFER]
    faults += [
        f"{what} does not hold what it held"
        for what, now in fingerprints.items()
        if state["fingerprints"].get(what) != now
    ]
    if faults and not config.force_resume:
        raise UserError(
            f"The run {config.output} cannot go on as it was: {'; '.join(faults)}. Restore it, or give --force-resume "
            "to go on with what is now."
        )
    notes = [f"Forced to go on although {fault}." for fault in faults]
    if state["num_processes"] != num_processes:
        notes.append(
            f"{num_processes} processes go on with what {state['num_processes']} began: the same batches and masks, "
            "but sums are rounded in another order and dropout draws anew."
        )
    return notes
