import dataclasses

import pytest
import yaml

from fastm3ae.config import PretrainConfig, TrainConfig
from fastm3ae.configfile import differences, from_dict, to_dict
from fastm3ae.errors import UserError
from fastm3ae.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name):
    config = preset(name)
    assert from_dict(PretrainConfig(), yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_defaults_are_the_official_run():
    """The numbers of run_scripts/pretrain_m3ae.sh."""
    config = preset("m3ae")
    vision, text, fusion, mim = config.model.vision, config.model.text, config.model.fusion, config.model.mim
    assert (vision.image_size_px, vision.patch_size_px, vision.width, vision.num_blocks) == (288, 16, 768, 11)
    assert (text.kind, text.width, text.num_layers, config.data.max_text_tokens) == ("roberta", 768, 12, 64)
    assert (fusion.num_layers, fusion.num_heads, fusion.dropout_frac) == (6, 12, 0.1)
    assert (mim.layer, mim.patch_frac, mim.decoder_width, mim.decoder_num_layers, mim.decoder_num_heads) == (
        3, 0.75, 384, 4, 6,
    )  # fmt: skip
    assert (config.optim.learning_rate, config.optim.weight_decay, config.optim.warmup_frac) == (1e-5, 0.01, 0.1)
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.98, 1e-8)
    assert (config.train.num_steps, config.train.batch_size) == (100_000, 256)
    assert config.data.datasets == ("medicat", "roco") and config.masking.token_frac == 0.15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"learning_rat": 1}}, r"Unknown configuration key optim.learning_rat. Did you mean 'learning_rate'"),
        ({"optm": {}}, r"Unknown configuration key optm. Did you mean 'optim'"),
        ({"optim": 3}, r"optim must be a section of keys, got 3"),
        ({"train": {"batch_size": "many"}}, r"train.batch_size must be of type int, got 'many'"),
        ({"train": {"batch_size": 2.5}}, r"train.batch_size must be of type int, got 2.5"),
        ({"train": {"batch_size": True}}, r"train.batch_size must be of type int, got True"),
        ({"train": {"precision": "bf61"}}, r"train.precision must be one of .*Did you mean 'bf16'"),
        ({"data": {"datasets": "roco"}}, r"data.datasets must be a list, got 'roco'"),
        ({"optim": {"learning_rate": "fast"}}, r"optim.learning_rate must be a number, got 'fast'"),
        ({"train": {"batch_size": 0}}, r"train.batch_size must be at least 1, got 0"),
        ({"masking": {"token_frac": 1.5}}, r"masking.token_frac must lie between 0 and 1, got 1.5"),
        ([1, 2], r"the configuration must be a section of keys"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(PretrainConfig(), values)


def test_values_keep_their_types():
    values = {
        "optim": {"learning_rate": "1e-4", "clip_grad_norm": None, "weight_decay": 0},
        "data": {"datasets": ["a"]},
    }
    config = from_dict(PretrainConfig(), values)
    assert config.optim.learning_rate == 1e-4 and config.optim.clip_grad_norm is None
    assert isinstance(config.optim.weight_decay, float) and config.data.datasets == ("a",)


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().batch_size = 3


def test_unknown_preset():
    with pytest.raises(UserError, match="no preset 'dmo'.*Did you mean 'demo'"):
        preset("dmo")


def test_differences_name_the_keys():
    old = to_dict(PretrainConfig())
    new = to_dict(dataclasses.replace(PretrainConfig(), train=TrainConfig(batch_size=8), seed=3))
    assert differences(old, new) == {"seed": (0, 3), "train.batch_size": (256, 8)}
    assert differences(old, old) == {}
    assert differences({"a": {"b": 1}}, {"c": 2}) == {"a": ({"b": 1}, None), "c": (None, 2)}


def test_micro_batch_is_a_number_or_auto():
    for value in (4, "auto"):
        assert from_dict(PretrainConfig(), {"train": {"micro_batch": value}}).train.micro_batch == value
    for value in (0, "atuo", 2.5):
        with pytest.raises(UserError, match="train.micro_batch must be"):
            from_dict(PretrainConfig(), {"train": {"micro_batch": value}})


def test_training_must_end():
    assert TrainConfig(num_steps=None, num_epochs=2).num_steps is None
    with pytest.raises(UserError, match="train.num_steps or train.num_epochs must say when training ends"):
        TrainConfig(num_steps=None)
