"""Arrow files from releases of ROCO and MediCaT, and from your own images and texts."""

from fastm3ae.data.prepare.common import PrepareReport
from fastm3ae.data.prepare.irtr_roco import prepare_irtr_roco
from fastm3ae.data.prepare.medicat import prepare_medicat
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
    "prepare_roco",
]

SOURCES = {
    "roco": prepare_roco,
    "medicat": prepare_medicat,
    "irtr-roco": prepare_irtr_roco,
    "csv": prepare_csv,
    "jsonl": prepare_jsonl,
    "folder": prepare_folder,
}
"""What ``fastm3ae prepare`` can read, by name."""
