import dataclasses

import pytest
import yaml

from fastm3ae.config import PretrainConfig, RunConfig, TrainConfig
from fastm3ae.config.files import differences, from_dict, read_yaml, to_dict
from fastm3ae.config.presets import PRESETS, preset
from fastm3ae.errors import UserError


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


NESTED = [1]
for _ in range(100):
    NESTED = [NESTED] * 10  # stands for 10^100 values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"kind": ["mpma"]}}, r"model.kind must be one of 'm3ae', 'mpma', 'image', got \['mpma'\]\."),
        ({"seed": 16**6000}, "seed must be a number of at most 64 bits, got a number of 24001 bits"),
        ({"seed": 2**63 - 1, "optim": {"eps": 16**6000}}, "optim.eps must be a number of at most 64 bits"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate must be a finite number, got nan"),
        ({"optim": {"weight_decay": "inf"}}, "optim.weight_decay must be a finite number, got inf"),
        ({"output": "a\0b"}, "output must be a text without NUL and half characters, got 'a.x00b'"),
        ({"output": "\ud800"}, "output must be a text without NUL and half characters"),
        ({"data": NESTED}, r"data must be a section of keys, got \[\[\[\[...\]"),
        ({"x" * 10**6: 1}, "Unknown configuration key x{900,}..."),
        ({"train": {"cuda_graphs": 1}}, "train.cuda_graphs must be of type bool, got 1"),
        ({"model": {"kind": "mpma", "image": {"target_scale": True}}}, "target_scale must be one of 1, 2, got True"),
    ],
)
def test_values_that_no_configuration_has(values, message):
    with pytest.raises(UserError, match=message) as refused:
        from_dict(PretrainConfig(), values)
    assert len(str(refused.value)) < 1500


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
MERGED = "a: &a {b: 1}\nc:\n  <<: *a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"has aliases \(\*name\), which are not read: write out what they stand for"),
        (MERGED, "has aliases"),
        ("[" * 50_000, "is no configuration: more than 32 sections within each other"),
        ("- " * 50_000, "is no configuration: more than 32 sections"),
        ("x" * 300_000, "is too long for a configuration: more than 262144 bytes"),
        ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("a: 2001-99-99", "is not YAML: month must be in 1..12"),
        ("!!python/object/apply:os.mkdir [owned]", "is not YAML: could not determine a constructor"),
        ("\udcff", "is not YAML: 'utf-8' codec can't decode"),
        ("a: [", "is not YAML: while parsing"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_read(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"a\.yaml {message}"):
        read_yaml(tmp_path / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_sizes_are_checked_before_a_model_is_built():
    for model, message in (
        ({"fusion": {"num_layers": 0}}, "model.fusion.num_layers must be at least 1, got 0"),
        ({"text": {"num_layers": 257}}, "model.text.num_layers must be at most 256"),
        ({"vision": {"width": 64 * 10**6}}, "model.vision.width must be at most 65536"),
        ({"vision": {"kind": "swin", "image_size_px": 96, "patch_size_px": 4, "swin_num_heads": [1]}}, "an entry"),
        ({"mim": {"decoder_width": 6}}, "model.mim.decoder_width must be a multiple of 4"),
        ({"kind": "image", "decoder_widths": [1] * 9}, "model.decoder_widths must be one to 8 numbers, got 9 of them"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            from_dict(RunConfig(), {"model": {"objectives": ["mlm"], **model} if "kind" not in model else model})
