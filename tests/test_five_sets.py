"""From each release of the original's benchmark to a tested model: prepare, finetune, evaluate, predict."""

import json

import pytest
import yaml
from prepared import image_bytes, write
from runs import MODEL, TOKENIZER
from test_prepare import write_roco
from test_prepare_melinda import write_melinda
from vqa_trees import MEDVQA, SLAKE, rad_splits, write_official, write_rad, write_slake

from fastm3ae.cli import main

SETS = {
    # name of the source, its preset, how it is written, further options of prepare, and of finetune
    "vqa-rad": ("vqa", "vqa-rad", lambda root: write_rad(root, rad_splits()), [], []),
    "slake": ("vqa", "slake", lambda root: write_slake(root, SLAKE), [], []),
    "medvqa-2019": ("vqa", "medvqa-2019", lambda root: write_official(root, MEDVQA), [], []),
    "melinda": ("classification", "melinda", write_melinda, [], ["--task.label-column", "i_meth_label"]),
    "irtr-roco": (
        "retrieval", "roco", write_roco, ["--num-val", "1", "--num-test", "2"], ["--task.num-false-texts", "3"]
    ),
}  # fmt: skip
OUTPUTS = {"metrics.json", "results.md", "predictions.csv", "predictions.jsonl"}


@pytest.mark.parametrize("source", SETS)
def test_from_the_release_to_the_results(tmp_path, monkeypatch, capsys, source):
    """The preset's own run but for a tiny model of random weights and a few steps."""
    task, preset, write_release, prepare_options, finetune_options = SETS[source]
    monkeypatch.chdir(tmp_path)
    write_release(tmp_path / "release")
    assert main(["prepare", source, "release", "data/finetune_arrows", *prepare_options]) == 0
    model = {
        **MODEL,
        "vision": {**MODEL["vision"], "weights": "random"},
        "text": {**MODEL["text"], "weights": "random"},
    }
    train = {
        "num_steps": 3,
        "num_epochs": None,
        "batch_size": 2,
        "num_workers": 0,
        "tensorboard": False,
        "device": "cpu",
    }
    config = {"model": model, "data": {"tokenizer": str(TOKENIZER), "max_text_tokens": 24}, "train": train}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--preset", preset, "--config", "tiny.yaml", "--output", "run", *finetune_options]
    assert main(["finetune", task, *arguments]) == 0
    assert {path.name for path in (tmp_path / "run/test").iterdir()} >= OUTPUTS
    tested = json.loads((tmp_path / "run/test/metrics.json").read_text())
    assert tested["about"]["weights_were_random"] and tested["about"]["preparation"] is not None
    assert main(["evaluate", "run/checkpoints/best", "--output", "again", "--device", "cpu", "--num-workers", "0"]) == 0
    assert json.loads((tmp_path / "again/metrics.json").read_text())["metrics"] == tested["metrics"]
    if task != "retrieval":
        write(tmp_path / "x.jpg", image_bytes(3, "JPEG"))
        capsys.readouterr()
        text = ["--question", "is it clear?"] if task == "vqa" else ["--text", "a gel"]
        predict = ["--checkpoint", "run/checkpoints/best", "--image", "x.jpg", "--json", "--device", "cpu", *text]
        assert main(["predict", task, *predict]) == 0
        assert tested["about"]["labels"][0] in capsys.readouterr().out
