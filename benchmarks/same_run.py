"""The demo, killed and stopped in the middle, and in two processes: are its losses those of the run left alone?

    python benchmarks/same_run.py                           # 800 steps, as the preset; about 25 minutes on two cores
    python benchmarks/same_run.py --steps 100 --check       # and exit with 1 where a run differs

Runs of the command in processes of their own, on the CPU, with --resume auto: one is left alone; one is killed three
times at random moments (SIGKILL), one stopped twice (SIGTERM), and both must log the same losses to the last bit. Two
processes (torchrun) make 20 steps; their losses may differ from one process's by 1e-6, relative, by rounding.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

MAX_DIFFERENCE, NUM_SHARED_STEPS = 1e-6, 20
INTERRUPTS = {"SIGKILL": 3, "SIGTERM": 2}
OF_THE_CLOCK = ("samples_per_s", "data_wait_frac")


def start(folder: Path, output: str, *options: str, num_processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    module = [*(launcher if num_processes > 1 else []), "-m", "fastm3ae"]
    data = ["--data.root", "corpus", "--data.tokenizer", "corpus/tokenizer"]
    command = ["pretrain", "--preset", "demo", "--train.device", "cpu", "--train.no-tensorboard", *data]
    return subprocess.Popen(
        [sys.executable, *module, *command, "--output", output, "--resume", "auto", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums of another number of threads are rounded otherwise
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def metrics(folder: Path, output: str) -> list[dict]:
    """The whole lines of metrics.jsonl, without what depends on the clock."""
    path = folder / output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in values]


def last_step(folder: Path, output: str) -> int:
    return max((line["step"] for line in metrics(folder, output)), default=0)


def interrupt(folder: Path, output: str, number: int, fracs: list[float], num_steps: int, options: list[str]) -> None:
    """Runs to the end, with a signal each time that so large a part of the steps is logged."""
    for frac in fracs:
        process = start(folder, output, *options)
        while process.poll() is None and last_step(folder, output) < frac * num_steps:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1))
        process.send_signal(number)
        status = process.wait()
        assert status in (-number, 128 + number), f"the run ended with {status} before it was interrupted"
        print(f"{output}: ended with {status} after step {last_step(folder, output)} was logged", flush=True)
    assert start(folder, output, *options).wait() == 0, f"{output} could not be finished"


def largest_difference(got: list[dict], want: list[dict]) -> float:
    """Relative, of any loss."""
    pairs = list(zip(got, want, strict=True))
    losses = [(left[name], right[name]) for left, right in pairs for name in left if "loss" in name]
    return max(abs(left - right) / abs(right) for left, right in losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a run differs")
    parser.add_argument("--steps", type=int, default=800, help="steps of the interrupted runs (default: %(default)s)")
    arguments = parser.parse_args()
    save_every = max(1, arguments.steps // 16)
    options = f"--train.num-steps {arguments.steps} --train.save-every-steps {save_every}".split()
    shared = f"--train.num-steps {NUM_SHARED_STEPS} --train.log-every-steps 1 --train.max-val-batches 2".split()
    print(f"demo, {arguments.steps} steps\n{harness.machine()}\n")
    with tempfile.TemporaryDirectory() as name:
        folder, same = Path(name), []
        assert start(folder, "alone", *options).wait() == 0, "the demo did not run"
        for signal_name, times in INTERRUPTS.items():
            fracs = sorted(random.uniform(0.05, 0.9) for _ in range(times))
            interrupt(folder, signal_name, signal.Signals[signal_name], fracs, arguments.steps, options)
            same.append(metrics(folder, signal_name) == metrics(folder, "alone"))
            num_lines = len(metrics(folder, "alone"))
            print(f"{signal_name}: {num_lines} lines, to the last bit equal: {same[-1]}", flush=True)
        for output, num_processes in (("one", 1), ("two", 2)):
            process = start(folder, output, *shared, num_processes=num_processes)
            assert process.wait() == 0, f"{num_processes} processes did not run"
        difference = largest_difference(metrics(folder, "two"), metrics(folder, "one"))
    bound = f"at most {MAX_DIFFERENCE:.0e}"
    print(f"\ninterrupted runs equal: {all(same)}; two processes differ by {difference:.1e} ({bound})")
    if arguments.check and not (all(same) and difference <= MAX_DIFFERENCE):
        sys.exit(1)


if __name__ == "__main__":
    main()
