"""Towers load from plain timm and transformers and go back to them."""

import dataclasses
from functools import partial

import pytest
import timm
import torch
from models import small_config, small_model
from safetensors.torch import save_file
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from fastm3ae.config import TextConfig
from fastm3ae.errors import UserError
from fastm3ae.model.m3ae import M3AE
from fastm3ae.weights.convert import to_official
from fastm3ae.weights.towers import load_tower_weights, resolve_text


def plain_vit(depth=3, size=64):
    return VisionTransformer(
        img_size=size, patch_size=16, embed_dim=64, depth=depth, num_heads=1, num_classes=0, global_pool="",
        pre_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5), act_layer=QuickGELU,
    )  # fmt: skip


def model_with(vision_weights="random", text_weights="random"):
    config = small_config()
    return M3AE(
        dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, weights=str(vision_weights)),
            text=dataclasses.replace(config.text, weights=str(text_weights)),
        )
    )


@pytest.mark.parametrize("form", ["folder", "safetensors", "pth"])
def test_vision_weights_from_plain_timm(tmp_path, form):
    plain = plain_vit()
    path = tmp_path / {"folder": "model.safetensors", "safetensors": "vit.safetensors", "pth": "vit.pth"}[form]
    if form == "pth":
        torch.save({"state_dict": plain.state_dict()}, path)
    else:
        save_file(plain.state_dict(), path)
    model = model_with(tmp_path if form == "folder" else path)
    load_tower_weights(model)
    for name, parameter in model.vision.named_parameters():  # 2 of its 3 blocks, as the original uses 11 of 12
        assert torch.equal(parameter, dict(plain.named_parameters())[name])
    plain_vit(depth=2).load_state_dict(model.vision.state_dict())  # and back


def test_vision_weights_of_another_size_are_resized(tmp_path):
    save_file(plain_vit(size=96).state_dict(), tmp_path / "vit.safetensors")
    model = model_with(tmp_path / "vit.safetensors")
    load_tower_weights(model)
    assert model.vision.pos_embed.shape == (1, 17, 64)


def test_vision_weights_under_openai_names(tmp_path):
    source = small_model(dtype=torch.float32)
    official = to_official(source.state_dict(), source)
    prefix = "vision_encoder."
    state = {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}
    torch.save(
        {**state, "visual.proj": torch.zeros(3), "token_embedding.weight": torch.zeros(5, 2)}, tmp_path / "clip.pt"
    )
    model = model_with(tmp_path / "clip.pt")
    load_tower_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(model.vision.parameters(), source.vision.parameters(), strict=True))


def test_vision_weights_that_do_not_fit(tmp_path):
    save_file(plain_vit(depth=1).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"another architecture: vision.blocks.1.norm1.weight is missing"):
        load_tower_weights(model_with(tmp_path / "vit.safetensors"))
    with pytest.raises(UserError, match="no_such_model"):
        load_tower_weights(model_with("no_such_model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        load_tower_weights(model_with(tmp_path / "empty"))


def test_the_swin_is_plain_timm():
    model = small_model("swin", objectives=("itm",), dtype=torch.float32)
    plain = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=2, num_classes=0,
        global_pool="",
    )  # fmt: skip
    plain.load_state_dict(model.vision.state_dict())


class Vocabulary:
    """What resolve_text asks of a tokenizer."""

    pad_token_id = 1

    def __len__(self):
        return 60


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_text_weights_from_plain_transformers(tmp_path, kind):
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 80, "max_position_embeddings": 34, "pad_token_id": 1,
    }  # fmt: skip
    config, tower = (RobertaConfig, RobertaModel) if kind == "roberta" else (BertConfig, BertModel)
    plain = tower(config(**sizes))
    plain.save_pretrained(tmp_path)
    text = resolve_text(TextConfig(weights=str(tmp_path)), Vocabulary())
    assert (text.kind, text.width, text.mlp_width, text.max_positions) == (kind, 32, 80, 34)
    assert text.layer_norm_eps == plain.config.layer_norm_eps
    model = M3AE(dataclasses.replace(small_config(), text=text))
    load_tower_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(model.text.parameters(), plain.parameters(), strict=True))
    plain.load_state_dict(model.text.state_dict())  # and back
    ids = torch.randint(4, 60, (2, 7))
    is_padding = torch.zeros(2, 7, dtype=torch.bool)
    is_padding[0, 5:] = True
    from fastm3ae.model.text import encode_tokens

    model.eval(), plain.eval()
    expected = plain(input_ids=ids, attention_mask=(~is_padding).long()).last_hidden_state
    assert torch.allclose(encode_tokens(model.text, ids, is_padding), expected, atol=1e-6)


def test_text_weights_that_cannot_be_had():
    with pytest.raises(UserError, match="model.text.weights 'no/such-model'"):
        resolve_text(TextConfig(weights="no/such-model"), Vocabulary())


def test_the_tokenizer_must_belong_to_the_tower():
    assert isinstance(resolve_text(TextConfig(), Vocabulary()).vocab_size, int)
    with pytest.raises(UserError, match="60 entries, but model.text.vocab_size is 50"):
        resolve_text(TextConfig(vocab_size=50), Vocabulary())
    with pytest.raises(UserError, match="pads with the id 1"):
        resolve_text(TextConfig(pad_token_id=0), Vocabulary())
