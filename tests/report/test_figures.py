"""What figures and lists of the page take from records, by records made by hand."""

from __future__ import annotations

import pytest
from benchmark.made_records import record
from matplotlib.figure import Figure

from dgavg.benchmark.reading import key_of
from dgavg.report.bars import gain_panels
from dgavg.report.curves import curve_panels
from dgavg.report.details import environment_lines
from dgavg.report.page import page
from dgavg.report.section import Section
from dgavg.report.style import Palette

ASWA = {"chain": "aswa_basic", "trainer": {"aswa": {}, "basic": {}}}  # which has no window


def run(accuracies, **options):
    """A run of `aswa_basic`: the accuracy of live and ASWA, in test and validation, by step."""
    return [
        record(step, {"live": (x, x), "aswa": (x + 0.1, x)}, **ASWA, **options)
        for step, x in accuracies.items()
    ]


def test_gains_are_of_candidates_under_their_own_batch_norm_policy():
    scores = {"live": (0.5, 0.5), "ema": (0.75, 0.5), "ema@keep": (0.25, 0.5)}
    section = Section({"r": [[record(10, scores)]]})
    (domain, mean) = gain_panels(section, Palette(["ema"]), "gain")
    assert domain.alt.endswith("held out: a: ema +25.0; selected +0.0")
    assert mean.alt.endswith("mean over the domains: ema +25.0; selected +0.0")


def test_a_mean_curve_has_the_steps_that_all_seeds_have():
    stopped = run({10: 0.2, 20: 0.4})
    section = Section({"r": [run({10: 0.4, 20: 0.8, 30: 0.9}, seed=1), stopped]})
    (panel,) = curve_panels(section, Palette(["aswa"]), "r", "curves")
    figure = Figure(figsize=panel.size)
    panel.draw(figure)
    lines = {line.get_gid(): line for axes in figure.axes for line in axes.lines}
    mean = lines["test-live"]
    assert list(mean.get_xdata()) == [10, 20]
    assert list(mean.get_ydata()) == pytest.approx([30, 60])


def test_a_soup_of_all_seeds_has_no_validation_data_and_is_on_the_page():
    soup = record(10, {"soup": (0.6, 0.5)}, seed=-1, chain="soup of live", members=[{}])
    splits = soup["candidates"]["soup"]["splits"]
    soup["candidates"]["soup"]["splits"] = {"a/in": splits["a/in"]}
    section = Section({"r": [run({10: 0.4, 20: 0.8})], "soup": [[soup]]})
    (trace,) = section.traces("soup", "soup")
    assert (trace.selected.step, trace.selected.test) == (10, 0.6)


def test_a_run_that_went_on_where_it_began_counts_once_for_its_environment():
    records = run({10: 0.4})
    other = run({10: 0.4}, seed=1)
    places = {
        ("r", key_of(records[0])): [{"torch": "2.6"}, {"torch": "2.6"}, {"torch": "2.7"}],
        ("r", key_of(other[0])): [{"torch": "2.6"}],
    }
    lines = environment_lines(Section({"r": [records, other]}, environments=places))
    assert lines == [["", "value"], ["torch", "2.6 (2 runs); 2.7 (1 runs)"]]


def test_the_headline_of_chains_that_pick_over_candidates_is_what_they_pick():
    single = record(10, {"live": (0.5, 0.5)}, chain="basic", trainer={"basic": {}})
    several = run({10: 0.4, 20: 0.8})
    text = page([Section({"r": [several], "s": [[single]]})])
    headlines = text[: text.index('id="s1-tables"')]
    assert "<code>aswa_basic</code>: <strong>80.0 %</strong>" in headlines
    assert "picks candidate and checkpoint" in headlines
    assert "<code>basic</code>: <strong>50.0 %</strong>" in headlines
    assert "picks the checkpoint" in headlines


def test_there_is_no_headline_where_nothing_tells_which_candidate_to_ship():
    one = run({10: 0.4})[0]
    one["protocol"] |= {"selection": "last", "holdout_fraction": 0}
    for found in one["candidates"].values():
        found["splits"] = {"a/in": found["splits"]["a/in"]}
    text = page([Section({"r": [[one]]})])
    assert "<strong>" not in text[: text.index('id="s1-tables"')]
