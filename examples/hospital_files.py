"""Draws files as a hospital has them, for ``own_data.sh``: DICOM of 12 bits, PNG of 16 bits, and a table of reports.

Schematic radiographs of no medical meaning. Half of them are DICOM files with a window and a header that names nobody,
every fourth of these with white as its lowest value (MONOCHROME1).
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from fastm3ae.data.demo import draw_pair
from fastm3ae.data.demo.radiographs import draw_radiograph
from fastm3ae.data.demo.tokenizer import write_tokenizer

SIZE_PX, VOCAB_SIZE = 160, 512


def dicom(grey, anatomy, inverted):
    """A DICOM file of 12 bits whose window leaves out what is darker than air and brighter than bone."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    values = 500 + grey.astype(np.uint16) * 10
    file = Dataset()
    file.file_meta = meta
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.StudyDescription, file.Modality = f"Radiograph of {anatomy}", "CR"
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 1, 16, 12, 11, 0
    file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    center = 4095 - 1775 if inverted else 1775
    file.WindowCenter, file.WindowWidth = center, 2550
    file.PixelData = (4095 - values if inverted else values).tobytes()
    return file


def main():
    """Writes ``table.csv``, the images, and a tokenizer of the reports' words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=400, help="images")
    chosen = parser.parse_args()
    (chosen.folder / "images").mkdir(parents=True)
    rows = []
    for number in range(chosen.num):
        study, captions = draw_pair(0, "train", number)
        grey = draw_radiograph(study, SIZE_PX)
        name = f"images/{number:04}.{'png' if number % 2 else 'dcm'}"
        if number % 2:
            Image.fromarray(grey.astype(np.uint16) * 257).save(chosen.folder / name)
        else:
            dicom(grey, study.anatomy, number % 8 == 0).save_as(chosen.folder / name, enforce_file_format=True)
        rows.append((name, f"P{number // 2:04}", captions[0], "".join(captions[1:2])))  # some have no impression
    with (chosen.folder / "table.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("file", "patient", "findings", "impression"), *rows])
    write_tokenizer(chosen.folder / "tokenizer", (text for row in rows for text in row[2:]), VOCAB_SIZE)


if __name__ == "__main__":
    main()
