"""Pairs that give losses which are not finite, at chosen steps of a run; also a command of its own, for torchrun."""

import sys

from fastm3ae.training.loop import Trainer


def poison(steps, image_id, next_batch=Trainer._next):
    """What may take the place of ``Trainer._next``: in these steps the image's pixels are not numbers."""

    def _next(trainer, batches):
        pieces = next_batch(trainer, batches)
        for piece in pieces if trainer.step + 1 in steps else ():
            for row, item in enumerate(piece.item_ids):
                if image_id in (item, "any"):
                    piece.image_BCHW[row] = float("nan")
        return pieces

    return _next


if __name__ == "__main__":
    from fastm3ae.cli import main

    Trainer._next = poison([int(step) for step in sys.argv[1].split(",")], sys.argv[2])
    sys.exit(main(sys.argv[3:]))
