"""Several processes of the command on one machine."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastm3ae.cli import main
from fastm3ae.official.arguments import parse_official
from fastm3ae.official.translate import to_run_config
from fastm3ae.training import launch

DATA = Path(__file__).parent / "data" / "golden" / "data"
# The original's pre-training line, scaled down by what follows it: a later value of a key counts.
TINY = shlex.split(f"""
    data_root={DATA} num_gpus=8 num_nodes=1 task_pretrain_m3ae per_gpu_batchsize=32 clip16 text_roberta
    image_size=288 max_text_len=64 tokenizer=downloaded/roberta-base
    datasets="['roco']" tokenizer={DATA}/tok/roberta image_size=32 num_gpus=1 per_gpu_batchsize=2 batch_size=4
    max_steps=20 val_check_interval=1000 num_workers=0 hidden_size=64 num_heads=2 num_top_layer=2 mim_layer=1
    mim_decoder_hidden_size=32 mim_decoder_num_layers=1 mim_decoder_num_heads=2 learning_rate=1e-3
    model.vision.weights=random model.vision.width=64 model.vision.num_blocks=1 model.text.weights=random
    model.text.width=32 model.text.num_layers=1 model.text.num_heads=2 model.text.mlp_width=64
    train.tensorboard=False train.device=cpu
""")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def program(text):
    return [sys.executable, "-c", text]


def test_each_process_knows_its_place(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    write = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(map(os.getenv, {names})))"
    assert launch.launch(program(write), 3) == 0
    places = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:5] for place in places] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({place[5] for place in places}) == 1 and int(places[0][5]) > 0


def test_the_first_failure_ends_the_others_and_gives_the_status(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    start = time.monotonic()
    hang = "import os, sys, time; time.sleep(0.2 if os.environ['RANK'] == '1' else 60); sys.exit(7)"
    assert launch.launch(program(hang), 2) == 7
    assert time.monotonic() - start < 20
    assert launch.launch(program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 2) == 128 + 9


def test_the_others_may_end_by_themselves_after_a_failure(tmp_path):
    """The first process prints why they failed, and must have the time to."""
    slow = (
        "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(1 - rank); "
        f"open(r'{tmp_path}/' + str(rank), 'w'); sys.exit(2)"
    )
    assert launch.launch(program(slow), 2) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_reaches_all_once_and_saving_is_waited_for(tmp_path, number):
    save = f"""
import os, signal, sys, time
seen = []
signal.signal({number}, lambda *_: seen.append(1))
rank = os.environ["RANK"]
open(rf"{tmp_path}/ready" + rank, "w").close()
while not seen:
    time.sleep(0.01)
time.sleep(0.2 if rank == "1" else 1.5)
open(rf"{tmp_path}/saved" + rank, "w").write(str(len(seen)))
sys.exit(128 + {number})
"""
    # The signal is ignored in programs that a shell script has started in the background; this one shall heed it.
    heed = f"import signal, sys; signal.signal({int(number)}, signal.SIG_DFL)"
    start = f"{heed}; from fastm3ae.training import launch; launch.GRACE_S = 0.3; command = {program(save)!r}"
    launcher = subprocess.Popen(program(f"{start}; sys.exit(launch.launch(command, 2))"))
    try:
        while len(list(tmp_path.glob("ready*"))) < 2:
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == 128 + number
    finally:
        launcher.terminate()  # with the processes that it has started, should the test have failed
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.parametrize(
    ("num_gpus", "num_here", "device", "num_processes", "missing"),
    [
        (8, 8, "auto", 8, None),
        (2, 8, "cuda", 2, None),
        (8, 2, "auto", 2, "num_gpus is 8, but this machine has only 2 GPUs"),
        (8, 0, "auto", 1, "num_gpus is 8, but this machine has no GPU, so that the CPU computes"),
        (8, 8, "cpu", 1, None),
        (8, 8, "cuda:3", 1, None),
    ],
)
def test_as_many_processes_as_there_are_gpus(monkeypatch, num_gpus, num_here, device, num_processes, missing):
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_here)
    assert launch.processes_for(num_gpus, device) == (num_processes, missing)


def test_with_starts_its_processes(monkeypatch, tmp_path, capsys):
    commands = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(launch, "launch", lambda command, number: commands.append((command, number)) or 5)
    arguments = [*TINY, "num_gpus=8", "train.device=auto", f"log_dir={tmp_path}"]
    assert main(["with", *arguments]) == 5
    ((command, number),) = commands
    assert command[:4] == [sys.executable, "-m", "fastm3ae", "with"] and number == 2
    config, _ = to_run_config(parse_official(arguments))
    Path(config.output).mkdir(parents=True)  # by a process that was faster
    assert to_run_config(parse_official(command[4:]))[0] == config
    error = capsys.readouterr().err
    assert error == "warning: num_gpus is 8, but this machine has only 2 GPUs; a step still takes 16 pairs.\n"


def test_several_machines_need_torchrun(monkeypatch, capsys):
    assert main(["with", *TINY, "num_nodes=2", "num_gpus=4"]) == 2
    error = capsys.readouterr().err
    assert "num_nodes is 2: start this on each machine by torchrun --nnodes 2 --nproc-per-node 4" in error
    ran = []
    monkeypatch.setattr("fastm3ae.training.pretrain.pretrain", ran.append)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["with", *TINY, "num_nodes=2", "num_gpus=4"]) == 0
    assert len(ran) == 1


def test_one_process_speaks_for_all_before_they_have_met(monkeypatch, capsys):
    arguments = ["with", *TINY, "vocab_size=3", "tokenizer=./none", "train.device=tpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main(arguments) == 2
        said.append(capsys.readouterr().err)
    assert said[0].count("warning: ") == said[0].count("error: ") == 1
    assert said[1] == ""


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_official_line_runs_scaled_down(tmp_path, capsys):
    for version in (0, 1):  # the same script again takes the next folder
        assert main(["with", *TINY, f"log_dir={tmp_path}"]) == 0
        folder = tmp_path / "task_pretrain_m3ae-seed0-from_" / f"version_{version}"
        assert f"run folder                   {folder}\n" in capsys.readouterr().out
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert summary_of(folder)["steps"] == 20 and lines[-1]["step"] == 20
        assert {"mlm_loss", "mim_loss", "itm_loss"} <= lines[-1].keys()


def test_the_official_line_runs_in_two_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "fastm3ae", "with", *TINY, "max_steps=2"]
    assert launch.launch([*command, f"output={tmp_path / 'run'}"], 2) == 0
    assert summary_of(tmp_path / "run")["steps"] == 2
    assert capfd.readouterr().out.count("run folder") == 1
    assert launch.launch([*command, f"output={tmp_path / 'run'}"], 2) == 2
    error = capfd.readouterr().err
    assert f"The run folder {tmp_path / 'run'} is not empty" in error and "Traceback" not in error
