"""Answers in the form in which they are labels: the original's recorded ones, and its rules one by one."""

from pathlib import Path

import pytest
from parity_data import check_data_goldens

from fastm3ae.data.answers import normalize_answer

GOLDEN = Path(__file__).parent / "data" / "golden" / "data"


def test_golden():
    checks = [check for check in check_data_goldens(GOLDEN) if check.name.startswith("normalize_word/")]
    missed = [check for check in checks if not check.ok]
    assert len(checks) == 14 and not missed, "\n".join(map(str, missed))


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("", ""),
        (" The  Left\tLung ", "left lung"),
        ("a", ""),
        ("None", "0"),
        ("ten of twelve", "10 of twelve"),
        ("t2-weighted/flair", "t2 weighted flair"),
        ("t2- weighted-flair", "t2 weightedflair"),  # one space beside a mark takes all of that mark away
        ("1,500 ml (left/right)", "1500 ml leftright"),  # a comma in a number takes all marks away
        ("1.5 cm. left.", "1.5 cm left"),
        ("." * 33 + "x", ".x"),
        ("Isnt", "isn't"),
        ("it's", "it's"),
        ("ow's'at yalld've y'alld've wouldn'tve", "'ow's'at yalld've y'all'd've wouldn't've"),
        ("somebody'd shes lets", "somebodyd shes lets"),
        ("xr#plain film", "xr#plain film"),
        ("肺", "肺"),
    ],
)
def test_rules(answer, expected):
    assert normalize_answer(answer) == expected
    assert normalize_answer(answer.upper()) == expected
