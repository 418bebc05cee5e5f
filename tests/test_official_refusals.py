"""Lines of the original that no run is made of: odd literals, numbers, lists and names end in a sentence."""

import pytest
import yaml

from fastm3ae.cli import main
from fastm3ae.errors import UserError
from fastm3ae.official.arguments import arguments_of, parse_official
from fastm3ae.official.translate import to_run_config

LINE = "task_pretrain_m3ae clip16 text_roberta max_text_len=64 num_gpus=1 per_gpu_batchsize=8"


def translated(words):
    return to_run_config(parse_official(arguments_of(f"{LINE} {words}")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seed=" + "-" * 9000 + "1", "seed must be a whole number, got '-----"),
        ("seed=" + "[" * 190 + "]" * 190, r"seed must be a whole number, got \[\[\[\[...\]"),
        ("seed=0x" + "f" * 6000, "seed must be a number of at most 64 bits, got a number of 24000 bits"),
        ("exp_name=0x" + "f" * 6000, "exp_name must be a number of at most 64 bits"),
        ("data_root=[1]", r"data_root must be a text, got \[1\]"),
        ("datasets=[1.5]", r"datasets must be a list, each a text, got \[1.5\]"),
        ("num_gpus=[1.5]", r"num_gpus must be a list, each a whole number, got \[1.5\]"),
        ("train_transform_keys=[None]", r"train_transform_keys must be a list, each a text, got \[None\]"),
        ("x" * 5000 + "=1", "The original has no configuration key x{900,}"),
        ("y" * 5000, "The original has no named configuration 'y"),
        ("exp_name=../../../owned", "exp_name must be a name within log_dir, got '../../../owned'"),
        ("exp_name=/tmp/owned", "exp_name must be a name within log_dir, got '/tmp/owned'"),
        ("exp_name=" + "a" * 5000, "The run folder cannot be 'result/aaa"),
    ],
)  # fmt: skip
def test_values_that_no_line_has(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        translated(words)
    assert len(str(refused.value)) < 1500 and not list(tmp_path.iterdir())


def test_a_number_of_gpus_is_not_counted_out():
    """Four billion GPUs take no list of their numbers."""
    assert translated("num_gpus=4294967296 num_nodes=1 batch_size=8")[0].train.device == "auto"


def test_the_folder_stays_within_log_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = translated("exp_name=a/b load_path=../../c.ckpt")
    assert config.output == "result/a/b-seed0-from_.._.._c.ckpt/version_0"


def test_a_line_break_in_a_value_ends_no_comment(tmp_path, monkeypatch, capsys):
    """The translation is headed by the line, as a comment."""
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--from-official", f"{LINE} tokenizer='x\nseed: 5'"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 0
