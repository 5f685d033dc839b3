"""Post-hoc EMA as a link: lengths offered, snapshots over the run."""

from __future__ import annotations

import pytest
import torch
from plain import assert_weights, iterates, run_of

from dgavg import UserError, chain, fit
from dgavg.averaging.posthoc import power_of
from dgavg.testing import check_link
from dgavg.testing.contract import is_shadow


def test_it_keeps_the_contract():
    check_link("posthocema", snapshots=4)
    assert is_shadow("posthocema_basic", {})


def test_lengths_that_are_kept_are_the_profile_over_all_iterates():
    run = run_of("posthocema_basic", {"posthocema": {"start": 3}})
    found = [state for t, state in iterates(run).items() if t >= 3]
    n, offered = len(found), run.candidates()
    assert list(offered) == ["live", "posthocema5", "posthocema10", "posthocema20"]
    for length in (0.05, 0.1):
        edges = torch.linspace(0, 1, n + 1, dtype=torch.float64) ** (power_of(length) + 1)
        expected = dict(found[-1])
        for k, v in found[-1].items():
            if v.is_floating_point():
                stack = torch.stack([s[k] for s in found])
                expected[k] = torch.tensordot(edges.diff(), stack, dims=1)
        candidate = offered[f"posthocema{100 * length:g}"]
        assert_weights(candidate.weights, expected, rtol=1e-3, atol=1e-3)
        assert candidate.batchnorm == "average"


def test_offered_lengths_are_those_asked_for():
    settings = {"offer": [0.075], "lengths": [0.05, 0.2], "batchnorm": "recalibrate"}
    run = run_of("posthocema_basic", {"posthocema": settings})
    iterates(run)
    offered = run.candidates()
    assert list(offered) == ["live", "posthocema7.5"]
    assert offered["posthocema7.5"].batchnorm == "recalibrate"


@pytest.mark.parametrize(
    ("snapshots", "counts", "every"),
    [
        (4, [3, 6, 9, 12], 1),
        (1, [12], 1),
        (99, range(1, 13), 1),
        (7, [2, 4, 6, 8, 10, 12], 1),
        (5, [3, 6, 9, 12], 1),
        (1, [3], 5),  # of steps 1, 6 and 11
    ],
)
def test_snapshots_are_spread_over_the_run(snapshots, counts, every):
    """At most as many as asked for, and none too many: each is a copy of the weights."""
    run = run_of("posthocema_basic", {"posthocema": {"snapshots": snapshots, "every": every}})
    iterates(run)
    stored = next(iter(run.trainer)).average.snapshots
    assert [s["count"] for s in stored] == [n for n in counts for _ in range(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offer": []}, r"posthocema.offer=\[\]: at least one length"),
        ({"offer": [0.5]}, r"posthocema.offer=\[0.5\]: length=0.5: a share of training"),
        ({"lengths": [0.1, 0.1]}, r"posthocema.lengths=\[0.1, 0.1\]: at least one"),
        ({"snapshots": 0}, "posthocema.snapshots=0: at least 1"),
        (
            {"offer": [0.1, 0.10000001]},
            r"posthocema.offer=\[0.1, 0.10000001\]: two of them are both posthocema10,",
        ),
        ({"every": 0}, "posthocema.every=0: at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("posthocema_basic", posthocema=settings)


def test_a_length_that_the_snapshots_of_the_run_cannot_make_is_refused():
    settings = {"offer": [0.1, 0.28], "snapshots": 1}
    with pytest.raises(UserError, match=r"offer=\[0.1, 0.28\]: 0.28 can't be made .*185%"):
        run_of("posthocema_basic", {"posthocema": settings})


def test_a_length_is_offered_as_soon_as_there_are_snapshots_enough_to_make_it():
    """Two averages alone miss that of 0.25 by more than it weighs."""
    run = run_of("posthocema_basic", {"posthocema": {"offer": [0.1, 0.25], "snapshots": 12}})
    offered = []
    fit(run, after_step=lambda run: offered.append([k for k in run.candidates() if k != "live"]))
    assert offered[0] == ["posthocema10"]
    assert offered[-1] == ["posthocema10", "posthocema25"]
