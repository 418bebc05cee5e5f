"""Captions of a study in the wording of several readers: lower-case, and each attribute is told exactly once.

Readers differ in how they phrase, which can be learned from the words around; the attributes themselves have one word
each and can only be seen in the picture.
"""

from dataclasses import dataclass

import numpy as np

from fastm3ae.data.demo.studies import LIMBS, Study, is_mirrored

__all__ = ["READERS", "Reader", "write_caption", "write_captions"]

SECOND_CAPTION_FRAC = 0.3
NUMBERS = ("single", "two", "three")
PLURALS = {"foreign body": "foreign bodies"}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One radiologist's way of dictating. The study's side goes with the body, the projection or the region."""

    study: tuple[str, ...]
    finding: tuple[str, ...]
    normal: tuple[str, ...]
    device: tuple[str, ...]
    no_device: str
    report: tuple[str, ...]


READERS = (
    Reader(
        study=("{projection} {body} radiograph", "{body} radiograph , {projection}"),
        finding=("{number} {size} {finding} in {region} zone", "{number} {size} {region} zone {finding}"),
        normal=("normal appearance", "no focal abnormality"),
        device=("{device} in place", "{device} present"),
        no_device="no hardware",
        report=("{study} : {finding} , {device}", "{study} with {finding} , {device}"),
    ),
    Reader(
        study=("{projection} {body} film", "{body} film , {projection}"),
        finding=("{number} {size} {region} {finding}", "{region} {finding} , {number} {size}"),
        normal=("unremarkable study", "normal study"),
        device=("{device} noted", "{device} in situ"),
        no_device="no device",
        report=("{study} . {finding} . {device}", "{finding} , {device} on {study}"),
    ),
    Reader(
        study=("{projection} image of {body}", "{projection} view of {body}"),
        finding=("{number} {size} {finding} over {region} third", "{region} third shows {number} {size} {finding}"),
        normal=("no significant finding", "within normal limits"),
        device=("also {device}", "status post {device}"),
        no_device="no implant",
        report=("{study} . {finding} . {device}", "{device} . {finding} on {study}"),
    ),
)


def write_captions(study: Study, rng: np.random.Generator) -> list[str]:
    """Writes one caption, or two by different readers."""
    num_captions = 1 + (rng.random() < SECOND_CAPTION_FRAC)
    readers = rng.permutation(len(READERS))[:num_captions]
    return [write_caption(study, READERS[reader], rng) for reader in readers]


def write_caption(study: Study, reader: Reader, rng: np.random.Generator) -> str:
    """Writes what the study shows in the reader's words."""

    def pick(templates: tuple[str, ...]) -> str:
        return templates[rng.integers(len(templates))]

    mirrored, limb = is_mirrored(study.anatomy, study.view), study.anatomy in LIMBS
    finding = study.finding
    if finding and study.number > 1:
        finding = PLURALS.get(finding, f"{finding}s")
    words = {
        "body": f"{study.side} {study.anatomy}" if limb else study.anatomy,
        "projection": f"{study.side} {study.view}" if mirrored and not limb else study.view,
        "region": study.zone if mirrored else f"{study.side} {study.zone}",
        "number": NUMBERS[study.number - 1],
        "size": study.size,
        "finding": finding,
        "device": study.device,
    }
    clauses = {
        "study": pick(reader.study).format(**words),
        "finding": pick(reader.finding if finding else reader.normal).format(**words),
        "device": pick(reader.device).format(**words) if study.device else reader.no_device,
    }
    return pick(reader.report).format(**clauses)
