"""The benchmark of the loader: its baseline is the original, it refuses what is wrong, and it keeps its word."""

import io
import json
import multiprocessing
import random
import re
import time
from pathlib import Path

import pytest
import torch
from corpus import TOKENIZERS, write_corpus
from PIL import Image
from safetensors.torch import load_file

from fastm3ae.data import collate_pairs, images
from fastm3ae.data.arrow import ArrowTable
from fastm3ae.data.decode import decode_image
from fastm3ae.data.text import load_tokenizer

GOLDEN = TOKENIZERS.parent
RECORDED = json.loads((GOLDEN / "data_pipeline.json").read_text())
TENSORS = load_file(GOLDEN / "data_pipeline.safetensors")


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder with the benchmarks is importable, and a run is short."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    import loader

    monkeypatch.setattr(loader, "NUM_BATCHES", 2)
    num_threads = torch.get_num_threads()
    yield loader
    torch.set_num_threads(num_threads)


def test_baseline_is_the_originals_batch():
    from original_pipeline import OriginalDataset, collate

    recorded, tokenizer = RECORDED["collate/roco_train"], load_tokenizer(TOKENIZERS / "roberta")
    want = {key.rpartition("/")[2]: value for key, value in TENSORS.items() if key.startswith("collate/roco_train/")}
    num_tokens = want["text_ids"].shape[1]
    dataset = OriginalDataset(GOLDEN / "roco_train.arrow", tokenizer, image_size_px=32, max_text_tokens=num_tokens)
    random.seed(7)
    batch = collate([dataset[pair] for pair in recorded["batch"]["raw_index"]], tokenizer)
    assert len(dataset) == recorded["len"] and batch["texts"] == recorded["batch"]["text"]
    assert torch.equal(batch["image"][recorded["image rows stored"]], want["image"])
    for key in ("text_ids", "text_masks", "text_labels"):
        assert torch.equal(batch[key], want[key]), key
    drawn = recorded["false_image_index_draws_random_randint_seed7"]
    assert torch.equal(batch["false_image"], torch.stack([dataset.image(pair) for pair in drawn]))


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta"])
def test_baseline_masks_the_originals_words(monkeypatch, name):
    from original_pipeline import mask_words

    recorded, tokenizer = RECORDED[f"wwm/{name}"], load_tokenizer(TOKENIZERS / name)
    want = {key.rpartition("/")[2]: value for key, value in TENSORS.items() if key.startswith(f"wwm/{name}/")}
    encodings = [
        tokenizer(text, padding="max_length", truncation=True, max_length=recorded["max_length"])
        for text in recorded["texts"]
    ]
    draws = {0.8: want["bernoulli_replace_0.8"], 0.5: want["bernoulli_random_0.5"]}
    monkeypatch.setattr(torch, "bernoulli", lambda p: draws[round(p.unique().item(), 1)].float())
    monkeypatch.setattr(torch, "randint", lambda high, size: want["random_words"])
    random.seed(recorded["python_random_seed"])
    ids, labels = mask_words(encodings, tokenizer)
    assert torch.equal(ids, want["out_input_ids"]) and torch.equal(labels, want["out_labels"])


@pytest.fixture
def pipelines(bench, tmp_path):
    write_corpus(tmp_path)
    corpus = bench.Corpus("small", tmp_path, ("one", "two"), str(TOKENIZERS / "bert-base-uncased"))
    return bench.Pipelines(corpus, num_workers=0)


def test_equal_pipelines_are_timed(pipelines):
    assert pipelines.config.data.datasets == ("one", "two") * 2  # 33 pairs for two batches of 32
    pipelines.check()
    pipelines.run_original()
    pipelines.run_ours()
    pipelines.run_ours_normalized()


def test_a_wrong_pixel_is_not_timed(pipelines, monkeypatch):
    def resize_crop(*arguments, **options):
        square = right(*arguments, **options)
        square[0, 200, 100] ^= 1
        return square

    right = images.resize_crop
    monkeypatch.setattr(images, "resize_crop", resize_crop)
    with pytest.raises(AssertionError, match="its pixels differ"):
        pipelines.check()


def test_a_wrong_token_is_not_timed(pipelines, monkeypatch):
    right = collate_pairs.encode
    monkeypatch.setattr(collate_pairs, "encode", lambda tokenizer, text, *rest: right(tokenizer, f"{text} ct", *rest))
    with pytest.raises(AssertionError, match="ids differ"):
        pipelines.check()


@pytest.mark.parametrize("target", [0.01, 1000.0])
def test_check_exits_by_the_figure_printed_last(bench, tmp_path, monkeypatch, capsys, target):
    write_corpus(tmp_path)
    monkeypatch.setattr(bench, "TARGET", target)
    options = ["--check", "--rounds", "2", "--arrows", str(tmp_path), "--datasets", "one", "two"]
    monkeypatch.setattr("sys.argv", ["loader.py", *options, "--tokenizer", str(TOKENIZERS / "bert-base-uncased")])
    status = 0
    try:
        bench.main()
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().out.splitlines()
    rows = [re.match(rf"(one|two) .*{bench.NORMALIZED} .* (\d+\.\d+)x .*x$", line) for line in lines]
    ratios = [float(row[2]) for row in rows if row]
    assert len(ratios) == 2 and f": {min(ratios):.2f}x (target: {target}x)" in lines[-1]
    assert status == (min(ratios) < target) == (target == 1000)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_figures_are_like_real_ones(bench, tmp_path, monkeypatch, image_format):
    import figures

    monkeypatch.setattr(figures, "NUM_FIGURES", 4)
    figures.write_corpus(tmp_path, image_format, texts_per_image=3)
    table = ArrowTable([tmp_path / "figures_train.arrow"])
    bits = pixels = num_grey = 0
    for row in range(len(table)):
        image = Image.open(io.BytesIO(table.image_bytes(row)))
        assert image.format == image_format and image.mode == "RGB" and len(set(table.row(row, "caption"))) == 3
        bits, pixels = bits + 8 * len(table.image_bytes(row)), pixels + image.width * image.height
        num_grey += decode_image(table.image_bytes(row)).mode == "L"
    low, high = {"JPEG": (0.5, 2.0), "PNG": (3.0, 10.0)}[image_format]
    assert len(table) == 4 and low < bits / pixels < high
    assert num_grey == (3 if image_format == "JPEG" else 0)


def burn(queue):
    while time.process_time() < 0.3:
        pass
    queue.put("done")
    time.sleep(60)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processor_time_of_workers_counts():
    import harness

    queue = multiprocessing.Queue()
    child = multiprocessing.Process(target=burn, args=(queue,), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=60) == "done"
        assert 0.2 < harness.cpu_s() - time.process_time() < 10
    finally:
        child.kill()
        child.join()
