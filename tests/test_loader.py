"""The loader: the same batches whatever the workers do, epochs that can be entered anywhere, no bad sample unsaid."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from corpus import TOKENIZER, assert_equal, caption_rows, pretrain_batches, write_corpus

from fastm3ae.config import DataConfig, M3AEConfig, PretrainConfig, TrainConfig, VisionConfig
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.loader import Loader, pretrain_loader
from fastm3ae.errors import BadSample, UserError


def train_loader(files, transform="clip_randaug", **options):
    return Loader(pretrain_batches(files, transform), **{"batch_size": 5, "is_training": True, "seed": 3} | options)


def batches_of(loader, *epoch):
    """The epoch's batches, of one piece each, or none where no pair can be used."""
    for pieces in loader.epoch(*epoch):
        assert len(pieces) <= 1
        yield from pieces


def digest(batches):
    total = hashlib.sha256()
    for batch in batches:
        for field in fields(batch):
            value = getattr(batch, field.name)
            total.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return total.hexdigest()


def two_epochs(files, num_workers):
    loader = train_loader(files, num_workers=num_workers)
    return digest(batch for epoch in range(2) for batch in batches_of(loader, epoch))


def test_training_visits_every_pair_once_in_a_new_order(corpus):
    loader = train_loader(corpus)
    epochs = [[text for batch in batches_of(loader, epoch) for text in batch.texts] for epoch in range(3)]
    assert len(loader) == 6 and all(len(set(texts)) == 30 for texts in epochs)  # the last 3 of 33 make no batch
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [text for batch in batches_of(train_loader(corpus, seed=4), 0) for text in batch.texts]


def test_validation_is_the_same_each_time(corpus):
    loader = train_loader(corpus, is_training=False)
    first, second = list(batches_of(loader, 0)), list(batches_of(loader, 7))
    assert len(first) == len(loader) == 7
    assert [text for batch in first for text in batch.texts] == [loader.dataset.text(pair) for pair in range(33)]
    for got, want in zip(second, first, strict=True):
        assert_equal(got, want)


def test_workers_do_not_change_the_batches(corpus):
    assert two_epochs(corpus, 0) == two_epochs(corpus, 1) == two_epochs(corpus, 2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_default_generator_is_left_alone(corpus, num_workers):
    before = torch.get_rng_state()  # dropout draws from it
    assert len(list(batches_of(train_loader(corpus, num_workers=num_workers), 0))) == 6
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("hash_seed", "start_method", "num_workers"), [(1, "spawn", 1), (2, "fork", 2)])
def test_neither_hash_seed_nor_start_method_changes_the_batches(corpus, hash_seed, start_method, num_workers):
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no start method {start_method} here")
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, __file__, start_method, str(num_workers), *map(str, corpus)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == two_epochs(corpus, 0)
    assert "huggingface/tokenizers" not in result.stderr  # its warning about forking after use of its threads


@pytest.mark.gpu
def test_batches_for_a_gpu(corpus):
    state = torch.cuda.get_rng_state()
    for num_workers in (0, 1):
        batches = list(batches_of(train_loader(corpus, num_workers=num_workers, pin_memory=True), 0))
        assert all(batch.image_BCHW.is_pinned() and batch.masked_index_M.is_pinned() for batch in batches)
        assert digest(batches) == digest(batches_of(train_loader(corpus), 0))
    assert torch.equal(torch.cuda.get_rng_state(), state)  # dropout draws from it


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_continues_where_it_was_left(corpus, num_workers, decoded):
    loader = train_loader(corpus, num_workers=num_workers)
    whole = list(batches_of(loader, 1))
    assert loader.state() == (1, 6)
    for number, batch in enumerate(batches_of(loader, 1)):
        assert loader.state() == (1, number + 1)
        assert_equal(batch, whole[number])
        if number == 2:
            break
    epoch, first_batch = loader.state()
    resumed = train_loader(corpus, num_workers=num_workers)
    decoded.clear()
    rest = list(batches_of(resumed, epoch, first_batch))
    assert len(rest) == 3
    for got, want in zip(rest, whole[3:], strict=True):
        assert_equal(got, want)
    if num_workers == 0:
        assert len(decoded) == 3 * (5 + 3)  # nothing of the batches before
    assert list(batches_of(resumed, 1, 6)) == []
    # The loader that was left in the middle of an epoch begins the next one as if it had not been.
    assert_equal(next(batches_of(loader, 2)), next(batches_of(resumed, 2)))


def test_bad_sample_stops(tmp_path):
    loader = train_loader(write_corpus(tmp_path, bad=[4]), num_workers=1)
    with pytest.raises(BadSample, match=r"one_train.arrow, row 4 \(image_id 'img/4.png'\): the image cannot be used: "):
        list(batches_of(loader, 0))


def test_bad_samples_are_skipped_and_noted(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    good = train_loader(write_corpus(tmp_path / "good"), batch_size=8)
    bad = train_loader(write_corpus(tmp_path / "bad", bad=[4, 5]), batch_size=8, on_bad_sample="skip", num_workers=1)
    num_noted = num_false_bad = 0
    for got, want in zip(batches_of(bad, 0), batches_of(good, 0), strict=True):
        assert len(got) + len(got.bad_samples) == 8
        kept = [want.texts.index(text) for text in got.texts]
        assert kept == sorted(kept) and not {"img/4.png", "img/5.png"} & set(got.item_ids)
        for name in ("image_BCHW", "mlm_labels_BT", "itm_labels_B", "patch_noise_BN"):
            tensor, expected = getattr(got, name), getattr(want, name)[kept]
            assert torch.equal(tensor, expected[:, : tensor.shape[1]] if name == "mlm_labels_BT" else expected)
        false_of = dict(zip((want.itm_labels_B == 0).nonzero()[:, 0].tolist(), want.false_image_FCHW, strict=True))
        expected = [false_of[index] for index in kept if index in false_of]
        assert torch.equal(got.false_image_FCHW, torch.stack(expected) if expected else want.false_image_FCHW[:0])
        num_noted += len(got.bad_samples)
        num_false_bad += len(got.bad_samples) - sum(
            image_id in ("img/4.png", "img/5.png") for image_id in want.item_ids
        )
    assert num_noted == len(bad.bad_samples) >= 5
    assert num_false_bad >= 1  # a pair is also left out when its false image is the bad one
    assert {(sample.row, sample.image_id) for sample in bad.bad_samples} == {(4, "img/4.png"), (5, "img/5.png")}


def test_a_batch_without_a_good_pair_is_passed_over(tmp_path):
    write_pairs(tmp_path / "a_val.arrow", caption_rows(12, bad=range(2, 12)))  # pairs 0, 1 and 2 are good
    options = {"batch_size": 4, "is_training": False, "on_bad_sample": "skip"}
    loader = Loader(pretrain_batches([tmp_path / "a_val.arrow"], false_images=None), **options)
    (batch,) = batches_of(loader, 0)
    assert len(batch) == 3 and loader.state() == (0, 6) and len(loader.bad_samples) == 21
    assert len(list(batches_of(loader, 1))) == 1 and len(loader.bad_samples) == 21  # counted anew


def test_no_good_pair_at_all(tmp_path):
    write_pairs(tmp_path / "a_val.arrow", caption_rows(3, bad=range(3)))
    options = {"batch_size": 4, "is_training": False, "on_bad_sample": "skip"}
    with pytest.raises(UserError, match=r"Not one pair can be used; the first of 6: .*a_val.arrow, row 0"):
        list(batches_of(Loader(pretrain_batches([tmp_path / "a_val.arrow"]), **options), 0))


def test_fewer_pairs_than_a_batch(corpus):
    with pytest.raises(UserError, match="A batch needs 34 pairs, but there are only 33"):
        train_loader(corpus, batch_size=34)
    assert len(train_loader(corpus, batch_size=34, is_training=False)) == 1


def test_loader_of_a_configuration(tmp_path):
    write_corpus(tmp_path)
    write_pairs(tmp_path / "one_val.arrow", caption_rows(2))
    config = PretrainConfig(
        model=M3AEConfig(vision=VisionConfig(image_size_px=32, patch_size_px=16)),
        data=DataConfig(root=str(tmp_path), datasets=("one", "two"), max_text_tokens=16),
        train=TrainConfig(batch_size=6, num_workers=0, device="cpu"),
    )
    batch = next(batches_of(pretrain_loader(config, TOKENIZER, "train"), 0))
    assert batch.image_BCHW.shape == (6, 3, 32, 32) and batch.patch_noise_BN.shape == (6, 4)
    assert batch.text_ids_BT.shape == (6, 16) and len(batch.false_image_FCHW) == 3
    with pytest.raises(UserError, match="two_val.arrow"):
        pretrain_loader(config, TOKENIZER, "val")
    config = replace(config, data=replace(config.data, datasets=("one",)), model=M3AEConfig(objectives=("mlm",)))
    batch = next(batches_of(pretrain_loader(config, TOKENIZER, "val"), 0))
    assert len(batch) == 3 and batch.patch_noise_BN.shape == (3, 0) and len(batch.false_image_FCHW) == 0


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    print(two_epochs([Path(name) for name in sys.argv[3:]], int(sys.argv[2])))
