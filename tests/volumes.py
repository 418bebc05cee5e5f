"""NIfTI volumes for tests."""

import gzip

import nibabel
import numpy as np


def volume_bytes(values, zooms=(1, 1, 1), axes="RAS", packed=False, **header):
    """A file of values that are given from left to right, back to front and feet to head, stored in another order."""
    image = nibabel.Nifti1Image(np.asarray(values), np.diag([*zooms, 1.0]))
    order = nibabel.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), order))
    for name, value in header.items():
        image.header[name] = value
    data = image.to_bytes()
    return gzip.compress(data, mtime=0) if packed else data
