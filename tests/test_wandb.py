"""Weights & Biases, by its own package, without a network: what is sent, and what becomes of a run where it fails."""

import io
import json
import shutil
import struct
import sys

import pytest
from runs import run, write_corpus

wandb = pytest.importorskip("wandb")

from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

PROJECT = ("--train.wandb-project", "reports")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Data, and a user without a login."""
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_corpus(tmp_path)
    yield tmp_path
    wandb.teardown()  # or else it would not look at the environment again


def records(file):
    """The messages in a .wandb file: a header of 7 bytes, then LevelDB's log of blocks of 32 KiB."""
    data, place, message = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(message)
            message = b""
        if 32768 - place % 32768 < 7:  # too little for a header is left empty
            place += 32768 - place % 32768


def sent(file):
    """The values of each row that was logged, and the configuration."""
    wandb.teardown()  # waits for the process that writes the file
    rows, config = [], {}
    for record in records(file):
        if record.HasField("history"):
            rows.append(_values(record.history.item))
        if record.HasField("run"):
            config |= _values(record.run.config.update)
    return rows, config


def _values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def logged(folder):
    """Step and values of each line of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), _named(line.pop("split"), line)) for line in lines]


def _named(split, values):
    return {f"{split}/{name}": value for name, value in values.items()}


def test_a_resumed_run_goes_on_with_its_wandb_run(corpus):
    folder = corpus / "run"
    assert run(corpus, *PROJECT) == 0
    first = json.loads((folder / "wandb.json").read_text())
    before = logged(folder)
    shutil.rmtree(folder / "checkpoints" / "step_000006")  # as if it had been killed before that was written
    assert run(corpus, *PROJECT, "--resume", "auto") == 0
    assert json.loads((folder / "wandb.json").read_text()) == first and first["project"] == "reports"
    files = sorted((folder / "wandb").glob(f"offline-run-*-{first['id']}/run-{first['id']}.wandb"))
    assert len(files) == 2
    for file, expected in zip(files, (before, [line for line in logged(folder) if line[0] > 4]), strict=True):
        rows, config = sent(file)
        assert config["train"]["wandb_project"] == "reports" and config["seed"] == 0
        found = [(row.pop("step"), {name: v for name, v in row.items() if not name.startswith("_")}) for row in rows]
        assert found == expected  # numbers alone: no picture, unless it is asked for
    assert run(corpus, "--train.wandb-project", "other", "--resume", "auto") == 0
    assert json.loads((folder / "wandb.json").read_text())["id"] != first["id"]


def test_pictures_are_sent_where_they_are_asked_for(corpus):
    assert run(corpus, *PROJECT, "--train.wandb-pictures", train={"num_steps": 1}) == 0
    (file,) = (corpus / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    names = {name.split("/")[0] for row in sent(file)[0] for name in row}
    assert {"reconstructions", "words"} & names


def test_a_run_outlives_weights_and_biases(corpus, monkeypatch, capsys):
    calls = []

    def log(self, values):
        calls.append(values)
        if len(calls) == 3:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", log)
    assert run(corpus, *PROJECT) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: Weights & Biases failed (Connection lost); the run goes on") == 1
    assert len(calls) == 3 and [step for step, _ in logged(corpus / "run")] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_what_cannot_be_started_ends_the_run_at_once(corpus, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal to ask for a login
    assert run(corpus, *PROJECT) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: Weights & Biases cannot be started (") and "WANDB_MODE=offline" in said
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(corpus, *PROJECT) == 2
    assert "error: train.wandb_project needs the package wandb: pip install" in capsys.readouterr().err
    assert run(corpus, train={"num_steps": 1}) == 0  # the folder is still free for it
