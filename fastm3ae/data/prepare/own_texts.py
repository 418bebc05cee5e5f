"""Texts of your own images: in files beside them (.txt, .json, .xml) and in the headers of DICOM files."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from fastm3ae.config.files import parse_json
from fastm3ae.data.dicom import open_dicom
from fastm3ae.data.dicom_header import check_tag, check_text_tags, header_text
from fastm3ae.data.prepare.common import read_lines
from fastm3ae.data.prepare.own_images import is_dicom_file
from fastm3ae.data.prepare.reports import read_xml
from fastm3ae.data.prepare.workers import map_ahead
from fastm3ae.errors import UserError

__all__ = ["NO_HEADER", "TEXT_SUFFIXES", "Header", "read_headers", "texts_beside", "texts_of"]

TEXT_SUFFIXES = (".txt", ".json", ".xml")


class Header(NamedTuple):
    """What was asked of a DICOM file's header: texts, and the value of the field that groups files, or ""."""

    texts: list[str]
    group: str


NO_HEADER = Header([], "")


def texts_of(value: Any, where: str) -> list[str]:
    """Returns the texts of a string, a list of strings, or None, without blank ones.

    Raises:
        UserError: It is something else; ``where`` names it.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, str):
            raise UserError(f"{where} must be a string or a list of strings, got {value!r}.")
    return [text for text in values if text.strip()]


def texts_beside(stem: Path, keys: Sequence[str]) -> list[str]:
    """Returns the texts of ``{stem}.txt``, ``.json`` and ``.xml``, as far as there are such files.

    Args:
        stem: Path of an image without its suffix.
        keys: Keys of texts in a JSON object, or names of elements in XML, in this order.

    Raises:
        UserError: A file cannot be read, or a value is no text.
    """
    texts = []
    plain, structured, marked_up = (stem.with_name(stem.name + suffix) for suffix in TEXT_SUFFIXES)
    if plain.is_file():
        texts += texts_of("".join(line for _, line in read_lines(plain)), str(plain))
    if structured.is_file():
        try:
            value = parse_json("".join(line for _, line in read_lines(structured)))
        except ValueError as error:
            raise UserError(f"{structured} is not valid JSON: {error}.") from None
        if isinstance(value, dict):
            for key in keys:
                texts += texts_of(value.get(key), f"{structured}: {key!r}")
        else:
            texts += texts_of(value, str(structured))
    if marked_up.is_file():
        root = read_xml(marked_up)
        for key in keys:
            texts += texts_of(_elements(root, key.lower()), str(marked_up))
    return texts


def _elements(element: Element, key: str) -> list[str]:
    """Returns the texts of the elements of a name, or whose attribute name or Label is that; of nested ones the outer.

    Upper and lower case and namespaces do not count.
    """
    found, waiting = [], [element]
    while waiting:  # a recursion would end at some depth, which hostile files reach
        element = waiting.pop()
        names = {element.tag.rpartition("}")[2], *(element.get(name, "") for name in ("name", "Label", "label"))}
        if key in {name.strip().lower() for name in names}:
            found.append("".join(element.itertext()))
        else:
            waiting += reversed(element)
    return found


def read_headers(
    root: Path, images: Iterable[str], text_tags: Sequence[str], group_tag: str | None
) -> Mapping[str, Header | str]:
    """Returns for each of the images that is a DICOM file what its header says, or what is wrong with the file.

    Args:
        root: Folder from which the images' paths start.
        images: The images; each is read once.
        text_tags: Keywords of fields that become texts.
        group_tag: Keyword of the field that groups files.

    Raises:
        UserError: A keyword is unknown, or of a field that becomes no text.
    """
    if not text_tags and group_tag is None:
        return {}
    check_text_tags(text_tags)
    if group_tag is not None:
        check_tag(group_tag)
    names = list(dict.fromkeys(images))
    read = map_ahead(functools.partial(_read_header, text_tags, group_tag), (root / name for name in names))
    return {name: header for name, header in zip(names, read, strict=True) if header is not None}


def _read_header(text_tags: Sequence[str], group_tag: str | None, path: Path) -> Header | str | None:
    """Returns what a file's header says, what is wrong with the file, or None of a file that is no DICOM file."""
    if not path.is_file() or not is_dicom_file(path):
        return None
    try:
        dataset = open_dicom(path.read_bytes(), header_only=True)
        texts = [header_text(dataset, tag) for tag in text_tags]
        return Header([text for text in texts if text.strip()], header_text(dataset, group_tag) if group_tag else "")
    except OSError as error:
        return f"the image file cannot be read: {error}"
    except ValueError as error:
        return str(error)
