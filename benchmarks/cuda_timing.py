"""Times the work of a GPU alone: each variant is captured into a CUDA graph, replayed in turn, with a cold cache.

A kernel of 15 microseconds takes less time than the Python that launches it, and its data would still lie in the
second-level cache from the run before.
"""

from collections.abc import Callable, Mapping

import torch
from harness import Timing

# Autograd runs a backward pass on the stream of its forward pass, and a graph captures one stream: so there is one.
STREAM = torch.cuda.Stream() if torch.cuda.is_available() else None
# More than any second-level cache.
FLUSHED_BYTES = 512 << 20


def capture(run: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """A replay of what a run launches, and True; or the run itself, and False, where it waits for the GPU."""
    with torch.cuda.stream(STREAM):
        for _ in range(3):
            run()
    STREAM.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=STREAM):
            run()
    except RuntimeError as error:  # what synchronises can not be captured
        print(f"not captured, its launches are timed, too: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def measure(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Runs every variant once in each round, between two events, after the cache has been read full of other data."""
    captured = {name: capture(run)[0] for name, run in variants.items()}
    other, total = torch.rand(FLUSHED_BYTES // 4, device="cuda"), torch.empty((), device="cuda")
    events = {name: [] for name in variants}
    with torch.cuda.stream(STREAM):
        for _ in range(rounds):
            for name, run in captured.items():
                # Reading, because what is written would still have to leave the cache while the variant runs.
                torch.sum(other, dim=0, out=total)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize()
    seconds = {name: tuple(s.elapsed_time(e) / 1e3 for s, e in pairs) for name, pairs in events.items()}
    return {name: Timing(samples, (float("nan"),) * len(samples)) for name, samples in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a run takes beside what is allocated before."""
    with torch.cuda.stream(STREAM):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
