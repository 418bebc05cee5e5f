"""Data sets: which texts, answers and classes belong to which image, and what is said when they do not fit."""

import pickle

import pytest
import torch
from corpus import SIZE, TOKENIZER, caption_rows, png, write_corpus

from fastm3ae.data.arrow import CAPTION_COLUMNS, VQA_COLUMNS, write_pairs
from fastm3ae.data.collate import BatchRequest
from fastm3ae.data.collate_pairs import ClassificationBatches, RetrievalBatches, VqaBatches
from fastm3ae.data.datasets import ClassificationDataset, PairDataset, VqaDataset
from fastm3ae.data.images import make_transform
from fastm3ae.data.text import encode
from fastm3ae.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


def test_pairs_stand_in_the_files_order(corpus):
    data = PairDataset(corpus)
    assert len(data) == 33 and data.notes == []
    expected = [(i, j) for i in range(17) for j in range(1 + (i if i < 12 else i - 12) % 3)]
    assert list(zip(data.row, data.position, strict=True)) == expected
    rows = [*caption_rows(12, 0), *caption_rows(5, 100)]
    assert [data.text(pair) for pair in range(33)] == [text for row in rows for text in row["caption"]]
    assert data.image_id(24) == "img/100.png"
    assert data.image(24).getpixel((0, 0)) == 100


def test_false_pairs_come_from_the_same_data_set(corpus, tmp_path):
    write_pairs(tmp_path / "empty_train.arrow", [])
    data = PairDataset([corpus[0], tmp_path / "empty_train.arrow", corpus[1]])
    assert [data.same_dataset(pair) for pair in (0, 23, 24, 32)] == [range(24)] * 2 + [range(24, 33)] * 2
    assert data.notes == [f"{tmp_path / 'empty_train.arrow'} holds no pair of an image and a text."]


def test_no_pair_at_all(tmp_path):
    write_pairs(tmp_path / "a_train.arrow", [])
    write_pairs(tmp_path / "b_train.arrow", [{"image": png(0), "caption": [], "image_id": "x", "split": "train"}])
    with pytest.raises(
        UserError, match=r"no pair of an image and a text in .*a_train.arrow, .*b_train.arrow; expected"
    ):
        PairDataset([tmp_path / "a_train.arrow", tmp_path / "b_train.arrow"])


def test_data_sets_travel_by_path(corpus):
    data = PairDataset(corpus)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.text(30) == data.text(30)
    assert len(pickle.dumps(data)) < 3000


def vqa_row(**changes):
    return {
        "image": png(7),
        "questions": ["chest ct ?", "large lesion ?", "brain ?"],
        "answers": [["yes"], ["left", "left lobe"], []],
        "answer_labels": [[4], [2, 9], []],
        "answer_scores": [[1.0], [0.3, 0.9], []],
        "image_id": "a.png",
        "question_id": [8, 8, 8],
        "answer_type": [0, 1, 1],
        "split": "test",
    } | changes


def test_questions_with_one_id_keep_their_own_answers(tmp_path):
    write_pairs(tmp_path / "vqa.arrow", [vqa_row()], VQA_COLUMNS)
    data = VqaDataset([tmp_path / "vqa.arrow"])
    batch = VqaBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32)[BatchRequest(0, 0, [2, 0, 1])]
    assert batch.texts == ["brain ?", "chest ct ?", "large lesion ?"]
    assert batch.answers == [[], ["yes"], ["left", "left lobe"]]
    assert batch.answer_ids_BA.tolist() == [[-1, -1], [4, -1], [2, 9]]
    assert torch.equal(batch.answer_scores_BA, torch.tensor([[0, 0], [1, 0], [0.3, 0.9]]))
    assert batch.is_open_B.tolist() == [True, False, True]
    assert batch.question_ids == [8, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer_type": [0, 1]},
            r"vqa.arrow, row 1: column 'answer_type' has 2 values, expected one for each of the 3",
        ),
        ({"answer_scores": [[1.0], [0.3], []]}, r"row 1: number 1 of 'questions' has 2 answer_labels and 1 answer_sco"),
        (
            {"answer_type": [0, 1, 2]},
            r"row 1: number 2 of 'questions' has the answer_type 2, expected 0 \(closed\) or 1",
        ),
        (
            {"answer_labels": [[0], [1, -1], []]},
            r"row 1: number 1 of 'questions' has the label -1 in column 'answer_la",
        ),
        ({"answer_labels": [[0], [1, 10], []]}, r"row 1: number 1 .* has the label 10 .* one from 0 to 9"),
    ],
)
def test_questions_without_their_answers(tmp_path, changes, message):
    facts = {"classes": {"answer_labels": list("abcdefghij")}}
    write_pairs(tmp_path / "vqa.arrow", [vqa_row(), vqa_row(**changes)], VQA_COLUMNS, facts)
    with pytest.raises(UserError, match=message):
        VqaDataset([tmp_path / "vqa.arrow"])


def test_classes(tmp_path):
    columns = CAPTION_COLUMNS | {"method": "list<int>"}
    rows = [row | {"method": [10 * i + j for j in range(1 + i % 3)]} for i, row in enumerate(caption_rows(3))]
    write_pairs(tmp_path / "cls.arrow", rows, columns)
    data = ClassificationDataset([tmp_path / "cls.arrow"], "method")
    batches = ClassificationBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32)
    assert batches[BatchRequest(0, 0, [5, 0, 2])].label_B.tolist() == [22, 0, 11]
    with pytest.raises(UserError, match="no column 'methods'.*Did you mean 'method'"):
        ClassificationDataset([tmp_path / "cls.arrow"], "methods")


def test_retrieval_draws_texts_of_the_same_data_set(corpus):
    data = PairDataset(corpus)
    batches = RetrievalBatches(data, TOKENIZER, make_transform("clip", SIZE), max_text_tokens=32, num_false_texts=15)
    batch = batches[BatchRequest(0, 0, [0, 30])]
    for pair, texts, ids_RT, is_padding_RT in zip(
        [0, 30], batch.false_texts, batch.false_text_ids_BRT, batch.is_false_text_padding_BRT, strict=True
    ):
        pool = {data.text(i) for i in data.same_dataset(pair)}
        assert len(texts) == 15 and set(texts) <= pool and len(set(texts)) > 4
        for text, ids_T, is_padding_T in zip(texts, ids_RT, is_padding_RT, strict=True):
            assert ids_T[~is_padding_T].tolist() == encode(TOKENIZER, text, 32).ids
            assert (ids_T[is_padding_T] == TOKENIZER.pad_token_id).all()
    assert batch.false_text_ids_BRT.shape[-1] == batch.text_ids_BT.shape[-1]
    assert batches[BatchRequest(1, 0, [0, 30])].false_texts != batch.false_texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer_labels": [[[2**40]]]},
            "has the label 1099511627776 in column 'answer_labels', expected one from 0 to",
        ),
        ({"answer_scores": [[[float("nan")]]]}, r"has the answer_scores \[nan\], expected finite numbers"),
    ],
)
def test_questions_that_no_model_is_made_for(tmp_path, changes, message):
    """The largest label decides how large a model is, where the file does not name its labels."""
    row = {"image": [b"x"], "questions": [["why"]], "answers": [[["a"]]], "answer_labels": [[[0]]], "image_id": ["i"],
           "answer_scores": [[[1.0]]], "question_id": [[1]], "answer_type": [[0]], "split": ["train"]}  # fmt: skip
    rows = [{name: values[0] for name, values in (row | changes).items()}]
    write_pairs(tmp_path / "a.arrow", rows, VQA_COLUMNS)
    with pytest.raises(UserError, match=message):
        VqaDataset([tmp_path / "a.arrow"])
