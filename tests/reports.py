"""A made-up run folder whose every text is hostile, for the tests of the report."""

import base64
import json

import yaml
from PIL import Image
from test_evaluation import ABOUT

from fastm3ae.config import PretrainConfig
from fastm3ae.config.files import to_dict
from fastm3ae.tasks.evaluation import Evaluation, write_evaluation
from fastm3ae.tasks.metrics import bootstrap

SCRIPT = "document.documentElement.setAttribute('data-owned', 'yes')"
HOSTILE = (
    f"<script>{SCRIPT}</script>",
    f"\"><img src=x onerror=\"{SCRIPT}\">",
    f"</pre></svg></title><script>{SCRIPT}</script>",
    f"javascript:{SCRIPT}",
    "{{ 7 * 7 }} $\\alpha$ & <b>",
)  # fmt: skip
"""Texts of which none may do anything."""


def hostile_run(root, name="run", seed=0, score=0.5):
    """A run with every kind of file, in which whatever may be a text is one of ``HOSTILE``."""
    folder = root / name
    (folder / "pictures").mkdir(parents=True)
    config = to_dict(PretrainConfig())
    config["data"] |= {"datasets": list(HOSTILE), "root": HOSTILE[1]}
    config["init_from"] = HOSTILE[2]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    bad, worse = HOSTILE[0].replace("/", ""), HOSTILE[4].replace("/", "")
    lines = [
        {"step": step, "split": split, "mlm_loss": 9.0 / step, f"{bad}_loss": step, worse: 1.0, "learning_rate": 0.1}
        | ({"mim_loss": 0.5, "mim_loss_patch_mean": 1.0, "score": step / 10} if split == "val" else {})
        for step in (1, 2, 3)
        for split in ("train", "val")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl')
    write_json(folder / "summary.json", {"steps": 3, "wall_s": 90.0, "num_parameters": 1234567})
    files = [{"path": f"data/{text}.arrow", "bytes": 5} for text in HOSTILE]
    write_json(folder / "data.json", {"files": files, "fingerprints": {"tokenizer": HOSTILE[1]}})
    write_json(folder / "environment.json", {"fastm3ae": HOSTILE[0], "commit": "abc", "libraries": {HOSTILE[1]: "1"}})
    write_json(folder / "environment_000002.json", {"device": HOSTILE[2]})
    pieces = [{"losses": {"mlm": "nan"}, "item_ids": list(HOSTILE)}]
    dead = [json.dumps({"step": step, "process": 0, "pieces": pieces}) for step in range(60)]
    (folder / "nonfinite.jsonl").write_text("\n".join(dead) + "\n")
    (folder / "stall_process_0.txt").write_text(HOSTILE[2])
    for step in (1, 3):
        Image.new("RGB", (40, 30), (step, 2, 3)).save(folder / "pictures" / f"{bad}_{step:06d}.png")
    about = ABOUT | {"datasets": list(HOSTILE), "checkpoint": HOSTILE[0], "seed": seed}
    evaluation = Evaluation(
        metrics={text: bootstrap(lambda index: score, "abcd", num_resamples=3) for text in HOSTILE},
        predictions=[{"image_id": "a", "score": 1.0}],
        confusion=(list(HOSTILE), list(HOSTILE)),
        notes=list(HOSTILE),
    )
    write_evaluation(evaluation, folder / "test", about)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))


def picture_bytes(uri):
    """The bytes of a data URI."""
    return base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
