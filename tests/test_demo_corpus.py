"""The demo corpus: reproducible, true to its attributes, readable by the rest of the package."""

import dataclasses
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers import AutoTokenizer

from fastm3ae.data.arrow import CAPTION_COLUMNS, ArrowTable, dataset_files
from fastm3ae.data.demo import DemoCorpus, draw_pair, ensure_demo_corpus, write_demo_corpus
from fastm3ae.data.demo.anatomies import BODIES
from fastm3ae.data.demo.radiographs import DEVICES, FINDINGS, Film, draw_radiograph
from fastm3ae.data.demo.reports import READERS, write_caption
from fastm3ae.data.demo.studies import DEVICES as DEVICES_OF
from fastm3ae.data.demo.studies import FINDINGS as FINDING_NAMES
from fastm3ae.data.demo.studies import SPLITS, VIEWS, is_mirrored
from fastm3ae.data.demo.tokenizer import SPECIAL_TOKENS, learn_wordpieces

COUNTS = {"num_train": 24, "num_val": 8, "num_test": 8}
NUM_DRAWN = 1500

# Every word that tells an attribute, by attribute and value: written down here a second time, so that the captions are
# checked against English and not against themselves.
WORDS = {
    "anatomy": {name: {name} for name in ("chest", "abdomen", "skull", "hand", "knee")},
    "view": {"frontal": {"frontal"}, "lateral": {"lateral"}, "oblique": {"oblique"}},
    "side": {"left": {"left"}, "right": {"right"}},
    "zone": {"upper": {"upper"}, "middle": {"middle"}, "lower": {"lower"}},
    "size": {"small": {"small"}, "large": {"large"}},
    "number": {1: {"single"}, 2: {"two"}, 3: {"three"}},
    "finding": {
        "nodule": {"nodule", "nodules"},
        "cyst": {"cyst", "cysts"},
        "fracture": {"fracture", "fractures"},
        "foreign body": {"body", "bodies"},
    },
    "device": {name: {name} for name in itertools.chain(*DEVICES_OF.values())},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_demo_corpus(tmp_path_factory.mktemp("demo"), **COUNTS, image_size_px=64, seed=3)


@pytest.fixture(scope="module")
def studies():
    return [draw_pair(0, "train", index)[0] for index in range(NUM_DRAWN)]


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def told_words(study):
    """The attributes that the caption of a study tells, as (attribute, value)."""
    names = ["anatomy", "view", "side", "device"] + (["zone", "size", "number", "finding"] if study.finding else [])
    return {name: getattr(study, name) for name in names if getattr(study, name) is not None}


def test_same_seed_same_bytes_whatever_the_hash_seed(corpus, tmp_path):
    program = (
        "import sys; from fastm3ae.data.demo import write_demo_corpus; "
        f"write_demo_corpus(sys.argv[1], **{COUNTS}, image_size_px=64, seed=3)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=env)
    assert digests(tmp_path) == digests(corpus.root)


def test_another_seed_gives_other_pairs(corpus, tmp_path):
    other = write_demo_corpus(tmp_path, **COUNTS, image_size_px=64, seed=4)
    ours, theirs = (ArrowTable.open([c.arrow("train")], CAPTION_COLUMNS) for c in (corpus, other))
    assert not {bytes(ours.image_bytes(i)) for i in range(24)} & {bytes(theirs.image_bytes(i)) for i in range(24)}
    assert ours.column("caption") != theirs.column("caption")


def test_arrows_have_the_original_schema_and_the_drawn_content(corpus):
    for split, num_images in zip(SPLITS, COUNTS.values(), strict=True):
        [path] = dataset_files(corpus.root, ["demo"], split)
        schema = pa.ipc.open_file(str(path)).schema
        assert schema.names == ["image", "caption", "image_id", "split"]
        assert schema.types == [pa.binary(), pa.list_(pa.string()), pa.string(), pa.string()]
        assert b"pandas" in schema.metadata
        table = ArrowTable.open([path], CAPTION_COLUMNS)
        assert len(table) == num_images
        assert set(table.column("split")) == {split}
        for index in range(num_images):
            study, captions = draw_pair(3, split, index)
            image = Image.open(io.BytesIO(table.image_bytes(index)))
            assert (image.format, image.mode, image.size) == ("PNG", "L", (64, 64))
            assert np.array_equal(np.asarray(image), draw_radiograph(study, 64))
            assert table.row(index, "caption") == captions


def test_splits_share_no_image(corpus):
    tables = [ArrowTable.open([corpus.arrow(split)], CAPTION_COLUMNS) for split in SPLITS]
    assert len({bytes(t.image_bytes(i)) for t in tables for i in range(len(t))}) == sum(COUNTS.values())
    assert len({image_id for t in tables for image_id in t.column("image_id")}) == sum(COUNTS.values())
    studies = [draw_pair(0, split, index)[0] for split in SPLITS for index in range(300)]
    assert len(set(studies)) == 900


def test_readme_says_that_the_corpus_is_synthetic(corpus):
    assert "Synthetic" in (corpus.root / "README.txt").read_text()


def test_ensure_draws_once_and_again_after_an_interruption_or_change(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fastm3ae.data.demo.write_demo_corpus", lambda folder: drawn.append(folder))
    ensure_demo_corpus(tmp_path)
    assert drawn == [tmp_path]
    complete = DemoCorpus(root=tmp_path)
    (tmp_path / "corpus.json").write_text(complete.recipe())
    assert ensure_demo_corpus(tmp_path) == complete and len(drawn) == 1
    (tmp_path / "corpus.json").write_text(dataclasses.replace(complete, seed=1).recipe())
    ensure_demo_corpus(tmp_path)
    assert len(drawn) == 2


def test_no_recipe_until_everything_is_written(tmp_path, monkeypatch):
    write_demo_corpus(tmp_path, num_train=2, num_val=1, num_test=1, image_size_px=32)
    assert (tmp_path / "corpus.json").exists()

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastm3ae.data.demo.write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        write_demo_corpus(tmp_path, num_train=2, num_val=1, num_test=1, image_size_px=32)
    assert not (tmp_path / "corpus.json").exists()


def test_captions_tell_exactly_the_drawn_attributes():
    texts = set()
    for index in range(NUM_DRAWN):
        study, captions = draw_pair(0, "train", index)
        told = told_words(study)
        assert len(captions) in (1, 2)
        for caption in captions:
            texts.add(caption)
            assert caption == caption.lower() == " ".join(caption.split())
            words = Counter(re.findall(r"\w+", caption))
            assert 8 <= len(caption.split()) <= 30, caption
            for name, values in WORDS.items():
                found = [value for value, known in values.items() for word in known for _ in range(words[word])]
                assert found == ([told[name]] if name in told else []), (name, caption)
            plural = study.finding and any(words[word] for word in WORDS["finding"][study.finding] if word[-1] == "s")
            assert bool(plural) == bool(study.finding and study.number > 1)
    assert len(texts) > NUM_DRAWN


def test_attribute_words_are_a_large_share_of_the_captions():
    known = {word for values in WORDS.values() for words in values.values() for word in words} | {"foreign"}
    words = [w for i in range(NUM_DRAWN) for c in draw_pair(0, "train", i)[1] for w in re.findall(r"\w+|[^\w\s]", c)]
    assert np.mean([word in known for word in words]) > 0.4


def test_every_reader_can_tell_every_study(studies):
    rng = np.random.default_rng(0)
    for study, reader in itertools.product(studies[:200], READERS):
        assert "{" not in write_caption(study, reader, rng) and "None" not in write_caption(study, reader, rng)


def test_attributes_are_drawn_independently(studies):
    """Side, zone, size, number and finding are balanced in every view of every anatomy: nothing gives them away."""
    abnormal = [study for study in studies if study.finding]
    for first, second in itertools.combinations(["anatomy", "side", "zone", "size", "number", "finding"], 2):
        table = Counter((getattr(s, first), getattr(s, second)) for s in abnormal)
        rows, columns = (Counter(getattr(s, name) for s in abnormal) for name in (first, second))
        expected = {(a, b): rows[a] * columns[b] / len(abnormal) for a in rows for b in columns}
        chi_squared = sum((table[cell] - count) ** 2 / count for cell, count in expected.items())
        freedom = (len(rows) - 1) * (len(columns) - 1)
        assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5, (first, second)


def test_every_name_can_be_drawn():
    assert set(BODIES) == {(anatomy, view) for anatomy, views in VIEWS.items() for view in views}
    assert set(FINDINGS) == set(FINDING_NAMES)
    assert set(DEVICES) == set(itertools.chain(*DEVICES_OF.values()))


def test_normal_pictures_show_neither_number_nor_size(studies):
    study = dataclasses.replace(studies[0], finding=None)
    other = dataclasses.replace(study, number=study.number % 3 + 1, size="large" if study.size == "small" else "small")
    assert np.array_equal(draw_radiograph(study, 64), draw_radiograph(other, 64))


@pytest.mark.parametrize("finding", FINDING_NAMES)
def test_a_finding_lies_where_the_caption_says_and_grows_with_size_and_number(studies, finding):
    """The pixels that a finding changes: their centre gives side and zone, their count size and number."""
    for anatomy, view in BODIES:
        base = next(s for s in studies if (s.anatomy, s.view) == (anatomy, view))

        def changed(anatomy=anatomy, base=base, **attributes):
            study = dataclasses.replace(base, finding=finding, device=None, **attributes)
            normal = dataclasses.replace(study, finding=None)
            difference = np.abs(draw_radiograph(study, 96).astype(int) - draw_radiograph(normal, 96)) > 25
            return np.argwhere(difference)

        rows = {zone: changed(zone=zone, side="left", size="small", number=1).mean(0) for zone in WORDS["zone"]}
        assert rows["upper"][0] + 15 < rows["middle"][0] < rows["lower"][0] - 15
        assert rows["middle"][1] > 55 and changed(zone="middle", side="right", size="small", number=1).mean(0)[1] < 41
        counts = [len(changed(zone="middle", side="left", size="small", number=n)) for n in (1, 2, 3)]
        assert counts[0] * 1.4 < counts[1] and counts[1] * 1.15 < counts[2]
        assert len(changed(zone="middle", side="left", size="large", number=1)) > 2.2 * counts[0]


def test_a_right_view_is_the_mirror_image_of_the_left_one(studies):
    for anatomy, view in BODIES:
        study = next(s for s in studies if (s.anatomy, s.view) == (anatomy, view))
        left, right = (
            draw_radiograph(dataclasses.replace(study, side=side), 96).astype(int) for side in ("left", "right")
        )
        is_mirror_image = np.abs(left - right[:, ::-1]).max() <= 1
        assert is_mirror_image == is_mirrored(anatomy, view)
        assert np.abs(left - right).max() > 40 or study.side is None


def test_devices_differ_and_are_bright(studies):
    for anatomy, devices in DEVICES_OF.items():
        study = dataclasses.replace(next(s for s in studies if s.anatomy == anatomy), finding=None)
        pictures = [draw_radiograph(dataclasses.replace(study, device=d), 96).astype(int) for d in (None, *devices)]
        assert all((picture >= 220).sum() > 50 for picture in pictures[1:])
        for first, second in itertools.combinations(pictures, 2):
            assert (np.abs(first - second) > 60).sum() > 100


def test_nothing_is_cut_at_the_edge_of_its_window(studies, monkeypatch):
    """Shapes are computed near themselves only; computed everywhere, they give the same picture."""
    near = [draw_radiograph(study, 64) for study in studies[:100]]
    monkeypatch.setattr(Film, "window", lambda *arguments: (slice(None), slice(None)))
    everywhere = [draw_radiograph(study, 64) for study in studies[:100]]
    assert np.array_equal(near, everywhere)


def test_the_background_is_never_flat_in_a_patch(studies):
    """A constant patch would have nothing to foretell, and its normalised pixels would be rounding noise."""
    pictures = np.stack([draw_radiograph(study, 96) for study in studies[:100]]).astype(float)
    patches = pictures.reshape(100, 6, 16, 6, 16).transpose(0, 1, 3, 2, 4).reshape(-1, 256)
    assert patches.std(1).min() > 0.5


def test_tokenizer_knows_every_word_and_splits_some(corpus, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    pieces = Counter()
    for split, index in itertools.product(SPLITS, range(200)):
        for caption in draw_pair(0, split, index)[1]:
            ids = tokenizer(caption)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            spelt = re.sub(r"\s", "", tokenizer.decode(ids, skip_special_tokens=True).replace(" ##", ""))
            assert spelt == re.sub(r"\s", "", caption)
            pieces.update(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(ids))
    assert pieces[True] > 0.01 * pieces.total()


def test_wordpieces_merge_the_most_frequent_pairs_first():
    vocab = learn_wordpieces(["abc abc abd"], 10**6)
    assert vocab[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert vocab[-3:] == ["ab", "abc", "abd"]
    assert len(learn_wordpieces(["abc abc abd"], len(vocab) - 1)) == len(vocab) - 1
    assert "##a" in vocab and "z" in vocab
