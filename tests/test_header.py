"""What a checkpoint's header claims is checked before a model is made of it."""

import dataclasses
import json

import pytest
import torch
from models import small_config, small_model
from safetensors.torch import save_file

from fastm3ae.config.files import to_dict
from fastm3ae.errors import UserError
from fastm3ae.model.m3ae import M3AE
from fastm3ae.tasks.checkpoint import read_finetuned
from fastm3ae.weights.convert import to_official
from fastm3ae.weights.header import check_fits
from fastm3ae.weights.pretrained import init_model, load_model, read_about


def write(folder, config=None, about=None, **changes):
    """A checkpoint of a small model, with another header or other tensors."""
    model = small_model(dtype=torch.float32)
    tree = to_dict(model.config) if config is None else config
    metadata = {"fastm3ae_config": tree if isinstance(tree, str) else json.dumps(tree)}
    if about is not None:
        metadata["fastm3ae_about"] = about if isinstance(about, str) else json.dumps(about)
    save_file(model.state_dict() | changes, folder / "model.safetensors", metadata)
    return folder


def changed(**changes):
    """The configuration of the small model with some values of its sections replaced."""
    tree = to_dict(small_config())
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return tree


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[]", "expected an object of JSON"),
        ("9" * 5000, "Exceeds the limit"),
        (changed(kind=["m3ae"]), r"model.kind must be one of 'm3ae', 'mpma', 'image', got \['m3ae'\]"),
        (changed(text={"vocab_size": None}), "it does not say the size of the vocabulary"),
        (changed(text={"vocab_size": 2**40}), "model.text.vocab_size must be at most 4194304, got 1099511627776"),
        (changed(text={"num_layers": 10**9}), "model.text.num_layers must be at most 256"),
        (changed(text={"width": -32}), "model.text.width must be at least 1, got -32"),
        (changed(fusion={"dropout_frac": 2.0}), "model.fusion.dropout_frac must be at most 1"),
        (changed(mim={"decoder_width": 42, "decoder_num_heads": 2}), "model.mim.decoder_width must be a multiple of 4"),
        (changed(vision={"image_size_px": 16 * 10**6}), "model.vision.image_size_px is too large: 10+ patches"),
        (changed(init_std=float("nan")), "model.init_std must be at least 0, got nan"),
        (changed(text={"layer_norm_eps": 10**400}), "a number of at most 64 bits, got a number of 1329 bits"),
    ],
)
def test_configurations_that_no_model_is_made_of(tmp_path, config, message):
    with pytest.raises(UserError, match=rf"model\.safetensors is damaged in its configuration: .*{message}"):
        load_model(write(tmp_path, config))


def test_a_model_that_its_file_cannot_hold_takes_no_memory(tmp_path):
    """Two billion values in a file of some hundred thousand bytes."""
    config = changed(text={"width": 2**14, "num_heads": 4, "num_layers": 2, "mlp_width": 2**12})
    with pytest.raises(UserError, match=r"is damaged: its configuration is of a model of \d{10} values, of"):
        load_model(write(tmp_path, config))
    model = small_model(dtype=torch.float32)
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": to_official(model.state_dict(), model)}, path)
    check_fits(model.config, path)
    with pytest.raises(UserError, match=r"x\.ckpt is damaged"):
        check_fits(dataclasses.replace(model.config, num_answers=2**21, objectives=("vqa",)), path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("[]", "expected an object of JSON"),
        ("{", "Expecting property name"),
        ({"labels": "ab"}, "labels must be a list"),
        ({"labels": [1]}, "the labels must be texts"),
        ({"labels": ["\ud800"]}, "the labels must be texts"),
        ({"labels": ["a"], "majority": {"open": 1}}, "the most frequent answers must be labels"),
        ({"config": {"task": {"kind": "vqa"}}}, "the labels of the task are missing"),
        ({"config": {"data": []}}, "config.data must be a dict"),
        ({"config": {"data": {"val_transform": 3}}}, "config.data.val_transform must be a text"),
        ({"weights_were_random": "no"}, "weights_were_random must be a bool"),
    ],
)
def test_what_a_run_cannot_have_said(tmp_path, about, message):
    with pytest.raises(UserError, match=rf"is damaged in what its run says of it: {message}"):
        read_about(write(tmp_path, about=about))


def test_a_configuration_of_a_task_is_checked_in_full(tmp_path):
    about = {"labels": ["a"], "config": {"task": {"kind": "vqa"}, "train": {"batch_size": [8]}}}
    with pytest.raises(UserError, match=r"train.batch_size must be of type int, got \[8\]"):
        read_finetuned(write(tmp_path, about=about))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("vision.pos_embed", torch.tensor(1.0), r"vision.pos_embed is \(\), expected \(1, 17, 64\)"),
        ("vision.pos_embed", torch.zeros(1, 7, 64), r"vision.pos_embed is \(1, 7, 64\), expected"),
        ("vision.pos_embed", torch.zeros(1, 5, 64, dtype=torch.int64), r"vision.pos_embed is \(1, 5, 64\), expected"),
        ("text_proj.weight", torch.zeros(48, 32, dtype=torch.int64), "text_proj.weight is of the type torch.int64"),
    ],
)
def test_tensors_of_other_forms_are_named(tmp_path, name, tensor, message):
    with pytest.raises(UserError, match=message):
        load_model(write(tmp_path, **{name: tensor}))


def test_official_tensors_that_cannot_be_stacked(tmp_path):
    model = small_model(dtype=torch.float32)
    state = to_official(model.state_dict(), model)
    state["multi_modal_language_layers.0.attention.self.key.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt is a checkpoint of another architecture: "):
        init_model(model, tmp_path / "x.ckpt")


def test_nothing_is_taken_of_a_head_that_is_not_whole(tmp_path):
    """Whose other tensors may be of any shape."""
    write(tmp_path, **{"mlm_head.dense.weight": torch.zeros(3, 3)})
    whole = M3AE(small_config())
    (tmp_path / "part").mkdir()
    state = {name: t for name, t in whole.state_dict().items() if name != "mlm_head.norm.weight"}
    state["mlm_head.dense.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "part" / "model.safetensors", {"fastm3ae_config": json.dumps(to_dict(whole.config))})
    report = init_model(small_model(dtype=torch.float32), tmp_path / "part")
    assert report.new == ["mlm_head"] and "mlm_head.dense.weight" in report.ignored
