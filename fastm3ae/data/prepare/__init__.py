"""Arrow files from the releases of data sets, and from your own images and texts."""

from fastm3ae.data.prepare.chexpert import prepare_chexpert
from fastm3ae.data.prepare.common import PrepareReport
from fastm3ae.data.prepare.irtr_roco import prepare_irtr_roco
from fastm3ae.data.prepare.medicat import prepare_medicat
from fastm3ae.data.prepare.medvqa_2019 import prepare_medvqa_2019
from fastm3ae.data.prepare.melinda import prepare_melinda
from fastm3ae.data.prepare.mimic_cxr import prepare_mimic_cxr
from fastm3ae.data.prepare.nih import prepare_nih
from fastm3ae.data.prepare.openi import prepare_openi
from fastm3ae.data.prepare.own_data import OwnDataOptions
from fastm3ae.data.prepare.own_folder import prepare_folder
from fastm3ae.data.prepare.own_tables import Columns, prepare_csv, prepare_jsonl
from fastm3ae.data.prepare.roco import prepare_roco
from fastm3ae.data.prepare.rsna import prepare_rsna
from fastm3ae.data.prepare.siim import prepare_siim
from fastm3ae.data.prepare.slake import prepare_slake
from fastm3ae.data.prepare.vqa_rad import prepare_vqa_rad

__all__ = [
    "SOURCES",
    "Columns",
    "OwnDataOptions",
    "PrepareReport",
    "prepare_chexpert",
    "prepare_csv",
    "prepare_folder",
    "prepare_irtr_roco",
    "prepare_jsonl",
    "prepare_medicat",
    "prepare_medvqa_2019",
    "prepare_melinda",
    "prepare_mimic_cxr",
    "prepare_nih",
    "prepare_openi",
    "prepare_roco",
    "prepare_rsna",
    "prepare_siim",
    "prepare_slake",
    "prepare_vqa_rad",
]

SOURCES = {
    "roco": prepare_roco,
    "medicat": prepare_medicat,
    "irtr-roco": prepare_irtr_roco,
    "mimic-cxr": prepare_mimic_cxr,
    "openi": prepare_openi,
    "vqa-rad": prepare_vqa_rad,
    "slake": prepare_slake,
    "slack": prepare_slake,  # as the original spells it
    "medvqa-2019": prepare_medvqa_2019,
    "melinda": prepare_melinda,
    "chexpert": prepare_chexpert,
    "nih": prepare_nih,
    "rsna": prepare_rsna,
    "siim": prepare_siim,
    "csv": prepare_csv,
    "jsonl": prepare_jsonl,
    "folder": prepare_folder,
}
"""What ``fastm3ae prepare`` can read, by name."""
