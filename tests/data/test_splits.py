from dataclasses import replace

import numpy as np
import pytest

from dgavg.data import Splits, make_splits, seed_hash, split_keys


def test_seed_hash_is_domainbeds():
    assert [seed_hash(0, i) for i in range(4)] == [894182419, 1514274641, 1325548499, 1796103049]
    assert seed_hash("a", 1) != seed_hash("a", 2)
    assert seed_hash(0) != seed_hash(0, 0)


def test_split_keys_is_domainbeds():
    """Against the ten lines of DomainBed's split_dataset, which shuffles a list."""
    for n, n_first, seed in [(1, 0, 3), (9, 4, 0), (2048, 409, seed_hash(0, 0))]:
        keys = list(range(n))
        np.random.RandomState(seed).shuffle(keys)
        first, rest = split_keys(n, n_first, seed)
        assert first.tolist() == keys[:n_first]
        assert rest.tolist() == keys[n_first:]
        assert first.dtype == rest.dtype == np.int64


def test_split_keys_does_not_change_from_one_version_to_the_next():
    first, rest = split_keys(10, 3, seed_hash(0, 0))
    assert (first.tolist(), rest.tolist()) == FIXED


FIXED = ([2, 3, 8], [1, 4, 5, 0, 9, 6, 7])


def test_each_domain_is_split_by_trial_and_index(make_data):
    data = make_data([50, 50, 29])
    splits = make_splits(data, 0.2, 7)
    assert [len(keys) for keys in splits.out] == [10, 10, 5]
    for i, domain in enumerate(data.domains):
        out, in_ = split_keys(len(domain), int(len(domain) * 0.2), seed_hash(7, i))
        assert splits.out[i].tolist() == out.tolist()
        assert splits.in_[i].tolist() == in_.tolist()
        assert sorted([*splits.out[i], *splits.in_[i]]) == list(range(len(domain)))
    assert splits.out[0].tolist() != splits.out[1].tolist()
    assert splits.out[0].tolist() != make_splits(data, 0.2, 8).out[0].tolist()


def test_leaves_the_global_random_state_alone(make_data):
    before = np.random.get_state()[1].tolist()
    make_splits(make_data([50, 50]), 0.2, 0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, float("nan")])
def test_refuses_a_fraction_that_is_none(make_data, refuses, fraction):
    with refuses(f"protocol.holdout_fraction={fraction}", "between 0 and 1"):
        make_splits(make_data([50, 50]), fraction, 0)


def test_a_fraction_of_0_holds_nothing_out(make_data):
    splits = make_splits(make_data([50, 3]), 0, 0)
    assert [len(keys) for keys in splits.out] == [0, 0]
    assert [sorted(keys) for keys in splits.in_] == [list(range(50)), list(range(3))]


def test_refuses_an_empty_part(make_data, refuses):
    with refuses("the 3 images of domain 'domain1'", "0 for validation and 3 for training"):
        make_splits(make_data([50, 3]), 0.2, 0)


def with_official(data):
    """The data set with lists: the first image out, the second in neither part."""
    sizes = [len(domain) for domain in data.domains]
    official = Splits(
        out=tuple(np.array([0]) for _ in sizes),
        in_=tuple(np.arange(2, n) for n in sizes),
        test=tuple(np.arange(n) for n in sizes),
    )
    return replace(data, official=official), official


def test_official_splits_are_the_data_sets_own(make_data):
    data, official = with_official(make_data([5, 6]))
    assert make_splits(data, 0.2, 0, kind="official") is official
    assert make_splits(data, 0.3, 7, kind="official") is official
    drawn = make_splits(data, 0.2, 0)
    assert drawn.test is None
    assert drawn.fingerprint() == make_splits(make_data([5, 6]), 0.2, 0, "domainbed").fingerprint()


def test_refuses_other_kinds_of_splits(make_data, refuses):
    data, _ = with_official(make_data([5, 6]))
    with refuses("no protocol.splits 'offical'", "did you mean 'official'", "domainbed, official"):
        make_splits(data, 0.2, 0, "offical")
    with refuses("data set 'toy' has no official splits", "write protocol.splits=domainbed"):
        make_splits(make_data([5, 6]), 0.2, 0, "official")
    with refuses("protocol.holdout_fraction=0", "write protocol.splits=domainbed"):
        make_splits(data, 0, 0, "official")


def test_equal_splits_have_one_fingerprint(make_data):
    data, official = with_official(make_data([5, 6]))
    again = with_official(make_data([5, 6]))[1]
    assert official.fingerprint() == again.fingerprint()
    whole = official.test
    others = [
        replace(official, test=None),
        replace(official, in_=whole),
        replace(official, out=whole),
        replace(official, in_=official.out, out=official.in_),
        make_splits(data, 0.2, 0),
    ]
    prints = {splits.fingerprint() for splits in [official, *others]}
    assert len(prints) == 6
