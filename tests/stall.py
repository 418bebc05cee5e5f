"""A command whose loader stands still, is slow, or is frozen, in one of its processes: for torchrun and the tests."""

import os
import signal
import sys
import time

from fastm3ae.cli import main
from fastm3ae.data.collate_pairs import PretrainBatches

HOW = {
    "hang": lambda: time.sleep(1e6),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda: time.sleep(0.5),
    "debug": breakpoint,
}


def stall(how, rank, epoch, batch):
    """Does it from this batch on, before each piece of the process with this rank, unless torchrun started it again."""
    make = PretrainBatches.__getitem__

    def slowly(batches, request):
        is_here = (request.epoch, request.batch) >= (epoch, batch) and os.environ.get("RANK", "0") == rank
        is_first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if is_here and is_first_time and "train" in str(batches.dataset.table.paths):
            HOW[how]()
        return make(batches, request)

    PretrainBatches.__getitem__ = slowly


if __name__ == "__main__":
    how, rank, epoch, batch = sys.argv[1].split(",")
    stall(how, rank, int(epoch), int(batch))
    sys.exit(main(sys.argv[2:]))
