"""The table: cells, means, errors, X, order, labels; from records written by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dgavg import Table, UserError
from dgavg.benchmark.labels import labels
from dgavg.benchmark.table import tables

DOMAINS = ("a", "b", "c")
PROTOCOL = {"name": "p", "steps": 20, "batch_size": 8, "test_split": "in", "selection": "last"}


def record(step, held_out, seed, candidates, chain="ema_basic", protocol=None, **extra):
    """`candidates`: by name the accuracies on the held-out in and out, and on the other outs."""
    found = {}
    for name, (test_in, test_out, validation) in candidates.items():
        splits = {}
        for domain in DOMAINS:
            if domain == held_out:
                splits[f"{domain}/in"] = {"accuracy": test_in, "loss": 1 - test_in, "n": 80}
                splits[f"{domain}/out"] = {"accuracy": test_out, "loss": None, "n": 20}
            else:
                splits[f"{domain}/out"] = {"accuracy": validation, "loss": 0.5, "n": 20}
        found[name] = {"batchnorm": "keep", "splits": splits}
    return {
        "step": step,
        "held_out": held_out,
        "seed": seed,
        "chain": chain,
        "trainer": {name: {} for name in chain.split("_")},
        "data": {"name": "toy", "content": "abc"},
        "protocol": {**PROTOCOL, **(protocol or {})},
        "candidates": found,
    } | extra


def run(accuracies, **options):
    """Runs of one evaluation: `accuracies[held_out][seed]` = (live, ema)."""
    return [
        [record(20, d, s, {"live": (x, x, x), "ema": (y, y, y)}, **options)]
        for d, by_seed in accuracies.items()
        for s, (x, y) in by_seed.items()
    ]


ACCURACIES = {
    "a": {0: (0.1, 0.2), 1: (0.2, 0.4), 2: (0.3, 0.3)},
    "b": {0: (0.5, 0.6), 1: (0.5, 0.9), 2: (0.8, 0.7)},
}


def line(table, candidate):
    (found,) = [x for x in str(table).splitlines() if candidate in x.split()[:2]]
    return found


def test_a_cell_is_the_mean_and_the_population_deviation_over_root_n():
    values = np.array([0.1, 0.2, 0.3])
    error = 100 * np.std(values / np.sqrt(3))  # as DomainBed has it
    cell = f"{100 * values.mean():.1f} ± {error:.1f}"
    assert cell == "20.0 ± 4.7"
    assert cell in line(Table({"r": run(ACCURACIES)}), "live")


def test_the_mean_is_over_domains_and_its_error_over_seeds():
    per_seed = np.array([[0.1, 0.2, 0.3], [0.5, 0.5, 0.8]]).mean(axis=0)
    wanted = f"{100 * per_seed.mean():.1f} ± {100 * np.std(per_seed) / math.sqrt(3):.1f}"
    assert line(Table({"r": run(ACCURACIES)}), "live").endswith(wanted)


def test_the_difference_to_live_is_paired_run_by_run():
    gains = np.array([0.1, 0.2, 0.0, 0.1, 0.4, -0.1])
    error = 100 * np.std(gains) / math.sqrt(6)
    wanted = f"{100 * gains.mean():+.1f} ± {error:.1f} (4 of 6 better)"
    assert line(Table({"r": run(ACCURACIES)}), "ema").endswith(wanted)


def test_one_seed_has_no_error():
    table = Table({"r": run({"a": {0: (0.5, 0.625)}, "b": {0: (0.25, 0.5)}})})
    assert line(table, "live").split() == ["ema_basic", "live", "50.0", "25.0", "37.5"]
    assert "±" not in str(table).splitlines()[0]


def test_a_missing_seed_is_an_x_in_its_cell_and_in_the_mean_and_never_averaged_over():
    holes = {"a": ACCURACIES["a"], "b": {0: (0.5, 0.6), 1: (0.5, 0.9)}}
    table = Table({"r": run(holes)})
    assert line(table, "live").split() == ["ema_basic", "live", "20.0", "±", "4.7", "X", "X"]
    assert line(table, "ema").split()[-2:] == ["X", "X"]  # and no difference to live either
    assert "X: not there for each of the seeds 0, 1, 2" in str(table)


def test_a_missing_fold_is_an_x():
    other = run({"a": {0: (0.1, 0.2)}, "b": {0: (0.1, 0.2)}}, chain="sma_basic")
    table = Table({"r": run({"a": {0: (0.5, 0.6)}}), "s": other})
    assert line(table, "ema_basic").split() == ["ema_basic", "live", "50.0", "X", "X"]


def test_a_candidate_that_one_run_never_reached_is_an_x_there():
    runs = run({"a": {0: (0.5, 0.6)}, "b": {0: (0.5, 0.6)}})
    del runs[0][0]["candidates"]["ema"]
    assert line(Table({"r": runs}), "ema").split() == ["ema", "X", "60.0", "X"]


CURVE = [
    record(10, "a", 0, {"live": (0.1, 0.9, 0.5)}, protocol={"selection": "validation"}),
    record(20, "a", 0, {"live": (0.2, 0.3, 0.8)}, protocol={"selection": "validation"}),
    record(30, "a", 0, {"live": (0.3, 0.4, 0.8)}, protocol={"selection": "validation"}),
    record(40, "a", 0, {"live": (0.4, 0.2, 0.1)}, protocol={"selection": "validation"}),
]


@pytest.mark.parametrize(
    ("rule", "step"),
    [(None, 20), ("validation", 20), ("last", 40), ("oracle", 40), ("oracle_best", 10)],
)
def test_a_rule_selects_the_checkpoint_and_the_first_of_ties(rule, step):
    (row,) = Table({"r": [CURVE]}, rule).to_frame().to_dict("records")
    assert (row["step"], row["accuracy"]) == (step, step / 100)


def test_the_oracle_rule_says_in_the_table_that_it_uses_the_test_domain():
    assert "uses the test domain" in str(Table({"r": [CURVE]}, "oracle"))


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="no selection rule 'oracel'; did you mean 'oracle'"):
        Table({"r": [CURVE]}, "oracel")


def test_the_whole_held_out_domain_counts_where_the_protocol_says_so():
    whole = record(20, "a", 0, {"live": (0.5, 1.0, 0.5)}, protocol={"test_split": "all"})
    frame = Table({"r": [[whole]]}).to_frame()
    assert frame["accuracy"].item() == pytest.approx((80 * 0.5 + 20 * 1.0) / 100)
    assert frame["loss"].item() == math.inf  # null in a record: the loss was not finite


def test_to_frame_has_every_number():
    frame = Table({"r": run(ACCURACIES)}).to_frame()
    found = {(r.held_out, r.seed, r.candidate): r.accuracy for r in frame.itertuples()}
    selected = {k[:2]: found.pop(k) for k in list(found) if k[2] == "selected"}
    assert selected == {(d, s): max(ACCURACIES[d][s]) for d in "ab" for s in range(3)}
    assert found == {
        (d, s, c): pair[i]
        for d, by_seed in ACCURACIES.items()
        for s, pair in by_seed.items()
        for i, c in enumerate(("live", "ema"))
    }
    assert list(frame.columns) == [
        *("run", "chain", "candidate", "held_out", "seed", "step", "accuracy", "loss"),
        *("validation", "batchnorm", "picked", "score", "hparams_seed"),
    ]


def test_rows_follow_the_runs_and_the_chain_and_columns_the_data_set():
    cells = {"c": {0: (0.5, 0.6)}, "a": {0: (0.5, 0.6)}}
    table = Table({"z": run(cells, chain="sma_ema_basic"), "y": run(cells)})
    lines = [text.split()[:2] for text in str(table).splitlines()[4:]]
    header = str(table).splitlines()[4].split()
    assert header[:5] == ["chain", "candidate", "a", "c", "mean"]
    assert [x[0] for x in lines[2:]] == [
        *("sma_ema_basic", "ema", "selected"),
        *("ema_basic", "ema", "selected"),
    ]


def test_runs_of_one_chain_are_told_apart_by_the_setting_they_differ_in():
    cells = {"a": {0: (0.5, 0.6)}}
    runs = {
        str(w): run(cells, trainer={"ema": {"decay": w, "every": 1}, "basic": {}})
        for w in (0.9, 0.99)
    }
    text = str(Table(runs))
    assert "ema_basic ema.decay=0.9 " in text
    assert "ema_basic ema.decay=0.99 " in text
    assert "every" not in text


def test_runs_of_two_models_never_look_alike():
    cells = {"a": {0: (0.5, 0.6)}}
    text = str(
        Table(
            {
                "x": run(cells, model={"name": "mlp", "width": 8}),
                "y": run(cells, chain="sma_basic", model={"name": "cnn"}),
            }
        )
    )
    assert "ema_basic model.name=mlp " in text
    assert "sma_basic model.name=cnn " in text


def test_runs_that_differ_in_nothing_a_record_says_are_called_by_name():
    cells = {"a": {0: (0.5, 0.6)}}
    text = str(Table({"x": run(cells), "y": run(cells)}))
    assert "ema_basic (x)" in text
    assert "ema_basic (y)" in text


@pytest.mark.parametrize(
    ("part", "change", "shown"),
    [
        ("protocol", {"protocol": {"steps": 30}}, "protocol.steps=20 there, 30 here"),
        ("data", {"data": {"name": "toy", "content": "xyz"}}, "data.content=abc there, xyz here"),
    ],
)
def test_a_table_refuses_to_mix_protocols_or_data(part, change, shown):
    cells = {"a": {0: (0.5, 0.6)}}
    runs = {"x": run(cells), "y": run(cells, **change)}
    with pytest.raises(UserError) as caught:
        Table(runs)
    assert f"y and x differ in {part}" in str(caught.value)
    assert shown in str(caught.value)
    assert [list(t.labels) for t in tables(runs)] == [["x"], ["y"]]  # one table for each


def test_the_same_images_from_another_folder_are_the_same_data():
    cells = {"a": {0: (0.5, 0.6)}}
    data = {"name": "toy", "content": "abc", "size": 64}
    assert len(tables({"x": run(cells), "y": run(cells, data=data, chain="sma_basic")})) == 1


def test_no_run_is_refused():
    with pytest.raises(UserError, match="no finished run"):
        Table({})


def test_one_pair_has_a_difference_but_no_error():
    table = Table({"r": run({"a": {0: (0.5, 0.6)}})})
    assert line(table, "ema").split()[-1] == "+10.0"


def test_a_folder_is_called_by_its_title():
    data = {"name": "folder", "title": "PACS", "content": "abc"}
    assert str(Table({"r": run(ACCURACIES, data=data)})).startswith("PACS: accuracy")


def test_a_schedule_in_one_run_and_a_number_in_another_are_both_named():
    def record(weight, lr):
        return {
            "chain": "irm_basic",
            "trainer": {"irm": {"weight": weight}},
            "optimizer": {"lr": lr},
        }

    found = labels(
        {
            "a": record({"linear": {"to": 1000.0}}, 0.01),
            "b": record(3.0, 0.001),
            "c": record({"cosine": {"to": 5.0}}, 0.01),
        }
    )
    assert found == {
        "a": "irm_basic irm.weight.linear.to=1000 optimizer.lr=0.01",
        "b": "irm_basic irm.weight=3 optimizer.lr=0.001",
        "c": "irm_basic irm.weight.cosine.to=5 optimizer.lr=0.01",
    }
