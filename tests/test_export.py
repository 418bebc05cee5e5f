"""Exported parts of a checkpoint give in plain timm, transformers and torch what they give in fastm3ae."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from runs import TOKENIZER
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoModel, AutoTokenizer, BertModel, RobertaModel
from whole_checkpoints import CONFIGS, write_checkpoint

from fastm3ae.cli import main
from fastm3ae.config import VisionConfig
from fastm3ae.data.decode import decode_image
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import load_tokenizer
from fastm3ae.export import export_text, export_vision
from fastm3ae.model.build import build_model
from fastm3ae.model.embed import ImageEncoder, PairEncoder, TextEncoder
from fastm3ae.model.text import encode_tokens
from fastm3ae.model.vision import encode_pixels
from fastm3ae.weights.pretrained import save_weights


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


READS_SWIN = pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="misreads a headless Swin")


@pytest.mark.parametrize(
    ("name", "transform"),
    [("m3ae", "clip"), pytest.param("swin", "imagenet", marks=READS_SWIN), ("mpma", "imagenet"), ("image", "clip")],
)
@torch.inference_mode()
def test_the_vision_tower_is_timms(name, transform, tmp_path, capsys):
    """From the picture on: how it is resized, cut and normalised is told, too."""
    model = write_checkpoint(tmp_path / name, name, transform)
    assert main(["export", "vision", str(tmp_path / name), str(tmp_path / "tower")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'tower'}\n"
    tower = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True).eval()
    image = picture(90, 77)
    theirs = create_transform(**resolve_model_data_config(tower), is_training=False)(image)[None]
    ours = normalize(make_transform(transform, 64)(decode_image(image))[None], *normalization(transform))
    assert (theirs - ours).abs().max() < 1e-5
    expected = encode_pixels(model.vision, ours)
    tokens = tower.forward_features(theirs)
    assert (tokens.reshape(expected.shape) - expected).abs().max() < 1e-5
    assert (tower(theirs) - ImageEncoder(model)(ours)["image"]).abs().max() < 1e-5


@torch.inference_mode()
def test_a_tower_of_the_papers_shape_is_timms(tmp_path):
    """Of 288 px and 11 blocks, though not as wide; a checkpoint without a word of its run counts as the original's."""
    vision = VisionConfig(width=128)
    assert (vision.image_size_px, vision.num_blocks) == (288, 11)
    config = dataclasses.replace(CONFIGS["m3ae"], vision=vision)
    model = build_model(config).eval()
    save_weights(model.state_dict(), config, tmp_path)
    export_vision(tmp_path, tmp_path / "tower")
    tower = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True).eval()
    inputs = resolve_model_data_config(tower)
    assert tuple(inputs["input_size"]) == (3, 288, 288) and inputs["mean"][0] == pytest.approx(0.48145466)
    image_BCHW = torch.randn(1, 3, 288, 288)
    assert (tower.forward_features(image_BCHW) - encode_pixels(model.vision, image_BCHW)).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("mpma", BertModel), ("m3ae-roberta", RobertaModel)])
@torch.inference_mode()
def test_the_language_tower_is_transformers(name, kind, tmp_path):
    model = write_checkpoint(tmp_path / name, name)
    if kind is RobertaModel:
        load_tokenizer(TOKENIZER.parent / "roberta").save_pretrained(tmp_path / name)
    export_text(tmp_path / name, tmp_path / "tower")
    tower, tokenizer = AutoModel.from_pretrained(tmp_path / "tower"), AutoTokenizer.from_pretrained(tmp_path / "tower")
    assert type(tower) is kind and not tower.training
    words = tokenizer.convert_ids_to_tokens([7, 9, 11, 8])
    texts = [tokenizer.convert_tokens_to_string(words[:2]), tokenizer.convert_tokens_to_string(words * 20)]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == model.config.text.max_tokens
    is_padding_BT = batch["attention_mask"] == 0
    ids_BT = batch["input_ids"] % 60  # the vocabulary of RoBERTa's files is larger than the model's
    ids_BT = ids_BT.masked_fill(is_padding_BT, model.config.text.pad_token_id)
    theirs = tower(input_ids=ids_BT, attention_mask=batch["attention_mask"]).last_hidden_state
    ours = encode_tokens(model.text, ids_BT, is_padding_BT)
    assert (theirs - ours)[~is_padding_BT].abs().max() < 1e-5


LOADER = """
import json, sys
sys.modules["fastm3ae"] = None  # an import would fail
import torch
for name in sys.argv[1:]:
    given = {"inputs.json": ""}
    graph = torch.export.load(f"{name}.pt2", extra_files=given)
    cases = torch.load(f"{name}.pt", weights_only=True)
    for inputs, expected in cases:
        found = graph.module()(*inputs)
        assert list(found) == list(expected), list(found)
        for key in expected:
            assert (found[key] - expected[key]).abs().max() < 1e-5, (name, key)
    parts = {key.split(".")[1] for key in graph.state_dict}
    print(json.dumps([name, sorted(parts), json.loads(given["inputs.json"])]))
"""


def test_graphs_need_no_fastm3ae(tmp_path):
    """One image or several, texts of any length."""
    graphs = {"m3ae": ("pair", PairEncoder), "swin": ("image", ImageEncoder), "mpma": ("text", TextEncoder)}
    for name, (part, encoder) in graphs.items():
        model = write_checkpoint(tmp_path / name, name)
        assert main(["export", "graph", str(tmp_path / name), str(tmp_path / f"{name}.pt2"), "--part", part]) == 0
        cases = []
        for num, num_tokens in ((1, 2), (3, 21)):
            image_BCHW = torch.randn(num, 3, 64, 64)
            is_padding_BT = torch.arange(num_tokens) >= torch.randint(1, num_tokens + 1, (num, 1))
            ids_BT = torch.randint(4, 60, (num, num_tokens)).masked_fill(is_padding_BT, model.config.text.pad_token_id)
            inputs = {
                "image": (image_BCHW,),
                "text": (ids_BT, is_padding_BT),
                "pair": (image_BCHW, ids_BT, is_padding_BT),
            }[part]
            with torch.inference_mode():
                cases.append((inputs, encoder(model)(*inputs)))
        torch.save(cases, tmp_path / f"{name}.pt")
    process = subprocess.run([sys.executable, "-c", LOADER, *graphs], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    said = {name: (parts, inputs) for name, parts, inputs in map(json.loads, process.stdout.splitlines())}
    assert set(said["m3ae"][1]) == {"image_size_px", "mean", "std", "max_tokens", "pad_token_id"}
    assert said["swin"] == (["vision"], {**said["swin"][1], "image_size_px": 64})  # no weights that it does not read
    assert said["mpma"] == (["global_head", "text"], {"max_tokens": 34, "pad_token_id": 0})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("text image new", "image has no language tower."),
        ("graph image new.pt2 --part text", "image has no language tower."),
        ("vision image there", "there exists: choose another name."),
        ("text mpma there", "there exists: choose another name."),
        ("graph image new.pt --part image", "new.pt must end in .pt2, as torch.export wants it."),
        ("graph mpma new.pt2 --part pair", "mpma is of mpma, whose fusion works on packed texts"),
        ("vision nowhere new", "there is no such checkpoint file"),
        ("vision image image/model.safetensors/new", "new cannot be written: Not a directory."),
        ("graph image image/model.safetensors/new.pt2 --part image", "new.pt2 cannot be written: File exists."),
    ],
)
def test_what_cannot_be_exported_is_said(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = line.split()[1]
    if name != "nowhere":
        write_checkpoint(tmp_path / name, name)
    (tmp_path / "there").mkdir()
    assert main(["export", *line.split()]) == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {name, "there"}
