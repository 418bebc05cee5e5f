"""The history of the benchmarks: what is kept, compared, drawn and refused; and the workflows that fill it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history.py"
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PAGE = ROOT / "docs" / "performance_tracking.md"
MACHINE = "AMD EPYC (AVX512), 2 threads, Linux"


def run(*arguments):
    return subprocess.run([sys.executable, HISTORY, *map(str, arguments)], capture_output=True, text=True)


def write_run(folder, day, machine=MACHINE, dirty=False, commit=None, **ratios):
    """As pytest-benchmark writes it."""
    commit = commit or f"{day:07d}" * 5
    cases = [
        {
            "name": f"test_{op}[{variant}-forward]",
            "fullname": "benchmarks/...",
            "extra_info": {"ratio_to_eager": ratio, "num_bytes": 1, "machine": f"{machine}, Python 3.12, torch 2.15"},
            "stats": {"median": 1e-3, "rounds": 10, "min": 1e-4},
        }
        for variant in ("eager", "ours")
        for op, ratio in ratios.items()
    ]
    about = {"id": commit, "time": f"2026-11-{day:02d}T12:00:00+00:00", "dirty": dirty, "branch": "main"}
    folder.mkdir(exist_ok=True)
    path = folder / f"{day}_{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"commit_info": about, "benchmarks": cases, "machine_info": {"cpu": "x" * 999}}))
    return path


@pytest.fixture
def runs(tmp_path):
    """A folder of three kept runs, added in another order than that of their commits."""
    made = [write_run(tmp_path / "made", day, fast=4.0 + day / 10, slow=2.0) for day in (3, 1, 2)]
    result = run(tmp_path / "kept", "--add", *made)
    assert result.returncode == 0, result.stderr
    return tmp_path / "kept"


def test_what_is_kept(runs, tmp_path):
    names = [path.name for path in sorted(runs.iterdir())]
    assert names == [f"2026-11-0{day}_000000{day}_amd-epyc-avx512-2-threads-linux.json" for day in (1, 2, 3)]
    assert all(path.stat().st_size < 1000 for path in runs.iterdir())
    kept = json.loads((runs / names[0]).read_text())
    assert [case["name"] for case in kept["benchmarks"]] == ["test_fast[ours-forward]", "test_slow[ours-forward]"]
    assert kept["benchmarks"][0]["stats"] == {"median": 1e-3}
    before = (runs / names[0]).read_text()
    assert run(tmp_path / "again", "--add", runs / names[0]).returncode == 0  # what is kept can be kept again
    assert (tmp_path / "again" / names[0]).read_text() == before
    compare = [sys.executable, ROOT / "benchmarks" / "compare.py", runs / names[0], runs / names[2], "--check"]
    assert subprocess.run(compare, capture_output=True).returncode == 0


def test_table_and_plot(runs, tmp_path):
    result = run(runs, "--output", tmp_path / "history.png", "--check")
    assert result.returncode == 0, result.stderr
    assert f"3 runs, {MACHINE}\nold: the median of the 2 before, new: commit 0000003\n" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("test_")]
    assert rows == [
        ["test_fast[ours-forward]", "4.15", "4.30", "1.04"], ["test_slow[ours-forward]", "2.00", "2.00", "1.00"]
    ]  # fmt: skip
    assert result.stdout.endswith("0 of 2 cases became slower or are missing\n")
    assert min(Image.open(tmp_path / "history.png").size) > 300


@pytest.mark.parametrize(
    ("ratios", "options", "status", "said"),
    [
        ({"fast": 3.4, "slow": 1.7}, [], 0, "0 of 2"),
        ({"fast": 3.2, "slow": 2.0}, [], 1, "1 of 2"),
        ({"fast": 3.2, "slow": 2.0}, ["--tolerance", "0.3"], 0, "0 of 2"),
        ({"fast": 9.0, "new": 0.1}, [], 1, "1 of 2"),
    ],
)
def test_check_gates_on_ratios(runs, tmp_path, ratios, options, status, said):
    new = write_run(tmp_path / "made", 9, **ratios)
    result = run(runs, "--add", new, "--check", *options)
    assert result.returncode == status and f"{said} cases became slower" in result.stdout, result.stderr
    assert run(runs, *options).returncode == 0


def test_of_several_runs_the_median_counts_and_old_ones_are_forgotten(tmp_path):
    for day, ratio in enumerate((90.0, 90.0, 90.0, 4.0, 4.0, 1.0, 4.0, 4.0, 3.5), start=1):
        run(tmp_path / "kept", "--add", write_run(tmp_path / "made", day, fast=ratio))
    result = run(tmp_path / "kept", "--check")
    assert result.returncode == 0 and "old: the median of the 5 before" in result.stdout
    assert result.stdout.splitlines()[-3].split() == ["test_fast[ours-forward]", "4.00", "3.50", "0.88"]


def test_a_first_run_is_no_failure(tmp_path):
    result = run(tmp_path / "kept", "--add", write_run(tmp_path / "made", 1, dirty=True, fast=2.0), "--check")
    assert result.returncode == 0 and "0 of 0" in result.stdout and "new: commit 0000001*" in result.stdout
    assert [path.name.split("_")[1] for path in (tmp_path / "kept").iterdir()] == ["0000001-dirty"]


def test_other_machines_are_another_history(runs, tmp_path):
    gpu = write_run(tmp_path / "made", 4, machine="NVIDIA H200, driver 580, 16 threads, Linux", fast=30.0)
    result = run(runs, "--add", gpu)
    assert result.returncode == 1 and "choose with --machine a part of: AMD EPYC" in result.stderr
    result = run(runs, "--machine", "H200", "--check")
    assert result.returncode == 0 and "1 runs, NVIDIA H200, driver 580, 16 threads, Linux" in result.stdout
    assert "3 runs" in run(runs, "--machine", "EPYC").stdout
    result = run(runs, "--machine", "B200")
    assert result.returncode == 1 and "must hold runs of B200, got those of: ['AMD" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be a file of pytest --benchmark-json"),
        ('{"benchmarks": []}', "must have cases of ours"),
        (
            '{"benchmarks": [{"name": "ours", "extra_info": {"ratio_to_eager": 1.0}}], "commit_info": {"id": "none"}}',
            "must say of which commit it is",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    result = run(tmp_path)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr


def test_an_empty_folder_is_refused(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 1 and "must hold runs, got those of: none" in result.stderr


def test_what_the_repository_keeps_can_be_read(tmp_path):
    result = run(ROOT / "benchmarks" / "results" / "history", "--output", tmp_path / "history.png")
    assert result.returncode == 0, result.stderr
    assert not re.search("^0 of 0", result.stdout, re.MULTILINE)


def test_the_pages_commands_exist():
    commands = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(commands).splitlines()
    assert len(lines) == 5
    for line in lines:
        check_command(line)


def check_command(line):
    """Every file of ours that a command names is there, and a script of ours knows its options."""
    for path in re.findall(r"(?<!\S)(?:benchmarks|\.ci|docs|tests)/?[\w./-]*", line):
        assert (ROOT / path).exists(), f"{path} of: {line}"
    script = re.search(r"benchmarks/\w+\.py", line)
    if script and line.startswith("python"):
        source = "".join((ROOT / "benchmarks" / name).read_text() for name in (Path(script[0]).name, "compare.py"))
        for option in re.findall(r"--[a-z-]+(?==|\s|$)", re.sub(r"\$\(.*?\)", "", line)):
            assert f'"{option}"' in source, f"{option} of: {line}"


def test_check_of_commands_finds_what_is_missing():
    for line in ("python benchmarks/absent.py", "python benchmarks/history.py x --absent", "bash .ci/absent"):
        with pytest.raises(AssertionError):
            check_command(line)


@pytest.mark.parametrize("name", ["tests", "gpu"])
def test_a_workflows_commands_exist(name):
    workflow = yaml.safe_load(WORKFLOWS[name].read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["timeout-minutes"] <= 60
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands and all(
        re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step
    )
    for command in commands:
        assert "${{" not in command, "what others wrote must come by the environment"
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
        for line in command.replace("\\\n", " ").splitlines():
            check_command(line.strip())


def test_the_cpu_workflow_runs_ci_with_the_oldest_python():
    (job,) = yaml.safe_load(WORKFLOWS["tests"].read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert oldest in job["strategy"]["matrix"]["python"] and "3.12" in job["strategy"]["matrix"]["python"]


def test_the_gpu_workflow_waits_to_be_asked():
    workflow = yaml.safe_load(WORKFLOWS["gpu"].read_text())
    events = workflow[True]  # YAML 1.1 reads "on" so
    assert events.keys() == {"workflow_dispatch", "pull_request"} and events["pull_request"] == {"types": ["labeled"]}
    (job,) = workflow["jobs"].values()
    assert "gpu" in job["runs-on"] and "github.event.label.name == 'gpu'" in job["if"]
    offered = events["workflow_dispatch"]["inputs"]["what"]["options"]
    suite = (ROOT / "benchmarks" / "gpu_suite.sh").read_text()
    assert all(re.search(r"^  (ops \| steps|both)\).*", suite, re.MULTILINE) and what in suite for what in offered)
    (upload,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact")]
    assert upload["with"]["path"] == "suite" and "cancelled" in upload["if"]
