"""What others wrote runs nothing, reaches no other file, opens no connection and takes no more than its share."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bombs import bmp, gif, jpeg, png_header, ppm, tiff, tiled_jpeg2000, tiled_tiff
from corpus import caption_rows
from fuzz.campaign import run_campaign
from PIL import Image
from radiographs import dicom_bytes
from runs import run
from test_images import encoded
from test_torchfile import Payload

from fastm3ae.cli import main
from fastm3ae.data.arrow import write_pairs
from fastm3ae.data.decode import decode_image
from fastm3ae.data.demo import write_demo_corpus
from fastm3ae.data.dicom import decode_dicom
from fastm3ae.data.prepare import OwnDataOptions, prepare_csv, prepare_openi
from fastm3ae.data.text import load_tokenizer
from fastm3ae.errors import UserError
from fastm3ae.weights.towers import load_tower_weights, resolve_text

ROOT = Path(__file__).parents[1]

# Calls and imports that run what stands in data, or reach further than was asked; by their full names.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
                   "subprocess.getstatusoutput", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
                   "shutil.unpack_archive", "tempfile.mktemp", "numpy.fromfile"}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile",
                     "urllib", "requests", "http", "ftplib", "httpx", "aiohttp"}  # fmt: skip
LISTENS = "fastm3ae/training/launch.py"  # asks the system for a free port of this machine
FORBIDDEN_WORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def full_names(tree):
    """For each name that a file imports, what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def called(node, names):
    """The full name of what an expression stands for; "" where it is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := called(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def unsafe(root):
    for path in sorted([*root.glob("fastm3ae/**/*.py"), *root.glob("kernels/**/*.py")]):
        where, tree = path.relative_to(root).as_posix(), ast.parse(path.read_text())
        names = full_names(tree)
        modules = {name.split(".")[0] for name in names.values()}
        forbidden = FORBIDDEN_MODULES | ({"socket"} if where != LISTENS else set())
        yield from (f"{where}: imports {module}" for module in sorted(modules & forbidden))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = called(node.func, names)
            words = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            if name in FORBIDDEN_CALLS:
                yield f"{where}:{node.lineno}: calls {name}"
            if name == "torch.load" and words.get("weights_only") is not True:
                yield f"{where}:{node.lineno}: torch.load without weights_only=True"
            for word, value in FORBIDDEN_WORDS.items():
                if word in words and words[word] is value:
                    yield f"{where}:{node.lineno}: {word}={value}"


def test_nothing_unsafe_stands_in_the_package():
    assert list(unsafe(ROOT)) == []
    loaders = [path for path in (ROOT / "fastm3ae").rglob("*.py") if "torch.load(" in path.read_text()]
    assert [path.name for path in loaders] == ["torchfile.py"]  # one place reads pickles


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads as read", "imports pickle"),
        ("def f():\n    import tarfile", "imports tarfile"),
        ("from urllib.request import urlopen", "imports urllib"),
        ("import socket", "imports socket"),
        ("import torch\ntorch.load('x')", "torch.load without weights_only=True"),
        ("from torch import load as l\nl('x', weights_only=1)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load('x', weights_only=not True)", "torch.load without weights_only=True"),
        ("import yaml as y\ny.load('x', y.SafeLoader)", "calls yaml.load"),
        ("eval('1')", "calls eval"),
        ("exec('1')", "calls exec"),
        ("from os import system\nsystem('x')", "calls os.system"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_a_planted_danger_is_found(tmp_path, source, complaint):
    (tmp_path / "fastm3ae").mkdir()
    (tmp_path / "fastm3ae" / "x.py").write_text(source)
    found = list(unsafe(tmp_path))
    assert len(found) == 1 and found[0].endswith(complaint)


def test_what_is_safe_is_not_found(tmp_path):
    (tmp_path / "fastm3ae").mkdir()
    (tmp_path / "fastm3ae" / "x.py").write_text(
        "import ast, re, torch, yaml\nmodel.eval()\nre.compile('x')\nyaml.safe_load('x')\nast.literal_eval('1')\n"
        "torch.load('x', weights_only=True)\ntorch.compile(f)\nf(trust_remote_code=False, shell=False)\n"
    )
    assert list(unsafe(tmp_path)) == []


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
@pytest.mark.parametrize(
    "command",
    ["inspect {}", "convert {} out", "pretrain --preset demo --init-from {}", "finetune vqa --init-from {}",
     "evaluate {} --output out", "predict vqa --checkpoint {} --image a.png --question why",
     "export vision {} out", "export text {} out", "export graph {} out.pt2 --part image", "features {}"],
)  # fmt: skip
def test_a_hostile_checkpoint_is_refused_by_every_command(command, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "evil": Payload(os.mkdir, str(tmp_path / "owned"))}, f"evil{suffix}")
    if command.startswith("pretrain"):  # what comes before its weights are read
        corpus = write_demo_corpus(tmp_path / "demo", num_train=8, num_val=8, num_test=1)
        command += f" --data.root {corpus.root} --data.tokenizer {corpus.tokenizer} --data.no-draw-demo"
        command += " --train.num-workers 0 --train.device cpu --train.batch-size 4 --output run"
    assert main(command.format(f"evil{suffix}").split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: evil{suffix} is refused: ") and "mkdir" in said
    assert not (tmp_path / "owned").exists()


HUGE = {
    "png": png_header(30_000, 30_000),
    "colour png": png_header(2**31 - 1, 2**31 - 1, depth=16, colour=6),
    "gif": gif(65_535, 65_535),
    "tiff": tiff(2**31 - 1, 2**20),
    "bmp": bmp(10**6, 10**6),
    "ppm": ppm(10**6, 10**6),
    "tiff of one tile": tiled_tiff(30_000, 10, 60_000),
    "jpeg 2000 of many tiles": tiled_jpeg2000(encoded(Image.new("RGB", (8, 8)), "JPEG2000"), 16, 65_535, 10),
    "jpeg": jpeg(encoded(Image.new("L", (8, 8)), "JPEG"), 65_500, 65_500),
    "dicom": dicom_bytes(np.zeros((4, 4), np.uint8)).replace(b"US\x02\0\x04\0", b"US\x02\0\xff\xff"),
}


class Bombs:
    """Decodes one of them."""

    name, documented, limit_s, limit_mib = "bombs", (ValueError,), 10.0, 64.0

    def __init__(self, name):
        self.data, self.decode = HUGE[name], decode_dicom if name == "dicom" else decode_image

    def begin(self):
        pass

    def make(self, rng):
        return self.data

    def read(self, data, folder):
        self.decode(data)
        return "accepted"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", HUGE)
def test_huge_images_are_refused_without_their_memory(name, tmp_path):
    report = run_campaign(Bombs(name), 1, seed=0, failures=tmp_path)
    assert report.outcomes == {"ValueError": 1} and not report.failures, report
    with pytest.raises(ValueError, match=r"limit of (89478485|178956970)|are larger than its|tiles are too many"):
        (decode_dicom if name == "dicom" else decode_image)(HUGE[name])


def test_a_huge_image_is_left_out_of_a_preparation(tmp_path):
    (tmp_path / "a.png").write_bytes(HUGE["png"])
    (tmp_path / "b.png").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
    (tmp_path / "t.csv").write_text("image,caption\na.png,a report\nb.png,a report\n")
    report = prepare_csv(tmp_path / "t.csv", tmp_path / "out", further=OwnDataOptions(val_frac=0, test_frac=0))
    (left_out,) = (item for items in report.dropped.values() for item in items)
    assert left_out.startswith("a.png (Image size (900000000 pixels) exceeds limit of 178956970 pixels")
    with pytest.raises(UserError, match=r"a\.png: .* exceeds limit of 178956970 pixels"):
        prepare_csv(tmp_path / "t.csv", tmp_path / "out", further=OwnDataOptions(on_bad_image="stop"))


@pytest.mark.parametrize(
    "report",
    [
        '<!DOCTYPE e [<!ENTITY a0 "x">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
        + "]><eCitation>&a9;</eCitation>",
        '<!DOCTYPE e [<!ENTITY f SYSTEM "file:///etc/passwd">]><eCitation>&f;</eCitation>',
    ],
    ids=["ten billion characters", "another file"],
)  # fmt: skip
def test_entities_of_xml_neither_grow_nor_read_files(report, tmp_path):
    (tmp_path / "ecgen-radiology").mkdir()
    (tmp_path / "ecgen-radiology" / "1.xml").write_text(report)
    (tmp_path / "CXR1_1_IM-0001-1001.png").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
    with pytest.raises(UserError, match=r"1\.xml cannot be read as XML: (limit on input|undefined entity)"):
        prepare_openi(tmp_path, tmp_path / "out")


def test_code_beside_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (folder / "evil.py").write_text(
        "import os\nos.mkdir('owned')\nfrom transformers import BertTokenizerFast as Evil\n"
    )
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^The tokenizer in .* contains custom code .*"):
        load_tokenizer(folder)
    assert os.listdir(tmp_path) == ["tokenizer"]


PROGRAM = """
import os, sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event == "socket.connect" and not isinstance(arguments[1], (str, bytes))
        and not str(arguments[1][0]).startswith("127.")
    ):
        os.write(2, f"network: {event} {arguments[1:]}".encode())
        os._exit(97)

sys.addaudithook(watch)  # holds in the loader's processes, too, and nothing can catch it
if sys.argv[1] == "probe":
    import urllib.request
    urllib.request.urlopen("http://localhost:9")
from fastm3ae.cli import main
for command in sys.argv[1:]:
    status = main(command.split())
    if status:
        sys.exit(status)
"""


def in_a_watched_process(*commands):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *commands], env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


def test_local_data_open_no_connection(tmp_path):
    """A whole run of the demo's model, its inspection and its evaluation; the hub's client may use the network."""
    assert in_a_watched_process("probe").returncode == 97
    corpus = write_demo_corpus(tmp_path / "demo", num_train=12, num_val=8, num_test=4)
    pretrain = (
        f"pretrain --preset demo --output {tmp_path}/run --data.root {corpus.root} --data.tokenizer {corpus.tokenizer} "
        "--data.no-draw-demo --train.num-steps 2 --train.batch-size 4 --train.num-workers 1 --train.device cpu "
        "--train.num-pictures 2"
    )
    done = in_a_watched_process(
        pretrain,
        f"inspect {tmp_path}/run",
        f"evaluate {tmp_path}/run/checkpoints/best --task retrieval --output {tmp_path}/found --device cpu "
        "--num-resamples 10 --num-workers 1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "found" / "metrics.json").is_file()


class Vocabulary:
    """What resolve_text asks of a tokenizer."""

    pad_token_id = 1

    def __len__(self):
        return 60


def missing_vision():
    from test_pretrained import model_with

    load_tower_weights(model_with("vit_base_patch16_224.mae"))


def missing_text():
    from fastm3ae.config import TextConfig

    resolve_text(TextConfig(weights="roberta-base"), Vocabulary())


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda: load_tokenizer("bert-base-uncased"), "The tokenizer 'bert-base-uncased'"),
        (missing_text, "model.text.weights 'roberta-base'"),
        (missing_vision, "model.vision.weights 'vit_base_patch16_224.mae'"),
    ],
)
def test_offline_is_heeded_and_says_what_is_missing(ask, what, tmp_path, monkeypatch):
    """conftest.py sets HF_HUB_OFFLINE before the hub's client is imported."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"^{what} .*\(HF_HUB_OFFLINE is set, and it is not in the hub's local cache"):
        ask()


HOSTILE = ("../../../owned", "/tmp/owned", "..", "a/../../../owned", "con\0trol", "x" * 300, "=cmd()", "\x1b[2J", "~/x")


def test_names_in_data_become_no_paths(tmp_path):
    """A run on images of hostile ids writes where it was told to, and pictures of them, too."""
    home = tmp_path / "deep" / "home"
    home.mkdir(parents=True)
    for split in ("train", "val"):
        rows = [row | {"image_id": name} for row, name in zip(caption_rows(9), HOSTILE, strict=True)]
        write_pairs(home / f"made_{split}.arrow", rows)
    before = {path for path in tmp_path.rglob("*")}
    assert run(home, train={"num_steps": 2, "batch_size": 4, "num_pictures": 4}) == 0
    written = {path for path in tmp_path.rglob("*")} - before - {home / "config.yaml"}
    assert written and all(path.is_relative_to(home / "run") for path in written)
    assert not Path("/tmp/owned").exists()
    assert any("pictures" in path.parts and path.suffix == ".png" for path in written)


def test_an_evaluation_of_hostile_names_stays_in_its_folder(tmp_path):
    from test_evaluation import ABOUT

    from fastm3ae.tasks.evaluation import Evaluation, write_evaluation
    from fastm3ae.tasks.metrics import bootstrap

    rows = [{"image_id": name, "expected": name, "predicted": name, "score": 1.0} for name in HOSTILE]
    metric = bootstrap(lambda index: float(len(index)), HOSTILE, num_resamples=2)
    evaluation = Evaluation(
        metrics=dict.fromkeys(HOSTILE, metric),
        predictions=rows,
        confusion=(HOSTILE, HOSTILE),
        hardest=[(torch.zeros(3, 16, 16), HOSTILE)],
    )
    write_evaluation(evaluation, tmp_path / "a" / "b", ABOUT | {"labels": list(HOSTILE), "datasets": list(HOSTILE)})
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "a" / "b"}


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a\\b", ""])
def test_a_data_set_of_a_hostile_name_is_not_written(name, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
    (tmp_path / "t.csv").write_text("image,caption\na.png,a report\n")
    if name:
        with pytest.raises(UserError, match="The name of a data set becomes a part of file names"):
            prepare_csv(tmp_path / "t.csv", tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_a_terminal_finds_no_commands_in_a_message(capsys):
    assert main(["pre\x1b[2Jtrain\u202e"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\u202e" not in said and r"\x1b[2J" in said
