"""What the documentation's pages get when the site is built, as a hook of mkdocs.

The configuration's reference, and the measurements of ``benchmarks/results``, which become files of the site.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's, wherever mkdocs was started

from fastm3ae.config import EvaluateConfig, FinetuneConfig, ImageConfig, M3AEConfig, MPMAConfig, PretrainConfig  # noqa: E402
from fastm3ae.config.presets import FINETUNE_PRESETS, PRESETS  # noqa: E402

MEASUREMENTS, PLACE = ROOT / "benchmarks" / "results", "measured/"
MODELS = (("M3AE", M3AEConfig), ("MPMA", MPMAConfig), ("A tower with a head, for images without texts", ImageConfig))


def on_files(files, config):
    """Adds what was measured to the site."""
    from mkdocs.structure.files import File

    for path in sorted(MEASUREMENTS.rglob("*")):
        if path.is_file():
            place = PLACE + path.relative_to(MEASUREMENTS).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at where the measurements are in the site, and fills in the configuration's reference."""
    markdown = markdown.replace("](../benchmarks/results/", f"]({PLACE}")
    return markdown.replace("<!-- every field -->", reference())


def reference() -> str:
    """Returns every field of every configuration, and every preset, as markdown."""
    parts = ["## Pre-training", _table(PretrainConfig)]
    for name in ("data", "masking", "optim", "train"):
        parts += [f"### {name}", _table(typing.get_type_hints(PretrainConfig)[name], f"{name}.")]
    parts += [
        "## Fine-tuning",
        "`model`, `data`, `optim` and `train` are those of pre-training.",
        _table(FinetuneConfig),
    ]
    parts += ["### task", _table(typing.get_type_hints(FinetuneConfig)["task"], "task.")]
    parts += ["## Evaluation", _table(EvaluateConfig), "## Models"]
    for title, model in MODELS:
        parts += [f"### {title}", _prose(inspect.getdoc(model).splitlines()[0]), _table(model, "model.", nested=True)]
    parts += ["## Presets", *(_presets(f"fastm3ae {command}", presets) for command, presets in _commands())]
    return "\n\n".join(parts)


def _commands() -> Iterator[tuple[str, Mapping[str, Callable]]]:
    yield "pretrain", PRESETS
    yield from ((f"finetune {task}", presets) for task, presets in FINETUNE_PRESETS.items())


def _presets(command: str, presets: Mapping[str, Callable]) -> str:
    rows = [f"| `{name}` | {_prose(inspect.getdoc(make))} |" for name, make in presets.items()]
    return "\n".join([f"| `{command} --preset` | |", "| --- | --- |", *rows])


def _table(config: type, prefix: str = "", nested: bool = False) -> str:
    """Returns a configuration's fields as a table; those that are configurations only if they are asked for."""
    rows = [f"| `{name}` | {default} | {_prose(text)} |" for name, default, text in _fields(config, prefix, nested)]
    return "\n".join(["| field | default | |", "| --- | --- | --- |", *rows])


def _fields(config: type, prefix: str, nested: bool) -> Iterator[tuple[str, str, str]]:
    """Each field's dotted name, default and documentation."""
    types, texts = typing.get_type_hints(config), _documentation(config)
    for field in dataclasses.fields(config):
        kind = types[field.name]
        if any(dataclasses.is_dataclass(part) for part in (kind, *typing.get_args(kind))):
            if nested:
                yield from _fields(kind, f"{prefix}{field.name}.", nested)
            continue
        values = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        text = texts[field.name] + (f" One of {', '.join(map(str, values))}." if len(values) > 1 else "")
        yield prefix + field.name, _default(field.default), text


def _default(value: object) -> str:
    """Returns a default as it is written on the command line, for a table's cell."""
    if value is dataclasses.MISSING:
        return "required"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _prose(text: str) -> str:
    """Returns a docstring's text for a table's cell."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;").split())


def _documentation(config: type) -> dict[str, str]:
    """Returns the string below each field, those of the base classes, too."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = " ".join(inspect.cleandoc(ast.literal_eval(text.value)).split())
    return texts
