"""The model of images without texts: what it computes, where its weights come from, and how it learns."""

import dataclasses

import image_models
import models
import mpma_models
import pytest
import torch
import torch.nn.functional as F
from image_models import TOWERS, small_batch, small_config, small_model
from safetensors.torch import save_file

from fastm3ae import objectives
from fastm3ae.config import FinetuneConfig, ImageConfig, OptimConfig, PretrainConfig, TaskConfig
from fastm3ae.data.batch import LabelBatch, MaskBatch
from fastm3ae.errors import UserError
from fastm3ae.model.image_model import ImageModel
from fastm3ae.training.optim import parameter_groups
from fastm3ae.weights.convert import to_official
from fastm3ae.weights.pretrained import convert_checkpoint, init_model, load_model, save_model
from fastm3ae.weights.towers import load_tower_weights

CASES = [
    ("vit", "image_classification", "cls"),
    ("vit", "image_classification", "mean"),
    ("vit", "segmentation", "cls"),
    ("clip", "image_classification", "cls"),
    ("clip", "segmentation", "cls"),
    ("swin", "image_classification", "cls"),
]


OTHER = {"image_classification": "segmentation", "segmentation": "image_classification"}


def literal_logits(model, image_BCHW):
    """timm's own forward pass, and the head step by step; the last product after the interpolation."""
    config, tokens = model.config, model.vision.forward_features(image_BCHW)
    if config.vision.kind == "swin":
        return model.image_classification_head(tokens.mean(dim=(1, 2)))
    if "image_classification" in config.objectives:
        feature = tokens[:, 0] if config.pool == "cls" else tokens[:, 1:].mean(dim=1)
        return F.linear(feature, model.image_classification_head.weight, model.image_classification_head.bias)
    grid = config.vision.image_size_px // config.vision.patch_size_px
    x = tokens[:, 1:].reshape(len(tokens), grid, grid, -1).permute(0, 3, 1, 2)
    for number, (conv, norm, _) in enumerate(model.segmentation_head.stages):
        if number:
            x = F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=False)
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        mean, var = x.mean(dim=(1, 2, 3), keepdim=True), x.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = x.clamp_min(0)
    x = F.interpolate(x, size=image_BCHW.shape[2:], mode="bilinear", align_corners=False)
    pixels = model.segmentation_head.pixels
    return (x * pixels.weight[0]).sum(dim=1) + pixels.bias


@pytest.mark.parametrize(("vision", "objective", "pool"), CASES)
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_logits_and_gradients_are_the_literal_ones(vision, objective, pool, checkpoint_activations):
    model = small_model(vision, objective, pool=pool)
    batch = small_batch(model.config)
    logits = literal_logits(model, batch.image_BCHW)
    objectives.OBJECTIVES[objective](logits, batch, model.config).mean.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    outputs = model(batch, checkpoint_activations=checkpoint_activations)
    assert list(outputs) == [objective] and torch.allclose(outputs[objective], logits, atol=1e-9)
    objectives.losses(outputs, batch, model.config)[objective].mean.backward()
    for name, parameter in model.named_parameters():
        assert expected[name] is not None and torch.allclose(parameter.grad, expected[name], atol=1e-7), name
    assert not model.leaves_some_alone


def test_an_uneven_grid_is_interpolated_to_the_images_size():
    config = small_config(objective="segmentation", decoder_widths=(6,))
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size_px=60, patch_size_px=20))
    torch.manual_seed(0)
    model = ImageModel(config)
    batch = small_batch(config, dtype=torch.float32)
    logits = model(batch)["segmentation"]
    assert logits.shape == (5, 60, 60) and torch.allclose(logits, literal_logits(model, batch.image_BCHW), atol=1e-5)


def same_tower(model, source):
    own, other = model.vision.state_dict(), source.vision.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("objective", ["image_classification", "segmentation"])
@pytest.mark.parametrize("origin", ["m3ae", "mpma", "official", "image"])
def test_it_starts_from_the_tower_of_every_checkpoint(tmp_path, origin, objective):
    torch.manual_seed(1)
    if origin == "mpma":
        source = mpma_models.small_model(dtype=torch.float32)
    elif origin == "image":
        source = image_models.small_model("clip", OTHER[objective], dtype=torch.float32, seed=1)
    else:
        source = models.small_model(dtype=torch.float32)
    path = tmp_path / ("official.ckpt" if origin == "official" else "ours")
    if origin == "official":
        torch.save({"state_dict": to_official(source.state_dict(), source)}, path)
    else:
        path.mkdir()
        save_model(source, path)
    model = small_model(source.config.vision.kind, objective, dtype=torch.float32, seed=5)
    head = f"{objective}_head"
    before = {name: value.clone() for name, value in getattr(model, head).state_dict().items()}
    assert not same_tower(model, source)
    report = init_model(model, path)
    assert same_tower(model, source) and report.new == [head]
    assert all(torch.equal(value, before[name]) for name, value in getattr(model, head).state_dict().items())
    ignored = {name.split(".")[0] for name in report.ignored}
    some = {
        "m3ae": {"text", "fusion", "mlm_head"},
        "mpma": {"text", "fusion", "global_head"},
        "official": {"language_encoder", "multi_modal_language_layers"},
        "image": {f"{OTHER[objective]}_head"},
    }
    assert ignored >= some[origin] and "vision" not in ignored


def test_a_tower_of_another_size_is_resized_and_another_architecture_refused(tmp_path):
    save_model(models.small_model(dtype=torch.float32), tmp_path)
    config = small_config("clip")
    larger = ImageModel(dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size_px=96)))
    init_model(larger, tmp_path)
    assert larger.vision.pos_embed.shape == (1, 37, 64)
    with pytest.raises(UserError, match=r"another architecture: vision.blocks.2.norm1.weight is missing"):
        init_model(
            ImageModel(dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_blocks=3))), tmp_path
        )


def test_a_swin_starts_from_m3aes(tmp_path):
    source = models.small_model("swin", objectives=("mlm", "itm"), dtype=torch.float32)
    save_model(source, tmp_path)
    model = small_model("swin", dtype=torch.float32, seed=5)
    init_model(model, tmp_path)
    assert same_tower(model, source)


@pytest.mark.parametrize("names", ["timm", "openai"])
def test_it_starts_from_a_plain_tower(tmp_path, names):
    source = models.small_model(dtype=torch.float32)
    prefix = "vision_encoder."
    official = to_official(source.state_dict(), source)
    openai = {key.removeprefix(prefix): value for key, value in official.items() if key.startswith(prefix)}
    save_file(openai if names == "openai" else source.vision.state_dict(), tmp_path / "tower.safetensors")
    vision = dataclasses.replace(TOWERS["clip"], weights=str(tmp_path / "tower.safetensors"))
    model = ImageModel(dataclasses.replace(small_config(), vision=vision))
    load_tower_weights(model)
    assert same_tower(model, source)


def test_a_checkpoint_comes_back_and_has_no_official_form(tmp_path):
    model = small_model("vit", "segmentation", dtype=torch.float32)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    batch = small_batch(model.config, dtype=torch.float32)
    assert loaded.config == model.config
    assert torch.equal(loaded(batch)["segmentation"], model(batch)["segmentation"])
    with pytest.raises(UserError, match="checkpoint of image, which the original M3AE does not have"):
        convert_checkpoint(tmp_path, tmp_path / "official.ckpt")


def test_a_frozen_tower_has_no_gradient_and_stays_in_evaluation_mode():
    config = small_config("swin")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, swin_drop_path_frac=0.9))
    torch.manual_seed(0)
    model = ImageModel(config)
    model.freeze("vision")
    model.train()
    batch = small_batch(config, dtype=torch.float32)
    assert torch.equal(model(batch)["image_classification"], model(batch)["image_classification"])
    objectives.losses(model(batch), batch, config)["image_classification"].mean.backward()
    assert not any(module.training for module in model.vision.modules()) and model.image_classification_head.training
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.image_classification_head.parameters())
    groups = parameter_groups(model, OptimConfig())
    assert {name for group in groups for name in group["names"]} == {
        "image_classification_head.weight", "image_classification_head.bias"
    }  # fmt: skip
    model.freeze()
    assert not torch.equal(model.train()(batch)["image_classification"], model(batch)["image_classification"])


@pytest.mark.parametrize("vision", ["vit", "clip"])
def test_norms_and_biases_do_not_decay_and_heads_learn_faster(vision):
    model = small_model(vision, "segmentation")
    groups = parameter_groups(model, OptimConfig(learning_rate=1e-3, head_lr_multiplier=7, weight_decay=0.05))
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    heads = {name for group in groups if group["lr"] == pytest.approx(7e-3) for name in group["names"]}
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if name.startswith("segmentation_head.")} == heads
    no_decay = {
        name for name in names if ".norm" in name or "bias" in name or ".stages.0.1." in name or ".1.1." in name
    }
    assert names - decayed == no_decay and "segmentation_head.stages.1.0.weight" in decayed


def test_classification_loss_by_hand():
    """Probabilities 1/2, 3/4 and 1/4: -ln of 1/2, 3/4, 3/4, 1/4, 1/2, 1/2 over 6."""
    ln3 = torch.tensor(3.0, dtype=torch.float64).log()
    logits = torch.stack([torch.stack([ln3 * 0, ln3, -ln3]), torch.stack([-ln3, ln3 * 0, ln3 * 0])])
    batch = LabelBatch(
        image_BCHW=torch.zeros(2, 3, 1, 1), item_ids=["a", "b"], groups=["a", "b"], bad_samples=[],
        label_BC=torch.tensor([[0, 1, 0], [1, 0, 0]], dtype=torch.int8),
    )  # fmt: skip
    loss = objectives.image_classification(logits, batch, ImageConfig(num_classes=3))
    expected = -torch.tensor([1 / 2, 3 / 4, 3 / 4, 1 / 4, 1 / 2, 1 / 2], dtype=torch.float64).log().mean()
    assert torch.allclose(loss.mean, expected)
    assert float(loss.sums["accuracy"]) == pytest.approx(3 / 3 + 2 / 3)


def test_segmentation_loss_by_hand():
    """Two pixels of probability 3/4 and 1/4; of the truth the first, nothing, and (found nowhere) the second."""
    ln3 = torch.tensor(3.0).log()
    logits = torch.stack([ln3, -ln3]).expand(3, 1, 2).clone()
    logits[1] = -ln3
    batch = MaskBatch(
        image_BCHW=torch.zeros(3, 3, 1, 2), item_ids=list("abc"), groups=list("abc"), bad_samples=[],
        mask_BHW=torch.tensor([[[True, False]], [[False, False]], [[False, True]]]),
    )  # fmt: skip
    loss = objectives.segmentation(logits, batch, ImageConfig(objectives=("segmentation",)))
    cross_entropy = -torch.tensor([3 / 4, 3 / 4, 3 / 4, 3 / 4, 1 / 4, 1 / 4]).log().mean()
    ratios = torch.tensor([(2 * 0.75 + 1) / (1 + 1 + 1), (0 + 1) / (0.5 + 1), (2 * 0.25 + 1) / (1 + 1 + 1)])
    assert torch.allclose(loss.mean, cross_entropy + (1 - ratios).mean())
    assert float(loss.sums["dice"]) == pytest.approx(1 + 1 + 0)


@pytest.mark.parametrize("objective", ["image_classification", "segmentation"])
def test_the_losses_of_pieces_join_to_that_of_the_batch(objective):
    model = small_model("vit", objective)
    batch = small_batch(model.config)
    (whole,) = objectives.losses(model(batch), batch, model.config).values()
    mean, metric = 0, 0
    for rows in (slice(0, 2), slice(2, 5)):
        target = "label_BC" if objective == "image_classification" else "mask_BHW"
        changes = {name: getattr(batch, name)[rows] for name in ("image_BCHW", "item_ids", target)}
        piece = dataclasses.replace(batch, **changes)
        (loss,) = objectives.losses(model(piece), piece, model.config).values()
        mean += loss.mean * objectives.num_averaged(objective, piece, model.config) / 5
        metric += next(iter(loss.sums.values()))
    assert torch.allclose(mean, whole.mean) and torch.allclose(metric, next(iter(whole.sums.values())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(objectives=("segmentation", "image_classification")), "must be image_classification or"),
        (lambda: ImageConfig(objectives=()), "must be image_classification or"),
        (lambda: ImageConfig(num_classes=0), "model.num_classes must be at least 1"),
        (lambda: ImageConfig(decoder_widths=()), "model.decoder_widths"),
        (lambda: small_config("swin", "segmentation"), "Segmentation needs a ViT"),
        (lambda: PretrainConfig(model=ImageConfig()), "model.kind must be m3ae or mpma, got image"),
        (lambda: FinetuneConfig(model=ImageConfig()), "For task.kind vqa model.kind must have texts"),
        (lambda: FinetuneConfig(task=TaskConfig(kind="segmentation")), "model.kind must be image, got m3ae"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(make, message):
    with pytest.raises(UserError, match=message):
        make()
