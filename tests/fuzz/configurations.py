"""Configurations: YAML files, the command's arguments, and command lines of the original. Nothing is trained."""

import contextlib
import functools
import io
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fastm3ae import cli
from fastm3ae.config import FinetuneConfig, PretrainConfig
from fastm3ae.config.files import from_dict, read_yaml, to_dict
from fastm3ae.config.presets import FINETUNE_PRESETS, PRESETS
from fastm3ae.data.prepare import SOURCES
from fastm3ae.errors import UserError
from fastm3ae.official.arguments import DEFAULTS, NAMED_CONFIGS
from fuzz.mutate import EXTREMES, NUMBERS, mutate, odd_text, odd_value

__all__ = ["CommandTarget", "ConfigurationTarget", "OfficialTarget"]


def exploding() -> Iterator[str]:
    """YAML whose aliases and merges stand for 10^9 values."""
    for first, next_one in (("[x]", "[{}]"), ("{root: x}", "{{<<: [{}]}}")):
        lines = [f"a0: &a0 {first}"]
        lines += [f"a{i}: &a{i} {next_one.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 10)]
        yield "\n".join(lines)
    yield from ("data: &a {root: x, <<: *a}\n", "train: &a [*a]\n")
    yield from (
        "[" * 50_000,
        "{a: " * 50_000,
        "[" * 3000 + "]" * 3000,
        "- " * 20_000,
        "? " * 5000,
        "a:\n" + " " * 10**6,
    )


class ConfigurationTarget:
    """YAML files, read into each kind of run; what is accepted is written and read back."""

    name, documented, limit_s, limit_mib = "configuration", (UserError,), 10.0, 64.0

    def __init__(self) -> None:
        made = [preset() for presets in (PRESETS, *FINETUNE_PRESETS.values()) for preset in presets.values()]
        self.bases = [PretrainConfig(), *(config for config in made if isinstance(config, FinetuneConfig))]
        self.trees = [to_dict(config) for config in made]
        self.seeds = [yaml.safe_dump(tree, sort_keys=False).encode() for tree in self.trees]
        self.bombs = [*exploding(), *NUMBERS]

    def begin(self) -> None:
        """There is nothing to prepare."""

    def make(self, rng: random.Random) -> bytes:
        way = rng.random()
        if way < 0.03:
            return rng.choice(self.bombs).encode()
        if way < 0.3:
            return mutate(rng.choice(self.seeds), rng, self.seeds)
        tree = json.loads(json.dumps(rng.choice(self.trees)))
        for _ in range(rng.choice((1, 1, 2))):
            self.change(tree, rng)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=bool(rng.getrandbits(1)))
        if rng.random() < 0.3:
            number = rng.choice((*NUMBERS, *map(str, EXTREMES)))
            text = text.replace(rng.choice(("null", "true", "8", "0.1")), number, 1)
        return text.encode(errors="surrogatepass")

    def change(self, tree: dict[str, Any], rng: random.Random) -> None:
        """An odd value somewhere in a configuration, or another one."""
        key = rng.choice(list(tree) or ["x"])
        if isinstance(tree.get(key), dict) and rng.random() < 0.9:
            self.change(tree[key], rng)
        elif isinstance(tree.get(key), (int, float)) and abs(tree[key]) < 2**64 and rng.random() < 0.8:
            tree[key] *= rng.choice((1, 2, 3, 0.5, *EXTREMES, float("nan"), float("inf"), 0.1))
        elif isinstance(tree.get(key), str) and rng.random() < 0.5:
            tree[key] = rng.choice(("auto", "x", "vit", "token", "clip", odd_text(rng)))
        elif rng.random() < 0.1:
            tree[odd_text(rng)] = odd_value(rng)
        else:
            tree[key] = odd_value(rng)

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "run.yaml"
        path.write_bytes(data)
        values = read_yaml(path)
        outcome, refusal = "", None
        for base in self.bases:
            try:
                config = from_dict(base, values)
            except UserError as error:
                refusal = error
                continue
            path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
            assert from_dict(base, read_yaml(path)) == config
            outcome = "accepted"
        if not outcome:
            raise refusal
        return outcome


class _Console(contextlib.AbstractContextManager):
    """What the command prints, into streams as strict as a terminal's."""

    def __enter__(self) -> "_Console":
        self.before = sys.stdout, sys.stderr
        self.streams = [
            io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
            for errors in ("strict", "backslashreplace")
        ]
        sys.stdout, sys.stderr = self.streams
        return self

    def __exit__(self, *error: Any) -> None:
        sys.stdout, sys.stderr = self.before

    def text(self) -> str:
        return b"".join(stream.buffer.getvalue() for stream in self.streams).decode(errors="replace")


def disarm() -> None:
    """Replaces everything that the commands run once their arguments are understood."""
    from fastm3ae import doctor
    from fastm3ae.data import describe
    from fastm3ae.tasks import evaluation, predict
    from fastm3ae.training import describe as describe_training
    from fastm3ae.training import evaluate, finetune, launch, pretrain, profile
    from fastm3ae.weights import pretrained

    class Nothing:
        broken = False

        def render(self) -> str:
            return "nothing"

        def is_cut(self, text: str) -> bool:
            return False

        def answer_all(self, pairs: list, top: int) -> list:
            return [[("yes", 0.5)]] * len(pairs)

        classify_all = answer_all

    def nothing(*_: Any, **__: Any) -> Nothing:
        return Nothing()

    done = evaluation.Evaluation(metrics={}, predictions=[])
    pretrain.pretrain = finetune.finetune = lambda config: to_dict(config) and {"loss": 1.0}
    finetune.finetune_seeds = lambda config, seeds: "table"
    evaluate.evaluate = lambda *_: done
    profile.profile = doctor.diagnose = describe.describe_arrow = predict.Predictor.load = nothing
    describe_training.describe_run = describe_training.describe_checkpoint = lambda path: "nothing"
    pretrained.convert_checkpoint = launch.launch = lambda *_: 0
    for name, source in SOURCES.items():
        SOURCES[name] = functools.wraps(source)(nothing)


def run_command(arguments: list[str]) -> str:
    """Runs the command, and returns "accepted" or its exit status."""
    with _Console() as console:
        try:
            status = cli.main(arguments)
        except SystemExit as ended:  # as argparse and tyro end it
            status = ended.code or 0
    text = console.text()
    assert status in (0, 2), f"exit status {status}"
    assert "Traceback" not in text, text[:500]
    assert text.strip() or not status, "refused without a word"
    return "exit 2" if status else "accepted"


LINES = (
    "profile --steps 3 --warm-up 1 --trace t", "evaluate ckpt --split val --max-images 3", "inspect a.arrow", "predict",
    "evaluate ckpt --task zero-shot --prompts p.yaml", "convert a.ckpt b", "doctor", "", "--help", "pretrain -h",
    "predict vqa --checkpoint c --image a.png --question why", "finetune", "finetune vqa --seeds 1 2 3", "inspect run",
    "predict classification --checkpoint c --image a.png b.png --text t --json --top 2", "with -h", "prepare",
    "prepare roco SOURCE OUTPUT --min-words 3", "prepare csv t.csv out --text-columns a b --delimiter ;",
    "prepare mimic-cxr s o --views AP PA --on-bad-image stop", "finetune vqa --init-from gone.ckpt",
    "pretrain --from-official task_pretrain_m3ae", "pretrain --config run.yaml",
    *(f"prepare {name} in out" for name in SOURCES),
)  # fmt: skip
LITERALS = (
    "[]", "{}", "()", "['a', 'b']", "[[[]]]", "{'a': 1}", "[0,1]", "None", "True", "'x'", "b'x'", "1j", "{1}", "..",
    "(" * 5000, "[" * 150 + "]" * 150, "-" * 5000 + "1", "{'mlm': 'x'}", "{'mlm': nan}", "../../../x", "/etc", "1_000",
    r"'a\x00b'", r"'\ud800'", r"'a\nb: 1'", "1if 2else 3", "lambda: 0", "__import__('os')", "f'{1}'", "x" * 10_000,
    "9" * 5000, "0b1", "a.b", "=", "1e400", "-1e400", "[1e400]", "10**10", "{'irtr': 1, 'vqa': 1}", r"'\udcff'",
)  # fmt: skip


def words_in_json(words: list[str]) -> bytes:
    """Arguments as an input: none holds NUL, and Linux takes no longer ones."""
    return json.dumps([word.replace("\0", "")[:100_000] for word in words]).encode()


class CommandTarget:
    """The command's arguments, as a list in JSON."""

    name, documented, limit_s, limit_mib = "command", (UserError,), 10.0, 64.0

    def __init__(self) -> None:
        commands = {"pretrain": PRESETS, **{f"finetune {task}": presets for task, presets in FINETUNE_PRESETS.items()}}
        self.flags = {
            (command, name): list(self.dotted(to_dict(preset())))
            for command, presets in commands.items()
            for name, preset in presets.items()
        }

    def begin(self) -> None:
        disarm()

    def dotted(self, tree: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from self.dotted(value, f"{where}{key}.")
            else:
                yield f"--{where}{key}".replace("_", "-"), value

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            command, name = rng.choice(list(self.flags))
            words = [*command.split(), "--preset", name]
            for flag, value in rng.choices(self.flags[command, name], k=rng.randint(1, 4)):
                odd = rng.choice((*NUMBERS, *map(str, EXTREMES), odd_text(rng), "3", "0.5", "None", "True", "cpu"))
                values = value if isinstance(value, list) else [value]
                words += [flag, *(map(str, values) if rng.random() < 0.5 else [odd] * rng.choice((0, 1, 1, 1, 2)))]
        else:
            words = rng.choice(LINES).split(" ")
        for _ in range(rng.choice((0, 1, 1, 2))):
            at = rng.randrange(len(words) + 1)
            odd = [odd_text(rng)], [rng.choice(NUMBERS)], ["--"], ["-v"], ["--help"], ["--preset", "demo"]
            file = rng.choice(("run.yaml", "gone", "/dev/null", "."))
            words[at : at + rng.choice((0, 1))] = rng.choice((*odd, [], words[:at], ["--config", file]))
        if words and rng.random() < 0.1:  # an argument that is not UTF-8 has half characters in its place
            words[rng.randrange(len(words))] += "\udcff"
        return words_in_json(words)

    def read(self, data: bytes, folder: Path) -> str:
        os.chdir(folder)
        Path("run.yaml").write_text("train: {num_steps: 3}\n")
        return run_command(json.loads(data))


class OfficialTarget:
    """Command lines of the original, run and translated."""

    name, documented, limit_s, limit_mib = "official-line", (UserError,), 10.0, 64.0

    def begin(self) -> None:
        disarm()
        os.environ["WORLD_SIZE"] = "1"  # no other process is started

    def make(self, rng: random.Random) -> bytes:
        words = [rng.choice(list(NAMED_CONFIGS))] if rng.random() < 0.9 else []
        words += ["task_pretrain_m3ae", "clip16", "text_roberta", "max_text_len=64"] if rng.random() < 0.5 else []
        keys = (*DEFAULTS, "loss_names.mim", "loss_names.x", "model.text.weights", "train.num_steps", "output")
        for _ in range(rng.randint(0, 3)):
            key = rng.choice(keys)
            odd = (*NUMBERS, *map(str, EXTREMES), odd_text(rng), *LITERALS)
            words.append(f"{key}={repr(DEFAULTS.get(key)) if rng.random() < 0.2 else rng.choice(odd)}")
        if rng.random() < 0.1:
            words = mutate(" ".join(words).encode(), rng).decode(errors="surrogateescape").split(" ")
        return words_in_json(
            ["pretrain", "--from-official", " ".join(words)] if rng.random() < 0.3 else ["with", *words]
        )

    def read(self, data: bytes, folder: Path) -> str:
        os.chdir(folder)
        return run_command(json.loads(data))
