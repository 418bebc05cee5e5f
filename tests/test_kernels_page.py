"""The page about the kernels: its snippets run, one after another, and no op is left out."""

import re
from pathlib import Path

import pytest
import torch

import fastm3ae.kernels

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_snippets(text):
    names = {"__name__": "page"}
    for match in SNIPPET.finditer(text):
        line = text[: match.start(1)].count("\n")
        exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), names)
    return names


def test_every_snippet_runs():
    # All of float32's error is that of sums in another order, for which assert_close has room.
    names = run_snippets(PAGE.read_text())
    assert torch.is_tensor(names["compiled"](names["pred_BNP"], names["noise_BN"]))


def test_a_wrong_snippet_is_found():
    with pytest.raises(AssertionError):
        run_snippets("text\n\n```python\nassert 1 == 1\n```\nmore\n```python\nassert 1 == 2\n```\n")


def test_every_op_has_a_place_and_a_check():
    text = PAGE.read_text()
    snippets = "".join(SNIPPET.findall(text))
    table, headings = text.split("\n\n```python\ntorch.manual_seed")[0], re.findall(r"^## .*", text, re.MULTILINE)
    for op in fastm3ae.kernels.__all__:
        assert f"| `{op}`" in table or f", `{op}`" in table, f"{op} is missing in the table of backends"
        assert f"{op}(" in snippets, f"{op} is not called"
        base = op.removesuffix("_from_seed").replace("scatter_patches_", "gather_patches")
        assert any(f"`{base}`" in heading for heading in headings), f"{op} has no section"
