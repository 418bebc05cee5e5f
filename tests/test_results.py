"""The table of several runs: what is averaged, what never is, and what stands beside the numbers."""

import json
import statistics

import pytest
from test_evaluation import ABOUT

from fastm3ae.errors import UserError
from fastm3ae.tasks.evaluation import Evaluation, digest, write_evaluation
from fastm3ae.tasks.metrics import Interval
from fastm3ae.tasks.results import read_results, results_table

SAME = {"num_groups": 100, "num_resamples": 1000, "confidence": 0.95}


def write(folder, accuracy, seed=0, learning_rate=1e-5, metrics=None, **about):
    """An evaluation whose overall accuracy is as given."""
    metrics = metrics or {
        "overall_accuracy": Interval(accuracy, accuracy - 0.04, accuracy + 0.05, 451, **SAME),
        "closed_accuracy": Interval(accuracy / 2, 0.2, 0.6, 251, **SAME),
    }
    configuration = {"seed": seed, "output": str(folder), "optim": {"learning_rate": learning_rate, "epochs": 9}}
    about = {**ABOUT, "seed": seed, "configuration": configuration, "weights_were_random": False, **about}
    write_evaluation(Evaluation(metrics=metrics, predictions=[]), folder, {**about, "checkpoint": f"best of {folder}"})
    return folder


def cells(markdown, number):
    """The cells of the row with a number, after its number."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| [{number}] |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def below(markdown, number):
    return next(line for line in markdown.splitlines() if line.startswith(f"- [{number}]: "))


def test_another_way_to_evaluate_is_another_row(tmp_path):
    write(tmp_path / "a", 0.6)
    write(tmp_path / "b", 0.7, options={"image_size_px": 576})
    table = results_table(read_results([tmp_path]))
    assert [cells(table.markdown, number)[2] for number in (1, 2)] == ["", "evaluated with image_size_px=576"]
    assert table.data["rows"][1]["options"] == {"image_size_px": 576}
    assert "- options: image_size_px=576" in (tmp_path / "b" / "results.md").read_text()


def test_seeds_are_averaged(tmp_path):
    for seed, accuracy in ((1, 0.6), (2, 0.65), (3, 0.7)):
        write(tmp_path / f"s{seed}", accuracy, seed)
    table = results_table(read_results([tmp_path]))
    assert cells(table.markdown, 1) == ["vqa_vqa_rad", "test", "", "65.0 ± 5.0", "32.5 ± 2.5"]
    (row,) = table.data["rows"]
    assert row["metrics"]["overall_accuracy"] == {
        "mean": pytest.approx(0.65), "standard_deviation": pytest.approx(statistics.stdev([0.6, 0.65, 0.7]))
    }  # fmt: skip
    assert [(run["seed"], run["metrics"]["overall_accuracy"]["value"]) for run in row["runs"]] == [
        (1, 0.6), (2, 0.65), (3, 0.7)
    ]  # fmt: skip
    assert row["runs"][1]["checkpoint"] == f"best of {tmp_path / 's2'}"
    assert json.loads(json.dumps(table.data)) == table.data


def test_one_seed_has_its_interval(tmp_path):
    table = results_table(read_results([write(tmp_path, 0.6, 5)]))
    assert cells(table.markdown, 1)[3:] == ["60.0 (56.0 to 65.0)", "30.0 (20.0 to 60.0)"]
    assert table.data["rows"][0]["metrics"]["closed_accuracy"] == {"mean": 0.3, "standard_deviation": None}
    assert below(table.markdown, 1).startswith("- [1]: seed 5; ")


def test_what_stands_below(tmp_path):
    for seed in (2, 1):
        environment = {"fastm3ae": "0.1.0", "commit": f"commit{seed}"}
        write(tmp_path / str(seed), 0.6, seed, environment=environment)
    table = results_table(read_results([tmp_path / "2", tmp_path / "1"]))
    assert below(table.markdown, 1) == (
        "- [1]: seeds 1, 2; 451 items (overall accuracy); 251 items (closed accuracy); "
        f"vqa_vqa_rad_test.arrow, sha256 abababababab; 3 labels, sha256 {digest(ABOUT['labels'])[:12]}; "
        "prepared with answers=train, val=patients; 95 % intervals by 1,000 resamples of whole images; "
        "fastm3ae 0.1.0, commit commit1; fastm3ae 0.1.0, commit commit2"
    )
    row = table.data["rows"][0]
    assert row["fingerprints"] == ABOUT["fingerprints"] and row["labels"] == ABOUT["labels"]
    assert [run["environment"]["commit"] for run in row["runs"]] == ["commit2", "commit1"]


def test_rows_are_configurations_and_say_in_what_they_differ(tmp_path):
    write(tmp_path / "a", 0.5, learning_rate=1e-5)
    write(tmp_path / "b", 0.6, learning_rate=2e-5)
    write(tmp_path / "c", 0.7, learning_rate=2e-5, weights_were_random=True)
    write(tmp_path / "d", 0.8, learning_rate=2e-5, split="val")
    recall = {
        "image_to_text_recall_at_1": Interval(0.25, 0.1, 0.4, 64, **SAME),
        "auroc": Interval(None, None, None, 64),
    }
    write(tmp_path / "e", 0, task="retrieval", datasets=["irtr_roco", "mine"], labels=[], metrics=recall)
    table = results_table(read_results([tmp_path]))
    assert [cells(table.markdown, number)[:4] for number in (1, 2, 3, 4)] == [
        ["vqa_vqa_rad", "test", "optim.learning_rate=1e-05", "50.0 (46.0 to 55.0)"],
        ["vqa_vqa_rad", "test", "optim.learning_rate=2e-05", "60.0 (56.0 to 65.0)"],
        ["vqa_vqa_rad", "test", "optim.learning_rate=2e-05, from random weights", "70.0 (66.0 to 75.0)"],
        ["vqa_vqa_rad", "val", "", "80.0 (76.0 to 85.0)"],
    ]
    assert cells(table.markdown, 5) == ["irtr_roco, mine", "test", "", "25.0 (10.0 to 40.0)", "-"]
    assert "labels" not in below(table.markdown, 5) and "; 64 items; " in below(table.markdown, 5)
    lines = table.markdown.splitlines()
    assert lines.index("## vqa") < lines.index("## retrieval")
    header = "|  | data | split | configuration | overall accuracy | closed accuracy |"
    assert lines[lines.index("## vqa") + 3] == "| --- | --- | --- | --- | ---: | ---: |"
    assert lines[lines.index("## vqa") + 2] == header and "closed" not in lines[lines.index("## retrieval") + 2]


def test_a_metric_that_is_not_defined_has_no_mean(tmp_path):
    for seed in (1, 2):
        write(tmp_path / str(seed), 0, seed, metrics={"auroc": Interval(None, None, None, 64)})
    table = results_table(read_results([tmp_path]))
    assert cells(table.markdown, 1)[-1] == "-"
    assert table.data["rows"][0]["metrics"]["auroc"] == {"mean": None, "standard_deviation": None}


UNLIKE = {
    "data": ({"fingerprints": {"x": "1" * 64}}, "have other data: .*abab.* and .*1111.*"),
    "labels": (
        {"labels": ["yes", "no", "maybe", "so"]},
        r"have other labels: 3 \(sha256 .*\) and 4 \(sha256 .*\); only .*1/metrics.json has 'être'; "
        "only .*2/metrics.json has 'maybe', 'so'",
    ),
    "order": ({"labels": ["no", "yes", "être"]}, "the same names in another order"),
    "unit": ({"resampling_unit": "patient"}, "have other resampling units: image and patient"),
    "items": (
        {
            "metrics": {
                "overall_accuracy": Interval(0.6, 0.5, 0.7, 450, **SAME),
                "closed_accuracy": Interval(0.6, 0.5, 0.7, 251, **SAME),
            }
        },
        "have other numbers of items: .*451.* and .*450",
    ),
    "metrics": ({"metrics": {"overall_accuracy": Interval(0.6, 0.5, 0.7, 451, **SAME)}}, "have other metrics"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_is_never_averaged(what, tmp_path):
    changes, complaint = UNLIKE[what]
    write(tmp_path / "1", 0.6, 1)
    write(tmp_path / "2", 0.7, 2, **changes)
    with pytest.raises(UserError, match=f"1/metrics.json and .*2/metrics.json .*{complaint}"):
        results_table(read_results([tmp_path]))


def test_a_seed_counts_once(tmp_path):
    write(tmp_path / "1", 0.6, 1)
    write(tmp_path / "again", 0.6, 1)
    with pytest.raises(UserError, match=r"one configuration and one seed, 1 \(checkpoints best of .*1 and .*again\)"):
        results_table(read_results([tmp_path]))
    assert len(read_results([tmp_path / "again" / ".." / "1", tmp_path, tmp_path / "1" / "metrics.json"])) == 2


BROKEN = {
    "not json": ("{", "is not JSON: "),
    "no object": ("[]", "is no evaluation's: it has no section 'about'"),
    "another file": ('{"metrics": {"loss": 1}}', "is no evaluation's: it has no section 'about'"),
    "an old one": ('{"about": {"task": "vqa"}, "metrics": {}}', "lacks checkpoint, configuration, .* in 'about'"),
    "no commit": (json.dumps({"about": {**ABOUT, "environment": {}}}), "lacks commit, fastm3ae in 'environment'"),
    "no metrics": (json.dumps({"about": ABOUT}), "is no evaluation's: it has no section 'metrics'"),
    "other metrics": (json.dumps({"about": ABOUT, "metrics": {"a": {"mean": 1}}}), "holds a metric that is none of"),
    "a number": (json.dumps({"about": ABOUT, "metrics": {"a": 1}}), "holds a metric that is none of"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_are_no_evaluations(what, tmp_path):
    content, complaint = BROKEN[what]
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/metrics.json {complaint}"):
        read_results([tmp_path])


def test_paths_without_an_evaluation(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; expected the folder of an evaluation"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=f"There is no metrics.json in {tmp_path} or below it"):
        read_results([tmp_path])
