"""Arrow files from releases of ROCO, MediCaT, MIMIC-CXR and Open-i, and from your own images and texts."""

from fastm3ae.data.prepare.common import PrepareReport
from fastm3ae.data.prepare.irtr_roco import prepare_irtr_roco
from fastm3ae.data.prepare.medicat import prepare_medicat
from fastm3ae.data.prepare.mimic_cxr import prepare_mimic_cxr
from fastm3ae.data.prepare.openi import prepare_openi
from fastm3ae.data.prepare.own_data import prepare_csv, prepare_folder, prepare_jsonl
from fastm3ae.data.prepare.roco import prepare_roco

__all__ = [
    "SOURCES",
    "PrepareReport",
    "prepare_csv",
    "prepare_folder",
    "prepare_irtr_roco",
    "prepare_jsonl",
    "prepare_medicat",
    "prepare_mimic_cxr",
    "prepare_openi",
    "prepare_roco",
]

SOURCES = {
    "roco": prepare_roco,
    "medicat": prepare_medicat,
    "irtr-roco": prepare_irtr_roco,
    "mimic-cxr": prepare_mimic_cxr,
    "openi": prepare_openi,
    "csv": prepare_csv,
    "jsonl": prepare_jsonl,
    "folder": prepare_folder,
}
"""What ``fastm3ae prepare`` can read, by name."""
