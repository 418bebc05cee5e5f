"""Features are what the models compute, row by row in the files' order, however they are put into batches."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from corpus import WORDS, caption_rows, png
from tasks_data import write_vqa
from whole_checkpoints import write_checkpoint

from fastm3ae.cli import main
from fastm3ae.config import FeaturesConfig
from fastm3ae.data.arrow import IMAGE_LABEL_COLUMNS, write_pairs
from fastm3ae.data.batch import ImageTextBatch
from fastm3ae.data.decode import decode_image
from fastm3ae.data.images import make_transform, normalization, normalize
from fastm3ae.data.text import encode
from fastm3ae.errors import UserError
from fastm3ae.features import Embedder, extract_features
from fastm3ae.model.embed import PairEncoder, embed

NAMES = {
    "m3ae": {"image": 64, "text": 32, "fused": 96},
    "swin": {"image": 32, "text": 32, "fused": 96},
    "mpma": {"image": 64, "text": 32, "image_aligned": 12, "text_aligned": 12},
    "mpma-vqa": {"image": 64, "text": 32, "fused": 96},
    "image": {"image": 64},
}


@pytest.fixture
def folder(tmp_path):
    """Two data sets of 12 and 5 images with 1 to 3 texts each."""
    write_pairs(tmp_path / "made_test.arrow", caption_rows(12, 0))
    write_pairs(tmp_path / "other_test.arrow", caption_rows(5, 100))
    return tmp_path


def extract(folder, name, output, **changes):
    config = FeaturesConfig(checkpoint=str(folder / name), root=str(folder), datasets=("made", "other"),
                            output=str(folder / output), device="cpu", num_workers=0)  # fmt: skip
    return extract_features(FeaturesConfig(**{**vars(config), **changes}))


def pair_batch(image_BCHW, ids_BT, is_padding_BT):
    fields = {"texts": [""] * len(ids_BT), "item_ids": [""] * len(ids_BT), "bad_samples": []}
    return ImageTextBatch(image_BCHW=image_BCHW, text_ids_BT=ids_BT, is_padding_BT=is_padding_BT, **fields)


def columns(path):
    """Of a parquet file, features as arrays (num_items, width)."""
    table = pq.read_table(path)
    found = {name: table[name].to_pylist() for name in table.column_names}
    return {name: np.array(values, np.float32 if name in NAMES["mpma"] | NAMES["m3ae"] else None)
            for name, values in found.items()}  # fmt: skip


@pytest.mark.parametrize("name", ["m3ae", "swin", "mpma"])
def test_rows_are_the_files_pairs(name, folder):
    """Each against its own pass of one pair without padding."""
    model = write_checkpoint(folder / name, name)
    found = extract(folder, name, "f.parquet", batch_size=7)
    table = columns(folder / "f.parquet")
    assert found.num_items == len(table["row"]) == 24 + 9 and found.text_column == "caption"
    assert found.widths == NAMES[name] == {key: table[key].shape[1] for key in found.widths}
    embedder, item = Embedder(folder / name, "cpu"), 0
    for file, rows in (("made_test.arrow", caption_rows(12, 0)), ("other_test.arrow", caption_rows(5, 100))):
        for row, content in enumerate(rows):
            square = make_transform("clip", 64)(decode_image(content["image"]))[None]
            image_BCHW = normalize(square, *normalization("clip"))
            for number, text in enumerate(content["caption"]):
                places = {key: table[key][item] for key in ("data_file", "row", "image_id", "text_number")}
                assert list(places.values()) == [file, row, content["image_id"], number]
                ids = torch.tensor([encode(embedder.tokenizer, text, 24).ids])
                batch = pair_batch(image_BCHW, ids, torch.zeros_like(ids, dtype=torch.bool))
                with torch.inference_mode():
                    if name == "mpma":
                        aligned = model.embed(batch)
                        expected = {"image_aligned": aligned.image_BE, "text_aligned": aligned.report_BE}
                    else:
                        expected = PairEncoder(model)(image_BCHW, ids, batch.is_padding_BT)
                for key, feature in expected.items():
                    assert np.abs(table[key][item] - feature[0].numpy()).max() < 1e-5, (key, item)
                item += 1
    about = json.loads(pq.read_schema(folder / "f.parquet").metadata[b"fastm3ae"])
    assert about == {"checkpoint": str(folder / name), "split": "test", "text_column": "caption"}


@pytest.mark.parametrize("name", ["m3ae", "mpma-vqa"])
def test_batches_change_nothing(name, folder):
    write_checkpoint(folder / name, name)
    for size in (1, 5, 33):
        extract(folder, name, f"{size}.parquet", batch_size=size)
    extract(folder, name, "workers.npz", batch_size=5, num_workers=2)
    first, *others = (columns(folder / f"{size}.parquet") for size in (1, 5, 33))
    with np.load(folder / "workers.npz") as arrays:
        others.append({key: arrays[key] for key in arrays if key != "fastm3ae"})
        assert json.loads(str(arrays["fastm3ae"]))["split"] == "test"
    for other in others:
        assert other.keys() == first.keys()
        for key, values in first.items():
            assert np.abs(other[key] - values).max() < 1e-5 if key in NAMES[name] else (other[key] == values).all(), key


def test_fused_features_are_what_the_heads_read(tmp_path):
    model = write_checkpoint(tmp_path / "mpma-vqa", "mpma-vqa")
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    batch = pair_batch(torch.randn(2, 3, 64, 64), ids, ids == 0)
    with torch.inference_mode():
        logits = model.vqa_head(embed(model, batch)["fused"])
        assert (logits - model(batch)["vqa"]).abs().max() < 1e-5


def test_questions_and_images_alone(tmp_path, capsys):
    write_vqa(tmp_path)
    rows = [{"image": png(10 * i), "labels": [i % 2], "image_id": f"{i}", "split": "test"} for i in range(4)]
    write_pairs(tmp_path / "labels_test.arrow", rows, IMAGE_LABEL_COLUMNS, {"classes": {"labels": ["a"]}})
    for name in ("m3ae", "image"):
        write_checkpoint(tmp_path / name, name)
    said = {
        ("m3ae", "vqa_made"): "16 images with questions: image (64), text (32), fused (96)",
        ("m3ae", "vqa_made", "--images-only"): "8 images: image (64)",
        ("m3ae", "labels"): "4 images: image (64)",
        ("image", "vqa_made"): "8 images: image (64)",
    }
    for number, ((name, dataset, *options), expected) in enumerate(said.items()):
        line = [str(tmp_path / name), "--root", str(tmp_path), "--datasets", dataset, "--num-workers", "0", *options]
        output = tmp_path / "new" / f"{number}.parquet"
        assert main(["features", *line, "--output", str(output), "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"wrote {output}: {expected}\n"
    image_ids = pq.read_table(tmp_path / "new" / "2.parquet")["image_id"].to_pylist()
    assert image_ids == ["0", "1", "2", "3"]


def test_what_is_given_by_hand(folder):
    write_checkpoint(folder / "m3ae", "m3ae")
    extract(folder, "m3ae", "f.parquet")
    table, embedder = columns(folder / "f.parquet"), Embedder(folder / "m3ae", "cpu")
    content = next(caption_rows(1, 0))
    (folder / "x.png").write_bytes(content["image"])
    found = embedder.embed([folder / "x.png", content["image"]], [content["caption"][0], " ".join(WORDS)], batch_size=1)
    for key in NAMES["m3ae"]:
        assert found[key].dtype == np.float32 and np.abs(found[key][0] - table[key][0]).max() < 1e-5
    assert np.abs(embedder.embed([folder / "x.png"])["image"] - found["image"][1:]).max() < 1e-5
    assert embedder.embed([]) == {}
    with pytest.raises(UserError, match="as many texts as images, got 1 and 2"):
        embedder.embed([content["image"]] * 2, ["one"])
    with pytest.raises(UserError, match="The image .* cannot be read: No such file"):
        embedder.embed([folder / "none.png"])


def test_bad_images_and_files_that_exist(folder, capsys):
    write_checkpoint(folder / "m3ae", "m3ae")
    write_pairs(folder / "made_test.arrow", caption_rows(12, 0, bad=(3,)))
    with pytest.raises(UserError, match=r"made_test.arrow, row 3 \(image_id 'img/3.png'\)"):
        extract(folder, "m3ae", "f.parquet", batch_size=2)
    assert not [path for path in folder.iterdir() if "parquet" in path.name]
    found = extract(folder, "m3ae", "f.parquet", on_bad_sample="skip")
    assert found.num_items == 33 - 1 and [bad.image_id for bad in found.bad_samples] == ["img/3.png"]
    assert "img/3.png" not in columns(folder / "f.parquet")["image_id"]
    before = (folder / "f.parquet").read_bytes()
    with pytest.raises(UserError, match="f.parquet exists: choose another name"):
        extract(folder, "m3ae", "f.parquet", on_bad_sample="skip")
    assert (folder / "f.parquet").read_bytes() == before
    with pytest.raises(UserError, match="output must end in .parquet or .npz, got x.csv"):
        FeaturesConfig(checkpoint="x", output="x.csv")
    with pytest.raises(UserError, match="column 'report'"):
        extract(folder, "m3ae", "g.npz", text_column="report")
