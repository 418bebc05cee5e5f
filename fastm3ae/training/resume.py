"""Going on with a run: from which checkpoint, and whether it is still the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastm3ae.config import RunConfig
from fastm3ae.config.files import differences, to_dict
from fastm3ae.errors import UserError
from fastm3ae.training.saved import checkpoints, damage, load_training_state, newest_whole

__all__ = ["check_same_run", "find_checkpoint"]

# What a run does is the same whatever these are; where data and tokenizer lie says less than what they hold.
MAY_DIFFER = (
    "output", "resume", "force_resume", "data.root", "data.tokenizer", "data.draw_demo", "train.micro_batch",
    "train.parallel", "train.device", "train.num_workers", "train.log_every_steps", "train.validate_every_steps",
    "train.validate_every_epochs", "train.max_val_batches", "train.num_pictures", "train.save_every_steps",
    "train.keep_checkpoints", "train.keep_every_steps", "train.tensorboard", "train.wandb_project",
    "train.wandb_pictures", "train.patience", "train.max_nonfinite_steps", "train.stall_timeout_s",
)  # fmt: skip


def find_checkpoint(config: RunConfig, is_restarted: bool = False) -> tuple[Path | None, list[str]]:
    """Returns the checkpoint that ``config.resume`` names, None to start anew; and notes for the user's log.

    Args:
        config: The run.
        is_restarted: Whether it had begun before, by the same command: what it has saved counts then, if anything.

    Raises:
        UserError: There is no such checkpoint, it is damaged, it is of another run than that in the run folder, or it
            is older than what is there.
    """
    if config.resume is None:
        return None, []
    output = Path(config.output)
    own = checkpoints(output / "checkpoints")
    if config.resume == "auto" or (is_restarted and own):
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
    if own and path.resolve().parent != (output / "checkpoints").resolve():
        raise UserError(
            f"{path} is of another run than that in the run folder {output}: give its own folder, or a new one, as "
            "--output."
        )
    newest = newest_whole(output / "checkpoints")[0] if own else path
    if load_training_state(newest)["step"] > load_training_state(path)["step"]:
        raise UserError(
            f"{path} cannot be resumed where there is {newest.name}, which would be lost: give a new --output, or "
            "--resume auto."
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
    found = differences(state["config"], to_dict(config))
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
