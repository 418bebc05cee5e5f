import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import ANSWERS, small_batch, small_config, small_model

from fastm3ae import objectives
from fastm3ae.errors import UserError
from fastm3ae.masking import split_patches

KINDS = [("clip", "roberta"), ("clip", "bert"), ("swin", "roberta"), ("swin", "bert")]


@pytest.mark.parametrize(("vision", "text"), KINDS)
@pytest.mark.parametrize("objective", ["mlm", "mim", "itm", "vqa", "classification", "retrieval"])
def test_every_objective_trains_every_tower(vision, text, objective):
    if objective == "mim" and vision == "swin":
        with pytest.raises(UserError, match="Swin"):
            small_config(vision, text, ("mim",))
        return
    model = small_model(vision, text, (objective,))
    batch = small_batch(model, objective)
    loss = objectives.losses(model(batch), batch, model.config)[objective]
    loss.mean.backward()
    assert loss.mean.isfinite()
    for tower in (model.vision, model.text, model.fusion, model.image_proj, model.text_proj):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


@pytest.mark.parametrize(("vision", "text"), KINDS)
def test_padding_changes_nothing(vision, text):
    model = small_model(vision, text, ("itm",)).eval()
    batch = small_batch(model, "itm")
    longer = dataclasses.replace(
        batch,
        text_ids_BT=F.pad(batch.text_ids_BT, (0, 5), value=model.config.text.pad_token_id),
        is_padding_BT=F.pad(batch.is_padding_BT, (0, 5), value=True),
    )
    assert torch.allclose(model.itm(batch), model.itm(longer), atol=1e-12)


def test_padding_ids_change_nothing_but_positions():
    """BERT's positions do not depend on the ids, so what stands at padding must not matter."""
    model = small_model(text="bert", objectives=("itm",)).eval()
    batch = small_batch(model, "itm")
    other = dataclasses.replace(batch, text_ids_BT=batch.text_ids_BT.where(~batch.is_padding_BT, 7))
    assert torch.allclose(model.itm(batch), model.itm(other), atol=1e-12)


def test_hidden_patches_are_not_seen():
    model = small_model().eval()
    batch = small_batch(model, "mim")
    pred, is_hidden = model.mim(batch)
    pixels = is_hidden.view(-1, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = dataclasses.replace(batch, image_BCHW=batch.image_BCHW + pixels * torch.randn_like(batch.image_BCHW))
    assert torch.equal(model.mim(other).pred, pred)
    visible = dataclasses.replace(batch, image_BCHW=batch.image_BCHW + ~pixels * 0.1)
    assert not torch.allclose(model.mim(visible).pred, pred)


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_mim_reads_the_configured_layer(layer):
    model = small_model(mim={"layer": layer}).eval()
    batch = small_batch(model, "mim")
    keep, restore, _ = split_patches(batch.patch_noise_BN, 0.75)
    text = model.encode_text(batch.text_ids_BT, batch.is_padding_BT)
    states = model.fusion(text, model.encode_image(batch.image_BCHW, keep), batch.is_padding_BT)
    assert torch.equal(model.mim_decoder(states.image[layer], restore), model.mim(batch).pred)


def test_itm_sees_the_false_images_where_the_label_is_0():
    model = small_model().eval()
    batch = small_batch(model, "itm")
    images = batch.image_BCHW.clone()
    images[batch.itm_labels_B == 0] = batch.false_image_FCHW
    expected = model.itm_head(model.cls_features(images, batch.text_ids_BT, batch.is_padding_BT))
    assert torch.equal(model.itm(batch), expected)


def test_mlm_gives_the_masked_positions_in_row_major_order():
    model = small_model().eval()
    batch = small_batch(model, "mlm")
    text = model.encode_text(batch.mlm_ids_BT, batch.is_padding_BT)
    states = model.fusion(text, model.encode_image(batch.image_BCHW), batch.is_padding_BT)
    everywhere = model.mlm_head(states.text[-1])
    assert torch.allclose(model.mlm_logits(batch), everywhere[batch.mlm_labels_BT != -100], atol=1e-12)
    loss, sums = objectives.mlm(model.mlm(batch), batch, model.config)
    assert torch.allclose(loss, F.cross_entropy(everywhere.flatten(0, 1), batch.mlm_labels_BT.flatten()), atol=1e-12)
    assert sums["accuracy"] == (everywhere.argmax(-1) == batch.mlm_labels_BT).sum()


def test_a_batch_without_masked_tokens_costs_nothing():
    model = small_model(objectives=("mlm",))
    batch = small_batch(model, "mlm")
    batch = dataclasses.replace(batch, mlm_labels_BT=torch.full_like(batch.mlm_labels_BT, -100), masked_index_M=None)
    loss = objectives.mlm(model.mlm(batch), batch, model.config).mean
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())


def test_vqa_targets_with_several_and_missing_answers():
    model = small_model(objectives=("vqa",)).eval()
    batch = small_batch(model, "vqa")
    targets = torch.zeros(4, ANSWERS, dtype=torch.float64)
    for i, (ids, scores) in enumerate(zip(batch.answer_ids_BA, batch.answer_scores_BA, strict=True)):
        for answer, score in zip(ids.tolist(), scores.tolist(), strict=True):
            if answer >= 0:
                targets[i, answer] = score
    logits = model.vqa(batch)
    expected = F.binary_cross_entropy_with_logits(logits, targets) * ANSWERS
    assert torch.allclose(objectives.vqa(logits, batch, model.config).mean, expected, atol=1e-7)


def test_retrieval_scores_equal_one_pass_per_pair():
    model = small_model(objectives=("retrieval",)).eval()
    batch = small_batch(model, "retrieval")
    scores = model.retrieval(batch)
    for r in range(3):
        features = model.cls_features(
            batch.image_BCHW, batch.false_text_ids_BRT[:, r], batch.is_false_text_padding_BRT[:, r]
        )
        assert torch.allclose(scores[:, 1 + r], model.retrieval_head(features)[:, 0], atol=1e-12)


def test_the_retrieval_head_starts_as_the_matching_row_and_the_itm_head_is_frozen():
    model = small_model(objectives=("retrieval",))
    assert torch.equal(model.retrieval_head.weight, model.itm_head.weight[1:])
    assert not any(p.requires_grad for p in model.itm_head.parameters())


def test_initialisation():
    torch.manual_seed(0)
    model = small_model(dtype=torch.float32)
    assert abs(model.fusion.text_layers[0].mlp_in.weight.std() - 0.02) < 2e-3
    assert model.mlm_head.decoder.bias.abs().sum() == 0
    assert model.mim_decoder.mask_token.std() > 0.01
    qkv = model.mim_decoder.blocks[0].attn.qkv.weight
    bound = (6 / (qkv.shape[0] + qkv.shape[1])) ** 0.5
    assert 0.9 * bound < qkv.abs().max() <= bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"image_size_px": 100}}, "multiple of model.vision.patch_size_px"),
        ({"vision_config": {"width": 100}}, "multiple of 64"),
        ({"mim": {"layer": 3}}, "model.mim.layer"),
        ({"mim": {"patch_frac": 1.0}}, "model.mim.patch_frac"),
        ({"objectives": ()}, "at least one objective"),
        ({"mim": {"decoder_num_heads": 3}}, "model.mim.decoder"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    base = small_config()
    if "vision_config" in changes:
        changes = {"vision_config": {**dataclasses.asdict(base.vision), **changes["vision_config"]}}
        with pytest.raises(UserError, match=message):
            small_config(vision_config=type(base.vision)(**changes["vision_config"]))
        return
    with pytest.raises(UserError, match=message):
        small_config(**changes)
