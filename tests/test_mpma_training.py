"""Whole runs of a tiny MPMA through the command: resumed, divided among passes and processes, saved and loaded."""

import dataclasses
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import yaml
from corpus import caption_rows
from mpma_models import small_batch, small_config, small_model
from runs import TOKENIZER, TRAIN, write_corpus
from safetensors.torch import load_file
from test_distributed import torchrun

from fastm3ae.cli import main
from fastm3ae.config import MPMAConfig, PretrainConfig
from fastm3ae.config.files import from_dict, to_dict
from fastm3ae.config.presets import preset
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.loader import pretrain_loader
from fastm3ae.data.text import load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.model.alignment import GlobalFeatures
from fastm3ae.model.mpma import MPMA
from fastm3ae.training.distributed import Processes
from fastm3ae.training.optim import parameter_groups
from fastm3ae.training.retrieval import Retrieval
from fastm3ae.training.validation import validate
from fastm3ae.weights.pretrained import init_model, load_model, save_model
from fastm3ae.weights.towers import load_tower_weights

MODEL = {
    "kind": "mpma",
    "vision": {"image_size_px": 32, "patch_size_px": 8, "width": 64, "num_blocks": 1},
    "text": {"width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32, "max_positions": 32, "dropout_frac": 0.0},
    "fusion": {"width": 32, "num_layers": 2, "num_heads": 2, "dropout_frac": 0.0},
    "image": {"decoder_width": 32, "decoder_num_layers": 1, "decoder_num_heads": 2},
    "alignment": {"head_width": 24, "width": 8, "learn_temperature": True},
    "num_slots": 3,
    "num_topk_slots": 6,
    "num_topk_kept": 2,
}
LOSSES = ("image_reconstruction", "report_reconstruction", "global_alignment", "local_alignment")


def command(folder, *arguments, output="run", model=None, **train):
    """The arguments of the command for a tiny run."""
    config = {
        "model": MODEL | (model or {}),
        "data": {"root": str(folder), "datasets": ["made"], "tokenizer": str(TOKENIZER), "max_text_tokens": 24},
        "masking": {"token_frac": 0.5},
        "optim": {"learning_rate": 1e-3},
        "train": TRAIN | train,
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["pretrain", "--config", str(path), "--output", str(folder / output), *arguments]


def run(folder, *arguments, **options):
    return main(command(folder, *arguments, **options))


def lines(folder):
    """Step, split and losses of every line of metrics.jsonl."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], *(line[f"{name}_loss"] for name in LOSSES)) for line in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a run on it."""
    folder = tmp_path_factory.mktemp("mpma")
    write_corpus(folder)
    assert run(folder) == 0
    return folder


def test_a_run_leaves_everything_behind(folder, capsys):
    summary = json.loads((folder / "run" / "summary.json").read_text())
    for name in LOSSES:
        assert summary[f"{name}_loss"] > 0
    for name in ("report_reconstruction_accuracy", "report_reconstruction_accuracy_shuffled_image",
                 "image_reconstruction_loss_patch_mean", "global_alignment_recall_at_1",
                 "image_to_report_recall_at_1", "score"):  # fmt: skip
        assert isinstance(summary[name], float)
    assert summary["image_to_report_candidates"] == 13 == summary["val_pairs"]
    resolved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert resolved["model"]["kind"] == "mpma" and resolved["model"]["text"]["vocab_size"] == 60
    assert main(["inspect", str(folder / "run")]) == 0
    assert main(["inspect", str(folder / "run" / "checkpoints" / "step_000006")]) == 0
    text = capsys.readouterr().out
    assert "kind: mpma" in text and "global_head" in text and "memory: slots" in text


def test_the_configuration_of_a_run_makes_it_again(folder):
    again = ["pretrain", "--config", str(folder / "run" / "config.yaml"), "--output", str(folder / "again")]
    assert main(again) == 0
    assert lines(folder / "again") == lines(folder / "run")


def test_a_stopped_run_goes_on_exactly(folder):
    assert run(folder, output="half", num_steps=6, save_every_steps=4) == 0
    (newest,) = (folder / "half" / "checkpoints").glob("step_000006")
    shutil.rmtree(newest)
    (folder / "half" / "summary.json").unlink()
    assert run(folder, "--resume", "auto", output="half", num_steps=6, save_every_steps=4) == 0
    assert lines(folder / "half") == lines(folder / "run")
    states = [load_file(folder / name / "checkpoints/step_000006/model.safetensors") for name in ("run", "half")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("view", ["masked", "full"])
def test_passes_add_up_to_the_whole_batch(folder, micro_batch, view):
    """Of the training losses; in validation, a pair is contrasted with those of its own piece."""
    model = {"alignment": MODEL["alignment"] | {"view": view}}
    outputs = f"whole_{view}_{micro_batch}", f"pieces_{view}_{micro_batch}"
    for output, pairs in zip(outputs, ("auto", micro_batch), strict=True):
        assert run(folder, output=output, model=model, micro_batch=pairs) == 0
    got, want = ([line for line in lines(folder / output) if line[1] == "train"] for output in reversed(outputs))
    for left, right in zip(got, want, strict=True):
        assert left[:2] == right[:2] and left[2:] == pytest.approx(right[2:], rel=2e-4)
    assert got[0][2:] == pytest.approx(want[0][2:], rel=1e-6)


def without_key_bias(name, x):
    """A parameter without the biases of keys: softmax does not see them, and Adam makes much of rounding errors."""
    if name.endswith("qkv.bias"):
        q, _, v = x.chunk(3)
        return torch.cat([q, v])
    if name.endswith("kv.bias"):
        return x.chunk(2)[1]
    return x[:0] if name.endswith("key.bias") else x


def test_two_processes_equal_one(folder):
    """Shares of 3 and 4 pairs, the larger one in two passes, and now and then a pair that cannot be used."""
    write_pairs(folder / "made_train.arrow", caption_rows(12, 100, bad=[5]))
    train = {"batch_size": 7, "micro_batch": 3, "num_steps": 8}
    try:
        arguments = ["--data.on-bad-sample", "skip", "--optim.learning-rate", "1e-4"]
        assert run(folder, *arguments, output="one", **train) == 0
        result = torchrun(command(folder, *arguments, output="two", **train))
        assert result.returncode == 0, result.stderr[-2000:]
    finally:
        write_corpus(folder)
    for left, right in zip(lines(folder / "two"), lines(folder / "one"), strict=True):
        assert left[:2] == right[:2] and left[2:] == pytest.approx(right[2:], rel=1e-5), left[:2]
    one, two = (load_file(folder / name / "checkpoints/step_000008/model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        got, want = (without_key_bias(name, x) for x in (two[name], tensor))
        assert torch.allclose(got, want, rtol=1e-4, atol=2e-5), name
    one, two = (json.loads((folder / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["image_to_report_recall_at_1"] == one["image_to_report_recall_at_1"]


def test_the_command_chooses_the_memory(folder):
    assert run(folder, "--model.memory", "topk", output="topk", num_steps=1) == 0
    resolved = yaml.safe_load((folder / "topk" / "config.yaml").read_text())
    assert resolved["model"]["memory"] == "topk"
    assert load_model(folder / "topk" / "checkpoints" / "step_000001").fusion.topk.matrix.shape == (6, 32)


def test_a_target_of_twice_the_resolution(folder):
    """The loader's images are of twice the tower's size, and so are the decoder's patches."""
    assert run(folder, "--model.image.target-scale", "2", output="twice", num_steps=1) == 0
    model = load_model(folder / "twice" / "checkpoints" / "step_000001")
    assert model.mim_decoder.pixels.out_features == 3 * 16**2 and model.vision.patch_embed.num_patches == 16


def test_a_batch_masks_both_sides(folder):
    """Whole words, about half of the tokens, noise for every patch, and no false image."""
    config = from_dict(PretrainConfig(), yaml.safe_load((folder / "run" / "config.yaml").read_text()))
    loader = pretrain_loader(config, load_tokenizer(TOKENIZER), "train")
    batches = [batch for (batch,) in loader.epoch(0)]
    num_masked = sum(len(batch.masked_index_M) for batch in batches)
    num_words = sum(int((batch.num_tokens_B - 2).sum()) for batch in batches)
    assert 0.4 < num_masked / num_words < 0.55
    for batch in batches:
        assert (batch.mlm_labels_BT != -100).any(dim=1).all() and (batch.itm_labels_B == 1).all()
        assert batch.patch_noise_BN.shape == (8, 16) and len(batch.false_image_FCHW) == 0


def test_a_checkpoint_is_the_model_again(folder, tmp_path):
    model = load_model(folder / "run" / "checkpoints" / "step_000006")
    assert isinstance(model, MPMA) and isinstance(model.config, MPMAConfig)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    larger = dataclasses.replace(model.config, vision=dataclasses.replace(model.config.vision, image_size_px=48))
    report = init_model(MPMA(larger), tmp_path)  # position embeddings are resized
    assert report.new == []
    objectives = ("image_reconstruction", "report_reconstruction")
    save_model(MPMA(dataclasses.replace(model.config, objectives=objectives)), tmp_path)
    assert init_model(model, tmp_path).new == ["global_head", "local_head"]
    assert main(["convert", str(folder / "run" / "checkpoints" / "step_000006"), str(tmp_path / "x.ckpt")]) == 2


def test_the_vision_tower_is_timms_plain_vit(tmp_path):
    import timm

    plain = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=2, num_heads=1, num_classes=0, img_size=64)
    torch.save(plain.state_dict(), tmp_path / "mae.pth")
    config = small_config()
    vision = dataclasses.replace(config.vision, weights=str(tmp_path / "mae.pth"))
    model = MPMA(dataclasses.replace(config, vision=vision))
    load_tower_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(model.vision.parameters(), plain.parameters(), strict=True))
    image = torch.randn(2, 3, 64, 64)
    batch = small_batch(config, lengths=(4, 5), hidden=((1,), (2,)), dtype=torch.float32)
    want = plain.eval().forward_features(image)[:, 0]
    features = model.eval().embed(dataclasses.replace(batch, image_BCHW=image))
    assert torch.allclose(features.image_BE, model.global_head.image(want), atol=1e-5)


@pytest.mark.parametrize("name", ["mpma", "mpma-demo"])
def test_presets_and_their_files(name):
    config = preset(name)
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert from_dict(PretrainConfig(), values) == config == from_dict(preset("mpma-demo"), values)
    assert config.masking.token_frac == 0.5 and config.model.image.patch_frac == 0.75
    back = from_dict(config, {"model": {"kind": "m3ae"}})
    assert back.model == PretrainConfig().model
    with pytest.raises(UserError, match="model.kind must be one of .*, got 'mpmaa'. Did you mean 'mpma'"):
        from_dict(config, {"model": {"kind": "mpmaa"}})
    with pytest.raises(UserError, match="Unknown configuration key model.mim"):
        from_dict(config, {"model": {"mim": {}}})


MISTAKES = {
    "one pair": (["--train.batch-size", "1"], "train.batch_size is 1, but global_alignment"),
    "the original's step": (["--train.step", "original"], "train.step must be packed for MPMA"),
    "no slots": (["--model.num-slots", "0"], "model.num_slots must be at least 1"),
    "an objective of M3AE": (["--model.objectives", "mlm"], "mlm"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_sentence(folder, capsys, name):
    arguments, message = MISTAKES[name]
    try:
        status = run(folder, *arguments, output="mistake")
    except SystemExit as error:  # the command's parser
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err + captured.out and "Traceback" not in captured.err


def test_groups_of_the_optimiser():
    """As in MAE and MRM, no norm decays, which in M3AE's original some do."""
    model = small_model(alignment={"learn_temperature": True}, dtype=torch.float32)
    groups = parameter_groups(model, from_dict(PretrainConfig(), {}).optim)
    names = {group["label"]: group["names"] for group in groups}
    assert sum(map(len, names.values())) == sum(p.requires_grad for p in model.parameters())
    undecayed = {name for label, some in names.items() if label.endswith("no_decay") for name in some}
    assert "global_head.log_temperature" in undecayed and "vision.blocks.0.norm1.weight" in undecayed
    assert "mim_decoder.blocks.0.norm1.weight" in undecayed
    assert "fusion.slots.0.keys" in names["fusion decay"] and "local_head.word.0.weight" in names["head decay"]


def test_controls_of_validation():
    """A model whose reports read no image scores the same with any, and a mean patch has the variance as its loss."""
    model = small_model()
    for layer in model.fusion.layers:
        torch.nn.init.zeros_(layer.cross_out.weight)
    batches = [small_batch(model.config, seed=seed) for seed in range(3)]
    metrics = validate(model, batches, nullcontext, Processes("cpu"))
    name = "report_reconstruction_accuracy"
    assert metrics[name] == metrics[f"{name}_shuffled_image"]
    assert metrics["image_reconstruction_loss_patch_mean"] == pytest.approx(767 / 768, abs=1e-3)
    assert model.training


def retrieval_of(image, report, **names):
    """Collected in batches of 6."""
    found, config = Retrieval(), small_config()
    for start in range(0, len(image), 6):
        rows = slice(start, min(start + 6, len(image)))
        default = [str(i) for i in range(len(image))]
        some = {name: names.get(name, default)[rows] for name in ("texts", "item_ids")}
        batch = dataclasses.replace(small_batch(config), **some)
        found.add(GlobalFeatures(image[rows], report[rows], torch.ones(())), batch)
    return found.recall(Processes("cpu"))


def test_retrieval():
    eye = torch.eye(64)
    swapped = eye[[1, 0, *range(2, 64)]]
    assert retrieval_of(eye, eye) == (1.0, 64)
    assert retrieval_of(eye, swapped) == (62 / 64, 64)
    for name in ("texts", "item_ids"):  # one image's reports are all its own, and so are equal ones
        assert retrieval_of(eye, swapped, **{name: ["a", "a", *map(str, range(2, 64))]}) == (1.0, 64)
    assert retrieval_of(torch.eye(150), torch.eye(150)) == (1.0, 64)
    assert retrieval_of(torch.eye(5), torch.eye(5)[[1, 0, 2, 3, 4]]) == (3 / 5, 5)
    assert Retrieval().recall(Processes("cpu")) == (0.0, 0)
