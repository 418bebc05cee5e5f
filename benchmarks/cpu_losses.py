"""What the C++ losses gain on the CPU, side by side with eager PyTorch, in float32.

    python benchmarks/cpu_losses.py            # the figures
    python benchmarks/cpu_losses.py --check    # and exit with 1 if one misses its target

- The pixel loss, forward and backward, at the shape of bench_masked_pixel_loss.py.
- The token loss, forward and backward, on 1,536 masked tokens: its time and its peak memory, both beside eager's on the
  same tokens. A peak is that of a process of its own: the most memory that was resident until the gradients were there,
  less what was resident before, when the inputs were.
- The token loss beside the original's way, which makes the logits of all positions and leaves out those that are not
  masked: 64 texts of 64 tokens, 3/32 of them masked (15 % of the 40 valid ones), as in a batch of 256 with its 1,536
  masked tokens, whose logits of all positions would need 10 GB.

Variants run interleaved in one process, after their results were checked.
"""

import argparse
import gc
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_masked_pixel_loss as pixel_loss
import bench_masked_token_loss as token_loss
import harness
import torch

PIXEL_LOSS_BATCH = 32
NUM_TOKENS = 1536
NUM_POSITIONS, NUM_MASKED = 64 * 64, 64 * 6
VARIANTS = {"eager": token_loss.eager, "ours": token_loss.ours}


def masked_only(tokens, weight, bias, labels):
    index = (labels != -100).nonzero().flatten()
    return token_loss.ours(tokens[index], weight, bias, labels[index])


def ratio(title, runs, rounds):
    """How many times faster the second run is than the first."""
    timings = harness.measure(runs, rounds, warm_up_rounds=1)
    for name, timing in timings.items():
        print(f"{title:42} {name:14} {timing.median_s * 1e3:9.1f} ms")
    first, second = timings.values()
    return first.median_s / second.median_s


def compare(title, variants, inputs, rounds):
    token_loss.check(variants, token_loss.forward_backward, inputs)
    runs = {name: partial(token_loss.forward_backward, function, *inputs) for name, function in variants.items()}
    return ratio(title, runs, rounds)


def peak_mib(variant):
    """Runs a variant in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", variant]
    peak = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"{'token loss, peak memory':42} {variant:14} {peak:9.0f} MiB")
    return peak


def print_peak(variant):
    tokens, weight, bias, labels = token_loss.make_inputs(NUM_TOKENS, device="cpu", dtype=torch.float32)
    # Once at a small size, so that what the libraries load and keep is there before.
    small = (x[:8].detach().requires_grad_() for x in (tokens, weight, bias))
    token_loss.forward_backward(VARIANTS[variant], *small, labels[:8] % 8)
    gc.collect()
    before, highest_before = resident_mib("VmRSS"), resident_mib("VmHWM")
    token_loss.forward_backward(VARIANTS[variant], tokens, weight, bias, labels)
    highest = resident_mib("VmHWM")
    assert highest > highest_before, "the peak is older than the call"
    print(highest - before)


def resident_mib(name):
    """What Linux says: now (VmRSS), or at most so far in this program (VmHWM; ru_maxrss has the parent's, too)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure misses its target")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default: %(default)s)")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        return print_peak(arguments.peak_of)

    print(f"{harness.machine()}\n")
    pixel = pixel_loss.SPEC.make(PIXEL_LOSS_BATCH)["forward+backward"].variants
    pixel = {name: pixel[name] for name in VARIANTS}
    make_inputs = partial(token_loss.make_inputs, device="cpu", dtype=torch.float32)
    original = {"original's way": token_loss.eager, "ours": masked_only}
    peaks = [peak_mib(variant) for variant in VARIANTS]
    # name, figure, target
    figures = [
        ("pixel loss, times faster than eager", ratio("pixel loss", pixel, 4 * arguments.rounds), 3.0),
        (
            f"token loss at {NUM_TOKENS} x {token_loss.VOCAB_SIZE}, times faster than eager",
            compare("token loss, the same tokens", VARIANTS, make_inputs(NUM_TOKENS), arguments.rounds),
            1.0,
        ),
        ("token loss, times less peak memory", peaks[0] / peaks[1], 2.0),
        (
            "token loss, times faster than the original's way",
            compare("token loss, all positions", original, make_inputs(NUM_MASKED, NUM_POSITIONS), arguments.rounds),
            8.0,
        ),
    ]
    print()
    for name, figure, target in figures:
        print(f"{name:60} {figure:6.2f} (target: {target})")
    if arguments.check and any(figure < target for _, figure, target in figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
