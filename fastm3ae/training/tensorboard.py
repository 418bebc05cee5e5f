"""TensorBoard's event files, written when something is logged: nothing is held back, and a failure is told there.

``torch.utils.tensorboard`` writes them from a thread, up to two minutes later; on a full disk the thread prints a
traceback, and a run that is killed lacks the last minutes.
"""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """An event file.

    Args:
        folder: TensorBoard's, with the files of the processes before.
        step: Steps that were made before; what those files have of later ones is not shown any more. 0: none were.

    Raises:
        OSError: It cannot be written; so do all methods.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if step:
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers by name."""
        self._write(
            Event(
                step=step,
                summary=Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]),
            )
        )

    def picture(self, name: str, path: Path, step: int) -> None:
        """Writes a picture that lies in a PNG file."""
        with Image.open(path) as image:
            width, height = image.size
        png = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=png)])))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()
