"""Radiology reports: their sections, which of them become texts, and the placeholders of de-identified words."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from fastm3ae.data.prepare.common import PrepareReport, keep_texts
from fastm3ae.errors import UserError, nearest

__all__ = [
    "SECTIONS",
    "Placeholders",
    "Section",
    "TextChoice",
    "check_sections",
    "choose_texts",
    "find_sections",
    "read_xml",
]

Placeholders = Literal["keep", "remove"]
"""What becomes of words that de-identification has blacked out with ___ or XXXX, wholly or in part."""

HEADINGS = {
    "impression": ("impression", "impressions", "conclusion", "conclusions"),
    "findings": ("findings", "finding"),
    "indication": (
        "indication",
        "clinical indication",
        "reason for exam",
        "reason for examination",
        "reason for study",
    ),
    "history": ("history", "clinical history", "patient history", "clinical information"),
    "comparison": ("comparison", "comparisons", "comparison exam", "comparison film", "reference exam"),
    "technique": ("technique",),
    "examination": ("examination", "exam", "type of examination", "type of exam"),
    "recommendation": ("recommendation", "recommendations"),
    "notification": ("notification", "notifications"),
    "comment": ("comment", "comments"),
    "wet read": ("wet read", "wetread", "preliminary report", "provisional findings impression"),
    "addendum": ("addendum", "final addendum"),
    "final report": ("final report",),
}
"""Section -> the phrases that head it, in any case."""
SECTIONS = tuple(name for name in HEADINGS if name != "final report")
BODY = {"impression", "findings"}
BESIDE = {"wet read", "addendum"}

_NAMES = {phrase: name for name, phrases in HEADINGS.items() for phrase in phrases}
_VIEWS = "views"
_AND = re.compile(r"\s*(?:[/&,]|\band\b)\s*")
# The colon is looked for before the words, because that is faster.
_PHRASE = "|".join(phrase.replace(" ", r"\s+") for phrase in _NAMES)
_KNOWN = re.compile(
    rf"(?<![\w-])(?=[^:]{{4,80}}:)((?:{_PHRASE})(?:{_AND.pattern}(?:{_PHRASE}))*)\s*(?:\([^()\n]*\))?\s*:",
    re.IGNORECASE,
)
_CAPITALS = re.compile(r"^([A-Z][A-Z0-9 ()/,&-]*[A-Z)])[ \t]*(?::|$)", re.MULTILINE)
_PART = re.compile(r"^(WET ?READ|PRELIMINARY REPORT|(?:FINAL )?ADDENDUM|FINAL REPORT)\b[ \t]*:?", re.MULTILINE)
_VIEW = re.compile(r"\b(?:CHEST|VIEWS?|RADIOGRAPHS?|PORTABLE|FRONTAL|LATERAL)\b")
_RULE = re.compile(r"_{10,}")
_PLACEHOLDER = re.compile(r"__|XXXX")


class Section(NamedTuple):
    """A part of a report; under a joint heading, such as "FINDINGS AND IMPRESSION:", it has several names."""

    names: tuple[str, ...]
    text: str


class TextChoice(NamedTuple):
    """Which sections become texts, and how."""

    sections: Sequence[str]
    min_words: int
    placeholders: Placeholders
    join: bool


def read_xml(path: Path) -> ElementTree.Element:
    """Returns the root of an XML file. Entities that name other files are refused, as are those that grow.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of odd encodings
        raise UserError(f"{path} cannot be read as XML: {error}.") from None


def check_sections(sections: Sequence[str], known: Sequence[str]) -> None:
    """Raises a UserError unless ``sections`` are one or more of the ``known`` ones."""
    if not sections:
        raise UserError(f"sections must name at least one of {', '.join(known)}; got none.")
    for name in sections:
        if name not in known:
            raise UserError(f"sections must be of {', '.join(known)}; got {name!r}.{nearest(name, known)}")


def find_sections(text: str) -> list[Section]:
    """Returns the sections of a report in free text, in its order; what precedes the first heading has no name.

    A heading is one of ``HEADINGS``, or several joined by "and", "/", "&" or a comma: in capitals with a colon
    anywhere, in capitals alone on its line, in other letters with a colon at the start of a line (findings and
    impression also after a sentence's end). In capitals at the start of a line, misspelt headings count, too
    ("IMPRESSON:"), and views ("CHEST, TWO VIEWS:") head findings where neither findings nor impression have begun.
    Other headings in capitals, such as "LUNGS:", are a part of the section they stand in.

    A wet read or addendum ends where "FINAL REPORT" follows it, and findings and impressions inside it are not those
    of the report; without a "FINAL REPORT" after it, it ends at the next heading.

    Args:
        text: The report, with its line breaks.
    """
    lines = (line.strip(" \t*") for line in text.splitlines())
    text = "\n".join("" if _RULE.fullmatch(line) else line for line in lines)
    headings = sorted(_headings(text))
    last_final = max((start for start, _, names in headings if "final report" in names), default=-1)
    sections = []
    names: tuple[str, ...] = ()
    begin = 0
    for start, end, next_names in headings:
        if next_names == (_VIEWS,):
            if BODY & set(names):
                continue
            next_names = ("findings",)
        if BESIDE & set(names) and start < last_final and not {"final report", *BESIDE} & set(next_names):
            continue
        sections.append(Section(names, text[begin:start]))
        names, begin = next_names, end
    return [*sections, Section(names, text[begin:])]


def choose_texts(found: Iterable[Section], choice: TextChoice, report: PrepareReport, where: str) -> list[str]:
    """Returns one text per chosen section, in the order chosen, or one of all; reports what is missing or too short.

    Sections of the same name are joined. One with several names is used for the first of them that is chosen.

    Args:
        found: The report's sections.
        choice: Which of them are wanted, and how.
        report: Takes what is missing or too short.
        where: Names the report in ``report``.
    """
    parts = [section for section in found if section.text.strip()]
    missing = [name for name in choice.sections if not any(name in part.names for part in parts)]
    if len(missing) == len(choice.sections):
        report.drop(f"report without {' or '.join(choice.sections)}", where)
        return []
    for name in missing:
        report.drop(f"section {name}, missing or empty", where)
    texts = []
    for name in choice.sections:
        texts.append(" ".join(part.text for part in parts if name in part.names))
        parts = [part for part in parts if name not in part.names]
    texts = [text for text in texts if text]
    if choice.placeholders == "remove":
        texts = [_without_placeholders(text) for text in texts]
    return keep_texts(texts, choice.min_words, report, where, join=choice.join)


def _headings(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Yields start, end and names of each heading."""
    ends = set()
    for match in _KNOWN.finditer(text):
        names = _names(match[1])
        if _is_heading(text, match, names):
            ends.add(match.end())
            yield match.start(), match.end(), names
    for match in _PART.finditer(text):
        if match.end() not in ends:
            ends.add(match.end())
            yield match.start(), match.end(), _names(match[1])
    for match in _CAPITALS.finditer(text):
        if match.end() in ends:
            continue
        has_colon = match[0].endswith(":")
        if names := _names(match[1], misspelt=has_colon):
            yield match.start(), match.end(), names
        elif has_colon and _VIEW.search(match[1]):
            yield match.start(), match.end(), (_VIEWS,)


def _names(heading: str, *, misspelt: bool = False) -> tuple[str, ...]:
    """Returns the sections that a heading names, or () if one of its phrases is not known."""
    names = []
    for phrase in _AND.split(" ".join(heading.lower().split())):
        if misspelt and len(phrase) >= 6 and phrase not in _NAMES:
            phrase = next(iter(get_close_matches(phrase, _NAMES, n=1, cutoff=0.8)), phrase)
        if phrase not in _NAMES:
            return ()
        names.append(_NAMES[phrase])
    return tuple(names)


def _is_heading(text: str, match: re.Match[str], names: tuple[str, ...]) -> bool:
    """Whether known words before a colon head a section, and do not belong to a sentence."""
    heading, start = match[1], match.start()
    before = text[:start].rstrip(" \t")
    starts_line = not before or before.endswith("\n")
    if heading.isupper():
        return True
    if heading[0].isupper():
        return starts_line or (BODY.issuperset(names) and before[-1] in ".;!?")
    return not before or before.endswith("\n\n")


def _without_placeholders(text: str) -> str:
    """Returns the text without words that hold a placeholder; the punctuation after one goes to the word before."""
    words: list[str] = []
    for word in text.split():
        if not _PLACEHOLDER.search(word):
            words.append(word)
        elif words and word[-1] in ".,;:?!" and words[-1][-1] not in ".,;:?!":
            words[-1] += word[-1]
    return " ".join(words)
