"""What the parts of MPMA do, on the demo's corpus: the forms of its memory, alignment, and paired masking.

    python benchmarks/mpma_ablation.py runs/mpma-ablation             # makes the runs that are missing, and the report
    python benchmarks/mpma_ablation.py runs/mpma-ablation --check     # and exits with 1 if alignment gains too little

Every variant of ``mpma-demo`` is trained with the same three seeds and as many steps. FOLDER gets the runs, report.md
and curves.png. Without alignment nothing puts images and reports into one space, so that its recall is that of a head
with random weights, or chance if that is more. What the towers know of it nevertheless shows a head that is trained
afterwards on pairs, the towers being frozen; for comparison also on towers that were aligned. It takes about 40 minutes
on one core.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import harness
import torch
import yaml

from fastm3ae.config import PretrainConfig
from fastm3ae.config.files import from_dict
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.loader import pretrain_loader
from fastm3ae.data.text import load_tokenizer
from fastm3ae.device import batch_mover
from fastm3ae.model.alignment import alone, info_nce
from fastm3ae.model.build import build_model
from fastm3ae.model.mpma import MPMA
from fastm3ae.training.distributed import Processes
from fastm3ae.training.validation import validate
from fastm3ae.weights.pretrained import init_model

RECONSTRUCTION = ["image_reconstruction", "report_reconstruction"]
VARIANTS = {
    "slots": [],
    # A quarter of the default, as the preset's slots and width are.
    "topk": ["--model.memory", "topk", "--model.num-topk-slots", "512", "--model.num-topk-kept", "8"],
    "none": ["--model.memory", "none"],
    "slots, without alignment": ["--model.objectives", *RECONSTRUCTION],
    "slots, separate masking": ["--model.masking", "separate"],
}
ALIGNED, NOT_ALIGNED = "slots", "slots, without alignment"
METRICS = {
    "report_reconstruction_accuracy": "hidden words predicted",
    "report_reconstruction_accuracy_shuffled_image": "the same with another pair's image",
    "image_reconstruction_loss": "hidden patches, MSE",
    "image_to_report_recall_at_1": "image finds its report among 64",
}
SEEDS = (0, 1, 2)
NUM_PROBE_STEPS = 100
MIN_RECALL_RATIO = 3.0


def folder_of(root: Path, variant: str, seed: int) -> Path:
    return root / f"{variant.replace(', ', '-').replace(' ', '-')}_seed{seed}"


def train(root: Path, variant: str, seed: int, num_steps: int) -> None:
    folder = folder_of(root, variant, seed)
    if (folder / "summary.json").exists():
        return
    command = [sys.executable, "-m", "fastm3ae", "pretrain", "--preset", "mpma-demo", "--output", str(folder)]
    command += ["--seed", str(seed), "--train.num-steps", str(num_steps), "--resume", "auto", *VARIANTS[variant]]
    command += ["--train.validate-every-steps", str(max(1, num_steps // 5)), "--train.no-tensorboard"]
    command += ["--data.root", str(root / "corpus"), "--data.tokenizer", str(root / "corpus" / "tokenizer")]
    with (root / f"{folder.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    print(f"{variant}, seed {seed}: trained", flush=True)


def curve(root: Path, variant: str, seed: int, metric: str) -> tuple[list[int], list[float]]:
    lines = map(json.loads, (folder_of(root, variant, seed) / "metrics.jsonl").read_text().splitlines())
    points = [(line["step"], line[metric]) for line in lines if line["split"] == "val" and metric in line]
    return [step for step, _ in points], [value for _, value in points]


def final(root: Path, variant: str, seed: int, metric: str) -> float | None:
    return json.loads((folder_of(root, variant, seed) / "summary.json").read_text()).get(metric)


def recalls_of_new_heads(root: Path, variant: str, seed: int) -> dict[str, float]:
    """Recall at 1 by a new head of global alignment on the frozen towers of a run, before and after its training."""
    folder = folder_of(root, variant, seed)
    found = folder / "new_head.json"
    if found.exists():
        return json.loads(found.read_text())
    config = from_dict(PretrainConfig(), yaml.safe_load((folder / "config.yaml").read_text()))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, objectives=("global_alignment",)))
    torch.manual_seed(seed)
    model = build_model(config.model)
    fresh = {name: value.clone() for name, value in model.global_head.state_dict().items()}
    init_model(model, max((folder / "checkpoints").glob("step_*")))
    model.global_head.load_state_dict(fresh)
    recalls = {"untrained": recall(model, config), "trained": recall(train_head(model, config), config)}
    found.write_text(json.dumps(recalls))
    return recalls


def recall(model: MPMA, config: PretrainConfig) -> float:
    return validate(model, batches(config, "val"), nullcontext, Processes("cpu"))["image_to_report_recall_at_1"]


def train_head(model: MPMA, config: PretrainConfig) -> MPMA:
    model.requires_grad_(False).global_head.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.global_head.parameters(), lr=1e-3)
    for batch in itertools.islice(batches(config, "train"), NUM_PROBE_STEPS):
        loss, _ = info_nce(model.embed(batch), alone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def batches(config: PretrainConfig, split: str) -> Iterator[PretrainBatch]:
    loader = pretrain_loader(config, load_tokenizer(config.data.tokenizer), split, num_workers=0)
    move = batch_mover(config.data, torch.device("cpu"))
    for epoch in itertools.count():
        for pieces in loader.epoch(epoch):
            yield from map(move, pieces)
        if split == "val":
            return


def summary_of(values: list[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return f"{form(statistics.mean(known))} ({form(min(known))} to {form(max(known))})" if known else "-"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def write_report(root: Path, num_steps: int, probes: dict[str, list[dict[str, float]]]) -> None:
    columns = ["variant", *METRICS.values()]
    lines = [
        f"# MPMA's parts on the demo's corpus: {num_steps} steps, seeds {', '.join(map(str, SEEDS))}",
        "",
        f"Means over the seeds, with the smallest and the largest. {harness.machine()}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for variant in VARIANTS:
        cells = [variant]
        for metric in METRICS:
            form = percent if "loss" not in metric else "{:.3f}".format
            cells.append(summary_of([final(root, variant, seed, metric) for seed in SEEDS], form))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "A new head of the global alignment on the frozen towers; an image finds its report among 64:", ""]
    lines += [f"| towers | untrained | trained for {NUM_PROBE_STEPS} steps on pairs |", "| --- | --- | --- |"]
    for variant, recalls in probes.items():
        cells = [summary_of([of[when] for of in recalls], percent) for when in ("untrained", "trained")]
        lines.append(f"| {variant} | {cells[0]} | {cells[1]} |")
    lines += ["", "![curves](curves.png)", ""]
    (root / "report.md").write_text("\n".join(lines))


def draw_curves(root: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(5 * len(METRICS), 4))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for number, variant in enumerate(VARIANTS):
            curves = [curve(root, variant, seed, metric) for seed in SEEDS]
            if not curves[0][0]:
                continue
            values = list(zip(*(values for _, values in curves), strict=True))
            color = f"C{number}"
            axis.plot(curves[0][0], list(map(statistics.mean, values)), color=color, label=variant)
            axis.fill_between(curves[0][0], list(map(min, values)), list(map(max, values)), color=color, alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(root / "curves.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 if alignment gains less than its target")
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--parallel", type=int, default=1, help="runs beside each other (default: %(default)s)")
    arguments = parser.parse_args()
    root = arguments.folder
    root.mkdir(parents=True, exist_ok=True)

    from fastm3ae.data.demo import ensure_demo_corpus

    ensure_demo_corpus(root / "corpus")
    with ThreadPoolExecutor(arguments.parallel) as pool:
        jobs = [pool.submit(train, root, v, seed, arguments.num_steps) for seed in SEEDS for v in VARIANTS]
        for job in jobs:
            job.result()
    probes = {
        variant: [recalls_of_new_heads(root, variant, seed) for seed in SEEDS] for variant in (ALIGNED, NOT_ALIGNED)
    }
    write_report(root, arguments.num_steps, probes)
    draw_curves(root)
    print((root / "report.md").read_text())
    aligned = statistics.mean(final(root, ALIGNED, seed, "image_to_report_recall_at_1") for seed in SEEDS)
    ratio = aligned / max(1 / 64, statistics.mean(of["untrained"] for of in probes[NOT_ALIGNED]))
    print(f"recall at 1 with alignment: {ratio:.1f} times that without (target: {MIN_RECALL_RATIO})")
    if arguments.check and ratio < MIN_RECALL_RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()
