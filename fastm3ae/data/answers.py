"""Answers to questions about images, written alike when they mean the same."""

import re

__all__ = ["normalize_answer"]

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
ARTICLES = {"a", "an", "the"}
# Words that get their apostrophe back where they lack just one of those they have here.
WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word for word in WITH_APOSTROPHES for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalize_answer(answer: str) -> str:
    """Returns the answer in small letters, without articles and punctuation, its numbers up to ten as digits.

    A mark of punctuation that has a space beside it goes away, any other becomes a space; in an answer with a comma
    between two digits all of them go away. A period stays before a digit. "None" is 0.

    Args:
        answer: An answer as it stands in a data set.

    Source: prepro/glossary.py, ``normalize_word`` (of the official VQA evaluation), of the answer in small letters.
    """
    answer = answer.lower()
    has_comma_in_number = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        goes_away = has_comma_in_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if goes_away else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the original passes a flag, whose value is 32, for the count
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
