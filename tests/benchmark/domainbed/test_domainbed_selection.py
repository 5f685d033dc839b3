"""The three rules against the slow, plain reading of their description."""

import math

import pytest
from domainbed_records import COUNTS, Folder
from hypothesis import given, settings
from hypothesis import strategies as st

from dgavg.benchmark.domainbed import RULES, select
from dgavg.benchmark.domainbed.selection import accuracies

IID, LOO, ORACLE = RULES
LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # few, so that ties happen; sums are exact


@st.composite
def groups(draw):
    """All records of one trial and algorithm on ColoredMNIST whose test domains have 0 in them."""
    records = []
    for envs in ([0], [0, 1], [0, 2], [1, 0], [0], [0, 1, 2]):
        for hparams in draw(st.sets(st.integers(0, 2))):
            for step in draw(st.lists(st.integers(0, 3), max_size=3)):
                keys = [f"env{i}_{part}_acc" for i in range(3) for part in ("in", "out")]
                args = {"test_envs": envs, "hparams_seed": hparams}
                records.append({"args": args, "step": step} | {k: draw(LEVELS) for k in keys})
    return draw(st.permutations(records))


def plain(records, rule):
    """(score, hparams_seed, test accuracy) of the best run, by loops alone."""
    best = None
    for hparams in (0, 1, 2):
        mine = [r for r in records if r["args"]["hparams_seed"] == hparams]
        alone = [r for r in mine if r["args"]["test_envs"] == [0]]
        picked = None
        if rule is IID:
            for r in alone:
                score = (r["env1_out_acc"] + r["env2_out_acc"]) / 2
                if picked is None or score > picked[0]:
                    picked = (score, r["env0_in_acc"])
        if rule is ORACLE:
            last = -1
            for r in alone:
                if r["step"] >= last:
                    last, picked = r["step"], (r["env0_out_acc"], r["env0_in_acc"])
        if rule is LOO:
            for step in range(4):
                test = [r for r in alone if r["step"] == step]
                with_1 = [
                    r
                    for r in mine
                    if sorted(r["args"]["test_envs"]) == [0, 1] and r["step"] == step
                ]
                with_2 = [r for r in mine if r["args"]["test_envs"] == [0, 2] and r["step"] == step]
                if len(test) == 1 and with_1 and with_2:
                    score = (with_1[-1]["env1_in_acc"] + with_2[-1]["env2_in_acc"]) / 2
                    if picked is None or score > picked[0]:
                        picked = (score, test[0]["env0_in_acc"])
        if picked is not None and (best is None or picked[0] >= best[0]):
            best = picked
    return None if best is None else best[1]


@pytest.mark.parametrize("rule", RULES, ids=["iid", "loo", "oracle"])
@settings(max_examples=150, deadline=None)
@given(records=groups())
def test_a_rule_picks_what_its_description_picks(rule, records):
    assert select(records, 0, rule) == plain(records, rule)


def test_scores_that_were_not_measured_choose_nothing():
    folder = Folder()
    only = folder.run("PACS", "ERM", [1], hparams=0)
    others = folder.run("PACS", "ERM", [1], hparams=1)
    for record in [*only, *others]:
        record["env1_out_acc"] = math.nan
    assert select(only, 1, ORACLE) == only[-1]["env1_in_acc"]  # nothing to choose from
    assert select([*only, *others], 1, ORACLE) is None
    assert select([*only, *others], 1, IID) is not None


def test_a_pair_beyond_the_domains_counts_for_none():
    folder = Folder()
    records = folder.run("ColoredMNIST", "ERM", [0], steps=(0,))
    for other in (1, 2, 3):
        (record,) = folder.run("PACS", "ERM", [0, other], steps=(0,))
        records.append(record)
    assert select(records, 0, LOO) == records[0]["env0_in_acc"]
    assert select(records[:2] + records[3:], 0, LOO) is None


def test_a_record_of_two_test_domains_belongs_to_the_groups_of_both():
    folder = Folder()
    folder.sweep("Mine", "ERM", pairs=True, trials=2)
    records = [record for run in folder.runs.values() for record in run]
    found = accuracies(records, LOO)
    wanted = [("Mine", "ERM", e, t) for t in range(2) for e in range(COUNTS["Mine"])]
    assert sorted(found) == sorted(wanted)


def test_of_steps_with_equal_scores_the_earliest_counts():
    folder = Folder()
    single = folder.run("ColoredMNIST", "ERM", [0], steps=(6, 3, 9))
    pairs = [r for v in (1, 2) for r in folder.run("ColoredMNIST", "ERM", [0, v], steps=(9, 6, 3))]
    for record in pairs:
        record.update(env1_in_acc=0.5, env2_in_acc=0.5)
    assert select([*single, *pairs], 0, LOO) == single[1]["env0_in_acc"]
