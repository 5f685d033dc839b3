"""TWA against projected training written out in float64, and a run that it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, erm, iterates, mean_of, run_of

from dgavg import UserError, chain, fit
from dgavg.testing import ToyBatches, toy_model, toy_run
from dgavg.testing.contract import same
from dgavg.trainers.weights.twa import TWA

EARLY = {"start": 0.3}  # the ends of epochs at steps 4, 8 and 12
ACTING = {**EARLY, "steps": 4}


def parameters_of(run, weights=None):
    weights = run.candidates()["twa"].weights if weights is None else weights
    return {k: v for k, v in weights.items() if k not in run.buffer_names}


def vector(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def orthonormal(samples, centred):
    """A basis (D, r) of the span, by QR."""
    return torch.linalg.qr((samples[1:] - samples[:1] if centred else samples).T).Q


def write(live, names, weights):
    with torch.no_grad():
        for name, part in zip(names, weights.split([live[k].numel() for k in names]), strict=True):
            live[name].copy_(part.view(live[name].shape))


def projected(samples, gradient, times, settings):
    """Weights after SGD within the span, from `gradient(weights, t)`, all vectors in float64."""
    mean, centred = samples.mean(dim=0), settings.get("centred", True)
    basis, weights = orthonormal(samples, centred), mean
    velocity = torch.zeros_like(mean)
    for t in times:
        slope = gradient(weights, t) + settings.get("weight_decay", 0.0) * weights
        step = basis @ (basis.T @ slope) + settings.get("reg", 0.0) * (weights - mean)
        velocity = settings.get("momentum", 0.9) * velocity + step
        weights = weights - settings.get("learning_rate", 0.03) * velocity
    return weights


RULES = {
    "default": {},
    "dicee": {"momentum": 0.0, "reg": 0.5},
    "nblt": {"centred": False, "momentum": 0.9, "weight_decay": 0.1},
    "all": {"momentum": 0.5, "weight_decay": 0.1, "reg": 0.2, "learning_rate": 0.1},
}


@pytest.mark.parametrize("rule", RULES)
def test_it_is_projected_training_on_the_batches_that_come_next(rule):
    settings = {**EARLY, "steps": 10, **RULES[rule]}
    run = run_of("twa_basic", {"twa": settings}, steps=14)
    found = iterates(run)
    model = toy_model().double()
    names, live = [k for k, _ in model.named_parameters()], model.state_dict()

    def gradient(weights, t):
        write(live, names, weights)
        model.zero_grad()
        erm(model, ToyBatches()(t), t).backward()
        return vector(p.grad for p in model.parameters())

    samples = torch.stack([vector(found[t][k] for k in names) for t in (4, 8, 12)])
    weights = projected(samples, gradient, range(14, 24), settings)
    write(live, names, weights)
    candidate = run.candidates()["twa"]
    assert candidate.batchnorm == "recalibrate"
    assert_weights(parameters_of(run), {k: live[k] for k in names}, rtol=1e-3, atol=1e-4)
    assert (weights - samples.mean(dim=0)).norm() > 0.01


def test_the_gradient_is_that_of_the_whole_chain():
    """Penalties, mixup's draws at each step, sam's two passes: as a second run takes them."""
    rest = {"sam": {"rho": 0.5}, "irm": {"anneal": 3, "weight": 5.0}, "mixup": {"alpha": 1.0}}
    run = run_of("twa_sam_irm_mixup_basic", {"twa": ACTING, **rest})
    fit(run)
    other = run_of("sam_irm_mixup_basic", rest)
    found = iterates(other)
    names = [k for k in other.live if k not in other.buffer_names]

    def gradient(weights, t):
        write(other.live, names, weights)
        other.t = t
        other.grad(other.prepare(other.batches(t)))
        return vector(p.grad for p in other.model.parameters())

    samples = torch.stack([vector(found[t][k] for k in names) for t in (4, 8, 12)])
    weights = projected(samples, gradient, range(12, 16), ACTING)
    write(other.live, names, weights)
    mine = vector(parameters_of(run).values())
    torch.testing.assert_close(mine, weights, rtol=1e-3, atol=1e-4)
    plain = run_of("twa_basic", {"twa": ACTING})
    fit(plain)
    assert (vector(parameters_of(plain).values()) - mine).norm() > 0.1


def test_links_outside_of_it_count_too():
    settings, found = {"twa": ACTING, "sam": {"rho": 0.5}, "mixup": {"alpha": 1.0}}, []
    for spec in ("twa_sam_mixup_basic", "sam_mixup_twa_basic"):
        run = run_of(spec, settings)
        fit(run)
        found.append(run.candidates()["twa"].weights)
    assert same(*found)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"start": 0}, [4, 8, 12, 16, 20, 24]),
        ({"start": 0.5}, [16, 20, 24]),
        ({"start": 5, "every": 2}, [8, 16, 24]),
        ({"start": 0, "samples": 4}, [12, 16, 20, 24]),
        ({"start": 0, "every": 2, "samples": 2}, [12, 20]),
    ],
)
def test_without_training_it_is_the_mean_of_the_samples(settings, steps):
    run = run_of("twa_basic", {"twa": {**settings, "steps": 0}}, steps=26)
    found = iterates(run)
    expected = mean_of(found[t] for t in steps)
    assert_weights(
        parameters_of(run), {k: expected[k] for k in parameters_of(run)}, rtol=1e-5, atol=1e-6
    )
    assert run.trainer.coefficients == pytest.approx([1 / len(steps)] * len(steps))


def test_before_the_end_it_offers_the_mean_so_far():
    run, offered = run_of("twa_basic", {"twa": ACTING}, eval_every=2), {}

    def note(run):
        offered[run.t, run.closed] = copy.deepcopy(run.candidates())

    found = {0: None}
    fit(run, after_eval=note, after_step=lambda run: found.update({run.t: clone(run.live)}))
    assert "twa" not in offered[2, False]
    for t, steps in ((4, [4]), (6, [4]), (10, [4, 8]), (12, [4, 8, 12])):
        expected = mean_of(found[s] for s in steps)
        mine = parameters_of(run, offered[t, False]["twa"].weights)
        assert_weights(mine, {k: expected[k].double() for k in mine}, rtol=1e-5, atol=1e-6)
    assert not same(offered[12, False]["twa"].weights, offered[12, True]["twa"].weights)


def clone(tensors):
    return {k: v.clone() for k, v in tensors.items()}


def loss_at(run, weights):
    """The training loss of parameters, with batch norm by the batch."""
    model = copy.deepcopy(run.model).train()
    model.load_state_dict(weights)
    losses = []
    for t in range(100, 110):
        batch = run.batches(t)
        losses.append(F.cross_entropy(model(batch.x), batch.y))
    return torch.stack(losses).mean().item()


def test_training_lowers_the_loss_where_the_mean_lags_behind():

    def slowly(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    run = run_of("twa_basic", {"twa": {"start": 0, "steps": 30}}, steps=24, optimizer=slowly)
    fit(run)
    average, trained = run.trainer.average, run.trainer.coefficients
    mean = loss_at(run, average.weights([1 / 6] * 6))
    assert loss_at(run, average.weights()) < mean - 0.05
    assert trained == average.coefficients.tolist()
    assert sum(trained) == pytest.approx(1)


def test_a_phase_that_blows_up_says_so_and_leaves_the_mean():
    run = run_of("twa_basic", {"twa": {**ACTING, "learning_rate": 1e300}})
    with pytest.warns(
        UserWarning, match=r"blew up in step . of their training, so twa is the mean"
    ):
        fit(run)
    assert run.closed
    assert set(run.trainer.coefficients) == {1 / run.trainer.average.samples}
    other = run_of("basic")
    fit(other)
    assert same(run.live, other.live)


def test_a_run_that_stops_early_keeps_the_mean_of_what_there_is():
    run = toy_run("twa_basic", {"twa": {**ACTING, "start": 0.5}})
    run.stopping = lambda scores: "enough" if len(scores) == 3 else ""
    fit(run)
    assert (run.t, run.trainer.average.count, run.trainer.coefficients) == (9, 1, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "twa.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "twa.every=0: at least 1"),
        ({"samples": 1}, "twa.samples=1: at least 2"),
        ({"steps": -0.1}, "twa.steps=-0.1: a share of the run below 1, or a number from 1 on"),
        ({"steps": 1.5}, "twa.steps=1.5: a share of the run below 1"),
        ({"steps": float("inf")}, "twa.steps=inf: a share of the run below 1"),
        ({"learning_rate": 0.0}, "twa.learning_rate=0: a number above 0"),
        ({"momentum": 1.0}, r"twa.momentum=1: a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, "twa.weight_decay=-1: a number from 0 on"),
        ({"reg": float("nan")}, "twa.reg=nan: a number from 0 on"),
        ({"batchnorm": "reset"}, "twa.batchnorm='reset': choose one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("twa_basic", twa=settings)


@pytest.mark.parametrize(
    ("settings", "found"), [({"start": 9}, "1"), ({"every": 3}, "1"), ({"start": 11}, "1")]
)
def test_fewer_than_two_samples_are_refused(settings, found):
    with pytest.raises(UserError, match=f"twa averages at the ends of epochs, but {found} of 4"):
        run_of("twa_basic", {"twa": {"start": 0, **settings}})


def test_it_is_known_by_its_name():
    assert chain("twa_basic").settings() == TWA(chain("basic")).settings()
