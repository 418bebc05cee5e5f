"""docs/clusters.md and docs/slurm/pretrain.sbatch do what they say, as far as one machine without SLURM can tell."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import command, write_corpus
from torch.distributed.run import get_args_parser

from fastm3ae.cli.configure import configure, run_options
from fastm3ae.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "docs" / "slurm" / "pretrain.sbatch", ROOT / "docs" / "clusters.md"
# What the script calls of SLURM: two nodes on this machine, whose tasks get the signals of scancel.
STUBS = {
    "srun": """
while [[ "$1" == --* ]]; do shift; done
tasks=()
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!)
done
echo "${tasks[@]}" > "$STUB/tasks"
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status""",
    "scontrol": """
if [[ "$1 $2" == "show hostnames" ]]; then echo localhost; else echo "$@" >> "$STUB/scontrol"; fi""",
    "scancel": """
[[ "$1 $2" == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(cat "$STUB/tasks")""",
    "rsync": """
[[ "$1" == -a ]] && mkdir -p "$3" && cp -R "$2." "$3" """,
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Starts the script as sbatch would, with the tiny run's arguments."""
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash{text}\n")
        path.chmod(0o755)
    environment = tmp_path / "venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text(f'PATH="{tmp_path / "stubs"}:{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "shared").mkdir()
    write_corpus(tmp_path / "shared")
    variables = {
        "VENV": str(tmp_path / "venv"), "STUB": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1", "USER": "somebody",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip

    def start(*more, num_steps, save_every=1000, **changes):
        train = {"num_steps": num_steps, "validate_every_steps": 1000, "save_every_steps": save_every}
        _, *arguments = command(tmp_path / "shared", train=train)
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments, *more], env={**os.environ, **variables, **changes}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def finished(process):
    """What a run that went well has printed."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def test_the_script_is_bash_and_asks_slurm_for_what_it_needs():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), flags=re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"  # torchrun starts the others
    assert "requeue" in asked and asked["open-mode"] == "append"
    name, seconds = re.fullmatch(r"B:(\w+)@(\d+)", asked["signal"]).groups()
    assert f"' {name}\n" in SCRIPT.read_text()
    (limit,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", SCRIPT.read_text())
    assert int(limit) < int(seconds)


def test_the_pages_options_are_torchruns_and_ours():
    commands = re.findall(r"^torchrun .*?[^\\]$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for command_line in commands:
        parsed = get_args_parser().parse_args(shlex.split(command_line.replace("\\\n", " "))[1:])
        name, *arguments = parsed.training_script_args
        assert (parsed.module, parsed.training_script, name) == (True, "fastm3ae", "pretrain")
        chosen, overrides = run_options(name, "demo").parse_known_args(arguments)
        config, _ = configure(name, "", PRESETS, overrides, chosen)
        assert config.resume == "auto" and config.output.endswith("runs/m3ae")


def test_two_nodes_train_on_copies_of_the_data(cluster, tmp_path):
    local = tmp_path / "disk"
    output = finished(cluster(num_steps=4, DATA=str(tmp_path / "shared"), LOCAL=str(local)))
    summary = json.loads((tmp_path / "shared" / "run" / "summary.json").read_text())
    assert summary["num_processes"] == 2 and summary["steps"] == 4 and output.count("run folder") == 1
    files = json.loads((tmp_path / "shared" / "run" / "data.json").read_text())["files"]
    assert {file["path"] for file in files} == {str(local / f"made_{split}.arrow") for split in ("train", "val")}
    assert not (tmp_path / "scontrol").exists()


def wait_for_steps(process, run, num):
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= num):
        time.sleep(0.05)


def test_before_the_time_limit_the_run_is_saved_and_requeued(cluster, tmp_path):
    run = tmp_path / "shared" / "run"
    process = cluster(num_steps=3000)
    wait_for_steps(process, run, 1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output[-3000:]  # torchrun's, whatever its processes end with
    assert "SIGTERM stopped the run: step" in output
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    (saved,) = (int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    output = finished(cluster("--force-resume", num_steps=saved + 2, SLURM_RESTART_COUNT="1"))
    assert f"going on from step_{saved:06d}" in output
    assert json.loads((run / "summary.json").read_text())["steps"] == saved + 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_is_started_again(cluster, tmp_path):
    run = tmp_path / "shared" / "run"
    process = cluster(num_steps=100, save_every=5)
    wait_for_steps(process, run, 12)
    _, launcher = (tmp_path / "tasks").read_text().split()
    (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    output = finished(process)
    assert output.count("nothing to resume yet") == 1 and re.search(r"going on from step_\d+", output)
    assert json.loads((run / "summary.json").read_text())["steps"] == 100
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 101))


def test_a_users_mistake_is_not_requeued(cluster, tmp_path):
    process = cluster("--train.batch-size", "0", num_steps=4)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "train.batch_size must be at least 1" in output
    assert re.search(r"exitcode\s*: 2\b", output)  # the process's own, in torchrun's report
    assert not (tmp_path / "scontrol").exists()
