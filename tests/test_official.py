"""The original's command line: what a line says, the same run as our configuration, and running it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fastm3ae.cli import main
from fastm3ae.config import FinetuneConfig, PretrainConfig
from fastm3ae.config.files import differences, from_dict, to_dict
from fastm3ae.config.presets import FINETUNE_PRESETS, preset
from fastm3ae.errors import UserError
from fastm3ae.official.arguments import NAMED_CONFIGS, arguments_of, parse_official
from fastm3ae.official.translate import to_run_config

GOLDEN = Path(__file__).parent / "data" / "golden"
RECORDED = json.loads((GOLDEN / "resolved_official_configs.json").read_text())
PRETRAIN = (
    "data_root=data/pretrain_arrows/ num_gpus=8 num_nodes=1 task_pretrain_m3ae per_gpu_batchsize=32 clip16 "
    "text_roberta image_size=288 max_text_len=64 tokenizer=downloaded/roberta-base"
)


def downstream(task, *more, image_size=384, load_path="downloaded/pretrained/m3ae.ckpt"):
    """A line of the scripts for fine-tuning and testing."""
    return (
        f"data_root=data/finetune_arrows/ num_gpus=1 num_nodes=1 task_finetune_{task} per_gpu_batchsize=16 clip16 "
        f"text_roberta image_size={image_size} tokenizer=downloaded/roberta-base load_path={load_path} {' '.join(more)}"
    )


LINES = {
    "defaults": "",
    "run_scripts/pretrain_m3ae.sh": PRETRAIN,
    "run_scripts/finetune_m3ae.sh vqa_vqa_rad": downstream("vqa_vqa_rad"),
    "run_scripts/finetune_m3ae.sh vqa_slack": downstream("vqa_slack", "clip_resizedcrop"),
    "run_scripts/finetune_m3ae.sh vqa_medvqa_2019": downstream("vqa_medvqa_2019", "clip_resizedcrop"),
    "run_scripts/finetune_m3ae.sh cls_melinda_p_meth_label": downstream("cls_melinda_p_meth_label", "clip_resizedcrop"),
    "run_scripts/finetune_m3ae.sh irtr_roco (train)": downstream(
        "irtr_roco", "get_recall_metric=False", "clip_resizedcrop"
    ),
}

# The lines that test: the task, what the line says of it, and in what it then differs from the recorded training line.
FINETUNED = "downloaded/finetuned/"
TESTED = {
    "vqa_vqa_rad": (384, FINETUNED + "vqa/vqa_rad/m3ae_finetuned_vqa_vqa_rad_77.4.ckpt", None),
    "vqa_slack": (384, FINETUNED + "vqa/slack/m3ae_finetuned_vqa_slack_84.3.ckpt", None),
    "vqa_medvqa_2019": (384, FINETUNED + "vqa/medvqa_2019/m3ae_finetuned_vqa_medvqa_2019_80.5.ckpt", None),
    "cls_melinda_p_meth_label": (384, FINETUNED + "cls/melinda/m3ae_finetuned_cls_melinda_79.6.ckpt", None),
    "irtr_roco pretrained": (288, "downloaded/pretrained/m3ae.ckpt", False),
    "irtr_roco finetuned": (288, FINETUNED + "irtr/roco/m3ae_finetuned_irtr_roco.ckpt", True),
}


def resolved(line):
    return parse_official(line.split()).config


def translated(line):
    return to_run_config(parse_official(line.split()))


@pytest.mark.parametrize("name", LINES)
def test_script_lines_resolve_as_recorded(name):
    assert resolved(LINES[name]) == RECORDED[name]


def test_every_recorded_line_is_tested():
    assert LINES.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", TESTED)
def test_test_lines_differ_from_training_lines_as_they_say(name):
    image_size, load_path, recalls = TESTED[name]
    task = name.split()[0]
    words = ["test_only=True"] if recalls is None else ["test_only=True", f"get_recall_metric={recalls}"]
    recorded = next(config for key, config in RECORDED.items() if f" {task}" in key)
    expected = {**recorded, "image_size": image_size, "load_path": load_path, "test_only": True,
                "train_transform_keys": ["clip"], "get_recall_metric": bool(recalls)}  # fmt: skip
    assert resolved(downstream(task, *words, image_size=image_size, load_path=load_path)) == expected


def test_the_typo_in_the_script_for_fine_tuning():
    """One of its lines has pwdper_gpu_batchsize, which the original refuses, too."""
    line = downstream("irtr_roco", "get_recall_metric=True", "test_only=True", image_size=288)
    assert resolved(line)["per_gpu_batchsize"] == 16
    with pytest.raises(UserError, match="pwdper_gpu_batchsize. Did you mean 'per_gpu_batchsize'"):
        parse_official(line.replace("per_gpu", "pwdper_gpu").split())


def test_slake_under_its_own_name():
    assert resolved("task_finetune_vqa_slake") == resolved("task_finetune_vqa_slack")


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configurations_set_known_keys_to_possible_values(name):
    config = resolved(name)
    assert {key: config[key] for key in NAMED_CONFIGS[name]} == NAMED_CONFIGS[name]


def test_precedence():
    assert resolved("image_size=64 clip16")["image_size"] == 64  # a value beats what comes behind it, too
    assert resolved("clip32 clip16")["vit"] == "ViT-B/16"
    assert resolved("clip16 clip32")["vit"] == "ViT-B/32"
    assert resolved("clip16 task_finetune_irtr_roco")["image_size"] == 384
    assert resolved("seed=1 seed=2")["seed"] == 2


LITERALS = {
    "seed=3": 3,
    "learning_rate=2e-5": 2e-5,
    "learning_rate=1": 1,
    "max_steps=None": None,
    "max_steps=1e5": 100000,
    "warmup_steps=0.2": 0.2,
    "warmup_steps=500": 500,
    "decay_power=cosine": "cosine",
    "datasets=['roco']": ["roco"],
    "datasets=('roco','medicat')": ["roco", "medicat"],
    "num_gpus=[0,1]": [0, 1],
    "precision=bf16": "bf16",
    "fast_dev_run=3": 3,
    "norm_pix_loss=0": False,
    "exp_name=7": "7",
    "tokenizer='a b'": "a b",
    "load_path=": "",
    "load_path=a=b.ckpt": "a=b.ckpt",
    "loss_names.mim=1": {**RECORDED["defaults"]["loss_names"], "mim": 1},
    "loss_names={'itm':0}": {**RECORDED["defaults"]["loss_names"], "itm": 0},
}


@pytest.mark.parametrize("word", LITERALS)
def test_values_are_literals_or_texts(word):
    value = parse_official([word]).config[re.split(r"[.=]", word)[0]]
    assert value == LITERALS[word] and type(value) is type(LITERALS[word])


def test_one_line_leaves_the_next_alone():
    parse_official(["task_pretrain_m3ae", "loss_names.mim=0"]).config["datasets"].append("x")
    assert resolved("task_pretrain_m3ae")["loss_names"]["mim"] == 1
    assert resolved("task_pretrain_m3ae")["datasets"] == ["medicat", "roco"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clip61"], "no named configuration 'clip61'. Did you mean 'clip16'"),
        (["task_pretrain_m3e"], "Did you mean 'task_pretrain_m3ae'"),
        (["image_size", "288"], "no named configuration 'image_size'. Did you mean 'image_size=...'"),
        (["imagesize=3"], "no configuration key imagesize. Did you mean 'image_size'"),
        (["ouput=x"], "no configuration key ouput. Did you mean 'output'"),
        (["loss_names.mlmm=1"], "no configuration key loss_names.mlmm. Did you mean 'mlm'"),
        (["seed.x=1"], "seed must be a whole number, got {'x': 1}"),
        (["image_size=big"], "image_size must be a whole number, got 'big'"),
        (["image_size=2.5"], "image_size must be a whole number, got 2.5"),
        (["num_gpus=${num_gpus}"], r"num_gpus must be a whole number or a list, got '\${num_gpus}'"),
        (["learning_rate=fast"], "learning_rate must be a number, got 'fast'"),
        (["test_only=yes"], "test_only must be True or False, got 'yes'"),
        (["data_root=None"], "data_root must be a text, got None"),
        (["datasets=[roco]"], r"datasets must be a list, got '\[roco\]'. In a shell, quote the list: 'datasets="),
        (["loss_names=3"], "loss_names must be a dictionary, got 3"),
    ],
)
def test_mistakes_in_words(words, message):
    with pytest.raises(UserError, match=message):
        parse_official(words)


def test_words_of_a_command_line():
    words = ["seed=1", 'datasets=["roco"]']
    for line in (
        "python main.py \\\n with seed=1 \\\n 'datasets=[\"roco\"]'\n",
        "CUDA_VISIBLE_DEVICES=1 python main.py with seed=1 'datasets=[\"roco\"]'  # a remark",
        "with seed=1 'datasets=[\"roco\"]'",
        "seed=1 'datasets=[\"roco\"]'",
    ):
        assert arguments_of(line) == words
    with pytest.raises(UserError, match="cannot be split into words"):
        arguments_of("with 'seed=1")


def test_the_pre_training_line_is_our_preset_but_for_what_the_original_does_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, notes = translated(PRETRAIN)
    assert notes == []
    assert differences(to_dict(preset("m3ae")), to_dict(config)) == {
        "output": ("runs/m3ae", "result/task_pretrain_m3ae-seed0-from_/version_0"),
        "model.text.weights": ("roberta-base", "downloaded/roberta-base"),
        "data.root": ("data/pretrain_arrows", "data/pretrain_arrows/"),
        "data.tokenizer": ("roberta-base", "downloaded/roberta-base"),
        "data.alpha": ("composite", "official"),
        "data.on_bad_sample": ("stop", "skip"),
        "masking.words": ("whole_word", "official"),
        "train.micro_batch": ("auto", 32),
        "train.precision": ("bf16", "fp16"),
        "train.validate_every_epochs": (None, 1.0),
    }


MAPPED = {
    "load_path=a/b.ckpt": {
        "init_from": "a/b.ckpt", "output": "result/task_pretrain_m3ae-seed0-from_a_b.ckpt/version_0"},
    "exp_name=x log_dir=logs seed=2": {"output": "logs/x-seed2-from_/version_0", "seed": 2},
    "resume_from=x": {"resume": "x"},
    "loss_names.mim=0": {"model.objectives": ["mlm", "itm"]},
    "datasets=['roco']": {"data.datasets": ["roco"]},
    "clip_randaug": {"data.train_transform": "clip_randaug"},
    "train_transform_keys=['clip_resizedcrop'] val_transform_keys=['clip_resizedcrop']": {
        "data.train_transform": "clip_resizedcrop"},
    "clip32": {"model.vision.weights": "vit_base_patch32_clip_quickgelu_224.openai", "model.vision.patch_size_px": 32},
    "vit=ViT-L/14@336px patch_size=14 input_image_embed_size=1024 image_size=336": {
        "model.vision.weights": "vit_large_patch14_clip_quickgelu_336.openai", "model.vision.patch_size_px": 14,
        "model.vision.width": 1024, "model.vision.num_blocks": 23, "model.vision.image_size_px": 336},
    "swin32_large384 image_size=384 loss_names.mim=0": {
        "model.vision.kind": "swin", "model.vision.weights": "swin_large_patch4_window12_384.ms_in22k",
        "model.vision.patch_size_px": 4, "model.vision.width": 192, "model.vision.swin_num_heads": [6, 12, 24, 48],
        "model.vision.image_size_px": 384, "model.objectives": ["mlm", "itm"], "data.train_transform": "imagenet",
        "data.val_transform": "imagenet"},
    "tokenizer=bert-base-uncased": {
        "data.tokenizer": "bert-base-uncased", "model.text.kind": "bert", "model.text.weights": "bert-base-uncased",
        "model.text.max_positions": 512, "model.text.num_token_types": 2, "model.text.layer_norm_eps": 1e-12},
    "hidden_size=64 num_top_layer=4 num_heads=2 mlp_ratio=2 drop_rate=0": {
        "model.fusion.width": 64, "model.fusion.num_layers": 4, "model.fusion.num_heads": 2,
        "model.fusion.mlp_ratio": 2, "model.fusion.dropout_frac": 0.0},
    "mim_prob=0.5 mim_layer=-1 mim_decoder_hidden_size=64 mim_decoder_num_layers=2 mim_decoder_num_heads=2 "
    "norm_pix_loss=False": {
        "model.mim.patch_frac": 0.5, "model.mim.layer": -1, "model.mim.decoder_width": 64,
        "model.mim.decoder_num_layers": 2, "model.mim.decoder_num_heads": 2, "model.mim.normalize_target": False},
    "whole_word_masking=False mlm_prob=0.3": {"masking.words": "token", "masking.token_frac": 0.3},
    "learning_rate=2e-5 weight_decay=0.1 decay_power=2 end_lr=1e-7 lr_multiplier_head=3 lr_multiplier_multi_modal=4": {
        "optim.learning_rate": 2e-5, "optim.weight_decay": 0.1, "optim.decay_power": 2.0,
        "optim.end_learning_rate": 1e-7, "optim.head_lr_multiplier": 3.0, "optim.fusion_lr_multiplier": 4.0},
    "decay_power=cosine warmup_steps=500": {"optim.schedule": "cosine", "optim.warmup_steps": 500},
    "warmup_steps=0.3": {"optim.warmup_frac": 0.3},
    "max_steps=None max_epoch=7": {"train.num_steps": None, "train.num_epochs": 7},
    "batch_size=1000": {"train.batch_size": 768},  # 32 x 8 x (1000 // 256)
    "batch_size=100": {},  # never less than a pass on every GPU
    "num_gpus=[0,1]": {},  # 32 x 2 x 4
    "num_nodes=2 batch_size=1024": {"train.batch_size": 1024},
    "per_gpu_batchsize=0 batch_size=100": {"train.batch_size": 100, "train.micro_batch": "auto"},
    "num_gpus=0": {"train.device": "cpu"},
    "num_workers=0 precision=32": {"train.num_workers": 0, "train.precision": "fp32"},
    "precision=bf16": {"train.precision": "bf16"},
    "val_check_interval=0.25": {"train.validate_every_epochs": 0.25},
    "val_check_interval=1000 batch_size=1024": {
        "train.validate_every_epochs": None, "train.validate_every_steps": 250, "train.batch_size": 1024},
    "fast_dev_run=True": {"train.num_steps": 1, "train.max_val_batches": 1},
    "fast_dev_run=4 max_steps=None": {"train.num_steps": 4, "train.max_val_batches": 4},
    "model.text.weights=random train.num_steps=20 model.vision.width=64 model.objectives=['mlm'] output=x": {
        "model.text.weights": "random", "train.num_steps": 20, "model.vision.width": 64, "model.objectives": ["mlm"],
        "output": "x"},
    "num_top_layer=2 model.mim.layer=1": {"model.fusion.num_layers": 2, "model.mim.layer": 1},
}  # fmt: skip


@pytest.mark.parametrize("words", MAPPED)
def test_what_each_key_becomes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = (to_dict(translated(line)[0]) for line in (PRETRAIN, f"{PRETRAIN} {words}"))
    assert {key: new for key, (_, new) in differences(before, after).items()} == MAPPED[words]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{downstream('vqa_slack')} loss_names.cls=1", "loss_names must name one task to fine-tune for, got vqa, cls"),
        (f"{PRETRAIN} test_only=True", "task_pretrain_m3ae is a pre-training, which has no test_only=True"),
        (f"{PRETRAIN} vit=ViT-B/61", "vit must be one of .* Did you mean 'ViT-B/16'"),
        (f"{PRETRAIN} patch_size=32", "patch_size must be 16 for the vision tower vit=ViT-B/16, got 32"),
        (f"{PRETRAIN} input_image_embed_size=512", "input_image_embed_size must be 768 .* got 512"),
        (f"{PRETRAIN} imagenet_randaug", "data.train_transform must be one of"),
        (f"{PRETRAIN} train_transform_keys=['clip','clip']", "train_transform_keys must name exactly one transform"),
        (f"{PRETRAIN} swin32_base224 image_size=224", "Swin cannot be masked"),
        (f"{PRETRAIN} optim_type=sgd", "optim_type must be 'adamw', the only optimiser here, got 'sgd'"),
        (f"{PRETRAIN} decay_power=linear", "decay_power must be a number or 'cosine', got 'linear'"),
        (f"{PRETRAIN} precision=64", "precision must be one of 16, bf16 and 32, got 64"),
        (f"{PRETRAIN} resume_from=a/last.ckpt", "is a checkpoint of the original, .* load_path=a/last.ckpt starts"),
        (f"{PRETRAIN} num_gpus=-1", "num_gpus must not be negative"),
        (f"{PRETRAIN} model.vison.width=64", "Unknown configuration key model.vison. Did you mean 'vision'"),
        (f"{PRETRAIN} train.num_steps=few", "train.num_steps must be of type int, got 'few'"),
        (f"{PRETRAIN} model=3", "model must be a section of keys, got 3"),
    ],
)
def test_what_cannot_be_run(line, message):
    with pytest.raises(UserError, match=message):
        translated(line)


@pytest.mark.parametrize(
    ("line", "task", "name"),
    [
        ("vqa_vqa_rad", "vqa", "vqa-rad"),
        ("vqa_slack", "vqa", "slake"),
        ("vqa_medvqa_2019", "vqa", "medvqa-2019"),
        ("cls_melinda_p_meth_label", "classification", "melinda"),
        ("irtr_roco (train)", "retrieval", "roco"),
    ],
)
def test_finetuning_lines_are_the_presets(line, task, name):
    """But for what every line of the original asks for, and from where it reads."""
    config, _ = translated(LINES[f"run_scripts/finetune_m3ae.sh {line}"])
    assert isinstance(config, FinetuneConfig) and config.init_from == "downloaded/pretrained/m3ae.ckpt"
    changed = differences(to_dict(FINETUNE_PRESETS[task][name]()), to_dict(config))
    ours = ("output", "init_from", "data.root", "data.tokenizer", "data.alpha", "data.on_bad_sample",
            "train.micro_batch", "train.precision", "model.text.weights", "model.mim.layer")  # fmt: skip
    assert changed.keys() == set(ours)


def test_keys_without_effect_are_named_once():
    _, notes = translated(f"{PRETRAIN} default_root_dir=x vocab_size=7 draw_false_image=2 num_layers=3 max_epoch=20")
    assert len(notes) == 1 and "default_root_dir, vocab_size, draw_false_image, num_layers, max_epoch" in notes[0]
    _, notes = translated(f"{PRETRAIN} max_steps=None max_epoch=20 num_gpus=[2,3]")
    assert len(notes) == 1 and "num_gpus=[2, 3] means the first 2 GPUs" in notes[0]


def test_the_next_free_version(tmp_path):
    line = f"{PRETRAIN} log_dir={tmp_path}"
    folder = tmp_path / "task_pretrain_m3ae-seed0-from_"
    for name in ("version_0", "version_10", "version_2", "version_x", "versions_99"):
        (folder / name).mkdir(parents=True)
    assert translated(line)[0].output == str(folder / "version_11")
    assert translated(f"{line} resume=auto")[0].output == str(folder / "version_10")
    assert translated(f"{line} exp_name=new resume=auto")[0].output.endswith("new-seed0-from_/version_0")


def test_from_official_prints_the_configuration_that_with_runs(tmp_path, monkeypatch, capsys):
    from fastm3ae.training import pretrain

    ran = []
    monkeypatch.setattr(pretrain, "pretrain", ran.append)
    monkeypatch.chdir(tmp_path)
    line = f"{PRETRAIN} num_gpus=1 vocab_size=3"
    assert main(["pretrain", "--from-official", f"python main.py with {line}"]) == 0
    printed = capsys.readouterr().out
    assert [text for text in printed.splitlines() if text.startswith("#")] == [
        f"# python main.py with {line}",
        "# to run it: python -m fastm3ae pretrain --config THIS_FILE",
        "# Without effect here: vocab_size.",
    ]
    assert main(["with", *line.split()]) == 0
    assert capsys.readouterr().err.count("warning: Without effect") == 1
    (tmp_path / "run.yaml").write_text(printed)
    assert main(["pretrain", "--config", "run.yaml"]) == 0
    assert ran[0] == ran[1] == from_dict(PretrainConfig(), yaml.safe_load(printed))
    assert main(["pretrain", "--from-official", line, "--train.num-steps", "9", "--output", "there"]) == 0
    changed = differences(to_dict(ran[0]), yaml.safe_load(capsys.readouterr().out))
    assert changed == {"output": (ran[0].output, "there"), "train.num_steps": (100000, 9)}
    assert main(["pretrain", "--from-official", PRETRAIN]) == 0
    assert "# to run it: torchrun --nproc-per-node 8 -m fastm3ae pretrain" in capsys.readouterr().out
    assert len(ran) == 2  # printing runs nothing


def test_profile_measures_the_run_of_an_official_line(tmp_path, monkeypatch, capsys):
    from fastm3ae.training import profile

    class Measured:
        def render(self):
            return "measured"

    asked = []
    monkeypatch.setattr(profile, "profile", lambda config, **options: asked.append(config) or Measured())
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--from-official", PRETRAIN, "--train.micro-batch", "3"]) == 0
    assert capsys.readouterr().out == "measured\n"
    changed = differences(to_dict(translated(PRETRAIN)[0]), to_dict(asked[0]))
    assert changed["train.micro_batch"][1] == 3 and len(changed) == 1
    assert main(["profile", "--from-official", "with task_finetune_cls_melinda_p_meth data_root=d"]) == 2
    assert "is for `fastm3ae finetune classification --from-official`, not profile" in capsys.readouterr().err


def test_help_and_mistakes_through_the_command(capsys):
    for arguments in (["with"], ["with", "--help"], ["with", "clip16", "-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "task_pretrain_m3ae" in text and "per_gpu_batchsize" in text and "--from-official" in text
    assert main(["with", *downstream("vqa_vqa_rad").split()]) == 2
    assert "error: The data folder data/finetune_arrows does not exist" in capsys.readouterr().err
    assert main(["with", *downstream("vqa_vqa_rad").split(), "test_only=True", "load_path="]) == 2
    assert "error: test_only=True needs the checkpoint to test" in capsys.readouterr().err
    assert main(["finetune", "vqa", "--from-official", PRETRAIN]) == 2
    assert "task_pretrain_m3ae is for `fastm3ae pretrain --from-official`, not finetune vqa" in capsys.readouterr().err
    melinda = "with task_finetune_cls_melinda_p_meth data_root=d load_path=gone.ckpt"
    assert main(["finetune", "vqa", "--from-official", melinda]) == 2
    assert "is for `fastm3ae finetune classification --from-official`, not finetune vqa" in capsys.readouterr().err
    assert main(["finetune", "classification", "--from-official", melinda]) == 0  # the checkpoint is not looked for
    assert yaml.safe_load(capsys.readouterr().out)["init_from"] == "gone.ckpt"
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain", "--preset", "demo", "--from-official", PRETRAIN])
    assert "not allowed with argument" in capsys.readouterr().err
