"""What a DICOM file's header says in words, and what in it may say who the patient is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastm3ae.data.dicom import reasons
from fastm3ae.errors import UserError, nearest

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["check_tag", "check_text_tags", "header_text", "identifying_fields"]

IDENTIFYING = frozenset(
    {
        "AccessionNumber", "AdmissionID", "CountryOfResidence", "CurrentPatientLocation", "DeviceSerialNumber",
        "EthnicGroup", "InstitutionAddress", "InstitutionName", "InstitutionalDepartmentName", "IssuerOfPatientID",
        "MedicalRecordLocator", "MilitaryRank", "NamesOfIntendedRecipientsOfResults", "Occupation", "OtherPatientIDs",
        "OtherPatientIDsSequence", "OtherPatientNames", "PatientAddress", "PatientAlternativeCalendar",
        "PatientBirthDate", "PatientBirthName", "PatientBirthTime", "PatientComments", "PatientID",
        "PatientInsurancePlanCodeSequence", "PatientInstitutionResidence", "PatientMotherBirthName", "PatientName",
        "PatientReligiousPreference", "PatientTelecomInformation", "PatientTelephoneNumbers", "RegionOfResidence",
        "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers", "ResponsibleOrganization",
        "ResponsiblePerson", "StationName", "StudyID",
    }
)  # fmt: skip
"""Keywords of DICOM PS3.15, table E.1-1, whose values name a patient, a person, a place or a case."""
IDENTIFYING_KINDS = {"PN": "a person's name", "DA": "a date", "DT": "a date", "TM": "a time", "UI": "an identifier"}
TEXT_KINDS = ("AE", "AS", "CS", "DS", "FD", "FL", "IS", "LO", "LT", "SH", "SL", "SS", "ST", "UC", "UL", "US", "UT")


def check_tag(tag: str) -> None:
    """Raises a UserError unless a word is the keyword of a DICOM field, such as StudyDescription."""
    from pydicom.datadict import DicomDictionary, tag_for_keyword

    if tag_for_keyword(tag) is None:
        known = [entry[4] for entry in DicomDictionary.values()]
        raise UserError(f"{tag!r} is no keyword of a DICOM field, such as StudyDescription.{nearest(tag, known)}")


def check_text_tags(tags: Sequence[str]) -> None:
    """Raises a UserError unless each of the keywords is of a field of text that does not say who the patient is."""
    from pydicom.datadict import dictionary_VR

    for tag in tags:
        check_tag(tag)
        kind = dictionary_VR(tag)
        if tag in IDENTIFYING or kind in IDENTIFYING_KINDS:
            what = IDENTIFYING_KINDS.get(kind, "a name, a number or a place")
            raise UserError(f"{tag} is {what} that may say who the patient is, and becomes no text.")
        if kind not in TEXT_KINDS:
            raise UserError(f"{tag} is a field of {kind}, expected one of text or numbers, such as StudyDescription.")


def header_text(dataset: "Dataset", tag: str) -> str:
    """Returns a field's value as a text, several with commas; "" where there is none.

    Raises:
        ValueError: The field is damaged.
    """
    with reasons():
        value = dataset.get(tag)
    if value is None:
        return ""
    return ", ".join(map(str, value)) if hasattr(value, "__iter__") and not isinstance(value, str) else str(value)


def identifying_fields(dataset: "Dataset") -> list[str]:
    """Returns the keywords of fields with a value that may say who the patient is; of burned-in words, too.

    Raises:
        ValueError: A field is damaged.
    """
    with reasons():
        found = [
            element.keyword or str(element.tag)  # of a private field
            for element in dataset
            if (element.keyword in IDENTIFYING or element.VR == "PN") and not element.is_empty
        ]
        return found + ["BurnedInAnnotation"] * (dataset.get("BurnedInAnnotation") == "YES")
