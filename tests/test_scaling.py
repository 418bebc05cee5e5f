"""The scaling plan: the page is what the program says, what is sent is counted, the formulas hold at their limits."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc_2026-11-22_scaling.txt"
NEEDLESS = """
from contextlib import nullcontext
import scaling_traffic
from fastm3ae.training.parallel import Replicated

Replicated.in_pass = lambda model, is_last: nullcontext()
scaling_traffic.main()
"""


@pytest.fixture(autouse=True)
def scaling(monkeypatch):
    """The folder with the benchmarks is importable, also in the processes that they start."""
    folder = str(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    import scaling

    return scaling


@pytest.fixture
def model():
    import scaling_model

    return scaling_model


@pytest.fixture
def work(model):
    return model.Workload(
        num_parameters=400_000_000,
        gradient_bytes=1_600_000_000,
        embedding_bytes=150_000_000,
        num_units=40,
        forward_flops=2e11,
        backward_flops=4e11,
        token_flops=2.5e9,
        false_image_flops=1.6e11,
    )


def test_the_page_has_the_programs_tables(scaling):
    text = scaling.PAGE.read_text()
    places = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n?<!-- end -->", text, flags=re.DOTALL))
    tables = scaling.scaling_tables.calculated(scaling.official_workload())
    assert places.keys() == tables.keys() | {"traffic"}
    for name, table in tables.items():
        assert places[name] == table, f"{name}: python benchmarks/scaling.py --update"
    recorded = RESULTS.read_text()
    assert all(place in recorded for place in places.values())


def test_kernels_are_about_as_many_as_counted(scaling, model):
    assert scaling.count_launches() == pytest.approx(model.NUM_LAUNCHES, rel=0.1)


def test_update_puts_tables_into_the_page(scaling, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    monkeypatch.setattr(scaling, "PAGE", page)
    scaling.update({"one": "| 1 |", "two": "| 2 |"})
    assert page.read_text() == "a\n<!-- one -->\n| 1 |\n<!-- end -->\nb\n<!-- two -->\n| 2 |\n<!-- end -->\n"
    with pytest.raises(AssertionError, match="0 places for the table three"):
        scaling.update({"three": ""})


def without_loopback(found):
    """Others may use the interface while tests run."""
    return dataclasses.replace(found, loopback_bytes=found.wire_bytes)


def test_what_two_processes_send_is_as_calculated(scaling):
    from scaling_traffic import FEATURES, GRADIENTS, PARAMETERS

    ddp, fsdp = scaling.simulate([scaling.Case("mpma", parallel, 2, 2) for parallel in ("ddp", "fsdp")])
    for found in (ddp, fsdp):
        assert scaling.faults(without_loopback(found)) == []
        assert found.loopback_bytes == 0 or found.loopback_bytes > 0.99 * found.wire_bytes
    share = scaling.BATCH_SIZE // 2
    assert ddp.num_bytes[GRADIENTS] == 4 * ddp.num_trained < 4 * ddp.num_parameters
    assert ddp.num_bytes[FEATURES] == fsdp.num_bytes[FEATURES] == share * 2 * 64 * 4
    assert PARAMETERS not in ddp.num_bytes and fsdp.num_bytes[PARAMETERS] > 4 * fsdp.num_parameters


def test_a_needless_reduction_is_found(scaling, monkeypatch, tmp_path):
    import scaling_traffic

    worker = tmp_path / "worker.py"
    worker.write_text(NEEDLESS)
    monkeypatch.setattr(scaling_traffic, "__file__", str(worker))
    (found,) = scaling.simulate([scaling.Case("m3ae", "ddp", 2, 2)])
    (fault,) = scaling.faults(without_loopback(found))
    assert f"{8 * found.num_trained:,} bytes of gradients, expected {4 * found.num_trained:,}" in fault


def test_every_deviation_is_a_fault(scaling):
    from scaling_traffic import COUNTS, FEATURES, GRADIENTS, ROWS, Case, Traffic

    right = Traffic(
        case=Case("mpma", "ddp", 2, 1),
        num_parameters=1000,
        num_trained=900,
        num_reduced=900,
        num_in_layers=700,
        num_in_towers=300,
        num_bytes={GRADIENTS: 3600, FEATURES: 4096, COUNTS: 56, ROWS: 13},
        num_messages={GRADIENTS: 2, FEATURES: 1, COUNTS: 2, ROWS: 2},
        wire_bytes=8000.0,
        loopback_bytes=8100.0,
        checkpoint_bytes=12_050,
    )
    assert scaling.faults(right) == []
    for change, said in [
        ({"num_bytes": {**right.num_bytes, GRADIENTS: 7200}}, "7,200 bytes of gradients, expected 3,600"),
        ({"num_bytes": {GRADIENTS: 3600, COUNTS: 56}}, "0 bytes of features, expected 4,096"),
        ({"num_bytes": {**right.num_bytes, "parameters": 8}}, "8 bytes of parameters, expected 0"),
        ({"num_bytes": {**right.num_bytes, COUNTS: 400}}, "413 bytes from host to host, expected at most 256"),
        ({"num_messages": {**right.num_messages, ROWS: 4}}, "gathers=4), expected HostMessages(sums=2, gathers=2)"),
        ({"checkpoint_bytes": 16_000}, "a checkpoint of 16,000 bytes, expected 12,000"),
        ({"loopback_bytes": 9000.0}, "9,000 bytes through the loopback, counted 8,000"),
        ({"loopback_bytes": 7900.0}, "7,900 bytes through the loopback, counted 8,000"),
    ]:
        (fault,) = scaling.faults(dataclasses.replace(right, **change))
        assert said in fault


def test_a_trace_is_read_by_kind(tmp_path):
    from scaling_traffic import COUNTS, FEATURES, GRADIENTS, PARAMETERS, ROWS, read_trace

    def event(name, dtype, shape):
        return {"name": name, "args": {"Input type": [dtype], "Input Dims": [shape]}}

    events = [
        event("gloo:all_reduce", "float", [100]),
        event("gloo:all_reduce", "float", [20]),
        event("gloo:all_reduce", "double", [5]),
        event("gloo:all_gather", "float", [3, 2, 12]),
        event("gloo:all_gather", "unsigned char", [5]),
        event("gloo:all_gather", "float", [50]),
        event("gloo:reduce_scatter", "float", [80]),
        event("aten::mm", "float", [9]),
        {"name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    num_bytes, num_messages, wire = read_trace(path, num_processes=4)
    assert num_bytes == {GRADIENTS: 800, COUNTS: 40, FEATURES: 288, ROWS: 5, PARAMETERS: 200}
    assert num_messages == {GRADIENTS: 3, COUNTS: 1, FEATURES: 1, ROWS: 1, PARAMETERS: 1}
    assert wire == 1.5 * (480 + 40) + 0.75 * 320 + 3 * (288 + 5 + 200)


def test_large_sums_take_their_bytes_and_small_ones_their_hops(model):
    one, node, many = (model.Cluster(model.H100, model.FABRIC, num) for num in (1, 8, 512))
    assert one.all_reduce_s(1e9) == one.gather_s(1e9) == 0
    assert node.rate == 450e9 * 0.8 and many.rate == 400e9 * 0.85
    for cluster in (node, many):
        num = cluster.num
        assert cluster.all_reduce_s(1e12) == pytest.approx(2 * (num - 1) / num * 1e12 / cluster.rate, rel=0.01)
        assert cluster.gather_s(1e12) == pytest.approx(cluster.all_reduce_s(1e12) / 2, rel=0.01)
    hops = model.TREE_CALL_S + 2 * (7 * model.TREE_NVLINK_S + math.log2(64) * model.FABRIC.tree_hop_s)
    assert many.all_reduce_s(8) == pytest.approx(hops, rel=1e-3)
    assert many.gather_s(8) > 511 * model.RING_NVLINK_S  # there is no tree for it


def test_messages_wait_for_each_other(model):
    assert model.last_end_s([1, 2, 3], [0.5, 0.5, 0.5]) == 3.5
    assert model.last_end_s([1, 2, 3], [5, 1, 1]) == 8
    assert model.last_end_s([], []) == 0


def test_the_slowest_of_many(model):
    assert model.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    assert model.expected_maximum(512) == pytest.approx(3.04, abs=0.02)


def test_nothing_is_lost_where_nothing_is_waited_for(model, work):
    fast = dataclasses.replace(model.FABRIC, node_rate=1e15, ring_hop_s=0, tree_hop_s=0)
    gpu = dataclasses.replace(model.H100, nvlink_rate=1e15)
    cluster, quiet = model.Cluster(gpu, fast, 64), model.HostMessages(0, 0)
    options = {"imbalance": 0.0, "messages": quiet}
    assert model.efficiency(work, cluster, 256, **options) == pytest.approx(1, abs=2e-3)
    step = model.make_step(work, cluster, 256, imbalance=1.0, messages=quiet)
    share = model.expected_maximum(64) * work.pair_std / 16  # of 256 independent pairs
    rate = gpu.flops * model.MATMUL_FRAC * model.STEP_FRAC
    assert step.slowest_s == pytest.approx(share * 256 * work.flops / rate)
    assert (step.host_s, step.seconds) == (0, step.compute_s + step.slowest_s + step.communication_s)


def test_gradients_that_no_pass_hides_are_waited_for(model, work):
    cluster = model.Cluster(model.H100, model.ETHERNET, 64)
    step = model.make_step(work, cluster, 1, imbalance=0.0)
    assert step.communication_s > 0.95 * cluster.all_reduce_s(work.gradient_bytes)
    found = [model.efficiency(work, cluster, 256, passes=passes) for passes in (1, 2, 4, 8)]
    assert found == sorted(found) and found[0] < 0.7 and found[-1] > 0.9


def test_a_host_that_takes_longer_than_the_gpu_is_waited_for(model, work):
    cluster = model.Cluster(model.H100, model.FABRIC, 512)
    messages = model.HostMessages(sums=1, gathers=2)
    assert messages.hops(512) == 4 * 511
    step = model.make_step(work, cluster, 32, messages=messages)
    host = model.NUM_LAUNCHES * model.LAUNCH_S + messages.seconds(512)
    assert step.host_s > 0 and step.seconds == pytest.approx(host)
    alone = model.make_step(work, model.Cluster(model.H100, model.FABRIC, 1), 1)
    assert alone.seconds == pytest.approx(model.NUM_LAUNCHES * model.LAUNCH_S)


def test_sharding_gathers_for_each_pass_and_scatters_once(model, work):
    slow = dataclasses.replace(model.H100, nvlink_rate=1e9)
    node = model.Cluster(slow, model.FABRIC, 8)
    layer = node.gather_s(work.gradient_bytes / work.num_units)
    for passes in (1, 3):
        step = model.make_step(work, node, 1, passes=passes, is_sharded=True, imbalance=0.0)
        gathered = (2 * passes + 1) * work.num_units + passes + 1  # what no layer hides: the first of a pass, the last
        computed = passes * work.flops / (slow.flops * model.MATMUL_FRAC * model.STEP_FRAC)
        assert step.communication_s == pytest.approx(gathered * layer - computed, rel=1e-6)
    many = model.Cluster(model.H100, model.ETHERNET, 512)
    step = model.make_step(work, many, 1, is_sharded=True, imbalance=0.0)
    assert step.communication_s == pytest.approx(work.num_units * many.across_s(work.gradient_bytes / 40), rel=0.05)
    assert many.across_s(1e12) == pytest.approx(2 * 63 / 64 * 1e12 / (12.5e9 * 0.85), rel=0.01)


def test_checkpoints_are_copied_in_parts(work):
    assert work.copied_bytes(1) == work.checkpoint_bytes == 12 * work.num_parameters
    assert work.copied_bytes(8) == 5 * work.num_parameters


def test_the_best_interval_loses_least(model):
    best = model.best_interval_s(512, 0.1)
    lost = [model.lost_frac(512, 0.1, factor * best) for factor in (0.5, 0.9, 1, 1.1, 2)]
    assert min(lost) == lost[2]
    assert model.seconds_between_failures(512) == pytest.approx(99 * 3600, rel=0.01)
