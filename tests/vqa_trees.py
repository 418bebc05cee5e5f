"""Made-up releases of VQA-RAD, SLAKE and MedVQA-2019 in their layouts, and what stands in the arrow files."""

import json

from prepared import image_bytes, write

from fastm3ae.data.arrow import VQA_COLUMNS, ArrowTable


def column(output, split, name, data_set="vqa_vqa_rad"):
    return ArrowTable.open([output / f"{data_set}_{split}.arrow"], VQA_COLUMNS).column(name)


def facts(output, split="train", data_set="vqa_vqa_rad"):
    file = output / f"{data_set}_{split}.arrow"
    return ArrowTable([file]).facts()[file.name]


def rad(qid, image, question, answer, kind="OPEN"):
    return {"qid": qid, "image_name": image, "question": question, "answer": answer, "answer_type": kind}


def rad_splits():
    return {
        "train": [
            rad(1, "a.jpg", "Is it clear?", "Yes", "CLOSED"),
            rad(2, "b.jpg", "Which side? ", "The left  side"),
            rad(3, "a.jpg", "How many?", 3),
            rad(4, "c.jpg", "Is it large?", "no.", "CLOSED "),
            rad(5, "b.jpg", "Which lobe?", "Lobe-upper"),
        ],
        "test": [
            rad(11, "a.jpg", "is it clear?", "yes", "CLOSED"),
            rad(12, "d.jpg", "Which sign?", "Silhouette"),
            rad(13, "d.jpg", "Is it left?", "No", "closed"),
        ],
    }


def write_images(folder, names):
    for name in names:
        write(folder / name, image_bytes(sum(map(ord, name)), "JPEG"))


def write_rad(root, splits):
    for split, records in splits.items():
        write(root / f"{split}set.json", json.dumps(records))
    write_images(root / "images", "a.jpg b.jpg c.jpg d.jpg".split())
    return root


# SLAKE


def slake(qid, image, question, answer, language="en", kind="OPEN"):
    record = {"qid": qid, "img_name": f"{image}/source.jpg", "question": question, "answer": answer}
    return record | {"answer_type": kind, "q_lang": language, "img_id": 1, "triple": ["vhead", "_", "_"]}


SLAKE = {
    "train": [
        slake(1, "xmlab1", "Which organ?", "Lung, Heart"),
        slake(2, "xmlab1", "哪个器官?", "肺", "zh"),
        slake(3, "xmlab2", "Is there liver?", "", kind="OPEN"),
    ],
    "validate": [slake(4, "xmlab3", "Is it CT?", "Yes", kind="CLOSED"), slake(5, "xmlab3", "是CT吗?", "是", "zh")],
    "test": [slake(6, "xmlab4", "Which organ?", "Liver")],
}


def write_slake(root, splits=SLAKE):
    for split, records in splits.items():
        write(root / f"{split}.json", json.dumps(records, ensure_ascii=False))
        write_images(root / "imgs", {record["img_name"] for record in records})
    return root


# MedVQA-2019

MEDVQA = {
    "train": {
        "modality": ["t1|what is it?|CT - noncontrast"],
        "organ": ["t1|which organ?|spine and contents"],
        "plane": ["t1|which plane?|axial", "t2|which plane?|sagittal"],
    },
    "val": {
        "modality": ["v1|is it an mri?|yes"],
        "organ": ["v1|which organ?|breast"],
        "plane": ["v1|which plane?|axial"],
    },
    "test": {
        "modality": ["e1|what is it?|xr#plain film"],
        "organ": ["e2|which organ?|breast"],
        "plane": ["e3|which plane?|lateral"],
    },
}


def medvqa_lines(**changes):
    return {split: files | changes.get(split, {}) for split, files in MEDVQA.items()}


def write_official(root, lines):
    training, validation = root / "ImageClef-2019-VQA-Med-Training", root / "ImageClef-2019-VQA-Med-Validation"
    names = {"modality": "C1_Modality", "plane": "C2_Plane", "organ": "C3_Organ"}
    for split, folder in (("train", training), ("val", validation)):
        for category, text in lines[split].items():
            write(folder / "QAPairsByCategory" / f"{names[category]}_{split}.txt", "\r\n".join(text) + "\r\n")
        write(folder / "QAPairsByCategory" / f"C4_Abnormality_{split}.txt", "t1|is it normal?|yes\n")
    tests = ["e9|abnormality|what is abnormal?|cyst#tumour"]
    for category in ("plane", "organ", "modality"):
        tests += [f"{image}|{category}|{rest}" for image, rest in (t.split("|", 1) for t in lines["test"][category])]
    write(root / "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt", "\n".join(tests))
    write_images(training / "Train_images", ["t1.jpg", "t2.jpg"])
    write_images(validation / "Val_images", ["v1.jpg"])
    write_images(root / "VQAMed2019Test/VQAMed2019_Test_Images", ["e1.jpg", "e2.jpg", "e3.jpg"])
    return root


def write_originals_layout(root, lines):
    for split, files in lines.items():
        for category, text in files.items():
            write(root / split / "QA" / f"{category.title()}.csv", "\n".join(text) + "\n")
            write_images(root / split / "images", [line.split("|")[0] + ".jpg" for line in text])
    return root
