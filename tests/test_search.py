"""Retrieval over a data set: every image with every text, recall both ways, ties, bad images, blocks, preselection."""

import dataclasses
import itertools
from math import comb

import mpma_models
import numpy as np
import pytest
import torch
from corpus import TOKENIZER, caption_rows, png, write_corpus
from models import small_config
from test_pair_scores import one_at_a_time

from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.batch import PretrainBatch
from fastm3ae.data.datasets import PairDataset
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import encode
from fastm3ae.errors import BadSample, UserError
from fastm3ae.model import embed
from fastm3ae.model.m3ae import M3AE
from fastm3ae.model.mpma import MPMA
from fastm3ae.tasks import search
from fastm3ae.tasks.pool import ReadyModel
from fastm3ae.tasks.recall import hits
from fastm3ae.tasks.search import Preselection, Retrieval, retrieve

MAX_TOKENS = 12


def make_ready(config, kind):
    text = dataclasses.replace(config.text, vocab_size=len(TOKENIZER), pad_token_id=TOKENIZER.pad_token_id)
    vision = dataclasses.replace(config.vision, image_size_px=32)
    torch.manual_seed(0)
    model = kind(dataclasses.replace(config, text=text, vision=vision, init_std=0.1))
    return ReadyModel(model=model, tokenizer=TOKENIZER, transform="clip", max_text_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def m3ae():
    return make_ready(small_config(text="bert", objectives=("retrieval",), dropout_frac=0.1), M3AE)


@pytest.fixture(scope="module")
def mpma():
    return make_ready(mpma_models.small_config(dropout_frac=0.1), MPMA)


@pytest.fixture
def dataset(tmp_path):
    """Six images, with 1, 2, 3, 1, 2 and 3 texts."""
    return open_pairs(tmp_path / "some_val.arrow", 6)


def open_pairs(file, num_images, bad=()):
    write_pairs(file, caption_rows(num_images, bad=bad))
    return PairDataset([file])


def inputs(ready, dataset):
    """Images and padded texts, each once, in the files' order."""
    mean, std = normalization(ready.transform)
    transform = make_transform(ready.transform, ready.model.config.image_size_px)
    firsts = np.unique(dataset.row, return_index=True)[1]
    image_BCHW = normalize(torch.stack([transform(dataset.image(pair)) for pair in firsts]), mean, std)
    ids = [encode(TOKENIZER, dataset.text(pair), MAX_TOKENS).ids for pair in range(len(dataset))]
    ids_BT = torch.full((len(ids), max(map(len, ids))), TOKENIZER.pad_token_id)
    is_padding_BT = torch.ones(ids_BT.shape, dtype=torch.bool)
    for row, of_text in enumerate(ids):
        ids_BT[row, : len(of_text)], is_padding_BT[row, : len(of_text)] = torch.tensor(of_text), False
    return image_BCHW, ids_BT, is_padding_BT


# Recall


def test_hits_without_ties():
    assert hits(np.array([0.1, 0.9, 0.5, 0.7]), np.array([0, 2]), (1, 2, 3, 10)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("scores", "own"),
    [
        ([1, 1, 1, 1, 1], [3]),
        ([1, 1, 1, 1, 1], [0, 4]),
        ([2, 1, 1, 0, 1], [1]),
        ([2, 1, 1, 1, 0], [2, 4]),
        ([-np.inf, -np.inf, 3, -np.inf, 2], [0]),
    ],
)
def test_equal_scores_are_put_in_order_by_lot(scores, own):
    """The probability is counted over all orders of the candidates."""
    orders = [sorted(order, key=lambda c: -scores[c]) for order in itertools.permutations(range(5))]
    want = [np.mean([bool(set(order[:k]) & set(own)) for order in orders]) for k in range(1, 7)]
    assert hits(np.array(scores, np.float32), np.array(own), range(1, 7)) == pytest.approx(want)


def made(scores_IT, image_of_text_T):
    return Retrieval(
        scores_IT=np.array(scores_IT, np.float32),
        image_of_text_T=np.array(image_of_text_T),
        image_ids=[""] * len(scores_IT),
        texts=[""] * len(image_of_text_T),
        is_exact=True,
        bad_samples=[],
        ids_without_text=[],
    )


def test_recall_by_hand():
    # Image 0 has the texts 0 and 3, image 1 the text 1, image 2 the text 2.
    found = made([[3, 9, 1, 8], [2, 1, 5, 6], [4, 0, 7, 5]], [0, 1, 2, 0])
    assert found.image_hits[1].tolist() == [0, 0, 1] and found.image_hits[5].tolist() == [1, 1, 1]
    assert found.text_hits[1].tolist() == [0, 0, 1, 1]
    at_1 = {"image_to_text_recall_at_1": pytest.approx(1 / 3), "text_to_image_recall_at_1": 0.5}
    further = {f"{way}_recall_at_{k}": 1 for way in ("image_to_text", "text_to_image") for k in (5, 10)}
    assert found.recall() == at_1 | further


def test_recall_is_the_originals():
    """``compute_irtr_recall``: the images of the k best texts, and the k best images."""
    rng = np.random.default_rng(0)
    image_of_text = rng.permutation(np.concatenate([np.arange(20), rng.integers(0, 20, 30)]))
    scores = torch.from_numpy(rng.normal(size=(20, 50)).astype(np.float32))
    images, texts = torch.arange(20), torch.from_numpy(image_of_text)
    scores[texts, torch.arange(50)] += 1
    recall = made(scores.tolist(), image_of_text).recall()
    for k in (1, 5, 10):
        of_images = texts[scores.topk(k, dim=1).indices] == images[:, None]
        of_texts = images[scores.topk(k, dim=0).indices] == texts[None]
        assert recall[f"image_to_text_recall_at_{k}"] == pytest.approx(of_images.any(dim=1).double().mean().item())
        assert recall[f"text_to_image_recall_at_{k}"] == pytest.approx(of_texts.any(dim=0).double().mean().item())
    assert 0.1 < recall["image_to_text_recall_at_1"] < 0.9


def test_a_constant_score_gives_chance():
    recall = made(np.zeros((20, 40)), np.repeat(np.arange(20), 2)).recall()
    for k in (1, 5, 10):
        assert recall[f"image_to_text_recall_at_{k}"] == pytest.approx(1 - comb(38, k) / comb(40, k))
        assert recall[f"text_to_image_recall_at_{k}"] == pytest.approx(k / 20)


# M3AE


def test_all_pairs_of_a_data_set(m3ae, dataset):
    told = []
    m3ae.model.train()
    found = retrieve(m3ae, dataset, pairs_per_pass=5, progress=lambda *numbers: told.append(numbers))
    assert m3ae.model.training  # left as it was
    want = one_at_a_time(m3ae.model.eval(), *inputs(m3ae, dataset))
    assert found.scores_IT.dtype == np.float32 and np.abs(found.scores_IT - want.numpy()).max() < 1e-5
    assert want.std() > 0.02
    assert found.image_of_text_T.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5]
    assert found.image_ids == [f"img/{i}.png" for i in range(6)]
    assert found.texts == [dataset.text(pair) for pair in range(12)]
    assert found.is_exact and not found.bad_samples and not found.ids_without_text
    assert told[0] == (5, 72) and told[-1] == (72, 72)
    assert set(found.image_hits) == {1, 5, 10} and found.image_hits[1].shape == (6,)
    assert found.text_hits[5].shape == (12,)


def test_blocks_change_nothing(m3ae, dataset, monkeypatch):
    """Images are encoded once, texts once, or with little memory once for each block of images."""
    encoded = {"encode_images": [], "encode_texts": []}
    for name, calls in encoded.items():
        real = getattr(search.PairScorer, name)

        def encode_and_note(self, first, *more, calls=calls, real=real):
            calls.append(len(first))
            return real(self, first, *more)

        monkeypatch.setattr(search.PairScorer, name, encode_and_note)
    whole = retrieve(m3ae, dataset)
    assert encoded == {"encode_images": [6], "encode_texts": [12]}
    monkeypatch.setattr(search.PairScorer, "bytes_per_token", 2**20 // (2 * 24))  # 24 tokens of each side
    blocks = retrieve(m3ae, dataset, cache_mib=1)
    assert np.abs(blocks.scores_IT - whole.scores_IT).max() < 1e-6
    assert encoded["encode_images"][1:] == [4, 2] and sum(encoded["encode_texts"][1:]) == 2 * 12
    assert len(encoded["encode_texts"]) > 5


@pytest.mark.parametrize(
    ("num_tokens", "most", "want"),
    [([3, 3, 3], 6, [2, 1]), ([3, 3, 3], 2, [1, 1, 1]), ([1, 9, 1, 1], 4, [1, 1, 2]), ([2, 2], 4, [2])],
)
def test_blocks_hold_what_fits(num_tokens, most, want):
    blocks = search._blocks(np.array(num_tokens), most)
    assert list(map(len, blocks)) == want
    assert [number for block in blocks for number in block] == list(range(len(num_tokens)))


def test_only_the_first_images(m3ae, dataset):
    whole, found = retrieve(m3ae, dataset), retrieve(m3ae, dataset, max_images=3)
    assert found.scores_IT.shape == (3, 6) and found.image_of_text_T.tolist() == [0, 1, 1, 2, 2, 2]
    assert np.abs(found.scores_IT - whole.scores_IT[:3, :6]).max() < 1e-6


def test_several_files_and_an_image_without_text(m3ae, tmp_path):
    files = write_corpus(tmp_path)
    write_pairs(tmp_path / "bare.arrow", [{"image": png(9), "caption": [], "image_id": "bare", "split": "train"}])
    found = retrieve(m3ae, PairDataset([files[1], tmp_path / "bare.arrow", files[0]]))
    assert found.scores_IT.shape == (17, 33) and found.ids_without_text == ["bare"]
    assert found.image_ids[4:6] == ["img/104.png", "img/0.png"]


def test_bad_images_stop_or_are_named(m3ae, tmp_path, monkeypatch):
    dataset = open_pairs(tmp_path / "some_val.arrow", 6, bad=(1, 4))
    with pytest.raises(BadSample, match=r"row 1 \(image_id 'img/1.png'\)"):
        retrieve(m3ae, dataset)
    whole = retrieve(m3ae, open_pairs(tmp_path / "good_val.arrow", 6))
    is_good_T = np.isin(whole.image_of_text_T, [0, 2, 3, 5])
    for bytes_per_token in (1, 2**30):  # in one block with the good ones, and in a block of its own
        told = []
        monkeypatch.setattr(search.PairScorer, "bytes_per_token", bytes_per_token)
        found = retrieve(m3ae, dataset, on_bad_sample="skip", progress=lambda *numbers, told=told: told.append(numbers))
        assert [bad.image_id for bad in found.bad_samples] == ["img/1.png", "img/4.png"]
        assert found.image_ids == ["img/0.png", "img/2.png", "img/3.png", "img/5.png"]
        assert found.image_of_text_T.tolist() == [0, 1, 1, 1, 2, 3, 3, 3] and len(found.texts) == 8
        assert np.abs(found.scores_IT - whole.scores_IT[[0, 2, 3, 5]][:, is_good_T]).max() < 1e-6
        assert told[-1] == (72, 72)


@pytest.mark.parametrize("name", ["m3ae", "mpma"])
def test_without_a_good_image_nothing_is_found(name, tmp_path, request):
    dataset = open_pairs(tmp_path / "none_val.arrow", 3, bad=(0, 1, 2))
    with pytest.raises(UserError, match=r"None of the 3 images can be used; the first: .*none_val.arrow, row 0"):
        retrieve(request.getfixturevalue(name), dataset, on_bad_sample="skip")


def test_a_score_that_is_no_number_is_refused(m3ae, mpma, dataset):
    message = r"The score of the image 'img/0.png' with the text '.*' must be a finite number, got nan"
    for ready, bias in ((m3ae, m3ae.model.retrieval_head.bias), (mpma, mpma.model.global_head.image[2].bias)):
        kept = bias.data.clone()
        bias.data.fill_(torch.nan)
        with pytest.raises(UserError, match=message):
            retrieve(ready, dataset)
        bias.data.copy_(kept)


# MPMA


@torch.no_grad()
def embed_pairs(model, image_BCHW, ids_BT, is_padding_BT):
    num = len(ids_BT)
    batch = PretrainBatch(
        image_BCHW=image_BCHW,
        text_ids_BT=ids_BT,
        is_padding_BT=is_padding_BT,
        texts=[""] * num,
        item_ids=[""] * num,
        bad_samples=[],
        mlm_ids_BT=ids_BT,
        mlm_labels_BT=torch.full_like(ids_BT, -100),
        itm_labels_B=torch.ones(num, dtype=torch.int64),
        false_image_FCHW=image_BCHW[:0],
        patch_noise_BN=torch.rand(num, model.config.num_noise_patches),
    )
    return model.embed(batch)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("scale", [1, 2])
def test_one_side_is_embedded_as_pairs_are(pool, scale):
    model = mpma_models.small_model(alignment={"pool": pool}, image={"target_scale": scale}).eval()
    batch = mpma_models.small_batch(model.config)
    with torch.no_grad():
        want = model.embed(batch)
        images = embed.embed_images(model, batch.image_BCHW)
        reports = embed.embed_reports(model, batch.text_ids_BT, batch.is_padding_BT)
    assert (images - want.image_BE).abs().max() < 1e-12 and (reports - want.report_BE).abs().max() < 1e-12


def test_mpma_compares_features(mpma, dataset, monkeypatch):
    monkeypatch.setattr(search, "EMBEDDED_AT_A_TIME", 5)
    found = retrieve(mpma, dataset)
    image_BCHW, ids_BT, is_padding_BT = inputs(mpma, dataset)
    of_pairs = embed_pairs(mpma.model.eval(), image_BCHW[found.image_of_text_T], ids_BT, is_padding_BT)
    firsts = np.unique(found.image_of_text_T, return_index=True)[1]
    want = of_pairs.image_BE[firsts] @ of_pairs.report_BE.T
    assert np.abs(found.scores_IT - want.numpy()).max() < 1e-5 and found.is_exact


def test_preselected_pairs_alone_are_scored(m3ae, mpma, dataset):
    exact, aligned = retrieve(m3ae, dataset), retrieve(mpma, dataset).scores_IT
    told, preselection = [], Preselection(ready=mpma, num_preselected=2)
    found = retrieve(m3ae, dataset, preselection=preselection, progress=lambda *numbers: told.append(numbers))
    is_selected_IT = np.zeros(aligned.shape, dtype=bool)
    for image in range(6):
        is_selected_IT[image, np.argsort(-aligned[image])[:2]] = True
    for text in range(12):
        is_selected_IT[np.argsort(-aligned[:, text])[:2], text] = True
    assert np.array_equal(np.isfinite(found.scores_IT), is_selected_IT) and 24 <= is_selected_IT.sum() < 40
    assert np.abs(found.scores_IT - exact.scores_IT)[is_selected_IT].max() < 1e-6
    assert (found.scores_IT[~is_selected_IT] == -np.inf).all()
    assert not found.is_exact and told[-1] == (is_selected_IT.sum(),) * 2
    everything = retrieve(m3ae, dataset, preselection=Preselection(ready=mpma, num_preselected=99))
    assert np.abs(everything.scores_IT - exact.scores_IT).max() < 1e-6 and not everything.is_exact


def test_preselection_leaves_bad_images_out(m3ae, mpma, tmp_path):
    dataset = open_pairs(tmp_path / "some_val.arrow", 6, bad=(2,))
    preselection = Preselection(ready=mpma, num_preselected=3)
    found = retrieve(m3ae, dataset, on_bad_sample="skip", preselection=preselection)
    assert [bad.image_id for bad in found.bad_samples] == ["img/2.png"] and found.scores_IT.shape == (5, 9)
    is_scored_IT = np.isfinite(found.scores_IT)
    assert (is_scored_IT.sum(axis=1) >= 3).all() and (is_scored_IT.sum(axis=0) >= 3).all()


def test_refusals(m3ae, mpma, dataset):
    without = dataclasses.replace(mpma, model=mpma_models.small_model(objectives=("image_reconstruction",)))
    with pytest.raises(UserError, match='model.objectives must have "global_alignment"'):
        retrieve(without, dataset)
    with pytest.raises(UserError, match='model.objectives must have "global_alignment"'):
        retrieve(m3ae, dataset, preselection=Preselection(ready=m3ae, num_preselected=2))
    with pytest.raises(UserError, match="A preselection is for a model with a fusion"):
        retrieve(mpma, dataset, preselection=Preselection(ready=mpma, num_preselected=2))
    with pytest.raises(UserError, match="num_preselected must be at least 1, got 0"):
        Preselection(ready=mpma, num_preselected=0)
