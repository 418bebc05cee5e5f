"""The tables of docs/scaling.md, as Markdown, each under the name of its place there."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling_model import (
    A100,
    ETHERNET,
    FABRIC,
    GPUS,
    GPUS_PER_NODE,
    H200,
    LAUNCH_S,
    M3AE_MESSAGES,
    MPMA_MESSAGES,
    NETWORKS,
    NUM_LAUNCHES,
    Cluster,
    Workload,
    best_interval_s,
    efficiency,
    lost_frac,
    make_step,
    pairs_per_s,
    seconds_between_failures,
)
from scaling_traffic import COUNTS, KINDS, ROWS, Traffic

NUMS, BATCHES = (8, 64, 512), (32, 256)
IMAGES_PER_PAIR = 1.5  # decoded: its own, and a false one for every second pair
OFFICIAL_BATCH, OFFICIAL_STEPS, WARMUP_FRAC = 256, 100_000, 0.1
SAVE_EVERY_STEPS = 5_000
# Float32 matrices of all pairs by all pairs that InfoNCE holds at the peak. Measured on a CPU: 5.3 with 1,024 pairs.
ALIGNMENT_MATRICES, ALIGNMENT_WIDTH = 5.3, 128


@dataclass(frozen=True)
class DataSet:
    """Images with texts.

    Args:
        name: As in the tables.
        num_images: As published; there are at least as many pairs.
        image_bytes: Of an encoded image, on average.
        cpu_s: Of one core, for a pair: decoded, resized, tokenized, masked, collated.
    """

    name: str
    num_images: int
    image_bytes: float
    cpu_s: float


# Processor time of an AMD EPYC: benchmarks/results/amd-epyc_2026-11-22_loader.txt, column "CPU ms", and for large
# radiographs 1.5 times what amd-epyc_2026-11-22_scaling.txt has, and 1 ms for the text.
DATA_SETS = (
    # Bytes of 180 MedPix images in ROCO's layout, at most 512 px: a stand-in.
    DataSet("ROCO", 81_825, 33e3, 2.83e-3),
    # 104 GB in its release; the time is that of 6 figures of its public sample, which are half as large.
    DataSet("MediCaT", 217_060, 104e9 / 217_060, 11.11e-3),
    # 557.6 GB of 377,110 images in the release 2.0.0, of which 243,334 are PA or AP; the time is that of drawn ones.
    DataSet("MIMIC-CXR, as released", 243_334, 557.6e9 / 377_110, 33e-3),
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(frac: float, digits: int = 0) -> str:
    return f"{100 * frac:.{digits}f} %"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def duration(seconds: float) -> str:
    for unit, size, below in (("s", 1, 120), ("min", 60, 120 * 60)):
        if seconds < below:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.0f} h"


def workload(work: Workload) -> str:
    """What was counted on the official configuration."""
    rows = [
        ["parameters", f"{work.num_parameters:,}"],
        ["bytes of gradients, float32", f"{work.gradient_bytes:,}"],
        [
            "GFLOP of a pair, 40 tokens: forward, backward",
            f"{work.forward_flops / 1e9:.1f}, {work.backward_flops / 1e9:.1f}",
        ],
        [
            "GFLOP of a further token; of a false image",
            f"{work.token_flops / 1e9:.2f}; {work.false_image_flops / 1e9:.1f}",
        ],
        ["kernels of a pass, about", f"{NUM_LAUNCHES:,}"],
        ["GB of a checkpoint", f"{work.checkpoint_bytes / 1e9:.2f}"],
        ["GB of weights, gradients and optimiser on each GPU: DDP, FSDP on 8", _state(work)],
    ]
    return table(["official M3AE, packed step", ""], rows)


def _state(work: Workload) -> str:
    state = work.checkpoint_bytes + work.gradient_bytes
    return f"{state / 1e9:.1f}, {state / GPUS_PER_NODE / 1e9:.1f}"


def compute(work: Workload) -> str:
    """One GPU alone."""
    rows = []
    for gpu in GPUS:
        for batch in BATCHES:
            seconds = make_step(work, Cluster(gpu, FABRIC, 1), batch).seconds
            rows.append(
                [f"{gpu.name}, {batch} pairs", ms(seconds), ms(NUM_LAUNCHES * LAUNCH_S), f"{batch / seconds:.0f}"]
            )
    return table(["one GPU", "step, ms", "of it the host starts kernels for, ms", "pairs/s"], rows)


def efficiencies(work: Workload, is_sharded: bool) -> str:
    """Weak scaling, for each kind of GPU, network and batch."""
    rows = []
    for name, gpu in (("H200, H100", H200), ("A100", A100)):
        for network in NETWORKS:
            for batch in BATCHES:
                cells = [
                    percent(efficiency(work, Cluster(gpu, network, num), batch, is_sharded=is_sharded)) for num in NUMS
                ]
                rows.append([f"{name}, {network.name}, {batch} pairs each", *cells])
    return table(["FSDP" if is_sharded else "DDP", *(f"{num} GPUs" for num in NUMS)], rows)


def parts(work: Workload) -> str:
    """Where the time of a step goes on the fabric."""
    rows = []
    for batch in BATCHES:
        for num in NUMS:
            step = make_step(work, Cluster(H200, FABRIC, num), batch)
            cells = (step.compute_s, step.slowest_s, step.communication_s, step.host_s, step.seconds)
            rows.append([f"{num} GPUs, {batch} pairs each", *map(ms, cells)])
    return table(
        ["H200, 8 x 400 Gb/s, DDP; ms", "compute", "slowest process", "gradients not hidden", "host", "step"], rows
    )


def host(work: Workload) -> str:
    """What the hosts tell one another in each step, over gloo."""
    rows = []
    for name, messages in (("M3AE", M3AE_MESSAGES), ("MPMA", MPMA_MESSAGES)):
        for num in NUMS:
            seconds = messages.seconds(num)
            cells = (
                f"{messages.sums} + {messages.gathers}", f"{messages.hops(num):,}", ms(seconds),
                ms(seconds + NUM_LAUNCHES * LAUNCH_S),
            )  # fmt: skip
            rows.append([f"{name}, {num} processes", *cells])
    header = ["", "sums + gathers a step", "messages one after the other", "ms", "hidden by a step of, ms"]
    return table(header, rows)


def remedies(work: Workload) -> str:
    """What changes where it breaks."""
    quiet = dataclasses.replace(M3AE_MESSAGES, sums=0)

    def row(what, cluster, batch, **options):
        return [what, percent(efficiency(work, cluster, batch, **options))]

    slow, large = Cluster(H200, ETHERNET, 64), Cluster(H200, FABRIC, 512)
    rows = [
        row("64 GPUs, 1 x 100 Gb/s, 256 pairs each, 1 pass", slow, 256),
        *(row(f"the same, {passes} passes", slow, 256, passes=passes) for passes in (2, 4, 8)),
        row("512 GPUs, 8 x 400 Gb/s, 32 pairs each", large, 32),
        row("the same, 4 passes", large, 32, passes=4),
        row("the same as first, and hosts that wait for no message", large, 32, messages=quiet),
        row("and pairs dealt out as they come", large, 32, messages=quiet, imbalance=1.0),
    ]
    return table(["H200", "efficiency"], rows)


def fixed_batch(work: Workload) -> str:
    """The official batch, divided among more and more GPUs."""
    alone = make_step(work, Cluster(H200, FABRIC, 1), OFFICIAL_BATCH).seconds
    rows = []
    for num in (1, 8, 16, 32, 64):
        seconds = make_step(work, Cluster(H200, FABRIC, num), OFFICIAL_BATCH // num).seconds
        cells = (f"{OFFICIAL_BATCH // num}", ms(seconds), f"{alone / seconds:.1f}x", duration(OFFICIAL_STEPS * seconds))
        rows.append([f"{num} H200", *cells])
    return table(
        [f"{OFFICIAL_BATCH} pairs a step", "pairs each", "ms", "as fast as one", f"{OFFICIAL_STEPS:,} steps"], rows
    )


def batches(work: Workload) -> str:
    """How many steps are left when the batch grows with the GPUs."""
    medicat, mimic = (sum(of.num_images for of in sets) for sets in (DATA_SETS[:2], DATA_SETS[2:]))
    pairs = OFFICIAL_BATCH * OFFICIAL_STEPS
    rows = []
    for num, batch in ((8, 32), (64, 32), (512, 32), (512, 256)):
        whole, steps = num * batch, pairs // (num * batch)
        seconds = make_step(work, Cluster(H200, FABRIC, num), batch).seconds
        cells = (
            f"{whole:,}", f"{medicat // whole:,}", f"{mimic // whole:,}", f"{steps:,}", f"{steps * WARMUP_FRAC:,.0f}",
            duration(steps * seconds),
        )  # fmt: skip
        rows.append([f"{num} x {batch}", *cells])
    header = ["GPUs x pairs", "batch", "steps of an epoch: ROCO + MediCaT", "MIMIC-CXR", "steps of the official run"]
    return table([*header, "of them warm-up", "on H200"], rows)


def alignment(work: Workload) -> str:
    """What MPMA's contrast of all pairs with all needs on each GPU."""
    rows = []
    for num, batch in ((8, 32), (64, 32), (64, 256), (512, 256)):
        pairs = num * batch
        gathered, held = 2 * pairs * ALIGNMENT_WIDTH * 4, ALIGNMENT_MATRICES * 4 * pairs**2
        rows.append([f"{num} x {batch}", f"{pairs:,}", f"{gathered / 1e6:.1f}", f"{held / 1e9:.3f}"])
    return table(["GPUs x pairs", "batch", "MB of features gathered", "GB of similarities on each GPU"], rows)


def loader(work: Workload) -> str:
    """What processors and storage must give to a GPU and to a node."""
    rows = []
    for data in DATA_SETS:
        for gpu in (H200, A100):
            rate = pairs_per_s(work, gpu, 256)
            cores, bytes_per_s = rate * data.cpu_s, rate * IMAGES_PER_PAIR * data.image_bytes * GPUS_PER_NODE
            cells = (
                f"{1e3 * data.cpu_s:.1f}", f"{rate:.0f}", f"{cores:.1f}", f"{GPUS_PER_NODE * cores:.0f}",
                f"{bytes_per_s / 1e6:,.0f}", f"{data.num_images * data.image_bytes / 1e9:.0f}",
            )  # fmt: skip
            rows.append([f"{data.name}, {gpu.name}", *cells])
    header = ["", "CPU ms a pair", "pairs/s a GPU", "cores a GPU", "cores a node", "MB/s a node", "GB in all"]
    return table(header, rows)


def checkpoints(work: Workload) -> str:
    """What writing costs, by how often it is done."""
    copy_s = work.copied_bytes(GPUS_PER_NODE) / H200.host_rate
    rows = []
    for interval_s in (60.0, 300.0, 900.0, 3600.0):
        cells = (
            percent(copy_s / interval_s, 3),
            f"{work.checkpoint_bytes / interval_s / 1e9:.3f}",
            f"{work.checkpoint_bytes / (0.02 * interval_s) / 1e9:.2f}",
        )
        rows.append([f"every {duration(interval_s)}", *cells])
    header = [
        f"8 H200, {work.checkpoint_bytes / 1e9:.2f} GB",
        "the copy stops training for",
        "GB/s, written meanwhile",
    ]
    return table([*header, "GB/s, were it waited for, to cost 2 %"], rows)


def failures(work: Workload) -> str:
    """How often something breaks, and how often to save."""
    rows = []
    for num in NUMS:
        copy_s = work.copied_bytes(num) / H200.host_rate
        best_s = best_interval_s(num, copy_s)
        step_s = make_step(work, Cluster(H200, FABRIC, num), 32).seconds
        default_s = SAVE_EVERY_STEPS * step_s
        cells = (
            duration(seconds_between_failures(num)), duration(best_s), f"{best_s / step_s:,.0f}",
            percent(lost_frac(num, copy_s, best_s), 2), duration(default_s),
            percent(lost_frac(num, copy_s, default_s), 2),
        )  # fmt: skip
        rows.append([f"{num} H200, 32 pairs each", *cells])
    header = ["", "between failures", "best interval", "in steps", "lost", f"{SAVE_EVERY_STEPS:,} steps", "lost"]
    return table(header, rows)


def traffic(measured: Iterable[Traffic]) -> str:
    """What a process gives to collectives in a step, by kind."""
    rows = []
    for found in measured:
        case = found.case
        passes = "1 pass" if case.num_passes == 1 else f"{case.num_passes} passes"
        name = f"{case.model}, {case.parallel}, {case.num_processes} processes, {passes}"
        sizes = [f"{found.num_bytes.get(kind, 0):,.0f}" for kind in KINDS]
        messages = sum(found.num_messages.get(kind, 0) for kind in (COUNTS, ROWS))
        rows.append([name, f"{found.num_trained:,}", *sizes, f"{messages:.0f}"])
    return table(["bytes a step and process", "trained parameters", *KINDS, "host's messages"], rows)


def calculated(work: Workload) -> dict[str, str]:
    """All tables that need no run, by name."""
    found = {make.__name__: make(work) for make in (workload, compute, parts, host, remedies, fixed_batch, batches)}
    found |= {make.__name__: make(work) for make in (alignment, loader, checkpoints, failures)}
    return {**found, "ddp": efficiencies(work, is_sharded=False), "fsdp": efficiencies(work, is_sharded=True)}
