"""The benchmark of retrieval: its yardstick, its FLOPs, its targets."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import small_config
from test_flops import ORIGINAL
from test_pair_scores import one_at_a_time
from test_step_benchmarks import run_main
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def retrieval(monkeypatch):
    """The benchmark with a small model: 9 tokens at most, 6 images with 6 texts, two images at a time."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import retrieval

    config = small_config(objectives=("retrieval",), init_std=0.1)
    monkeypatch.setattr(retrieval, "official_config", lambda: config)
    monkeypatch.setattr(retrieval, "timed_config", lambda: config)
    for name, value in {
        "NUM_TOKENS": 9, "LENGTHS": (9, 5), "SIZES_PX": (64,), "NUM_TIMED": 6, "NUM_AT_A_TIME": 2, "SHORTEST": 3,
        "TEXTS_PER_PASS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(retrieval, name, value)
    return retrieval


def make_model(retrieval):
    import whole_step

    return whole_step.make_model(retrieval.timed_config()).eval()


def test_both_ways_give_the_scores_of_the_model(retrieval):
    model = make_model(retrieval)
    batch = retrieval.make_texts(model.config, [3, 9, 5, 9])
    batch = dataclasses.replace(batch, image_BCHW=batch.image_BCHW[:3])
    want = one_at_a_time(model, batch.image_BCHW, batch.text_ids_BT, batch.is_padding_BT)
    assert want.shape == (3, 4) and want.std() > 0.05
    for way in retrieval.WAYS.values():
        assert (way(model, batch) - want).abs().max() < 1e-5


@pytest.mark.parametrize("num_tokens", [9, 5])
def test_flops_are_those_of_the_scores(retrieval, num_tokens):
    """What is added up is what the products of three images with four texts need, and the original's with its own."""
    model = make_model(retrieval)
    flops = retrieval.count_flops(model.config, num_tokens)
    batch = retrieval.make_texts(model.config, [num_tokens] * 4)
    batch = dataclasses.replace(batch, image_BCHW=batch.image_BCHW[:3])
    counted = {}
    for name, way in retrieval.WAYS.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            way(model, batch)
        counted[name] = counter.get_total_flops()
    assert counted["original"] == 12 * flops["original pair"]
    assert counted["ours"] == 3 * flops["image"] + 4 * flops["text"] + 12 * flops["pair"]
    assert retrieval.flops_frac(flops, 3, 4) == pytest.approx(counted["ours"] / counted["original"])


def test_flops_of_the_fusion_by_hand(retrieval):
    """Of three layers: the first without what is cached, the second whole, of the last CLS alone."""
    config = retrieval.timed_config()
    flops, width, num_heads = retrieval.count_flops(config, 9), config.fusion.width, config.fusion.num_heads
    num_image = 1 + config.vision.num_patches
    for own, other in ((9, num_image), (num_image, 9)):
        mlp, attention = 4 * config.fusion.mlp_ratio * own * width**2, 4 * own * other * width
        first = 2 * own * width**2 + mlp + attention
        whole = first + 2 * (3 + 1 + 1) * own * width**2 + 4 * other * width**2 + 4 * own * own * width
        # Queries, then of self- and cross-attention keys and values of one query, and the products behind.
        keys = 4 * num_heads * (own + other) * width + 2 * 4 * width**2
        last = 2 * (2 + 2) * width**2 + keys + 4 * config.fusion.mlp_ratio * width**2
        flops["pair"] -= first + whole + last
    assert flops["pair"] == 2 * 2 * width**2 + 2 * 2 * width  # poolers and head


def test_official_flops(monkeypatch):
    """A pair costs the original what image-text matching costs it, but for the head; and ours meets its target."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import retrieval

    flops = retrieval.count_flops(retrieval.counted_config(288), 64)
    retrieval_head = 2 * 2 * 768
    assert flops["original pair"] == sum(of_part for of_part, _ in ORIGINAL["itm"].values()) - 6144 + retrieval_head
    assert retrieval.flops_frac(flops, 2000, 2000) <= retrieval.MAX_FLOPS_FRAC


@pytest.mark.parametrize(("target", "status"), [(0.01, 0), (100.0, 1)])
def test_check(retrieval, monkeypatch, tmp_path, capsys, target, status):
    monkeypatch.setattr(retrieval, "MIN_RATIO", target)
    monkeypatch.setattr(retrieval, "MAX_FLOPS_FRAC", 0.9)
    file = tmp_path / "step_retrieval.json"
    assert run_main(retrieval, monkeypatch, "--check", "--output", file) == status
    said = capsys.readouterr().out
    assert "36 scores with a deviation of 0." in said and "64 px, 5 tokens" in said
    assert said.splitlines()[-1].startswith("time of the original's way over ours: ")
    record = json.loads(file.read_text())
    frac, ratio = record["figures"]
    assert 0.2 < frac["value"] < 0.9 and ratio["is_missed"] == bool(status)
    assert ratio["value"] == record["rows"][1]["times_first"] and record["rows"][1]["batch_size"] == 12
    if status:
        assert run_main(retrieval, monkeypatch) == 0  # it is only said


def test_nothing_is_timed_with_wrong_scores(retrieval, monkeypatch):
    monkeypatch.setattr(retrieval, "our_scores", lambda model, batch: torch.zeros(1))
    assert "so nothing is timed" in run_main(retrieval, monkeypatch, "--check")
