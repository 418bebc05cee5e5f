"""Balanced parts of a batch: only who computes what depends on them, and none has much more to do than others."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import TOKENIZER, pretrain_batches
from tasks_data import write_captions, write_vqa

from fastm3ae.data import collate_pairs
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.balance import Work, divide
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import RetrievalBatches, VqaBatches
from fastm3ae.data.datasets import PairDataset, VqaDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.loader import Loader, Place

ROOT = Path(__file__).parents[1]


def random_work(seed, num_pairs, num_images=None):
    """Half of the pairs with a false image; texts of captions' lengths, of which many are cut at the same one."""
    rng = np.random.default_rng(seed)
    text_bytes = np.minimum(rng.gamma(3, 45, size=num_pairs).round(), 200)
    images = None if num_images is None else rng.integers(num_images, size=num_pairs)
    return Work((rng.permutation(num_pairs) >= num_pairs // 2).astype(np.int64), text_bytes, images)


@pytest.mark.parametrize("num_pairs", [0, 1, 2, 7, 32, 257])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [None, 1, 5, 100])
def test_parts_hold_every_pair_once_in_its_order(num_pairs, num_parts, num_images):
    pairs = np.random.default_rng(0).permutation(300)[:num_pairs]
    pairs.sort()
    parts = divide(pairs.tolist(), num_parts, random_work(1, 300, num_images))
    assert len(parts) == num_parts and sorted(sum(parts, [])) == pairs.tolist()
    assert all(part == sorted(part) for part in parts)
    # The sizes are those of consecutive pairs: how many passes a process makes does not depend on the work.
    assert list(map(len, parts)) == list(map(len, divide(pairs.tolist(), num_parts)))


@pytest.mark.parametrize(("num_pairs", "num_parts"), [(64, 2), (256, 8), (2048, 64), (256, 6), (256, 24), (100, 7)])
def test_parts_have_as_much_of_everything(num_pairs, num_parts):
    for seed in range(20):
        work = random_work(seed, num_pairs)
        parts, consecutive = divide(range(num_pairs), num_parts, work), divide(range(num_pairs), num_parts)
        images, text = work.further_images_B, work.text_bytes_B
        num_further = [images[part].sum() for part in parts]
        assert max(num_further) - min(num_further) <= 1
        # Whatever a false image costs beside a byte, the fullest part has less than that of consecutive pairs.
        for image in (0, 30, 300, 3000):
            cost = image * images + text
            assert max(cost[part].sum() for part in parts) <= max(cost[part].sum() for part in consecutive)
        if num_pairs % num_parts == 0:
            bytes_of_parts = [text[part].sum() for part in parts]
            assert max(bytes_of_parts) - min(bytes_of_parts) <= 0.1 * np.mean(bytes_of_parts)


def test_what_cannot_be_divided_goes_to_parts_with_fewer_pairs():
    work = Work(np.array([1] * 11 + [0] * 10), np.full(21, 100))
    parts = divide(range(21), 2, work)  # of 10 and 11 pairs
    assert [work.further_images_B[part].sum() for part in parts] == [6, 5]


def test_pairs_of_an_image_stay_together():
    images = np.array([7, 1, 7, 2, 7, 3, 4, 7])
    parts = divide(range(8), 2, Work(np.zeros(8, np.int64), np.full(8, 10), images))
    assert parts == [[0, 2, 4, 7], [1, 3, 5, 6]]
    # What is too much for a part goes where there is room.
    images = np.array([0, 0, 0, 0, 0, 1, 2, 3, 4])
    parts = divide(range(9), 3, Work(np.zeros(9, np.int64), np.full(9, 10), images))
    assert parts[0] == [0, 1, 2] and [images[part].tolist().count(0) for part in parts] == [3, 1, 1]


@pytest.mark.parametrize(("num_pairs", "num_parts", "num_images"), [(64, 4, 315), (256, 8, 315), (64, 8, 40)])
def test_fewer_images_are_encoded(num_pairs, num_parts, num_images):
    for seed in range(20):
        work = random_work(seed, num_pairs, num_images)
        balanced, consecutive = (
            [len(set(work.image_B[part])) for part in divide(range(num_pairs), num_parts, each)]
            for each in (work, None)
        )
        assert sum(balanced) < sum(consecutive) and max(balanced) <= max(consecutive)
        assert sum(balanced) <= len(set(work.image_B)) + num_parts - 1  # hardly one is torn apart


def of_every_pair(pieces):
    """What the batches hold of each pair."""
    found = {}
    for piece in pieces:
        false_images = iter(piece.false_image_FCHW)
        for row, pair in enumerate(piece.pairs):
            num_tokens = piece.num_tokens_B[row]
            rows = [x[row, :num_tokens] for x in (piece.text_ids_BT, piece.mlm_ids_BT, piece.mlm_labels_BT)]
            is_false = piece.itm_labels_B[row] == 0
            rows += [piece.image_BCHW[row], piece.patch_noise_BN[row], next(false_images) if is_false else is_false]
            assert pair not in found
            found[pair] = rows
    return found


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 5), (2, None), (3, 2)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_masks_and_draws_do_not_depend_on_the_division(corpus, num_ranks, micro_batch, num_workers):
    """Texts, masks, labels, noise, augmented and false images of every pair are those of the whole batch."""
    options = {"batch_size": 16, "is_training": True, "seed": 3, "num_workers": num_workers}
    batches = pretrain_batches(corpus, "clip_randaug")
    whole = list(Loader(batches, **options).epoch(1))
    places = [Place(micro_batch=micro_batch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    of_ranks = [list(Loader(batches, place=place, **options).epoch(1)) for place in places]
    assert len(whole) == 2
    for (joined,), *shares in zip(whole, *of_ranks, strict=True):
        pieces = [piece for share in shares for piece in share]
        for piece in pieces:
            places_in_batch = [joined.pairs.index(pair) for pair in piece.pairs]
            assert places_in_batch == sorted(places_in_batch)
        assert max(map(len, pieces)) <= (micro_batch or 8)
        num_false = [sum(len(piece.false_image_FCHW) for piece in share) for share in shares]
        assert sum(num_false) == 8 and max(num_false) - min(num_false) <= 1
        got, want = of_every_pair(pieces), of_every_pair([joined])
        assert got.keys() == want.keys()
        assert all(torch.equal(x, y) for pair in want for x, y in zip(got[pair], want[pair], strict=True))


def test_a_division_reads_no_image_and_no_text(corpus, monkeypatch):
    batches = pretrain_batches(corpus)
    for name in ("row", "image_bytes", "column"):
        monkeypatch.delattr(ArrowTable, name)
    monkeypatch.delattr(collate_pairs, "encode")
    pairs = [30, 2, 5, 8, 11, 14]
    work = batches.work(BatchRequest(0, 0, pairs))
    monkeypatch.undo()
    texts = [batches.dataset.text(pair).encode() for pair in pairs]
    assert work.text_bytes_B.tolist() == [min(len(text), 32 * 4.2) for text in texts]
    assert work.image_B is None and len(Place(num_ranks=2).pieces(6, True, work)[0]) == 3
    labels = batches[BatchRequest(0, 0, pairs)].itm_labels_B
    assert work.further_images_B.tolist() == (1 - labels).tolist()


@pytest.mark.parametrize("false_images", ["batch", None])
def test_false_images_that_cost_nothing_are_not_dealt(corpus, false_images):
    batches = pretrain_batches(corpus, false_images=false_images)
    work = batches.work(BatchRequest(0, 0, list(range(12))))
    assert not work.further_images_B.any() and len(set(work.text_bytes_B)) > 5


def test_false_images_of_a_pass_are_its_own(corpus):
    batches = pretrain_batches(corpus, false_images="batch")
    request = BatchRequest(0, 0, list(range(12)))
    for part in divide(range(12), 3, batches.work(request)):
        piece = batches[BatchRequest(0, 0, request.pairs, part)]
        is_false, own = piece.itm_labels_B == 0, torch.arange(4)
        assert piece.pairs == part and ((piece.itm_index_B >= 0) & (piece.itm_index_B < 4)).all()
        assert torch.equal(piece.itm_index_B == own, ~is_false)


def test_questions_and_retrieval(tmp_path):
    questions = VqaDataset([write_vqa(tmp_path) / "vqa_made_train.arrow"])
    request, transform = BatchRequest(0, 0, list(range(24))), make_transform("clip", 16)
    shared, own = (
        VqaBatches(questions, TOKENIZER, transform, max_text_tokens=24, shares_images=shares).work(request)
        for shares in (True, False)
    )
    assert shared.image_B.tolist() == [pair // 2 for pair in range(24)] and own.image_B is None
    for rank in range(4):
        (piece,) = Place(rank=rank, num_ranks=4).pieces(24, True, shared)
        assert len(set(shared.image_B[piece])) == 3
    captions = PairDataset([write_captions(tmp_path) / "irtr_made_train.arrow"])
    made = RetrievalBatches(captions, TOKENIZER, transform, max_text_tokens=24, num_false_texts=3)
    assert made.work(BatchRequest(0, 0, list(range(8)))) is None


def test_validation_is_not_dealt(corpus):
    """Its pieces are the same for any number of processes."""
    batches = pretrain_batches(corpus)

    def pieces(num_ranks):
        places = [Place(micro_batch=3, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        loaders = [Loader(batches, batch_size=16, is_training=False, place=place) for place in places]
        return sorted(piece.pairs for loader in loaders for found in loader.epoch(0) for piece in found)

    assert pieces(1) == pieces(2) == pieces(5)


@pytest.mark.parametrize("arguments", [["--datasets", "one", "two"], ["--datasets", "one", "--questions", "vqa_made"]])
def test_benchmark(tmp_path, corpus, arguments):
    """With captions of different lengths and with questions; the target is held by the process's exit status."""
    write_vqa(tmp_path)
    tokenizer = ["--tokenizer", str(ROOT / "tests" / "data" / "golden" / "data" / "tok" / "roberta")]
    command = [sys.executable, str(ROOT / "benchmarks" / "balance.py"), "--check", "--root", str(tmp_path)]
    result = subprocess.run(
        [*command, *arguments, *tokenizer], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("24 questions about 12 images" if "--questions" in arguments else "33 pairs with") in result.stdout
