"""The tools around the kernels' benchmarks: what they count, compare, report and refuse."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EAGER_S, OURS_S = 0.1, 0.02
TINY = """
import time
from op_benchmark import OpBenchmark, Target, Workload, main, pytest_cases

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def make(batch_size):
    seconds = {{"eager": {eager}, "ours": {ours}}}
    runs = {{name: (lambda s: lambda: {spend}(s * batch_size))(s) for name, s in seconds.items()}}
    return {{"sleep": Workload(runs, num_bytes=1 << 20)}}

SPEC = OpBenchmark(op="sleep", shape="none", workloads=("sleep",), variants=("eager", "ours"), make=make,
    batch_size={{"cpu": 1, "cuda": 1}}, rounds={{"cpu": 5, "cuda": 5}},
    targets=dict.fromkeys(("cpu", "cuda"), (Target("sleep", "eager", {target}), Target("sleep", "absent", 9.0))))
test_sleep = pytest_cases(SPEC)

if __name__ == "__main__":
    main(SPEC, "Sleeps.")
"""


def run(*command, cwd):
    environment = {"PYTHONPATH": str(BENCHMARKS), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def write_history(path, **ratios):
    cases = [{"name": name, "extra_info": {"ratio_to_eager": ratio}} for name, ratio in ratios.items()]
    path.write_text(json.dumps({"benchmarks": cases}))
    return path


@pytest.mark.parametrize(("target", "status"), [(2.0, 0), (50.0, 1)])
def test_check_holds_the_target(tmp_path, target, status):
    (tmp_path / "bench_sleep.py").write_text(TINY.format(spend="time.sleep", eager=EAGER_S, ours=OURS_S, target=target))
    start = time.perf_counter()
    result = run("bench_sleep.py", "--check", "--batch-sizes", 2, "--json", "bench_sleep.json", cwd=tmp_path)
    assert result.returncode == status, result.stderr
    record = json.loads((tmp_path / "bench_sleep.json").read_text())
    figure, absent = record["figures"]
    assert 2.0 < figure["figure"] < 8.0 and absent["figure"] is None
    assert "sleep, sleep: ours vs absent: not measured, it is not installed" in result.stdout
    rows = {(row["batch_size"], row["variant"]): row for row in record["rows"]}
    assert rows[1, "ours"]["median_s"] >= OURS_S and rows[2, "ours"]["median_s"] >= 2 * OURS_S
    assert rows[1, "ours"]["rate_per_s"] == pytest.approx((1 << 20) / rows[1, "ours"]["median_s"])
    assert rows[1, "copy"]["share_of_ceiling"] == 1
    assert time.perf_counter() - start < 60

    report = run(BENCHMARKS / "report.py", ".", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    table = (tmp_path / "report.md").read_text()
    assert f"| {target}x | {'**missed**' if status else 'met'} |" in table and "not installed" in table
    assert json.loads((tmp_path / "results.json").read_text()) == [record]


def test_history_holds_the_ratio(tmp_path):
    (tmp_path / "bench_sleep.py").write_text(TINY.format(spend="burn", eager=EAGER_S, ours=OURS_S, target=1.0))
    options = ("-p", "no:cacheprovider", "--benchmark-json=new.json", "-o", "python_files=bench_*.py")
    result = run("-m", "pytest", "-q", *options, "bench_sleep.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    old = write_history(tmp_path / "old.json", **{"test_sleep[ours-sleep]": 1.0, "test_sleep[eager-sleep]": 9.0})
    result = run(BENCHMARKS / "compare.py", old, "new.json", "--check", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of 1 cases became slower or are missing" in result.stdout
    cases = {case["name"]: case["extra_info"] for case in json.loads((tmp_path / "new.json").read_text())["benchmarks"]}
    assert cases["test_sleep[ours-sleep]"]["ratio_to_eager"] == pytest.approx(EAGER_S / OURS_S, rel=0.2)


@pytest.mark.parametrize(
    ("new", "status", "said"),
    [
        ({"ours-a": 4.0, "ours-b": 2.0}, 0, "0 of 2"),
        ({"ours-a": 3.3, "ours-b": 2.0}, 0, "0 of 2"),
        ({"ours-a": 3.1, "ours-b": 2.0}, 1, "1 of 2"),
        ({"ours-a": 4.0, "eager-b": 2.0}, 1, "1 of 2"),
    ],
)
def test_compare_gates_on_ratios(tmp_path, new, status, said):
    old = write_history(tmp_path / "old.json", **{"ours-a": 4.0, "ours-b": 2.0})
    result = run(BENCHMARKS / "compare.py", old, write_history(tmp_path / "new.json", **new), "--check", cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert f"{said} cases became slower or are missing" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"), [("{", "must be a file of pytest"), ('{"benchmarks": []}', "must have cases of ours")]
)
def test_compare_refuses_other_files(tmp_path, text, said):
    (tmp_path / "new.json").write_text(text)
    old = write_history(tmp_path / "old.json", **{"ours-a": 4.0})
    result = run(BENCHMARKS / "compare.py", old, tmp_path / "new.json", cwd=tmp_path)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr
