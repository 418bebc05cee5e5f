"""CUDA graphs: a pass's thousands of kernels are recorded once, and then started by one call.

A graph replays the same kernels on the same addresses, so that what a pass reads is copied to where it stood when the
pass was recorded, and batches of different lengths are brought to one shape by a bucket. Gradients are added to tensors
that stay. What is replayed draws new dropout, and gives what the pass would have given.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastm3ae.data.batch import PretrainBatch
from fastm3ae.model.bucket import Sizes, fill_batch
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.packed import maybe_compiled
from fastm3ae.model.packed_step import batch_reads, compute, plan_batch
from fastm3ae.model.plan import Plan

__all__ = ["PassGraphs", "Recorder", "Results", "record_graph"]

# Each holds the memory of a pass's activations.
MAX_GRAPHS = 4
NUM_WARM_UP = 3

Results = dict[str, dict[str, Tensor]]
"""By objective, its mean loss and the sums of its metrics."""

RunPass = Callable[[Callable[[], dict[str, Any]], PretrainBatch, Tensor], Results]
"""Makes a pass of the model's forward pass over a batch, and adds the gradient of the sum of the objectives' losses,
each times its share."""

Recorder = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]
"""Records what a function does on the device, which must change nothing but gradients; returns what does it again, and
the tensors in which its results then stand."""


class PassGraphs:
    """Makes passes by replaying those that were recorded for their shape.

    Args:
        model: The model, on its GPU.
        share_texts: As of ``fastm3ae.model.packed_step.run_packed``.
        compiled: Likewise.
        say: Takes a line for the log.
        record: Records a pass.
    """

    def __init__(
        self, model: M3AE, share_texts: bool, compiled: bool, say: Callable[[str], None], record: Recorder
    ) -> None:
        self.model, self.share_texts, self.say, self.record = model, share_texts, say, record
        self._compute = maybe_compiled(compute, compiled)
        self._buckets: dict[tuple[int, ...], Sizes] = {}
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()

    def __call__(self, piece: PretrainBatch, shares: Sequence[float], run: RunPass) -> Results:
        """Makes a pass.

        Args:
            piece: The batch.
            shares: For each objective by what its loss is multiplied.
            run: What is recorded where there is no graph for the batch's shape yet.
        """
        bucket = self._bucket(piece)
        plan_for = partial(plan_batch, self.model, share_texts=self.share_texts, bucket=bucket)
        batch, plan = fill_batch(piece, bucket), plan_for(piece)
        shape = (*batch.text_ids_BT.shape, plan.shape)
        if shape not in self._recorded:
            while len(self._recorded) >= MAX_GRAPHS:
                self._recorded.popitem(last=False)
            own = dataclasses.replace(batch, **{name: x.clone() for name, x in _tensors(batch).items()})
            plan_of_own = plan_for(own)
            forward = partial(self._compute, self.model, own, plan_of_own)
            self._recorded[shape] = _Recorded(own, plan_of_own, len(shares), partial(run, forward), self.record)
        self._recorded.move_to_end(shape)
        return self._recorded[shape](batch, plan, shares)

    def _bucket(self, piece: PretrainBatch) -> Sizes:
        num_pairs, num_tokens = place = tuple(piece.text_ids_BT.shape)
        sizes, bucket = Sizes.of(batch_reads(self.model, piece), piece), self._buckets.get(place)
        if bucket is None or not sizes.fit(bucket, num_tokens):
            larger = self._buckets[place] = sizes.bucket(num_tokens, bucket)
            what = f"{num_pairs} pairs with texts of up to {num_tokens} tokens: a CUDA graph for {larger.describe()}"
            if bucket is not None:
                what += f"; the one for {bucket.describe()} is too small for a batch with {sizes.describe()}"
            self.say(what)
        return self._buckets[place]


class _Recorded:
    """A recorded pass.

    Args:
        batch: What it reads, in tensors of its own.
        plan: The plan for that.
        num_shares: How many losses there are.
        run: The pass, of the batch and the shares.
        record: Records it.
    """

    def __init__(
        self,
        batch: PretrainBatch,
        plan: Plan,
        num_shares: int,
        run: Callable[[PretrainBatch, Tensor], Results],
        record: Recorder,
    ) -> None:
        self.batch, self.device = batch, batch.image_BCHW.device
        self.indices = plan.send(self.device)
        # While the pass is recorded no loss counts, so that the gradients stay what they are.
        self.shares = torch.zeros(num_shares, device=self.device, dtype=torch.float64)
        self.replay, self.results = record(partial(run, self.batch, self.shares))

    def __call__(self, batch: PretrainBatch, plan: Plan, shares: Sequence[float]) -> Results:
        own = _tensors(self.batch)
        for name, tensor in _tensors(batch).items():
            own[name].copy_(tensor)
        plan.send(self.device, self.indices)
        host = torch.tensor(shares, dtype=torch.float64)
        self.shares.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
        self.replay()
        # The next replay writes into the same tensors.
        return {name: {key: value.clone() for key, value in of.items()} for name, of in self.results.items()}


def record_graph(function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Records a CUDA graph; a ``Recorder``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Libraries allocate and kernels are compiled at their first calls, on another stream as PyTorch asks. What that
    # draws is no part of the run.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]), torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The loader's thread may take page-locked memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def _tensors(batch: PretrainBatch) -> Mapping[str, Tensor]:
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}
