"""What was found to fit is found once: remembered for runs of the same kind, and never the cause of a failure."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import small_config

import fastm3ae
from fastm3ae.config import DataConfig, FinetuneConfig, PretrainConfig, TaskConfig, TrainConfig
from fastm3ae.errors import UserError
from fastm3ae.training import run
from fastm3ae.training.distributed import Processes
from fastm3ae.training.memory import explain_full_memory, fit_micro_batch, largest_that_fits
from fastm3ae.training.pretrain import PRETRAINING
from fastm3ae.training.remembered import find_once

CONFIG = PretrainConfig(model=small_config(), train=TrainConfig(batch_size=256))
GPU = torch.device("cuda")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes its time, after each failed attempt
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastm3ae" / "micro_batch.json"


@pytest.fixture
def gpu(monkeypatch):
    """What the GPU is taken for, which is not there."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150_754_820_096)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


@pytest.fixture
def process(monkeypatch, gpu):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    process = Processes("cpu")
    process.device = GPU
    return process


class Search:
    """Finds a number and counts how often it was asked."""

    def __init__(self, limit):
        self.limit, self.number = limit, 0

    def __call__(self):
        self.number += 1
        return largest_that_fits(256, self._attempt)

    def _attempt(self, size):
        if size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_search_is_made_once(file, process, capsys):
    search = Search(40)
    assert find_once(search, CONFIG, 256, process) == 37
    assert f"micro_batch 37: so many pairs fit at once, which {file} remembers" in capsys.readouterr().out
    assert [of["micro_batch"] for of in json.loads(file.read_text()).values()] == [37]
    assert find_once(search, CONFIG, 256, process) == 37 and search.number == 1
    said = capsys.readouterr().out
    assert said.startswith("micro_batch 37, as found before on 20") and f"; delete {file} to search anew" in said
    assert os.listdir(file.parent) == [file.name]
    file.unlink()
    assert find_once(search, CONFIG, 256, process) == 37 and search.number == 2


def with_section(section, **changes):
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})


OTHER_RUNS = {
    "model": with_section("model", objectives=("mlm",)),
    "precision": with_section("train", precision="fp16"),
    "checkpointing": with_section("train", checkpoint_activations=True),
    "original": with_section("train", step="original"),
    "compiled": with_section("train", compiled=True),
    "graphs": with_section("train", cuda_graphs=True),
    "texts": with_section("data", max_text_tokens=30),
    "masks": with_section("masking", token_frac=0.5),
    "task": FinetuneConfig(model=CONFIG.model, train=CONFIG.train, task=TaskConfig(kind="retrieval")),
}
SAME_RUNS = {
    "steps": with_section("train", num_steps=3, log_every_steps=2, num_workers=1),
    "seed": replace(CONFIG, seed=4, output="elsewhere"),
    "data": with_section("data", root="elsewhere", datasets=("other",)),
    "optim": with_section("optim", learning_rate=1e-3),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_kind_of_run_is_searched_for(file, process, name):
    assert find_once(Search(40), CONFIG, 256, process) == 37
    assert find_once(Search(300), OTHER_RUNS[name], 256, process) == 256
    assert len(json.loads(file.read_text())) == 2
    assert find_once(Search(1), CONFIG, 256, process) == 37  # both are remembered
    assert find_once(Search(1), OTHER_RUNS[name], 256, process) == 256


@pytest.mark.parametrize("name", SAME_RUNS)
def test_the_same_kind_of_run_is_not(file, process, name):
    assert find_once(Search(40), CONFIG, 256, process) == 37
    assert find_once(Search(300), SAME_RUNS[name], 256, process) == 37


@pytest.mark.parametrize("name", ["gpu", "memory", "torch", "fastm3ae", "share", "processes"])
def test_other_circumstances_are_searched_for(file, process, gpu, monkeypatch, name):
    assert find_once(Search(40), CONFIG, 256, process) == 37
    if name == "gpu":
        gpu.name = "NVIDIA A100"
    elif name == "memory":
        gpu.total_memory //= 2
    elif name == "processes":
        process.number = 2
    elif name != "share":
        monkeypatch.setattr({"torch": torch, "fastm3ae": fastm3ae}[name], "__version__", "0.0")
    assert find_once(Search(300), CONFIG, 128 if name == "share" else 256, process) == 256


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 3}', b'{"a": {"micro_batch": 0, "gpus": [], "date": ""}}',
     b'{"a": {"micro_batch": true, "gpus": [], "date": ""}}', b'{"a": {"micro_batch": 4, "gpus": 3, "date": ""}}',
     b"[" * 100_000],
    ids=["empty", "cut", "list", "no text", "number", "zero", "true", "no gpus", "deep"],
)  # fmt: skip
def test_a_damaged_file_is_said_and_replaced(file, process, capsys, content):
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert find_once(Search(40), CONFIG, 256, process) == 37
    said = capsys.readouterr().out
    assert said.count("micro_batch.json in the cache folder cannot be used, so that micro_batch is searched for") == 1
    assert find_once(Search(1), CONFIG, 256, process) == 37
    assert "cannot be used" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said(file, process, capsys):
    file.parent.parent.write_text("a file, where a folder is needed")
    assert find_once(Search(40), CONFIG, 256, process) == 37
    assert "cannot be written, so that micro_batch is not remembered: " in capsys.readouterr().out


def test_a_user_without_a_home(file, process, monkeypatch, capsys):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    assert find_once(Search(40), CONFIG, 256, process) == 37
    assert "not remembered: Could not determine home directory." in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_file_whole(file, process, monkeypatch, capsys):
    find_once(Search(40), CONFIG, 256, process)
    before = file.read_bytes()

    def no_space(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        assert find_once(Search(300), OTHER_RUNS["masks"], 256, process) == 256
    assert "No space left on device" in capsys.readouterr().out
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_cpu_remembers_nothing(file, process):
    process.device = torch.device("cpu")
    search = Search(40)
    assert find_once(search, CONFIG, 256, process) == find_once(search, CONFIG, 256, process) == 37
    assert search.number == 2 and not file.exists()


def test_what_did_not_fit_after_all_is_forgotten(file, process, gpu):
    for limit, config in ((40, CONFIG), (40, OTHER_RUNS["masks"]), (300, OTHER_RUNS["texts"])):
        find_once(Search(limit), config, 256, process)
    forgotten = "give a smaller --train.micro-batch, or auto, which will search anew: what it had found is forgotten"
    with pytest.raises(UserError, match=f"full in step 8, with passes of 37 pairs: {forgotten} .CUDA out of memory"):
        with explain_full_memory(GPU, 8, 37):
            raise torch.OutOfMemoryError("CUDA out of memory")
    assert [of["micro_batch"] for of in json.loads(file.read_text()).values()] == [256]
    assert find_once(Search(20), CONFIG, 256, process) == 20
    # What was found on other GPUs, or never, stays.
    before, gpu.name = file.read_bytes(), "NVIDIA A100"
    for device, micro_batch in ((GPU, 20), (GPU, 5), (torch.device("cpu"), 20)):
        with pytest.raises(UserError, match=r"or auto \(full\)"), explain_full_memory(device, 9, micro_batch):
            raise torch.OutOfMemoryError("full")
    assert file.read_bytes() == before


def test_runs_use_it(file, process, monkeypatch):
    """A new one does; a resumed one goes on with its own, and a number that is given is taken."""
    tried = []

    def fit(model, config, most, autocast, longest_batch, state_frac):
        tried.append((most, len(longest_batch(2))))
        return largest_that_fits(most, Search(40)._attempt)

    monkeypatch.setattr(run, "fit_micro_batch", fit)
    state = {"num_processes": 1, "micro_batch": 11}
    given = with_section("train", micro_batch=9)
    made = [
        run.with_micro_batch(config, None, PRETRAINING, process, state).train.micro_batch
        for config, state in ((CONFIG, None), (CONFIG, None), (CONFIG, state), (given, None))
    ]
    assert made == [37, 37, 11, 9] and tried == [(256, 2)]


@pytest.mark.gpu
def test_a_gpu_is_asked_once(file):
    from models import small_gpu_model

    model = small_gpu_model(init_std=0.03)
    data, train = DataConfig(max_text_tokens=32), TrainConfig(batch_size=64)
    config = PretrainConfig(model=model.config, data=data, train=train)
    process, tried = Processes("cuda"), []
    for _ in range(2):
        found = run.with_micro_batch(config, model, PRETRAINING, process)
        tried.append(found.train.micro_batch)
    assert tried == [64, 64] and len(json.loads(file.read_text())) == 1
    assert fit_micro_batch(model, config, 64, run.autocast_context(config.train, process.device),
                           lambda num: PRETRAINING.longest_batch(config, num), state_frac=0.5) == 64  # fmt: skip
