"""The benchmarks of whole steps: what they run, hold, write and say of what fails."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import small_config
from mpma_models import small_config as small_mpma_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def gpu_step(monkeypatch):
    """With a small model, few steps, and without the product, which takes seconds."""
    import gpu_step

    def small(config):
        return replace(config, model=small_config())

    monkeypatch.setattr(gpu_step, "preset", lambda name, made=gpu_step.preset: small(made(name)))
    monkeypatch.setattr(gpu_step, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_step, "BATCH_SIZES", (6,))
    monkeypatch.setattr(gpu_step, "MAX_PASS", 4)
    monkeypatch.setattr(gpu_step, "DEFAULT_VARIANTS", ["original", "packed"])
    monkeypatch.setattr(gpu_step, "SHORTEST", 5)
    monkeypatch.setattr(gpu_step, "LONGEST", 9)
    monkeypatch.setattr(gpu_step, "NUM_TOKENS", 9)
    monkeypatch.setattr(gpu_step, "NUM_PREPARING", 1)
    monkeypatch.setattr(gpu_step, "measure_matmul", lambda device, dtype: 1e12)
    gpu_step.make_batches.cache_clear()
    return gpu_step


def run_main(module, monkeypatch, *arguments):
    """The exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_table_of_what_runs_and_what_fails(gpu_step, monkeypatch, tmp_path, capsys):
    def broken(config, model):
        raise RuntimeError("no graph\nof this")

    file = tmp_path / "step_m3ae.json"
    assert run_main(gpu_step, monkeypatch, "--check", "--rounds", 2, "--json", file) == 0
    said = capsys.readouterr().out
    assert "left out: packed, CUDA graphs; original, compiled" in said and "failed" not in said
    record = json.loads(file.read_text())
    assert [(row["batch_size"], row["variant"], row["max_pass"]) for row in record["rows"]] == [
        (6, "original", 4), (6, "packed", 4)
    ]  # fmt: skip
    original, packed = record["rows"]
    assert original["times_first"] == 1 and record["figures"] == []
    assert packed["times_first"] == pytest.approx(original["median_s"] / packed["median_s"])
    assert packed["samples_per_s"] == pytest.approx(6 / packed["median_s"])
    flops = gpu_step.needed_flops(replace(gpu_step.preset("m3ae"), model=gpu_step_model(gpu_step)), 6)
    assert flops > 1e6 and packed["utilisation"] == pytest.approx(flops / packed["median_s"] / 1e12)

    # A variant that fails is said, counted, and leaves the others alone.
    monkeypatch.setitem(gpu_step.VARIANTS, "packed, CUDA graphs", gpu_step.Variant(broken))
    names = ("original", "packed, CUDA graphs", "packed")
    for check, status in ((["--check"], 1), ([], 0)):
        assert run_main(gpu_step, monkeypatch, *check, "--json", file, "--rounds", 2, "--variants", *names) == status
        said = capsys.readouterr().out
        assert "failed: RuntimeError: no graph\n" in said and "failed: packed, CUDA graphs at 6 pairs" in said
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["packed, CUDA graphs"]["error"] == "RuntimeError: no graph" and "median_s" in rows["packed"]

    # Without time nothing is begun, which is no failure.
    assert run_main(gpu_step, monkeypatch, "--check", "--seconds", 0) == 0
    assert "no time left for: packed at 6 pairs" in capsys.readouterr().out


def gpu_step_model(gpu_step):
    import whole_step

    return whole_step.with_vocabulary(small_config(), gpu_step.VOCAB_SIZE)


def test_a_pass_is_halved_until_it_fits(gpu_step, monkeypatch):
    def hungry(config, model):
        def step(pieces):
            if len(pieces[0]) > 1:
                raise torch.OutOfMemoryError("full")
            sizes.append([len(piece) for piece in pieces])

        return step

    sizes = []
    monkeypatch.setitem(gpu_step.VARIANTS, "packed", gpu_step.Variant(hungry))
    config = replace(gpu_step.preset("m3ae"), model=gpu_step_model(gpu_step))
    contestant = gpu_step.prepare(config, "packed", 6)
    assert contestant.max_pass == 1 and sizes == [[1] * 6]
    # The texts are those of any other division, and other ones in each batch.
    whole = gpu_step.make_batches(config.model, 6, 4, gpu_step.NUM_BATCHES)
    lengths, lengths_of_whole = (
        [[int(number) for piece in pieces for number in piece.num_tokens_B] for pieces in batches]
        for batches in (contestant.batches, whole)
    )
    assert lengths == lengths_of_whole and len(set(map(tuple, lengths))) == gpu_step.NUM_BATCHES


@pytest.mark.parametrize(("fitting", "least", "most"), [(300, 256, 300), (31, 0, 0), (32, 32, 32), (10**6, 1024, 2048)])
def test_largest_batch(gpu_step, monkeypatch, fitting, least, most):
    def make(config, model):
        def step(size):
            if size > fitting:
                raise torch.OutOfMemoryError("full")

        return step

    monkeypatch.setitem(gpu_step.VARIANTS, "packed", gpu_step.Variant(make))
    monkeypatch.setattr(gpu_step, "make_batches", lambda config, batch_size, *_: [batch_size])
    monkeypatch.setattr(gpu_step, "MAX_BATCH", 1024)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = replace(gpu_step.preset("m3ae"), model=gpu_step_model(gpu_step))
    assert least <= gpu_step.largest_batch(config, "packed") <= most


def test_best_of_ours_against_both_yardsticks(gpu_step):
    def rows(**times):
        names = {"compiled": "original, compiled", "graphs": "packed, CUDA graphs"}
        return {(32, names.get(key, key)): {"times_first": value} for key, value in times.items()}

    first, second = gpu_step.figures_of(rows(original=1.0, compiled=1.5, packed=2.4, graphs=2.7), [32])
    assert "packed, CUDA graphs" in first.name and first.value == 2.7 and not first.is_missed
    assert second.value == pytest.approx(1.8) and not second.is_missed
    first, second = gpu_step.figures_of(rows(original=1.0, compiled=2.0, packed=2.4), [32])
    assert first.is_missed and second.is_missed
    first, second = gpu_step.figures_of(rows(original=1.0, packed=2.4), [32])
    assert second.value is None and not second.is_missed and "not measured" in str(second)
    assert gpu_step.figures_of({}, [32])[0].value is None and gpu_step.figures_of({}, [4]) == []
    too_fast = {(256, name): {"times_first": value} for name, value in (("original", 1.0), ("packed", 3.7))}
    assert "THE YARDSTICK IS WRONG" in gpu_step.figures_of(too_fast, [256])[0].name


@pytest.mark.parametrize(("target", "status"), [(0.01, 0), (100.0, 1)])
def test_mpma_step(monkeypatch, tmp_path, capsys, target, status):
    import mpma_step

    def small(config):
        return replace(config, model=small_mpma_config(dropout_frac=0.1))

    monkeypatch.setattr(mpma_step, "preset", lambda name, made=mpma_step.preset: small(made(name)))
    monkeypatch.setattr(mpma_step, "VOCAB_SIZE", 50)
    monkeypatch.setattr(mpma_step, "LENGTHS", (5, 9, 12))
    monkeypatch.setattr(mpma_step, "MIN_RATIO", {"cpu": target})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peaks = {"plain": 2.0, "plain, fused": 1.5, "ours": 1.0}
    monkeypatch.setattr(mpma_step.whole_step, "peak_gib", lambda script, name: peaks[name])
    file = tmp_path / "step_mpma.json"
    assert run_main(mpma_step, monkeypatch, "--check", "--rounds", 2, "--json", file) == status
    record = json.loads(file.read_text())
    assert [row["variant"] for row in record["rows"]] == list(peaks)
    ratio, peak = record["figures"]
    assert ratio["value"] == record["rows"][2]["times_first"] > 0 and ratio["is_missed"] == bool(status)
    assert peak["value"] == 0.5 and not peak["is_missed"]
    assert run_main(mpma_step, monkeypatch, "--peak-of", "plain") == 0
    assert 0.1 < float(capsys.readouterr().out.splitlines()[-1]) < 100

    import report

    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    report.main()
    table = (tmp_path / "report.md").read_text()
    assert f"| at least {target} | {'**missed**' if status else 'met'} |" in table
    assert table.count("| MPMA | 3 |") == 3 and "| 1.50 | " in table
    assert json.loads((tmp_path / "results.json").read_text()) == [record]


def test_report_names_what_failed(monkeypatch, tmp_path):
    import report
    import whole_step

    rows = [{"batch_size": 32, "variant": "packed", "error": "RuntimeError: a | b"}]
    figures = [whole_step.Figure("ours", None, 2.0)]
    whole_step.write_json(tmp_path / "step_m3ae.json", "M3AE", rows, figures, ["a note"])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    report.main()
    table = (tmp_path / "report.md").read_text()
    assert "| M3AE | 32 | packed | failed: RuntimeError: a / b |" in table
    assert "| M3AE | ours | - | at least 2.0 | not measured |" in table and "- M3AE: a note\n" in table
