"""Windows against the weights themselves: what a candidate saved is made of these very steps."""

from __future__ import annotations

import pytest
import torch
from pictures import pictures
from safetensors.torch import load_file

from dgavg import Trainer, leave_one_domain_out, trainer
from dgavg.benchmark.reading import read_runs
from dgavg.report.section import Section
from dgavg.report.windows import Window, link_of, window

WALK = {}  # the live weights after each step, by seed


@pytest.fixture(autouse=True)
def _watcher():
    @trainer("watcher")
    class Watcher(Trainer):
        """Remembers where the live weights were."""

        def after_step(self, run):
            WALK.setdefault(run.seed, {})[run.t] = {k: v.clone() for k, v in run.live.items()}

    WALK.clear()


def _train(folder, links, settings=(), steps=60, every=4):
    """Runs of three seeds; by candidate and seed its trace, and what it saved."""
    dotted = {"model.width": 8, "model.batchnorm": False, "optimizer.lr": 0.05}
    dotted |= {"protocol.steps": steps, "protocol.eval_every": every, **dict(settings)}
    where = {"seeds": [0, 1, 2], "holdout": ["d1"], "runs": folder, "quiet": True}
    data = pictures({"d0": 60, "d1": 70, "d2": 65}, noise=0.7)
    leave_one_domain_out(f"{links}_watcher_basic", data, settings=dotted, **where)
    runs, _ = read_runs([folder])
    ((name, _),) = runs.items()
    section = Section(runs)
    found = {}
    for candidate in [c for c in section.own(name) if c != "live"]:
        for trace in section.traces(name, candidate, "d1"):
            file = folder / name / "d1" / str(trace.seed) / f"weights/{candidate}.safetensors"
            found[candidate, trace.seed] = trace, load_file(file)
    return found


def _parameters(seed, steps):
    """The live weights after some steps, one a row."""
    each = [WALK[seed][t] for t in steps]
    return torch.stack([torch.cat([v.flatten() for v in w.values()]) for w in each]).double()


def _saved(seed, weights):
    return torch.cat([weights[name].flatten() for name in WALK[seed][1]]).double()


LINKS = {
    "ma_sma_swa_swag_lawa_twa_swad": {
        "ma.feedback": False,
        "sma.start": 10,
        "swa.start": 0.25,
        "lawa.k": 3,
        "twa.steps": 0,
        "twa.samples": 3,
        "twa.start": 0,
    },
    "ma_sma_swa_lawa_swad": {
        "ma.feedback": False,
        "ma.start": 2,
        "ma.every": 2,
        "sma.start": 0.3,
        "sma.every": 4,
        "swa.start": 10,
        "swa.every": 2,
        "lawa.k": 2,
        "lawa.every": 2,
        "lawa.start": 9,
        "swad.n_converge": 2,
        "swad.n_tolerance": 2,
    },
    "sma_swad": {"sma.start": 0, "swad.tolerance_ratio": 0.0, "swad.n_tolerance": 1},
}


@pytest.mark.parametrize("selection", ["validation", "last"])
@pytest.mark.parametrize("links", LINKS)
def test_weights_are_the_mean_over_their_window(links, selection, tmp_path):
    settings = {f"trainer.{k}": v for k, v in LINKS[links].items()}
    settings["protocol.selection"] = selection
    found = _train(tmp_path, links, settings)
    assert len(found) == 3 * len(links.split("_"))
    for (candidate, seed), (trace, weights) in found.items():
        assert trace.window.last <= trace.selected.step
        mean = _parameters(seed, trace.window.steps).mean(0)
        assert torch.allclose(mean, _saved(seed, weights), atol=1e-5), (candidate, seed)


@pytest.mark.parametrize("n_tolerance", [3, 5])
def test_the_windows_of_swads_code_hold_its_segments(n_tolerance, tmp_path):
    settings = {"trainer.swad.rule": "code", "trainer.swad.n_tolerance": n_tolerance}
    settings["protocol.selection"] = "last"
    for (_, seed), (trace, weights) in _train(tmp_path, "swad", settings).items():
        steps = range(trace.window.first, trace.window.last + 1)
        assert len(steps) % 4 == 0
        means = _parameters(seed, steps).reshape(len(steps) // 4, 4, -1).mean(1)
        saved = _saved(seed, weights)
        shares = torch.linalg.lstsq(means.T, saved[:, None]).solution.flatten()
        assert (means.T @ shares - saved).abs().max() < 1e-5
        assert min(shares[0], shares[-1]) > 1e-3  # both ends are in


def test_an_exponential_mean_begins_at_its_window_and_remembers(tmp_path):
    settings = {"trainer.ema.start": 8, "trainer.ema.decay": 0.9, "trainer.ema.every": 2}
    for (_, seed), (trace, weights) in _train(tmp_path, "ema", settings).items():
        assert trace.window.memory == pytest.approx(20)
        mean, *others = _parameters(seed, trace.window.steps)
        for other in others:
            mean = 0.9 * mean + 0.1 * other
        assert torch.allclose(mean, _saved(seed, weights), atol=1e-5)


def test_what_the_records_do_not_tell_has_no_window(tmp_path):
    for trace, _ in _train(tmp_path, "aswa").values():
        assert trace.window is None


def _record(step, trainer, **more):
    return {"step": step, "epoch": step / 5, "trainer": trainer, "candidates": {}} | more


EMA = {"decay": 0.9, "half_life": None, "warmup": None, "start": 0.0, "every": 1}


@pytest.mark.parametrize(
    ("settings", "memory"),
    [
        ({}, 10.0),
        ({"half_life": 7.0}, 10.099),
        ({"warmup": "power"}, None),
        ({"decay": {"linear": {"to": 0.99}}}, None),
    ],
)
def test_the_memory_of_an_exponential_mean(settings, memory):
    records = [_record(50, {"ema": EMA | settings}, protocol={"steps": 100})]
    found = window("ema", records, 0)
    assert (found.first, found.last) == (1, 50)
    assert found.memory == (pytest.approx(memory, rel=1e-3) if memory else None)


def test_there_is_no_window_before_its_start():
    records = [_record(50, {"sma": {"start": 0.6, "every": 1}}, protocol={"steps": 100})]
    assert window("sma", records, 0) is None
    later = [_record(60, {"sma": {"start": 0.6, "every": 1}}, protocol={"steps": 100})]
    assert window("sma@keep", later, 0) == Window(60, 60)


@pytest.mark.parametrize(
    ("candidate", "link"),
    [
        ("live", ""),
        ("swa", "swa"),
        ("swag_bma@keep", "swag"),
        ("swad", "swad"),
        ("posthocema5", "posthocema"),
    ],
)
def test_a_candidate_is_of_the_link_with_the_longest_name(candidate, link):
    links = ("swa", "swag", "swad", "posthocema", "basic")
    assert link_of(candidate, {name: {} for name in links}) == link
