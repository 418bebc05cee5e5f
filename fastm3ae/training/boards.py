"""Where a run shows its numbers besides its own files: TensorBoard, and Weights & Biases."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fastm3ae.config import RunConfig
from fastm3ae.config.files import to_dict
from fastm3ae.errors import UserError, first_line

__all__ = ["Board", "WandbBoard", "open_boards"]

WANDB_FILE = "wandb.json"


class Board(Protocol):
    """What the run folder tells, too."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Shows numbers by name."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Shows a picture that lies in a PNG file."""

    def close(self) -> None:
        """Ends."""


def open_boards(config: RunConfig, step: int) -> list[Board]:
    """Returns the boards that a run wants.

    Args:
        config: The run; its folder is there.
        step: Steps that were made before.

    Raises:
        OSError: A file cannot be written.
        UserError: Weights & Biases cannot be started.
    """
    boards: list[Board] = []
    if config.train.wandb_project is not None:
        boards.append(WandbBoard(config))
    if config.train.tensorboard:
        from fastm3ae.training.tensorboard import TensorBoard  # slow to import, and not always wanted

        boards.append(TensorBoard(Path(config.output) / "tensorboard", step))
    return boards


class WandbBoard:
    """A run of Weights & Biases, which a resumed run goes on with.

    What cannot be started ends the run before its first step. What fails later is said once, and the run goes on
    without it: its own files have everything.

    Steps are an axis of the values' own, because W&B takes no step twice: those that a resumed run makes again are sent
    again, with the same values. Of the machine and its user no more is sent than the client does by itself; code, the
    state of a git checkout and what is printed are not.

    Args:
        config: The run; its folder is there.

    Raises:
        UserError: The package is missing, or it cannot be started, as without a login or a network.
    """

    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "train.wandb_project needs the package wandb: pip install 'fastm3ae[wandb]', or leave it out."
            ) from error
        folder, project = Path(config.output), config.train.wandb_project
        file, is_new = folder / WANDB_FILE, not (folder / "wandb").exists()
        before = json.loads(file.read_text()) if file.is_file() else {}
        try:
            self._run = wandb.init(
                project=project,
                id=before.get("id") if before.get("project") == project else None,
                resume="allow",
                name=folder.resolve().name,
                dir=folder,
                config=to_dict(config),
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
            )
        except wandb.Error as error:
            if is_new:  # or else the run folder would not be empty when it is started again
                shutil.rmtree(folder / "wandb", ignore_errors=True)
            raise UserError(
                f"Weights & Biases cannot be started ({first_line(error).removesuffix('.')}): `wandb login`, "
                "WANDB_MODE=offline in the environment, or no train.wandb_project."
            ) from error
        self._image, self._sends_pictures = wandb.Image, config.train.wandb_pictures
        self._run.define_metric("*", step_metric="step")
        file.write_text(json.dumps({"project": project, "id": self._run.id}) + "\n")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers by name."""
        self._try(lambda run: run.log({"step": step, **values}))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Sends a picture that lies in a PNG file, if the run is to send pictures."""
        if self._sends_pictures:
            self._try(lambda run: run.log({"step": step, name: self._image(str(path))}))

    def close(self) -> None:
        """Ends when all is sent."""
        self._try(lambda run: run.finish())

    def _try(self, send: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # whatever its client and the process behind it raise
            self._run = None
            tqdm.write(
                f"warning: Weights & Biases failed ({first_line(error)}); the run goes on without it, and its own "
                "files have all numbers"
            )
