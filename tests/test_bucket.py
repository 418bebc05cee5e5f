"""A batch in a bucket: the same losses and gradients, and one shape for all batches that fit."""

import random

import pytest
import torch
from models import small_model
from test_packed_step import PRETRAINING, SUBSETS, draw, make_batch, run

from fastm3ae import objectives
from fastm3ae.model import packed_step
from fastm3ae.model.bucket import Sizes, fill_batch


def bucket_of(model, batch, smaller=None):
    return Sizes.of(packed_step.batch_reads(model, batch), batch).bucket(batch.text_ids_BT.shape[1], smaller)


def plan_in(model, batch, bucket):
    plan = packed_step.plan_batch(model, batch, bucket=bucket)
    plan.send(torch.device("cpu"))
    return plan


def in_bucket(bucket):
    def losses(model, batch):
        outputs = packed_step.compute(model, fill_batch(batch, bucket), plan_in(model, batch, bucket))
        found = objectives.losses(outputs, batch, model.config)
        return {objective: loss.mean for objective, loss in found.items()}

    return losses


def packed(model, batch):
    return {name: loss.mean for name, loss in objectives.losses(model(batch), batch, model.config).items()}


@pytest.mark.parametrize("seed", range(25))
def test_a_bucket_changes_no_loss_and_no_gradient(seed):
    model, batch = draw(seed)
    bucket = bucket_of(model, batch)
    bucket = Sizes(bucket.tokens, bucket.rows, bucket.false_images + seed % 2)
    want, want_gradients = run(model, batch, packed)
    got, gradients = run(model, batch, in_bucket(bucket))
    assert got.keys() == want.keys() and gradients.keys() == want_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in want_gradients.values()) or 1
    assert all(abs(got[name] - want[name]) < 1e-12 * max(1, abs(want[name])) for name in want)
    assert all((gradients[n] - want_gradients[n]).abs().max() < 1e-12 * scale for n in want_gradients)


@pytest.mark.parametrize("names", SUBSETS)
def test_all_batches_of_a_bucket_have_one_shape(names):
    model = small_model(objectives=names)
    rng = random.Random(0)

    def some_batch(seed):
        lengths = [rng.randint(2, 11) for _ in range(7)] + [12]
        return make_batch(
            model, lengths, [rng.randint(0, n // 2) for n in lengths], [rng.randint(0, 1) for _ in lengths], seed
        )

    batches = [some_batch(seed) for seed in range(12)]
    bucket = None
    for batch in batches:
        bucket = bucket_of(model, batch, bucket)
    sizes = [Sizes.of(packed_step.batch_reads(model, batch), batch) for batch in batches]
    assert all(of_batch.fit(bucket, 12) for of_batch in sizes) and len({str(of_batch) for of_batch in sizes}) > 1
    plans = [plan_in(model, batch, bucket) for batch in batches]
    assert len({plan.shape for plan in plans}) == 1
    free = {packed_step.plan_batch(model, batch).shape for batch in batches}
    assert len(free) > 1 or names == ("mim",)
    filled = [fill_batch(batch, bucket) for batch in batches]
    assert len({tuple(batch.false_image_FCHW.shape) for batch in filled}) == 1
    assert names == ("mim",) or "mlm" not in names or len({len(batch.masked_labels_M) for batch in filled}) == 1


def test_a_batch_that_does_not_fit_gets_a_larger_bucket():
    model = small_model()
    small, large = (make_batch(model, lengths, [1] * 4, [1, 0, 0, 1]) for lengths in ([3] * 4, [30, 3, 3, 30]))
    bucket = bucket_of(model, small)
    sizes = Sizes.of(packed_step.batch_reads(model, large), large)
    assert not sizes.fit(bucket, 30)
    larger = sizes.bucket(30, bucket)
    assert sizes.fit(larger, 30)
    assert all(larger.tokens[name] >= bucket.tokens[name] for name in PRETRAINING)
    assert larger.rows["mlm"] >= bucket.rows["mlm"] and larger.false_images >= bucket.false_images


@pytest.mark.parametrize("num_tokens", [2, 3, 64])
@pytest.mark.parametrize("total", [0, 1, 17, 256, 100_000])
def test_every_size_gets_a_bucket(num_tokens, total):
    sizes = Sizes({"mlm": total}, {"mlm": total // 7}, 3)
    assert sizes.fit(sizes.bucket(num_tokens), num_tokens)
