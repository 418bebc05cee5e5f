"""The packed step gives what the original's passes give: losses, metrics, gradients, and which parameters have none."""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import VOCAB, CountingBackend, small_batch, small_config, small_gpu_model, small_model

from fastm3ae import objectives
from fastm3ae.config import PretrainConfig, TrainConfig, VisionConfig
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.errors import UserError
from fastm3ae.model import packed, packed_step, reads
from fastm3ae.model.m3ae import M3AE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import original_step  # noqa: E402

PRETRAINING = ("mlm", "mim", "itm")
SUBSETS = [PRETRAINING, ("mlm",), ("mim",), ("itm",), ("mim", "itm"), ("itm", "mlm"), ("mim", "mlm")]


def run(model, batch, losses):
    """The losses, and the gradient of each parameter that has one."""
    model.zero_grad(set_to_none=True)
    results = losses(model, batch)
    torch.stack(list(results.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in results.items()}, gradients


def step(name):
    def losses(model, batch):
        found = objectives.losses(model(batch, step=name), batch, model.config)
        return {objective: loss.mean for objective, loss in found.items()}

    return losses


def yardstick(model, batch):
    return {objective: outputs.loss for objective, outputs in original_step.passes(model, batch)}


ORIGINAL = step("original")


def differences(model, batch, want_losses=ORIGINAL):
    """The largest relative difference of a loss, and of a gradient to the largest one; inf where one is missing."""
    got, got_gradients = run(model, batch, step("packed"))
    want, want_gradients = run(model, batch, want_losses)
    assert list(got) == list(model.config.objectives) and set(got) == set(want)
    if set(got_gradients) != set(want_gradients):
        return float("inf"), float("inf")
    # Against the largest gradient of all: those that are zero but for rounding have no scale of their own.
    scale = max(gradient.abs().max().item() for gradient in want_gradients.values()) or 1
    of_gradients = max((got_gradients[n] - want_gradients[n]).abs().max().item() for n in want_gradients) / scale
    return max(abs(got[name] - want[name]) / abs(want[name] or 1) for name in want), of_gradients


def make_batch(model, lengths, num_masked, labels, seed=0):
    """A batch with texts of these lengths, so many masked tokens in each, and these labels of image-text matching."""
    generator = torch.Generator().manual_seed(seed)
    config, B = model.config, len(lengths)
    size, dtype = config.vision.image_size_px, model.image_proj.weight.dtype
    ids = torch.randint(4, VOCAB, (B, max(lengths)), generator=generator)
    is_padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(is_padding, config.text.pad_token_id)
    mlm_labels = torch.full_like(ids, -100)
    for b, (length, count) in enumerate(zip(lengths, num_masked, strict=True)):
        chosen = torch.randperm(length, generator=generator)[:count]
        mlm_labels[b, chosen] = ids[b, chosen]
    labels = torch.tensor(labels)

    def images(count):
        return torch.randn(count, 3, size, size, generator=generator, dtype=dtype)

    return PretrainBatch(
        image_BCHW=images(B), text_ids_BT=ids, is_padding_BT=is_padding,
        texts=[""] * B, item_ids=[""] * B, bad_samples=[],
        mlm_ids_BT=ids.where(mlm_labels == -100, 3), mlm_labels_BT=mlm_labels,
        itm_labels_B=labels, false_image_FCHW=images(int((labels == 0).sum())),
        patch_noise_BN=torch.rand(B, (size // config.vision.patch_size_px) ** 2, generator=generator),
    )  # fmt: skip


def draw(seed):
    """A random configuration and batch."""
    rng = random.Random(seed)
    num_layers = rng.randint(1, 4)
    config = small_config(
        text=rng.choice(["roberta", "bert"]),
        objectives=rng.choice(SUBSETS),
        vision_config=VisionConfig(image_size_px=48, patch_size_px=16, width=64, num_blocks=rng.randint(1, 2)),
    )
    fusion = dataclasses.replace(config.fusion, num_layers=num_layers)
    read = {"layer": rng.randint(-1, num_layers - 1), "patch_frac": rng.choice([0.3, 0.75, 0.95])}
    torch.manual_seed(seed)
    model = M3AE(dataclasses.replace(config, fusion=fusion, mim=dataclasses.replace(config.mim, **read))).double()
    lengths = [rng.randint(2, 11) for _ in range(rng.randint(1, 5))]
    num_masked = [rng.randint(0, length) for length in lengths]
    return model, make_batch(model, lengths, num_masked, [rng.randint(0, 1) for _ in lengths], seed)


@pytest.mark.parametrize("seed", range(40))
def test_any_batch_of_any_model(seed):
    model, batch = draw(seed)
    of_losses, of_gradients = differences(model, batch)
    assert of_losses < 1e-9 and of_gradients < 1e-9


@pytest.mark.parametrize(("num_layers", "layer"), [(6, 3), (6, 1), (6, 5), (4, 2), (3, 0), (3, -1)])
def test_equals_the_yardstick(num_layers, layer):
    config = small_config()
    fusion, mim = (
        dataclasses.replace(config.fusion, num_layers=num_layers),
        dataclasses.replace(config.mim, layer=layer),
    )
    torch.manual_seed(0)
    model = M3AE(dataclasses.replace(config, fusion=fusion, mim=mim)).double()
    batch = make_batch(model, [9, 2, 5, 7], [3, 1, 0, 2], [1, 0, 0, 1])
    of_losses, of_gradients = differences(model, batch, yardstick)
    assert of_losses < 1e-9 and of_gradients < 1e-9
    of_losses, of_gradients = differences(model.float(), to_float32(batch), yardstick)
    assert of_losses < 1e-5 and of_gradients < 1e-5


def to_float32(batch):
    return dataclasses.replace(
        batch, image_BCHW=batch.image_BCHW.float(), false_image_FCHW=batch.false_image_FCHW.float()
    )


@pytest.mark.parametrize(
    ("lengths", "num_masked", "labels"),
    [
        ([2, 2], [0, 0], [1, 0]),
        ([2, 30], [2, 30], [0, 1]),
        ([4, 5, 6], [1, 1, 1], [1, 1, 1]),
        ([4, 5, 6], [1, 1, 1], [0, 0, 0]),
        ([7], [2], [0]),
        ([7, 7, 7, 7], [1, 2, 3, 4], [0, 1, 0, 1]),
    ],
    ids=["nothing_masked", "everything_masked", "no_negative", "all_negative", "one_pair", "equal_lengths"],
)
def test_extreme_batches(lengths, num_masked, labels):
    model = small_model()
    of_losses, of_gradients = differences(model, make_batch(model, lengths, num_masked, labels))
    assert of_losses < 1e-9 and of_gradients < 1e-9


@pytest.mark.parametrize("objective", ["vqa", "classification", "retrieval"])
def test_fine_tuning_heads(objective):
    model = small_model(objectives=(objective,))
    of_losses, of_gradients = differences(model, small_batch(model, objective))
    assert of_losses < 1e-9 and of_gradients < 1e-9


def test_swin():
    model = small_model("swin", objectives=("mlm", "itm"))
    of_losses, of_gradients = differences(model, small_batch(model, "mlm"))
    assert of_losses < 1e-9 and of_gradients < 1e-9


def test_metrics_are_the_same():
    model = small_model().eval()
    batch = small_batch(model, "mlm")
    got, want = (objectives.losses(model(batch, step=name), batch, model.config) for name in ("packed", "original"))
    assert {name: loss.sums for name, loss in got.items()} == {name: loss.sums for name, loss in want.items()}


@pytest.mark.parametrize("objective", PRETRAINING)
def test_dropout_draws_from_the_same_distribution(objective):
    """The mean loss over many draws lies within its confidence interval of the original's (five standard errors)."""
    model = small_model(objectives=(objective,), dropout_frac=0.3, dtype=torch.float32).train()
    batch = to_float32(make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1]))
    torch.manual_seed(1)
    samples = {}
    with torch.no_grad():
        for name in ("packed", "original"):
            samples[name] = np.array([step(name)(model, batch)[objective].item() for _ in range(200)])
    error = np.sqrt(sum(values.var(ddof=1) / len(values) for values in samples.values()))
    assert min(values.std() for values in samples.values()) > 0
    assert abs(samples["packed"].mean() - samples["original"].mean()) < 5 * error
    # Dropout in fewer places would make the losses vary less.
    assert 0.7 < samples["packed"].std() / samples["original"].std() < 1.4


def test_training_encodes_the_text_of_each_objective(monkeypatch):
    """With dropout the unmasked texts of MIM and ITM are two encodings; without it, or as an option, they are one."""
    model = small_model(dropout_frac=0.1)
    batch = small_batch(model, "mlm")
    seen, encode_texts = [], packed.encode_texts

    def encode(text, plan, run):
        seen.append(len(plan.texts))
        return encode_texts(text, plan, run)

    monkeypatch.setattr(packed_step, "encode_texts", encode)
    model.train()(batch)
    model(batch, share_texts=True)
    model.eval()(batch)
    assert seen == [3, 2, 2]


def test_only_images_that_a_loss_sees_are_encoded():
    counts = []
    model = small_model(objectives=("itm",))
    model.vision.patch_embed.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    batch = make_batch(model, [4, 5, 6, 7], [1, 1, 1, 1], [1, 0, 0, 1])
    model(batch)
    model = small_model(objectives=("mim",))
    model.vision.patch_embed.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    model(make_batch(model, [4, 5], [1, 1], [1, 0]))
    assert counts == [4]  # two true, two false images; and for MIM the visible patches alone, not by this module


MUTATIONS = {
    "text positions off by one": (packed, "_positions", lambda f: lambda text, ids: f(text, ids) + 1),
    "ITM with the wrong images": (
        reads,
        "_itm_reads",
        lambda f: (
            lambda batch, config: (
                lambda r: dataclasses.replace(
                    r, images=dataclasses.replace(r.images, index=r.images.index[::-1].copy())
                )
            )(f(batch, config))
        ),
    ),
    "another sample's hidden patches": (
        M3AE,
        "mim_outputs_of_hidden",
        lambda f: lambda model, image, restore: f(model, image, restore.roll(1, 0)),
    ),
    "MIM's text rows missing in the image's cross-attention": (
        packed,
        "co_attend",
        lambda f: (
            lambda layer, x, other, stream: f(
                layer, x, other * (torch.arange(len(other)) < len(other) - 5)[:, None], stream
            )
        ),
    ),
}


@pytest.mark.parametrize(("where", "name", "mutate"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_the_comparison_sees_a_fault(where, name, mutate, monkeypatch):
    model = small_model()
    batch = make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1])
    mutated = mutate(getattr(where, name))
    monkeypatch.setattr(where, name, mutated)
    if name == "_itm_reads":
        table = {**reads.OBJECTIVES, "itm": dataclasses.replace(reads.OBJECTIVES["itm"], reads=mutated)}
        monkeypatch.setattr(packed_step, "OBJECTIVES", table)
    of_losses, _ = differences(model, batch)
    assert of_losses > 1e-6


def test_a_gap_in_a_text_is_refused():
    model = small_model()
    batch = small_batch(model, "mlm")
    is_padding = batch.is_padding_BT.clone()
    is_padding[0, 1] = True
    with pytest.raises(ValueError, match="is_padding must be False at all tokens of a text and True behind its last"):
        dataclasses.replace(batch, is_padding_BT=is_padding, num_tokens_B=None)


def test_checkpointed_activations_change_nothing():
    model = small_model(dropout_frac=0.1)
    batch = make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1])
    results = []
    for options in ({}, {"checkpoint_activations": True}):
        torch.manual_seed(0)

        def losses(model, batch, options=options):
            found = objectives.losses(model(batch, **options), batch, model.config)
            return {name: loss.mean for name, loss in found.items()}

        results.append(run(model, batch, losses))
    (plain, plain_gradients), (checkpointed, gradients) = results
    assert plain == checkpointed and plain_gradients.keys() == gradients.keys()
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in gradients)


def test_negatives_of_the_batch_are_not_encoded_again():
    model = small_model()
    batch = make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1])
    other = torch.tensor([0, 3, 1, 3])
    of_batch = dataclasses.replace(
        batch, false_image_FCHW=batch.false_image_FCHW[:0], itm_index_B=other, itm_rows_B=None
    )
    as_false = dataclasses.replace(batch, false_image_FCHW=batch.image_BCHW[other[1:3]])
    counts = []
    model.vision.patch_embed.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    (got, gradients), (want, want_gradients) = (run(model, b, step("packed")) for b in (of_batch, as_false))
    assert counts == [4, 6]
    assert all(abs(got[name] - want[name]) < 1e-12 for name in want)
    assert all((gradients[name] - want_gradients[name]).abs().max() < 1e-12 for name in want_gradients)
    assert max(differences(model, of_batch)) < 1e-9


def test_one_graph_for_batches_of_any_shape():
    """``torch.compile`` takes the whole step without a break, and stops compiling when it has seen a few shapes."""
    model = small_model(dropout_frac=0.1, dtype=torch.float32)
    backend = CountingBackend()
    compiled = torch.compile(packed_step.compute, fullgraph=True, backend=backend)
    for seed in range(6):
        batch = to_float32(make_batch(model, [9, 2 + seed, 5, 7], [3, 1, 1 + seed % 2, 2], [1, 0, 0, 1], seed))
        plan = packed_step.plan_batch(model, batch)
        plan.send(torch.device("cpu"))
        losses = []
        for function in (compiled, packed_step.compute):
            torch.manual_seed(seed)
            outputs = function(model, batch, plan)
            losses.append(objectives.total(objectives.losses(outputs, batch, model.config)))
        assert torch.equal(*losses)
    assert backend.num_graphs <= 3


@pytest.mark.parametrize("option", ["share_texts", "checkpoint_activations", "compiled"])
def test_options_of_the_packed_step_are_refused_with_the_other(option):
    with pytest.raises(UserError, match=f"train.{option} is an option of train.step packed only"):
        TrainConfig(step="original", **{option: True})
    assert PretrainConfig(train=TrainConfig(**{option: True})).step_options()[option]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_device(compiled):
    model = small_gpu_model()
    batch = to_float32(make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1])).to("cuda")
    for _ in range(2):  # what is compiled may wait
        objectives.total(objectives.losses(model(batch, compiled=compiled), batch, model.config)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objectives.total(objectives.losses(model(batch, compiled=compiled), batch, model.config)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_equals_the_original_on_a_gpu():
    model = small_gpu_model()
    batch = to_float32(make_batch(model, [9, 2, 5, 7], [3, 1, 1, 2], [1, 0, 0, 1]))
    of_losses, of_gradients = differences(model, batch.to("cuda"))
    assert of_losses < 1e-4 and of_gradients < 1e-3
