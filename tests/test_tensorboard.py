"""TensorBoard's event files: what was logged is there, also of a run that was killed and went on."""

import pytest
from full_disk import full_disk
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastm3ae.training.tensorboard import TensorBoard


def test_what_is_made_again_is_shown_once(tmp_path):
    before = TensorBoard(tmp_path / "board")
    for step in range(1, 6):
        before.scalars({"train/loss": step, "val/score": -step}, step)  # and it is not closed
    after = TensorBoard(tmp_path / "board", step=3)
    after.scalars({"train/loss": 40}, 4)
    Image.new("RGB", (30, 20)).save(tmp_path / "picture.png")
    after.picture("words", tmp_path / "picture.png", 4)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [event.step for event in board.Scalars("val/score")] == [1, 2, 3]
    (image,) = board.Images("words")
    assert (image.step, image.width, image.height) == (4, 30, 20)
    assert image.encoded_image_string == (tmp_path / "picture.png").read_bytes()


def test_a_full_disk_is_told_at_once(tmp_path):
    board = TensorBoard(tmp_path / "board")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        board.scalars({"loss": 1.0}, 1)
