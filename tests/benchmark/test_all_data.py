"""Training on all data of the training domains: nothing validates, the last weights count."""

from __future__ import annotations

import json

import pytest

from dgavg import UserError

ALL = {"protocol__holdout_fraction": 0, "protocol__selection": "last"}


def test_every_image_is_trained_on_or_tested_on(train, make_data, only_run, records_of):
    table, folder = train("sma_swa_basic", make_data([60, 70, 65]), trainer__sma__start=2, **ALL)
    run = only_run(folder)
    for record in records_of(run):
        for candidate in record["candidates"].values():
            assert {k: v["n"] for k, v in candidate["splits"].items()} == {"d1/in": 70}
    assert {p.stem for p in (run / "weights").iterdir()} == {"live", "sma", "swa"}
    assert "checkpoint: the last evaluation" in str(table)


def test_a_stopped_run_goes_on_as_if_it_had_not(train, only_run, content_of):
    _, once = train("ema_basic", folder="once", **ALL)
    _, twice = train("ema_basic", folder="twice", **ALL)
    run = only_run(twice)
    (run / "done").unlink()
    train("ema_basic", folder="twice", **ALL)
    assert content_of(run) == content_of(only_run(once))


@pytest.mark.parametrize(
    ("chain", "settings", "message"),
    [
        ("ema_basic", {"protocol__selection": "validation"}, "select by: write protocol.selection"),
        ("ema_basic", {"stopping__candidate": "ema"}, "stop by: write stopping.candidate=null"),
        ("swad_basic", {}, "no validation data, which swad in 'swad_basic' decides by"),
        ("aswa_swad_basic", {}, "which aswa, swad in 'aswa_swad_basic' decides by"),
        ("autolr_sma_basic", {}, "which autolr in 'autolr_sma_basic' decides by"),
    ],
)
def test_what_reads_validation_data_is_refused(train, tmp_path, chain, settings, message):
    with pytest.raises(UserError, match=message):
        train(chain, **{**ALL, **settings})
    assert not (tmp_path / "runs").exists()


def test_weights_that_blow_up_are_found_without_validation_data_too(train):
    with pytest.raises(UserError, match=r"is (nan|inf)"):
        train("basic", optimizer__lr=1e30, **ALL)


def test_a_last_update_that_blows_up_is_found_too(train):
    with pytest.raises(UserError, match=r"step 1: the training loss of the live .* is (nan|inf)"):
        train("basic", steps=1, every=1, optimizer__lr=1e30, model__batchnorm=False, **ALL)


def test_ermpps_second_stage_trains_by_given_drops(train, only_run, records_of):
    _, folder = train(
        "autolr_lpft_sma_basic",
        trainer__autolr__drops=[8, 16],
        trainer__sma__start=2,
        trainer__lpft__probe=4,
        **ALL,
    )
    rates = [record["lr"] for record in records_of(only_run(folder))]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4])


def test_records_say_that_nothing_was_held_out(train, only_run):
    _, folder = train("basic", **ALL)
    line = (only_run(folder) / "records.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["protocol"]["holdout_fraction"] == 0
