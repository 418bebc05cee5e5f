"""Checkpoints: ours, the original's and of towers, to ``fastm3ae.weights.pretrained``; and a run's, to go on from."""

import base64
import collections
import hashlib
import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_models
import mpma_models
import torch
from models import small_model
from safetensors.torch import save
from test_convert import official_config

from fastm3ae.config.files import to_dict
from fastm3ae.errors import UserError
from fastm3ae.tasks.checkpoint import read_finetuned
from fastm3ae.training.checkpoint import Checkpointer
from fastm3ae.training.distributed import Processes
from fastm3ae.training.saved import damage, load_training_state, newest_whole, part_sizes, read_own, read_parts
from fastm3ae.weights.convert import to_official
from fastm3ae.weights.pretrained import load_model, read_about, read_weights
from fastm3ae.weights.towers import read_tensors
from fuzz.mutate import EXTREMES, mutate, odd_json, odd_text, odd_value

__all__ = ["CheckpointTarget", "TrainingCheckpointTarget"]

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt")
OWNED = "owned"  # what a payload would make, beside the file


class Payload:
    """What runs code where a pickle is read without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (self.function, self.arguments, *([] if self.state is None else [self.state]))


def payloads(folder: str) -> list[Any]:
    """Objects whose loading would make the folder."""
    inert, code = collections.UserDict, f"__import__('os').mkdir({folder!r})"
    return [
        Payload(os.mkdir, folder), Payload(os.system, f"mkdir {folder}"), Payload(eval, code), Payload(exec, code),
        Payload(getattr, {}, "clear"), Payload(__import__, "os"),
        Payload(inert, state={"data": Payload(os.mkdir, folder)}), Payload(map, os.mkdir, [folder]),
        Payload(collections.OrderedDict, [("a", Payload(os.mkdir, folder))]), Payload(torch.load, folder),
        Payload(Path, folder), Payload(Path.mkdir, Path(folder)), Payload(io.open, folder, "w"),
        Payload(collections.Counter, [folder], state={"a": 1}),
    ]  # fmt: skip


def torch_file(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def zip_file(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


class CheckpointTarget:
    """Files of weights. The first line of an input is the file's name."""

    name, documented, limit_s, limit_mib = "checkpoint", (UserError,), 10.0, 128.0

    def __init__(self) -> None:
        model = small_model(dtype=torch.float16)
        made = [
            model, small_model("swin", "bert", ("itm", "vqa"), dtype=torch.float16),
            mpma_models.small_model(dtype=torch.float16), mpma_models.small_model(memory="topk", dtype=torch.float16),
            image_models.small_model(dtype=torch.float16),
            image_models.small_model(objective="segmentation", dtype=torch.float16),
        ]  # fmt: skip
        self.models = [(of.state_dict(), to_dict(of.config)) for of in made]
        official, config = to_official(model.state_dict(), model), official_config(model)
        self.about = {"config": {"task": {"kind": "vqa"}, "data": {"datasets": ["a"]}}, "labels": ["yes"]}
        self.official = {"state_dict": official, "hyper_parameters": {"config": config}, "epoch": 3}
        self.ours = [save(state, self.metadata(config, self.about)) for state, config in self.models]
        vision = {n.removeprefix("vision."): t for n, t in self.models[0][0].items() if n.startswith("vision.")}
        self.pickles = [
            torch_file(self.official), torch_file({"state_dict": official}), torch_file(vision),
            torch_file(self.official, _use_new_zipfile_serialization=False), torch_file({"model": vision}),
        ]  # fmt: skip
        self.seeds = [*self.ours, *self.pickles]
        self.members = members_of(self.pickles[0])
        zeros = {"archive/data.pkl": self.members[next(iter(self.members))], "archive/data/0": bytes(2**28)}
        self.bomb = zip_file(zeros, zipfile.ZIP_DEFLATED)

    def begin(self) -> None:
        torch.set_num_threads(1)

    @staticmethod
    def metadata(config: Any, about: Any) -> dict[str, str]:
        return {"format": "pt", "fastm3ae_config": json.dumps(config), "fastm3ae_about": json.dumps(about)}

    def make(self, rng: random.Random) -> bytes:
        ours = rng.random() < 0.5
        data = self.make_ours(rng) if ours else self.make_pickle(rng)
        suffix = rng.choice(SUFFIXES) if rng.random() < 0.05 else SUFFIXES[0] if ours else rng.choice(SUFFIXES[1:])
        return f"model{suffix}\n".encode() + data

    def make_ours(self, rng: random.Random) -> bytes:
        way, ours = rng.random(), rng.choice(self.ours)
        if way < 0.02:
            return ours
        if way < 0.3:
            return mutate(ours, rng, self.seeds)
        if way < 0.4:
            length = int.from_bytes(ours[:8], "little")
            header = mutate(ours[8 : 8 + length], rng)
            length = rng.choice((len(header), len(header), *EXTREMES)) & (2**64 - 1)
            return length.to_bytes(8, "little") + header + ours[8 + length :][:1000]
        state, config = rng.choice(self.models)
        state, about = dict(state), json.loads(json.dumps(self.about))
        if rng.random() < 0.2:
            self.change(about, rng)
        metadata = self.metadata(config, about)
        if way < 0.75:
            config = json.loads(metadata["fastm3ae_config"])
            for _ in range(rng.randint(1, 2)):
                self.change(config, rng)
            metadata["fastm3ae_config"] = json.dumps(config)
        elif way < 0.85:
            metadata[rng.choice(("fastm3ae_config", "fastm3ae_about", "x"))] = (
                odd_json(rng).encode(errors="replace").decode()
            )
        else:
            for name in rng.sample(list(state), rng.randint(1, 3)):
                self.change_tensor(state, name, rng)
        return save(state, metadata)

    def change(self, config: dict[str, Any], rng: random.Random) -> None:
        """An odd value somewhere in a configuration."""
        key = rng.choice(list(config) or ["x"])
        if isinstance(config.get(key), dict) and rng.random() < 0.9:
            self.change(config[key], rng)
        elif isinstance(config.get(key), (int, float)) and rng.random() < 0.7:
            config[key] = rng.choice((*EXTREMES, 3, 16, 48, 100, 1000, 10**5, 0.5))
        elif rng.random() < 0.1:
            config[odd_text(rng)] = odd_value(rng)
        else:
            config[key] = odd_value(rng)

    def change_tensor(self, state: dict[str, torch.Tensor], name: str, rng: random.Random) -> None:
        """A tensor of another shape, another type, or gone."""
        tensor = state[name]
        ways: tuple[Callable[[], torch.Tensor], ...] = (
            lambda: tensor.reshape(-1), lambda: tensor[..., :0], lambda: tensor[None], lambda: torch.tensor(1.0),
            lambda: tensor.to(torch.int64), lambda: tensor.bool(), lambda: tensor.to(torch.float8_e5m2),
            lambda: tensor.to(torch.complex64), lambda: torch.zeros(0, 2**40), lambda: torch.zeros(7, 0),
            lambda: torch.full_like(tensor, float("nan")), lambda: torch.zeros(3, 5, 7), lambda: tensor.to(torch.uint8),
        )  # fmt: skip
        if rng.random() < 0.2:
            del state[name]
        elif rng.random() < 0.2:
            state[odd_text(rng).encode(errors="replace").decode() + "x"] = state.pop(name)
        else:
            state[name] = rng.choice(ways)().contiguous()

    def make_pickle(self, rng: random.Random) -> bytes:
        way = rng.random()
        if way < 0.02:
            return rng.choice(self.pickles)
        if way < 0.04:
            return self.bomb
        if way < 0.4:
            return mutate(rng.choice(self.pickles), rng, self.seeds)
        if way < 0.6:  # damage behind right checksums
            members = dict(self.members)
            name = rng.choice((*members, next(iter(members)), next(iter(members))))
            members[name] = mutate(members[name], rng, self.pickles)
            return zip_file(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        if way < 0.75:
            payload = rng.choice(payloads(OWNED))
            place = rng.choice(("evil", "state_dict", "callbacks"))
            if rng.random() < 0.3:
                return pickle.dumps({**self.tame(), place: payload}, protocol=rng.choice((0, 2, 4)))
            return torch_file({"state_dict": {}, place: payload}, pickle_protocol=rng.choice((2, 4)))
        if way < 0.85:
            return torch_file({**self.official, "state_dict": self.claims_much(rng)})
        content = json.loads(json.dumps(self.official["hyper_parameters"]))
        state = dict(self.official["state_dict"])
        if rng.random() < 0.5:
            self.change(content, rng)
        else:
            for name in rng.sample(list(state), rng.randint(1, 3)):
                self.change_tensor(state, name, rng)
        return torch_file({"state_dict": rng.choice((state, state, odd_value(rng))), "hyper_parameters": content})

    @staticmethod
    def tame() -> dict[str, Any]:
        return {"state_dict": {}, "hyper_parameters": {"config": {"loss_names": {}}}}

    def claims_much(self, rng: random.Random) -> dict[str, Any]:
        """Tensors that are larger than what is stored of them."""
        state = dict(self.official["state_dict"])
        for name in rng.sample(list(state), rng.choice((1, 3, len(state)))):
            shape = list(state[name].shape) or [1]
            shape[rng.randrange(len(shape))] = rng.choice((1000, 2**20, 2**30))
            state[name] = rng.choice(
                (
                    lambda shape: torch.zeros(1).expand(shape), lambda shape: torch.empty(shape, device="meta"),
                    lambda shape: torch.zeros(shape, layout=torch.sparse_coo),
                    lambda shape: torch.nn.Parameter(torch.zeros(1).expand(shape)),
                )
            )(shape)  # fmt: skip
        return state

    def read(self, data: bytes, folder: Path) -> str:
        name, content = data.split(b"\n", 1)
        path = folder / name.decode()
        path.write_bytes(content)
        os.chdir(folder)  # where a payload would make its folder
        refusal, outcome = None, ""
        for reader in (read_tensors, read_about, read_weights, read_finetuned, load_model):
            try:
                reader(path)
                outcome = "accepted"
            except UserError as error:
                refusal = error
        assert os.listdir(folder) == [path.name], f"code of the file ran: {os.listdir(folder)}"
        if not outcome:
            raise refusal
        return outcome


class TrainingCheckpointTarget:
    """A run's folder of two checkpoints, as the checkpointer wrote them. An input is JSON: each file, as base64."""

    name, documented, limit_s, limit_mib = "training-checkpoint", (UserError,), 10.0, 128.0

    def __init__(self) -> None:
        model = small_model(dtype=torch.float32)
        state = {"config": to_dict(model.config)}
        parts, own = {"optimizer.x.exp_avg": torch.ones(3, 2)}, {"process_0.torch_rng": torch.get_rng_state()}
        with tempfile.TemporaryDirectory() as folder:
            checkpointer = Checkpointer(Path(folder), Processes("cpu"), keep=2)
            for step in (1, 2):
                weights = model.state_dict()
                checkpointer.save(step, model.config, weights, parts, own, state | {"step": step}, is_best=True)
            checkpointer.close()
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def begin(self) -> None:
        torch.set_num_threads(1)

    def make(self, rng: random.Random) -> bytes:
        files = dict(self.files)
        for _ in range(rng.choice((1, 1, 2, 3))):
            name, way = rng.choice(list(files)), rng.random()
            if way < 0.1:
                del files[name]
            elif way < 0.2:
                files[name] = files[rng.choice(list(files))]
            elif way < 0.25:
                files[f"step_{rng.choice(('000003', '9' * 5000, '-1', '٣', '', '1e9', '00000000002'))[:200]}/x"] = b""
            elif way < 0.35 and name.endswith(".json"):
                files[name] = odd_json(rng).encode(errors="surrogatepass")
            else:
                files[name] = mutate(files[name], rng, list(self.files.values()))
            if name.endswith(".json") or not files:
                continue
            if name in files and rng.random() < 0.5:
                self.vouch(files, name)
            if not files:
                break
        return json.dumps({name: base64.b64encode(content).decode() for name, content in files.items()}).encode()

    def vouch(self, files: dict[str, bytes], name: str) -> None:
        """Writes a file's new size and hash where a manifest has its old ones: whoever damages it can do so, too."""
        was, now = (of.get(name, b"") for of in (self.files, files))
        hashes = tuple(hashlib.sha256(content).hexdigest().encode() for content in (was, now))
        sizes = tuple(f'"bytes": {len(content)}'.encode() for content in (was, now))
        manifest = f"{Path(name).parts[0]}/checkpoint.json"
        for other in files.keys() & {manifest}:
            files[other] = files[other].replace(*hashes).replace(*sizes)

    def read(self, data: bytes, folder: Path) -> str:
        for name, content in json.loads(data).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        for checkpoint in folder.glob("step_*"):
            fault = damage(checkpoint)
            assert fault is None or fault.strip()
        path, notes = newest_whole(folder)
        assert all(note.strip() for note in notes)
        if path is None:
            return "nothing to go on from"
        load_training_state(path)
        read_parts(path, {name: torch.empty(size) for name, size in part_sizes(path).items()})
        read_own(path, "process_0.")
        return "accepted" if not notes else "an older one"
