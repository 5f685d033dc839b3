"""SWAG against moments of stored ends of epochs, and the samples it offers at the end."""

from __future__ import annotations

import io

import pytest
import torch
from plain import assert_weights, iterates, mean_of, plain_training, run_of, trained

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, is_shadow, toy_run
from dgavg.testing.contract import same
from dgavg.trainers.weights.swag import SWAG  # noqa: F401  (makes it known)

ACTING = {"start": 0.3, "rank": 2, "samples": 2}


def link_of(run):
    return next(link for link in run.trainer if link.name == "swag")


def test_it_keeps_the_contract_of_a_link():
    check_link("swag", **ACTING)


def test_it_leaves_training_alone_to_the_bit():
    assert is_shadow("swag_basic", {"swag": ACTING})
    assert is_shadow("swag_irm_basic", {"swag": ACTING, "irm": {"anneal": 3}})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"start": 0}, [4, 8, 12, 16, 20, 24]),
        ({}, [16, 20, 24]),
        ({"start": 9, "rank": 2}, [12, 16, 20, 24]),
        ({"start": 5, "every": 2}, [8, 16, 24]),
        ({"start": 0.9, "rank": 0}, [24]),
    ],
)
def test_moments_are_those_of_the_ends_of_epochs_from_start_on(settings, steps):
    run = run_of("swag_basic", {"swag": settings}, steps=26)
    found = iterates(run)
    snapshots, candidate = [found[t] for t in steps], run.candidates()["swag"]
    posterior, rank = link_of(run).posterior, settings.get("rank", len(steps))
    parameters = {k: v for k, v in candidate.weights.items() if k not in run.buffer_names}
    expected = mean_of(snapshots)
    assert_weights(parameters, {k: expected[k] for k in parameters}, rtol=1e-5, atol=1e-6)
    assert candidate.batchnorm == "recalibrate"
    assert (posterior.count, posterior.rank) == (len(steps), rank)
    assert posterior.deviations == min(rank, len(steps))
    variances = {
        k: torch.stack([s[k] for s in snapshots]).var(dim=0, correction=0) for k in parameters
    }
    assert_weights(posterior.variance(), variances, rtol=1e-3, atol=1e-8)


def test_moments_are_those_of_plain_training():
    ends = []

    def note(model, t):
        if t in (8, 12):
            ends.append({k: v.detach().clone() for k, v in model.named_parameters()})

    plain_training(after_step=note)
    run = trained("swag_basic")
    posterior = link_of(run).posterior
    found = {k: v for k, v in posterior.mean().items() if k in ends[0]}
    assert_weights(found, mean_of(ends))
    half = {k: (ends[1][k] - ends[0][k]).abs() / 2 for k in ends[0]}  # of two: the deviation
    assert_weights({k: v.sqrt() for k, v in posterior.variance().items()}, half)


def test_under_the_average_policy_statistics_are_averaged_and_not_sampled():
    run = run_of("swag_basic", {"swag": {"batchnorm": "average", "samples": 1}})
    found = iterates(run)
    expected = mean_of(found[t] for t in (8, 12))
    candidates = run.candidates()
    assert_weights(candidates["swag"].weights, expected, rtol=1e-5, atol=1e-6)
    assert candidates["swag_bma"].batchnorm == "average"
    (member,) = candidates["swag_bma"].members
    statistics = {k: v for k, v in member.items() if k in run.buffer_names}
    assert len(statistics) == 3
    assert_weights(statistics, {k: expected[k] for k in statistics}, rtol=1e-5, atol=1e-6)


def test_samples_are_offered_after_training_alone():
    run, offered = run_of("swag_basic", {"swag": ACTING}), {}
    fit(run, after_step=lambda run: offered.update({run.t: list(run.candidates())}))
    assert all(offered[t] == ["live"] for t in range(1, 4))
    assert all(offered[t] == ["live", "swag"] for t in range(4, 13))
    assert list(run.candidates()) == ["live", "swag", "swag_bma"]
    bma = run.candidates()["swag_bma"]
    assert bma.batchnorm == "recalibrate"
    assert same(bma.weights, run.candidates()["swag"].weights)


def test_without_samples_the_mean_is_all():
    assert list(trained("swag_basic").candidates()) == ["live", "swag"]


def test_samples_are_offered_after_an_early_stop():
    run = toy_run("swag_basic", {"swag": ACTING})
    run.stopping = lambda scores: "enough" if len(scores) == 2 else ""
    fit(run)
    assert run.t == 6
    assert len(run.candidates()["swag_bma"].members) == 2


def test_a_run_that_stops_before_the_first_epoch_ends_offers_nothing():
    run = toy_run("swag_basic", {"swag": ACTING})
    run.stopping = lambda scores: "enough"
    fit(run)
    assert run.t == 3
    assert list(run.candidates()) == ["live"]


def members_of(seed=0, **settings):
    run = trained("swag_basic", {"swag": {**ACTING, **settings}}, seed=seed)
    return run.candidates()["swag_bma"].members


def test_samples_are_the_same_whenever_asked_and_differ():
    run = trained("swag_basic", {"swag": {**ACTING, "samples": 3}})
    before = torch.get_rng_state()
    first, again = (run.candidates()["swag_bma"].members for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert same(first, again)
    assert same(first[:2], members_of())
    assert len(first) == 3
    assert not same(first[0], first[1])
    assert not same(first[:2], members_of(seed=1))
    twin = run.model
    twin.load_state_dict(first[0])


def test_samples_are_those_of_the_whole_gaussian_at_their_scale():
    run = trained("swag_basic", {"swag": {**ACTING, "scale": 4.0}})
    mean = run.candidates()["swag"].weights
    name = "featurizer.1.weight"
    for wide, narrow in zip(run.candidates()["swag_bma"].members, members_of(), strict=True):
        torch.testing.assert_close(wide[name] - mean[name], 2 * (narrow[name] - mean[name]))
    for member in members_of(scale=0.0):
        assert same(member, dict(mean))
    diagonal, both = members_of(rank=0), members_of(rank=2)
    assert not same(diagonal, both)


def test_a_run_resumed_after_its_end_offers_the_same_samples():
    run, file = trained("swag_basic", {"swag": ACTING}), io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    again = run_of("swag_basic", {"swag": ACTING})
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same(run.candidates()["swag_bma"].members, again.candidates()["swag_bma"].members)


def test_the_posterior_predicts_with_the_model_of_the_run():
    run = trained("swag_basic")
    live = {k: v.clone() for k, v in run.live.items()}
    batches = [run.batches(t).x for t in range(3)]
    found = link_of(run).posterior.predict(run.model, batches[0], samples=3, batches=batches)
    assert found.shape == (24, 3)
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * 24)
    assert same(dict(run.model.state_dict()), live)


def test_the_mean_is_that_of_swa():
    run = trained("swag_swa_basic", {"swag": {"start": 0.3}, "swa": {"start": 0.3}})
    found = run.candidates()
    assert list(found) == ["live", "swag", "swa"]
    for name, tensor in found["swa"].weights.items():
        torch.testing.assert_close(found["swag"].weights[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "swag.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "swag.every=0: at least 1"),
        ({"rank": -1}, "trainer.swag.rank=-1: deviations to keep, from 0 on"),
        ({"scale": -1.0}, "trainer.swag.scale=-1.0: a number from 0 on"),
        ({"scale": float("inf")}, "trainer.swag.scale=inf: a number from 0 on"),
        ({"scale": float("nan")}, "trainer.swag.scale=nan: a number from 0 on"),
        ({"samples": -1}, "trainer.swag.samples=-1: a number from 0 on"),
        ({"batchnorm": "reset"}, "swag.batchnorm='reset': choose one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("swag_basic", swag=settings)


@pytest.mark.parametrize(("start", "steps"), [(9, 10), (0, 3)])
def test_a_start_that_no_end_of_an_epoch_reaches_is_refused(start, steps):
    with pytest.raises(UserError, match=f"none of 4 steps ends from step {start} to {steps}"):
        run_of("swag_basic", {"swag": {"start": start}}, steps=steps)
