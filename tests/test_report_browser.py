"""The report in a real browser: no script runs, nothing is asked for, nothing is wider than the screen."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from reports import hostile_run

from fastm3ae.training.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium in PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(hostile_run(tmp_path_factory.mktemp("reported")))


def browse(page, *options):
    """What the browser prints, and what it logs."""
    command = [BROWSER, *QUIET, f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", *options]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def screenshot(page, name, width, height, *options):
    file = page.with_name(name)
    browse(page, f"--screenshot={file}", f"--window-size={width},{height}", *options)
    return np.array(Image.open(file).convert("RGB"))


def test_no_script_runs_and_nothing_is_asked_for(page):
    dom, log = browse(page, "--dump-dom")
    assert "data-owned" not in dom.split("<head>")[0]  # what the hostile texts would set
    assert not re.search(r"<script|<img src=\"?x", dom) and dom.count("<svg") >= 5 and "Content Security" not in log
    assert "ERR_" not in log and "Refused to" not in log


def test_the_hostile_texts_would_run_otherwise(page):
    """Without the page's escapes and policy they do: the test above can fail."""
    bare = page.with_name("bare.html")
    bare.write_text(
        "<html><head></head><body><script>document.documentElement.setAttribute('data-owned', 'yes')</script>"
    )
    assert 'data-owned="yes"' in browse(bare, "--dump-dom")[0].split("<head>")[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(page, width):
    """The right margin is empty from top to bottom: what is wider scrolls within the page."""
    pixels = screenshot(page, f"{width}.png", width, 1500)
    assert pixels.shape == (1500, width, 3)
    assert (pixels[:, -8:] == pixels[0, -1]).all() and (pixels != pixels[0, -1]).any()


def test_light_and_dark(page):
    light = screenshot(page, "light.png", 1000, 800)
    dark = screenshot(page, "dark.png", 1000, 800, "--blink-settings=preferredColorScheme=0")
    assert light[0, 0].min() > 240 and dark[0, 0].max() < 40
    assert light.min() < 60 and dark.max() > 200  # the text
