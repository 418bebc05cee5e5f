"""How fast many GPUs make a step: what is assumed, and the formulas. Nothing here was measured on a GPU.

Every number that is assumed has its name and its source below; what the model and the step need comes as ``Workload``,
which scaling.py counts. Times are in seconds, sizes in bytes, rates in units per second, unless a name says otherwise.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

GPUS_PER_NODE = 8

# The goal of the packed step on one H200 is 256 pairs in 283 ms, which is 70 % of what large products reach.
MATMUL_FRAC = 0.80  # of the data sheet's dense bf16 rate in a product of 8192 x 8192 x 8192. Assumption.
STEP_FRAC = 0.70  # of that, in the whole step. Assumption: our goal, not yet measured.
NUM_LAUNCHES = 3_000  # kernels of a pass; 2,942 were counted with torch 2.15, copies into DDP's buckets among them
LAUNCH_S = 8e-6  # until the host has started one of them in eager PyTorch, Python included. Assumption.
NVLINK_FRAC, NETWORK_FRAC, MEMORY_FRAC = 0.80, 0.85, 0.80  # of the data sheet's rate. Assumptions.

# Latencies of one hop and of a call: NCCL's own model (src/graph/tuning.cc: hwLat, baseLat), ring with the protocol
# Simple, tree with LL128, whose bandwidth that file puts at 0.9 * 0.915 of the ring's.
RING_CALL_S, RING_NVLINK_S, TREE_CALL_S, TREE_NVLINK_S, TREE_FRAC = 8.4e-6, 3.4e-6, 4.4e-6, 1.2e-6, 0.82

GLOO_HOP_S = 30e-6  # a message of some bytes between two hosts, by TCP, until the receiver's thread runs. Assumption.

TEXT_TOKENS_STD = 16.3  # of ROCO's captions: benchmarks/results/amd-epyc_2026-11-22_balance.txt
# What balanced shares leave of the differences between the processes' work: 0.41 of 3.57 % with 8 processes, 0.64 of
# 6.75 % with 64. Measured there; the calculation has 3.7 and 6.2 % for shares that are not balanced.
BALANCED = 0.1
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default
# Of a checkpoint, float32, counted in real ones: the weights, which the first process writes, and AdamW's two means, of
# which each process writes its share.
WEIGHT_BYTES, MEANS_BYTES = 4, 8
RESTART_S = 180.0  # from a failure to the first new step: noticed, met again, checkpoint read. Assumption.
# 419 unexpected interruptions in 54 days of 16,384 GPUs: "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.4.
GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class Gpu:
    """A GPU and its node, by data sheet.

    Args:
        name: As in the tables.
        flops: Dense bf16 operations per second.
        memory_bytes: Its memory.
        memory_rate: Bytes per second from its memory.
        nvlink_rate: Bytes per second to others of the node, one direction.
        host_rate: Bytes per second to page-locked memory of the host (PCIe 5 or 4, 80 % of it). Assumption.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_rate: float
    nvlink_rate: float
    host_rate: float


H200 = Gpu("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9)
H100 = Gpu("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9)
A100 = Gpu("A100", 312e12, 80e9, 2.0e12, 300e9, 25e9)
GPUS = (H200, H100, A100)


@dataclass(frozen=True)
class Network:
    """What joins the nodes.

    Args:
        name: As in the tables.
        node_rate: Bytes per second that a node sends, one direction.
        ring_hop_s: Latency of a hop of a ring. InfiniBand: NCCL's model. TCP: assumption.
        tree_hop_s: The same of a tree.
    """

    name: str
    node_rate: float
    ring_hop_s: float
    tree_hop_s: float


FABRIC = Network("8 x 400 Gb/s", 400e9, 9.6e-6, 8.5e-6)
ETHERNET = Network("1 x 100 Gb/s", 12.5e9, 40e-6, 40e-6)
NETWORKS = (FABRIC, ETHERNET)


@dataclass(frozen=True)
class Workload:
    """What a step needs, per process, as it is counted on the real configuration.

    Args:
        num_parameters: All.
        gradient_bytes: Of what is trained, float32.
        embedding_bytes: Of the word embeddings, whose gradient is ready last.
        num_units: Layers that fully sharded parameters are gathered by.
        forward_flops: Per pair, half of the images being false.
        backward_flops: The same.
        token_flops: What a token of the text adds, in both directions.
        false_image_flops: What a false image adds.
    """

    num_parameters: int
    gradient_bytes: int
    embedding_bytes: int
    num_units: int
    forward_flops: float
    backward_flops: float
    token_flops: float
    false_image_flops: float

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops

    @property
    def pair_std(self) -> float:
        """Standard deviation of a pair's operations over their mean: its text's length, a false image or none."""
        return math.hypot(self.token_flops * TEXT_TOKENS_STD, self.false_image_flops / 2) / self.flops

    @property
    def checkpoint_bytes(self) -> int:
        return (WEIGHT_BYTES + MEANS_BYTES) * self.num_parameters

    def copied_bytes(self, num: int) -> float:
        """What the first of so many processes copies of a checkpoint, while training stands still."""
        return (WEIGHT_BYTES + MEANS_BYTES / num) * self.num_parameters


@dataclass(frozen=True)
class HostMessages:
    """Collectives of a step that the host waits for, counted in runs of several processes.

    Args:
        sums: all_reduce of some numbers.
        gathers: all_gather of some bytes.
    """

    sums: int
    gathers: int

    def hops(self, num: int) -> int:
        """Messages that wait for one another: gloo sends around a ring, twice for a sum."""
        return (2 * self.sums + self.gathers) * (num - 1)

    def seconds(self, num: int) -> float:
        return self.hops(num) * GLOO_HOP_S


M3AE_MESSAGES, MPMA_MESSAGES = HostMessages(sums=1, gathers=0), HostMessages(sums=2, gathers=2)


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together.

    Args:
        gpu: Each of them.
        network: Between nodes.
        num: How many.
    """

    gpu: Gpu
    network: Network
    num: int

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num / GPUS_PER_NODE)

    @property
    def rate(self) -> float:
        """Bytes per second of a ring through all: NVLink's, or what its node's cards let through."""
        inside = self.gpu.nvlink_rate * NVLINK_FRAC
        return inside if self.num_nodes == 1 else min(inside, self.network.node_rate * NETWORK_FRAC)

    def _ring_s(self, num_rounds: int) -> float:
        between = num_rounds * (self.num_nodes - 1)
        return RING_CALL_S + (num_rounds * (self.num - 1) - between) * RING_NVLINK_S + between * self.network.ring_hop_s

    def all_reduce_s(self, num_bytes: float) -> float:
        """Sums tensors of so many bytes: the faster of ring and double binary tree."""
        if self.num == 1:
            return 0.0
        ring = self._ring_s(2) + 2 * (self.num - 1) / self.num * num_bytes / self.rate
        inside, between = min(self.num, GPUS_PER_NODE) - 1, math.log2(self.num_nodes)
        latency = TREE_CALL_S + 2 * (inside * TREE_NVLINK_S + between * self.network.tree_hop_s)
        return min(ring, latency + 2 * num_bytes / (TREE_FRAC * self.rate))

    def gather_s(self, num_bytes: float) -> float:
        """Gathers, or sums and scatters, tensors of so many bytes in all: a ring."""
        return 0.0 if self.num == 1 else self._ring_s(1) + (self.num - 1) / self.num * num_bytes / self.rate

    def across_s(self, num_bytes: float) -> float:
        """Sums tensors of so many bytes over the nodes, of which each GPU has its part and a card of its own."""
        num, hop = self.num_nodes, self.network
        if num == 1:
            return 0.0
        rate = self.network.node_rate * NETWORK_FRAC
        ring = RING_CALL_S + 2 * (num - 1) * (hop.ring_hop_s + num_bytes / num / rate)
        return min(ring, TREE_CALL_S + 2 * (math.log2(num) * hop.tree_hop_s + num_bytes / (TREE_FRAC * rate)))


@dataclass(frozen=True)
class Step:
    """Where the time of a step goes.

    Args:
        compute_s: Forward and backward passes of a process with average pairs, and the optimiser.
        slowest_s: Until the process with the most work is done, too.
        communication_s: Gradients and parameters, as far as no pass hides them.
        host_s: The GPU waits for the host: for kernels to be started, and for what the hosts tell one another.
    """

    compute_s: float
    slowest_s: float
    communication_s: float
    host_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.slowest_s + self.communication_s + self.host_s


def last_end_s(ready_s: Iterable[float], took_s: Iterable[float]) -> float:
    """When the last of several messages has arrived that are sent one after the other, each when it is ready."""
    end = 0.0
    for ready, took in zip(ready_s, took_s, strict=True):
        end = max(end, ready) + took
    return end


def expected_maximum(num: int) -> float:
    """Of so many standard normal variables (Blom 1958)."""
    return NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


def make_step(
    work: Workload,
    cluster: Cluster,
    batch: int,
    *,
    passes: int = 1,
    is_sharded: bool = False,
    imbalance: float = BALANCED,
    messages: HostMessages = M3AE_MESSAGES,
) -> Step:
    """Calculates a step.

    Args:
        work: What a pair needs.
        cluster: Who computes.
        batch: Pairs of a process and pass.
        passes: Of a step, whose gradients are added up before they are summed over the processes.
        is_sharded: Whether a node's GPUs have parts of the model (FSDP2), or each has a copy (DDP).
        imbalance: What is left of the differences between the processes' work; 1: pairs are dealt out as they come.
        messages: Of the hosts.
    """
    gpu, num = cluster.gpu, cluster.num
    rate = gpu.flops * MATMUL_FRAC * STEP_FRAC
    slowest = 1 + imbalance * expected_maximum(num) * work.pair_std / math.sqrt(batch * passes) if num > 1 else 1.0
    forward, backward = (slowest * batch * flops / rate for flops in (work.forward_flops, work.backward_flops))
    # Reads weight, gradient and both means, writes all but the gradient.
    optimizer = 7 * work.gradient_bytes / (gpu.memory_rate * MEMORY_FRAC)
    if is_sharded:
        optimizer /= min(num, GPUS_PER_NODE)
        done = _sharded_s(work, cluster, forward, backward, passes)
    else:
        done = _replicated_s(work, cluster, forward, backward, passes)
    computed = passes * (forward + backward)
    host = passes * NUM_LAUNCHES * LAUNCH_S + (messages.seconds(num) if num > 1 else 0.0)
    even = computed / slowest + optimizer
    return Step(even, computed - computed / slowest, done - computed, max(0.0, host - done - optimizer))


def _replicated_s(work: Workload, cluster: Cluster, forward: float, backward: float, passes: int) -> float:
    """Passes of which the last sums the gradients, bucket by bucket, as the backward pass fills them."""
    sizes, computed = _bucket_sizes(work), passes * (forward + backward)
    num = len(sizes) - 1
    ready = [computed - backward * (num - index - 1) / num for index in range(num)]
    return max(computed, last_end_s([*ready, computed], map(cluster.all_reduce_s, sizes)))


def _sharded_s(work: Workload, cluster: Cluster, forward: float, backward: float, passes: int) -> float:
    """Passes that gather each layer twice, within the node; the last sums and scatters it there, then across nodes."""
    node = dataclasses.replace(cluster, num=min(cluster.num, GPUS_PER_NODE))
    layer, num = work.gradient_bytes / work.num_units, work.num_units
    each = node.gather_s(layer)  # also to scatter
    ahead = max(forward, num * each) + each
    done = passes * ahead + (passes - 1) * max(backward, num * each)
    took = max(backward, 2 * num * each)
    ready = [done + took * (index + 1) / num + each for index in range(num)]
    return max(ready[-1], last_end_s(ready, [cluster.across_s(layer)] * num))


def _bucket_sizes(work: Workload) -> list[float]:
    """Buckets of equal size in the order in which they are filled, and the word embeddings, which are the last."""
    rest = work.gradient_bytes - work.embedding_bytes
    num = math.ceil(rest / BUCKET_BYTES)
    return [rest / num] * num + [work.embedding_bytes]


def efficiency(work: Workload, cluster: Cluster, batch: int, *, passes: int = 1, **options) -> float:
    """Pairs per second and GPU, over those of one GPU that makes the same passes."""
    alone = make_step(work, Cluster(cluster.gpu, cluster.network, 1), batch, passes=passes)
    return alone.seconds / make_step(work, cluster, batch, passes=passes, **options).seconds


def pairs_per_s(work: Workload, gpu: Gpu, batch: int) -> float:
    """Of one GPU alone."""
    return batch / make_step(work, Cluster(gpu, FABRIC, 1), batch).seconds


def seconds_between_failures(num: int) -> float:
    return GPU_HOURS_PER_FAILURE * 3600 / num


def best_interval_s(num: int, blocked_s: float) -> float:
    """Between checkpoints that stop training for so long each, such that least is lost (Young 1974)."""
    return math.sqrt(2 * blocked_s * seconds_between_failures(num))


def lost_frac(num: int, blocked_s: float, interval_s: float) -> float:
    """Of the time: checkpoints, what is done again, restarts (Daly 2006, first order)."""
    return blocked_s / interval_s + (interval_s / 2 + RESTART_S) / seconds_between_failures(num)
