"""What a row is made of: the draw that the rule picks, `selected`, runs of two domains."""

from __future__ import annotations

import pytest
from benchmark.made_records import PROTOCOL, record

from dgavg import Table, UserError
from dgavg.benchmark.results import grouped, results, title_of
from dgavg.benchmark.table import tables


def found(runs, rule="validation"):
    return {
        (r.candidate, r.held_out, r.seed): r
        for name, cells in grouped(runs).items()
        for r in results(name, cells, rule)
    }


def test_selected_is_the_best_candidate_at_its_best_checkpoint_by_the_rule_alone():
    runs = {
        "r": [
            [
                record(10, {"live": (0.9, 0.5), "ema": (0.8, 0.4)}),
                record(20, {"live": (0.7, 0.4), "ema": (0.6, 0.6)}),
            ]
        ]
    }
    selected = found(runs)["selected", "a", 0]
    assert (selected.picked, selected.step, selected.accuracy) == ("ema", 20, 0.6)
    lines = str(Table(runs)).splitlines()
    assert lines[-1].split() == ["selected", "60.0", "60.0", "-30.0"]


def test_the_first_candidate_wins_a_tie_and_a_run_of_one_has_no_selected():
    tied = {"r": [[record(10, {"live": (0.9, 0.5), "ema": (0.8, 0.5)})]]}
    assert found(tied)["selected", "a", 0].picked == "live"
    assert list(found({"r": [[record(10, {"live": (0.9, 0.5)})]]})) == [("live", "a", 0)]


def drawn(accuracies, **options):
    """Runs by draw: `accuracies[draw]` = (test, validation) of the live weights."""
    return {
        f"base-h{draw}": [[record(20, {"live": pair}, draw=draw, **options)]]
        for draw, pair in accuracies.items()
    }


def test_the_rule_picks_the_draw_in_each_cell():
    runs = drawn({0: (0.9, 0.1), 2: (0.5, 0.8), 1: (0.7, 0.3)})
    for name, each in drawn({0: (0.4, 0.6), 1: (0.3, 0.2)}, seed=1).items():
        runs[name] += each
    cells = found(runs)
    assert (cells["live", "a", 0].hparams_seed, cells["live", "a", 0].accuracy) == (2, 0.5)
    assert (cells["live", "a", 1].hparams_seed, cells["live", "a", 1].accuracy) == (0, 0.4)


def test_of_draws_that_tie_the_last_counts_as_in_domainbed():
    assert (
        found(drawn({2: (0.2, 0.5), 0: (0.0, 0.5), 1: (0.1, 0.5)}))["live", "a", 0].accuracy == 0.2
    )


def test_draws_are_one_row_of_one_table_and_drawn_settings_are_no_difference():
    text = str(Table(drawn({0: (0.9, 0.1), 1: (0.5, 0.8)})))
    assert text.splitlines()[-1].split() == ["ema_basic", "live", "50.0", "50.0"]
    assert "searched images a domain, 1 seed, the best of 2 draws of hyper-parameters" in text


def test_groups_are_told_apart_by_what_no_search_draws():
    groups = {}
    for group, beta in (("g", 0.9), ("h", 0.5)):
        optimizer = {"lr": beta, "beta1": beta}  # the first draw of each group has another rate
        for draw in (1, 2):
            one = record(20, {"live": (0.5, 0.5)}, draw=draw, optimizer=optimizer)
            groups[f"{group}{draw}"] = [[one | {"search": one["search"] | {"group": group}}]]
    assert set(Table(groups).labels.values()) == {
        *("ema_basic optimizer.beta1=0.9", "ema_basic optimizer.beta1=0.5")
    }


def test_two_lists_of_official_splits_are_never_in_one_table():
    runs = {}
    for lists in ("one", "two"):
        data = {"name": "t", "content": "c", "splits": lists}
        runs[lists] = [[record(10, {"live": (0.5, 0.5)}, data=data)]]
    with pytest.raises(UserError, match=r"differ in data \(data.splits=one there, two here\)"):
        Table(runs)
    assert len(tables(runs)) == 2


def test_a_data_set_without_a_title_is_called_by_its_name():
    untitled = {"name": "toy", "title": None, "content": "abc"}
    one = record(10, {"live": (0.5, 0.5)}, data=untitled)
    assert str(Table({"r": [[one]]})).startswith("toy: accuracy")


def test_a_cell_that_chose_among_fewer_draws_is_marked():
    runs = drawn({0: (0.9, 0.1), 1: (0.5, 0.8)})
    runs["base-h0"] += drawn({0: (0.4, 0.2)}, held_out="b")["base-h0"]
    text = str(Table(runs))
    assert "50.0  40.0°" in text
    assert "°: chosen among fewer draws" in text


def test_what_is_made_of_draws_chooses_among_none():
    runs = drawn({0: (0.9, 0.1), 1: (0.5, 0.8)}, protocol=PROTOCOL)
    for (records,) in runs.values():
        records[0]["search"]["settings"] = ["optimizer.lr"]
    runs["soup"] = [[record(20, {"soup": (0.5, 0.5)}, chain="soup of live", members=[{}])]]
    assert "°" not in str(Table(runs))


def test_runs_of_two_domains_alone_make_no_row():
    table = Table({"r": [[record(10, {"live": (0.5, 0.1)}, held_out_with="b")]]})
    assert table.lines() == [["chain", "candidate", "mean", "against live"]]
    assert "8 images a domain, no run that left out one domain alone" in str(table)
    assert table.differences() == ""


def test_runs_of_two_domains_are_in_no_cell_and_cross_validation_reads_them():
    alone = [
        record(10, {"live": (0.1, 0.9), "ema": (0.3, 0.9)}),
        record(20, {"live": (0.2, 0.5), "ema": (0.4, 0.5)}),
    ]
    pairs = [
        [record(t, {"live": (x, 0.1), "ema": (x / 2, 0.1)}, held_out_with=other) for t, x in steps]
        for other, steps in {"b": [(10, 0.5), (20, 0.6)], "c": [(10, 0.3), (20, 0.4)]}.items()
    ]
    runs = {"r": [alone, *pairs]}
    assert found(runs)["live", "a", 0].step == 10
    cells = found(runs, "loo")
    assert (cells["live", "a", 0].step, cells["live", "a", 0].score) == (20, pytest.approx(0.5))
    assert cells["selected", "a", 0].picked == "live"
    assert str(Table(runs, "loo")).splitlines()[-1].split() == ["selected", "20.0", "20.0", "+0.0"]
    assert list(Table(runs).held_out) == ["a"]
    assert found({"r": [alone, pairs[0]]}, "loo") == {}


def test_cross_validation_without_a_run_of_two_domains_says_how_to_train_them():
    with pytest.raises(
        UserError, match="rule loo reads runs that left two domains out: train with"
    ):
        Table({"r": [[record(10, {"live": (0.1, 0.9)})]]}, "loo")


def test_the_test_list_of_official_splits_is_the_whole_domain():
    one = record(10, {"live": (0.25, 0.9)}, protocol={**PROTOCOL, "splits": "official"})
    one["protocol"]["test_split"] = "all"
    one["candidates"]["live"]["splits"]["a/out"] = {"accuracy": 1.0, "loss": 1.0, "n": 10}
    assert found({"r": [[one]]})["live", "a", 0].accuracy == 0.25


def test_a_departure_from_the_protocol_stands_in_the_title():
    one = record(10, {"live": (0.25, 0.9)}, changed=["model.resnet18=True", "optimizer.lr=0.1"])
    lines = str(Table({"r": [[one]]})).splitlines()
    assert lines[3] == "NOT as the protocol says: model.resnet18=True, optimizer.lr=0.1"


@pytest.mark.parametrize(
    ("data", "title"),
    [
        ({"name": "folder", "title": "PACS"}, "PACS"),
        ({"name": "pacs", "title": None}, "pacs"),
        ({"name": "digits"}, "digits"),
    ],
)
def test_a_data_set_is_called_by_its_title_where_it_has_one(data, title):
    assert title_of(data) == title
