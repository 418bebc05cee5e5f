"""Several processes make the steps that one process makes on the joined batch.

    python tests/ranks/parity.py                 # the table
    python tests/ranks/parity.py --check         # and exit with 1 where an error is above 1e-6
    python tests/ranks/parity.py --num-ranks 2 --steps 5 --seed 7

Small models from random weights train on made-up captions of 3 to 29 words: batches of 15 pairs, which the processes
share unequally, in one or two passes of at most 4 pairs, each with another number of masked tokens and false images.
Losses and parameters are compared with those of one process that makes each step in one pass. In float64, because
rounding grows from step to step: Adam makes a whole step of a gradient that is zero but for rounding. In float32 the
losses alone are compared.

The error of a loss is |a - b| / |b|, the largest over steps and objectives; that of the parameters is the largest over
tensors of norm(a - b) / norm(b), tensors shorter than the way that they can have gone in the steps counted as so long.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from corpus import TOKENIZER, TOKENIZERS, caption_rows

from fastm3ae.config import DataConfig, OptimConfig, PretrainConfig, TrainConfig
from fastm3ae.config.files import from_dict
from fastm3ae.config.presets import PRESETS
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.loader import Place, pretrain_loader
from fastm3ae.device import batch_mover
from fastm3ae.model.build import build_model
from fastm3ae.training.distributed import Processes
from fastm3ae.training.loop import build_step
from fastm3ae.weights.towers import resolve

TARGET = 1e-6
BATCH, MICRO_BATCH, LEARNING_RATE = 15, 4, 1e-3
WAYS = ("ddp", "fsdp", "fsdp on machines of 2")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SIZES = {
    "vision": {"image_size_px": 32, "patch_size_px": 8, "width": 64, "num_blocks": 2, "weights": "random"},
    "text": {"width": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 48, "max_positions": 40, "dropout_frac": 0.0,
             "weights": "random", "num_token_types": 2, "kind": "bert"},
    "fusion": {"width": 32, "num_layers": 3, "num_heads": 4, "dropout_frac": 0.0},
}  # fmt: skip
MODELS = {
    "M3AE": {**SIZES, "mim": {"layer": 2, "decoder_width": 32, "decoder_num_layers": 2, "decoder_num_heads": 2}},
    "MPMA": {
        **SIZES,
        "kind": "mpma",
        "vision": {**SIZES["vision"], "kind": "vit"},
        "image": {"decoder_width": 32, "decoder_num_layers": 2, "decoder_num_heads": 2},
        "alignment": {"head_width": 24, "width": 12, "learn_temperature": True},
        "num_slots": 5,
    },
}


def configuration(root: Path, name: str, way: str, num_steps: int, seed: int) -> PretrainConfig:
    base = dataclasses.replace(
        PRESETS["m3ae" if name == "M3AE" else "mpma"](),
        seed=seed,
        data=DataConfig(root=str(root), datasets=("made",), tokenizer=str(TOKENIZERS / "bert-base-uncased"),
                        max_text_tokens=32),
        optim=OptimConfig(learning_rate=LEARNING_RATE, clip_grad_norm=1.0),
        train=TrainConfig(num_steps=num_steps, batch_size=BATCH, micro_batch=BATCH, num_workers=0, device="cpu",
                          parallel=way.split()[0]),
    )  # fmt: skip
    return resolve(from_dict(base, {"model": MODELS[name]}), TOKENIZER)


def train(config: PretrainConfig, processes: Processes, dtype: torch.dtype):
    """Returns the losses of each step, and the parameters after the last one."""
    place = Place(micro_batch=config.train.micro_batch, rank=processes.rank, num_ranks=processes.number)
    loader = pretrain_loader(config, TOKENIZER, "train", place=place)
    torch.manual_seed(config.seed)
    step = build_step(config, build_model(config.model).to(dtype), config.train.num_steps, processes)
    move, losses = batch_mover(config.data, torch.device("cpu")), []
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for pieces in itertools.islice(batches, config.train.num_steps):
        pieces = [_as(dtype, move(piece)) for piece in pieces]
        sums = step(pieces, processes.sum(step.count(pieces)))
        names = [name for name in sums if name.endswith("_loss")]
        totals = processes.sum([float(sums[name][0]) for name in names] + [sums[name][1] for name in names])
        means = zip(totals[: len(names)], totals[len(names) :], strict=True)
        losses.append({name: total / count for name, (total, count) in zip(names, means, strict=True)})
    return losses, {name: tensor.clone() for name, tensor in step.parallel.weights().items()}


def _as(dtype: torch.dtype, batch):
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch,
        **{name: x.to(dtype) for name, x in fields.items() if isinstance(x, torch.Tensor) and x.is_floating_point()},
    )


def work(root: Path, ways: list[str], models: list[str], num_steps: int, seed: int) -> None:
    """What each process does: all cases, one after another."""
    processes, found = Processes("cpu"), {}
    for way, name, dtype in itertools.product(ways, models, DTYPES):
        config = configuration(root, name, way, num_steps, seed)
        if processes.number > 1:
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=MICRO_BATCH))
        if way.endswith("of 2"):
            processes.number_here = 2  # as torchrun says it on each of several machines
        found[name, way, dtype] = train(config, processes, DTYPES[dtype])
        processes.number_here = processes.number
    if processes.is_first:
        torch.save(found, root / f"found_{processes.number}.pt")
    processes.close()


def run(root: Path, num_ranks: int, ways: list[str], arguments: argparse.Namespace) -> dict:
    """Starts the processes and returns what they found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    case = {"ways": ways, "models": arguments.models, "num_steps": arguments.steps, "seed": arguments.seed}
    result = subprocess.run(
        [sys.executable, *launcher, __file__, "--work", str(root), json.dumps(case)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{num_ranks} processes failed:\n{result.stderr[-4000:]}")
    return torch.load(root / f"found_{num_ranks}.pt")


def loss_error(got: list[dict[str, float]], want: list[dict[str, float]]) -> float:
    pairs = [(a[name], b[name]) for a, b in zip(got, want, strict=True) for name in b]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def parameter_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], num_steps: int) -> float:
    assert got.keys() == want.keys()
    errors = []
    for name, b in want.items():
        way = 5 * LEARNING_RATE * num_steps * b.numel() ** 0.5  # the fusion and the heads learn five times faster
        errors.append(float((got[name] - b).norm() / max(b.norm(), way)))
    return max(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # a process of those that are compared
    arguments = parser.parse_args()
    if arguments.work:
        work(Path(arguments.work[0]), **json.loads(arguments.work[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root, worst = Path(folder), 0.0
        write_pairs(root / "made_train.arrow", caption_rows(40, arguments.seed))
        one = run(root, 1, ["ddp"], arguments)
        print(f"seed {arguments.seed}, {arguments.steps} steps, batches of {BATCH} pairs, torch {torch.__version__}\n")
        print("| model | processes | weights | losses, float64 | parameters, float64 | losses, float32 |")
        print("| --- | --- | --- | --- | --- | --- |")
        for num in arguments.num_ranks:
            ways = [way for way in WAYS if num > 2 or not way.endswith("of 2")]
            several = run(root, num, ways, arguments)
            for name, way in itertools.product(arguments.models, ways):
                (losses, weights), (single, _) = (several[name, way, dtype] for dtype in DTYPES)
                (want, want_weights), (want_single, _) = (one[name, "ddp", dtype] for dtype in DTYPES)
                errors = [loss_error(losses, want), parameter_error(weights, want_weights, arguments.steps),
                          loss_error(single, want_single)]  # fmt: skip
                worst = max(worst, *errors)
                print(f"| {name} | {num} | {way} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    print(f"\nlargest error: {worst:.1e} (target {TARGET:.0e})")
    return int(arguments.check and worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
