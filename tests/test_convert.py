import argparse
import collections
import os
import pickle
import sys
import types

import pytest
import torch
from models import small_batch, small_model

from fastm3ae.errors import UserError
from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import config_from_official, from_official, read_official, to_official
from fastm3ae.weights.pretrained import convert_checkpoint, init_model, load_model, read_weights, save_model

CASES = [
    ("clip", "roberta", ("mlm", "mim", "itm")),
    ("clip", "bert", ("vqa", "classification")),
    ("swin", "roberta", ("mlm", "itm")),
    ("swin", "bert", ("retrieval",)),
]


def official_config(model):
    """The official configuration of one of our models."""
    config = model.config
    names = {"mlm": "mlm", "mim": "mim", "itm": "itm", "vqa": "vqa", "cls": "classification", "irtr": "retrieval"}
    return {
        "loss_names": {official: int(ours in config.objectives) for official, ours in names.items()},
        "image_size": config.vision.image_size_px,
        "hidden_size": config.fusion.width,
        "num_top_layer": config.fusion.num_layers,
        "num_heads": config.fusion.num_heads,
        "mlp_ratio": config.fusion.mlp_ratio,
        "drop_rate": config.fusion.dropout_frac,
        "mim_prob": config.mim.patch_frac,
        "mim_layer": config.mim.layer,
        "mim_decoder_hidden_size": config.mim.decoder_width,
        "mim_decoder_num_layers": config.mim.decoder_num_layers,
        "mim_decoder_num_heads": config.mim.decoder_num_heads,
        "norm_pix_loss": config.mim.normalize_target,
        "vqa_label_size": config.num_answers,
        "melinda_label_size": {"p_meth_label": config.num_classes},
        "label_column_name": "p_meth_label",
    }


def text_config(model):
    return {"num_attention_heads": model.config.text.num_heads, "hidden_dropout_prob": 0.0}


@pytest.mark.parametrize(("vision", "text", "objectives"), CASES)
def test_to_the_official_names_and_back(vision, text, objectives):
    model = small_model(vision, text, objectives, dtype=torch.float32).eval()
    state = to_official(model.state_dict(), model)
    config = config_from_official(official_config(model), state, text_config(model))
    again = M3AE(config).eval()
    ours, leftovers = from_official(state, again)
    assert set(ours) == {name for name, _ in again.named_parameters()}
    assert all("position_ids" in name or "decoder_pos_embed" in name for name in leftovers)
    again.load_state_dict({**again.state_dict(), **ours})
    batch = small_batch(model, objectives[0])
    run = M3AE.mlm_logits if objectives[0] == "mlm" else getattr(M3AE, objectives[0])
    torch.testing.assert_close(run(again, batch), run(model, batch), rtol=0, atol=0)


def test_official_names_of_swin_follow_the_original():
    names = to_official(small_model("swin", objectives=("itm",)).state_dict(), small_model("swin", objectives=("itm",)))
    assert "vision_encoder.layers.0.downsample.reduction.weight" in names
    assert "vision_encoder.layers.1.blocks.1.attn.relative_position_bias_table" in names
    assert "vision_encoder.patch_embed.norm.weight" in names and "vision_encoder.norm.bias" in names


def lightning_checkpoint(path, state, config=None):
    """A file as the original's PyTorch Lightning 1.3 writes it: callbacks are keyed by their class."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    sys.modules |= {"pytorch_lightning": types.ModuleType("pytorch_lightning"),
                    "pytorch_lightning.callbacks": types.ModuleType("pytorch_lightning.callbacks"),
                    module.__name__: module}  # fmt: skip
    content = {
        "epoch": 3,
        "state_dict": collections.OrderedDict(state),
        "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}},
        "hyper_parameters": {"config": config, "extra": argparse.Namespace(a=1)},
    }
    torch.save(content, path)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        del sys.modules[name]


def test_a_lightning_checkpoint_loads(tmp_path):
    model = small_model(dtype=torch.float32)
    path = tmp_path / "m3ae.ckpt"
    lightning_checkpoint(path, to_official(model.state_dict(), model), official_config(model))
    checkpoint = read_official(path)
    assert checkpoint.config == official_config(model)
    again = small_model(dtype=torch.float32, seed=1)
    report = init_model(again, path)
    assert report.new == [] and report.ignored == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "pytorch_lightning" not in sys.modules


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path):
    torch.save({"state_dict": {}, "evil": Evil(tmp_path / "owned")}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="mkdir"):
        read_official(tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(UserError, match="plain.ckpt"):
        read_official(tmp_path / "plain.ckpt")
    assert not (tmp_path / "owned").exists()


def test_broken_and_missing_checkpoints(tmp_path):
    model = small_model(dtype=torch.float32)
    path = tmp_path / "m3ae.ckpt"
    with pytest.raises(UserError, match="no such checkpoint"):
        read_weights(path)
    lightning_checkpoint(path, to_official(model.state_dict(), model))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="m3ae.ckpt is not a readable checkpoint"):
        read_weights(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match='expected a dictionary with a "state_dict"'):
        read_weights(path)
    lightning_checkpoint(path, {"encoder.weight": torch.zeros(2)}, official_config(model))
    with pytest.raises(UserError, match="not a checkpoint of the original M3AE: it lacks 'language_encoder"):
        read_weights(path)
    save_model(model, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_weights(tmp_path)


def test_export_loads_back_strictly(tmp_path):
    model = small_model(dtype=torch.float32)
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "official.ckpt")
    state = torch.load(tmp_path / "official.ckpt", weights_only=True)["state_dict"]
    ours, leftovers = from_official(state, model)
    assert set(ours) == {name for name, _ in model.named_parameters()}
    assert set(leftovers) == {"language_encoder.embeddings.position_ids", "mim_head.decoder_pos_embed"}
    assert all(torch.equal(ours[name], p) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="exists"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "official.ckpt")


def test_load_model_rebuilds_ours(tmp_path):
    model = small_model("swin", "bert", ("itm", "vqa"), dtype=torch.float32).eval()
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    assert again.config == model.config
    batch = small_batch(model, "vqa")
    assert torch.equal(again.vqa(batch), model.vqa(batch))


def test_another_architecture_is_refused_with_what_differs(tmp_path):
    model = small_model(dtype=torch.float32)
    save_model(model, tmp_path)
    with pytest.raises(UserError, match=r"another architecture: .*vision.* is missing"):
        init_model(small_model("swin", objectives=("itm",), dtype=torch.float32), tmp_path)
    with pytest.raises(UserError, match=r"text.embeddings.* is missing|text.embeddings.* expected"):
        init_model(small_model(text="bert", dtype=torch.float32), tmp_path)


def test_fine_tuning_starts_heads_anew_and_resizes_positions(tmp_path):
    import dataclasses

    model = small_model(dtype=torch.float32)
    save_model(model, tmp_path)
    vision = dataclasses.replace(model.config.vision, image_size_px=96)
    larger = small_model(objectives=("vqa", "retrieval"), vision_config=vision, dtype=torch.float32, seed=1)
    report = init_model(larger, tmp_path)
    assert report.new == ["retrieval_head", "vqa_head"]
    assert {name.split(".")[0] for name in report.ignored} == {"mlm_head", "mim_decoder"}
    assert larger.vision.pos_embed.shape == (1, 37, 64)
    assert torch.equal(larger.vision.pos_embed[:, 0], model.vision.pos_embed[:, 0])
    assert torch.equal(larger.itm_head.weight, model.itm_head.weight)
    assert torch.equal(larger.retrieval_head.weight, model.itm_head.weight[1:])


def test_swin_bias_tables_are_resized(tmp_path):
    import dataclasses

    model = small_model("swin", objectives=("itm",), dtype=torch.float32)
    save_model(model, tmp_path)
    vision = dataclasses.replace(model.config.vision, image_size_px=128)
    larger = small_model(objectives=("itm",), vision_config=vision, dtype=torch.float32, seed=1)
    init_model(larger, tmp_path)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    small, large = (dict(m.vision.named_parameters())[name] for m in (model, larger))
    assert small.shape == (9, 1) and large.shape == (49, 1)
    assert torch.allclose(large.mean(), small.mean(), atol=0.02)
