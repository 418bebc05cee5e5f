"""Files of torch are read without running them, and take no more memory than they are long."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from fastm3ae.errors import UserError
from fastm3ae.weights.torchfile import check_state, load_torch


class Payload:
    """What runs code where a pickle is read without care."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("mkdir owned",), "system"),
        (eval, ("__import__('os').mkdir('owned')",), "eval"),
        (io.open, ("owned", "w"), "open"),
        (torch.load, ("owned",), "load"),
        (getattr, ({}, "clear"), "getattr"),
    ],
)
def test_what_would_be_called_is_refused(tmp_path, monkeypatch, function, arguments, name, is_zip):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "evil": Payload(function, *arguments)}
    torch.save(content, "x.ckpt", _use_new_zipfile_serialization=is_zip)
    message = rf"^x\.ckpt is refused: .*{name}" if is_zip else r"^x\.ckpt is not a readable checkpoint: "
    with pytest.raises(UserError, match=message) as refused:
        load_torch(tmp_path.joinpath("x.ckpt").relative_to(tmp_path), ("collections.", "pathlib."))
    assert "\n" not in str(refused.value) and os.listdir() == ["x.ckpt"]


def raw(path, code):
    """A file of torch whose pickle is written by hand: opcodes of protocol 2."""
    with zipfile.ZipFile(path, "w") as file:
        for member, content in (("data.pkl", b"\x80\x02" + code + b"."), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"archive/{member}", content)


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


CALL = b"\x85R"  # calls what is below with the topmost value
STATE = b"}" + text("__class__") + text("owned") + b"s" + b"b"  # gives it a state


@pytest.mark.parametrize("name", ["collections namedtuple", "collections.abc os.system", "pathlib Path"])
def test_what_is_allowed_is_neither_imported_nor_called(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    module, function = name.split()
    raw("x.ckpt", f"c{module}\n{function}\n".encode() + text("owned") + CALL + STATE)
    inert = load_torch(tmp_path / "x.ckpt", ("collections.", "pathlib."))
    assert type(inert).__name__ == "_Inert" and type(inert).__module__ == "fastm3ae.weights.torchfile"
    assert not vars(inert) and os.listdir() == ["x.ckpt"]


def test_a_call_within_a_state_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = b"cposix\nmkdir\n" + text("owned") + CALL
    raw("x.ckpt", b"ccollections\nUserDict\n" + text("a") + CALL + b"}" + text("data") + call + b"sb")
    with pytest.raises(UserError, match=r"x\.ckpt is refused: .*posix\.mkdir"):
        load_torch(tmp_path / "x.ckpt", ("collections.",))
    assert os.listdir() == ["x.ckpt"]


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(
        tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED
    ) as bomb:  # fmt: skip
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr("whole/data/1", bytes(10**7))
    with pytest.raises(UserError, match=r"bomb\.pt is not a readable checkpoint: it has \d+ bytes and unpacks to 1000"):
        load_torch(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(2**40), r"its tensors claim \d{13} bytes, but it has \d+\."),
        (torch.empty(2**40, device="meta"), "'?a'? is no tensor of numbers"),
        (torch.zeros(2**20, 2**20, layout=torch.sparse_coo), "'?a'? is no tensor of numbers"),
        ("text", "'?a'? is no tensor of numbers"),
    ],
    ids=["expanded", "meta", "sparse", "text"],
)
def test_tensors_that_are_not_there_are_refused(tmp_path, tensor, message):
    path = tmp_path / "x.pt"
    torch.save({"a": tensor}, path)
    state = load_torch(path)
    with pytest.raises(UserError, match=message):
        check_state(state, path)


def test_tied_tensors_and_views_are_taken(tmp_path):
    tied = torch.randn(50, 20)
    state = {"a": tied, "b": tied, "c": tied.T, "d": tied[3]}
    torch.save(state, tmp_path / "x.pt")
    check_state(load_torch(tmp_path / "x.pt"), tmp_path / "x.pt")
    for other in ([], {1: tied}, None):
        with pytest.raises(UserError, match="holds no state dict: expected a dictionary of tensors"):
            check_state(other, tmp_path / "x.pt")


def test_a_plain_pickle_is_refused(tmp_path):
    for protocol in (0, 2, 4):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(Payload(os.mkdir, str(tmp_path / "owned")), protocol))
        with pytest.raises(UserError, match=r"x\.pt is not a readable checkpoint: \S"):
            load_torch(tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]
