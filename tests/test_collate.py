"""Batches for pre-training: masks, labels, false images, and nothing decoded in vain."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from corpus import SIZE, TOKENIZER, TOKENIZERS, assert_equal, pretrain_batches

from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.text import encode, load_tokenizer


def test_texts_are_padded_to_the_batch(corpus):
    batches = pretrain_batches(corpus)
    for pairs in ([0], [1, 2, 3], list(range(33))):
        batch = batches[BatchRequest(0, 0, pairs)]
        lengths = [len(encode(TOKENIZER, batches.dataset.text(pair), 32)) for pair in pairs]
        assert (~batch.is_padding_BT).sum(1).tolist() == lengths
        assert batch.text_ids_BT.shape == (len(pairs), min(32, -(-max(lengths) // 8) * 8))
    assert batch.text_ids_BT.shape[1] == 32 and max(lengths) == 32  # some texts are cut


@pytest.mark.parametrize("vocabulary", ["bert-base-uncased", "roberta"])
@pytest.mark.parametrize("words", ["whole_word", "official"])
def test_masked_text(corpus, words, vocabulary):
    tokenizer = load_tokenizer(TOKENIZERS / vocabulary)
    batches = pretrain_batches(corpus, words=words, tokenizer=tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)
    num_masked = []
    for epoch in range(20):
        batch = batches[BatchRequest(epoch, 0, list(range(33)))]
        is_selected_BT = batch.mlm_labels_BT != -100
        assert torch.equal(batch.mlm_labels_BT[is_selected_BT], batch.text_ids_BT[is_selected_BT])
        assert torch.equal(batch.mlm_ids_BT[~is_selected_BT], batch.text_ids_BT[~is_selected_BT])
        assert not torch.isin(batch.text_ids_BT[is_selected_BT], special).any()
        num_masked.append(is_selected_BT.sum(1))
    num_masked = torch.stack(num_masked)
    if words == "whole_word":
        assert num_masked.min() >= 1
    else:  # the budget is 5 of 32 tokens, padding included, so short texts are often left alone
        assert num_masked.min() == 0 and num_masked.max() == 5


def test_the_official_mode_does_not_depend_on_the_other_texts(corpus):
    batches = pretrain_batches(corpus, words="official")
    whole = batches[BatchRequest(0, 0, list(range(33)))]
    for pair in range(33):
        alone = batches[BatchRequest(0, 0, [pair])]
        assert torch.equal(alone.mlm_ids_BT[0], whole.mlm_ids_BT[pair, : alone.mlm_ids_BT.shape[1]])


def test_image_text_matching(corpus):
    batches = pretrain_batches(corpus, num_patches=9)
    data, seen, false_levels = batches.dataset, set(), {0: set(), 100: set()}
    for batch_number in range(100):
        pairs = [0, 30, 5, 6, 7]
        batch = batches[BatchRequest(0, batch_number, pairs)]
        assert sorted(batch.itm_labels_B.tolist()) == [0, 0, 0, 1, 1]
        seen.add(tuple(batch.itm_labels_B.tolist()))
        assert torch.equal(batch.image_BCHW[:, 0, 0, 0], torch.tensor([data.image(p).getpixel((0, 0)) for p in pairs]))
        shown_false = [p for p, label in zip(pairs, batch.itm_labels_B, strict=True) if label == 0]
        for pair, image in zip(shown_false, batch.false_image_FCHW, strict=True):
            false_levels[0 if pair < 24 else 100].add(int(image[0, 0, 0]))
        assert batch.patch_noise_BN.shape == (5, 9) and batch.patch_noise_BN.dtype == torch.float32
        assert ((batch.patch_noise_BN >= 0) & (batch.patch_noise_BN < 1)).all()
    assert len(seen) == 10  # all placements of two ones
    assert len(false_levels[0]) > 1 and false_levels[0] <= set(range(12))
    assert len(false_levels[100]) == 1 and false_levels[100] <= set(range(100, 105))  # one pair, one epoch, one draw


def test_false_images_are_drawn_uniformly_the_true_one_included(corpus):
    batches = pretrain_batches([corpus[1]])
    counts = np.zeros(105, int)
    for epoch in range(600):
        counts[int(batches[BatchRequest(epoch, 0, [4])].false_image_FCHW[0, 0, 0, 0])] += 1
    expected = 600 * np.array([1, 2, 3, 1, 2]) / 9  # a level is as frequent as its image has texts
    assert counts[100:].sum() == 600
    assert (np.abs(counts[100:] - expected) < 4 * np.sqrt(expected)).all()


def test_no_false_image_is_decoded_in_vain(corpus, decoded):
    batches = pretrain_batches(corpus)
    for num_pairs, num_false in ((8, 4), (7, 4), (1, 1)):
        decoded.clear()
        batch = batches[BatchRequest(0, 0, list(range(num_pairs)))]
        assert len(decoded) == num_pairs + num_false
        assert len(batch.false_image_FCHW) == num_false == (batch.itm_labels_B == 0).sum()


def test_without_image_text_matching_nothing_false_is_decoded(corpus, decoded):
    batch = pretrain_batches(corpus, false_images=None, num_patches=0)[BatchRequest(0, 0, list(range(8)))]
    assert len(decoded) == 8 and batch.false_image_FCHW.shape == (0, 3, SIZE, SIZE)
    assert batch.itm_labels_B.tolist() == [1] * 8 and batch.patch_noise_BN.shape == (8, 0)


def test_random_transforms_leave_the_default_generator_alone(corpus):
    batches = pretrain_batches(corpus, transform="clip_randaug")
    before = torch.get_rng_state()
    first = batches[BatchRequest(0, 0, [1, 2, 3])]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert_equal(batches[BatchRequest(0, 0, [1, 2, 3])], first)
    assert not torch.equal(batches[BatchRequest(1, 0, [1, 2, 3])].image_BCHW, first.image_BCHW)


def test_batches_move_as_a_whole(corpus):
    batch = pretrain_batches(corpus)[BatchRequest(0, 0, [1, 2, 3])]
    moved = batch.to("meta", non_blocking=True)
    assert type(moved) is type(batch) and moved.texts == batch.texts and moved.item_ids == batch.item_ids
    tensors = [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), torch.Tensor)]
    assert {"image_BCHW", "mlm_labels_BT", "false_image_FCHW", "patch_noise_BN"} <= set(tensors)
    assert all(getattr(moved, name).is_meta for name in tensors)


def test_false_images_of_the_batch_are_those_of_other_pairs(corpus, decoded):
    batch = pretrain_batches(corpus, false_images="batch")[BatchRequest(0, 0, list(range(8)))]
    assert len(decoded) == 8 and batch.false_image_FCHW.shape == (0, 3, SIZE, SIZE)
    own = torch.arange(8)
    assert torch.equal(batch.itm_index_B == own, batch.itm_labels_B == 1) and batch.itm_labels_B.sum() == 4
    assert ((batch.itm_index_B >= 0) & (batch.itm_index_B < 8)).all()
    assert np.array_equal(batch.itm_rows_B, batch.itm_index_B.numpy())
    seen = {
        pretrain_batches(corpus, false_images="batch")[BatchRequest(e, 0, [0, 1, 2, 3])].itm_index_B[0].item()
        for e in range(40)
    }
    assert seen == {0, 1, 2, 3}
