"""How a command line is read, and a job written as a command."""

from __future__ import annotations

import shlex

import pytest
from omegaconf import OmegaConf

from dgavg import UserError
from dgavg.config import compose
from dgavg.sweep.words import command, one_run, read_words


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ("seed=3", "seeds=[3]"),
        ("--seed 3", "seeds=[3]"),
        ("-m seed=3", "seeds=[3]"),
        ("-m seed=0,1,2", "seeds=[0,1,2]"),
        ("-m seed=range(0,3)", "seeds=[0,1,2]"),
        ("seeds=[0,1]", "seeds=[0,1]"),
    ],
)
def test_seed_is_short_for_seeds(words, seeds):
    found = read_words([*words.split(), "name=x"], [])
    assert sorted(found.overrides) == sorted([seeds, "name=x"])
    assert "--seed" not in found.flags


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1 seeds=[2]", "seed=1 and seeds=[2]: write one of them"),
        ("--seed 1 seed=2", "seed=2 and seed=1: write one of them"),
        ("seed=0,1", "seed=0,1: write seeds=[0,1] for a list, or dgavg -m to run each of them"),
        ("-m seed=interval(0,1)", "seed=interval(0,1): write a list such as seed=0,1,2"),
    ],
)
def test_seeds_given_wrongly_are_one_line(words, said):
    with pytest.raises(UserError) as error:
        read_words(words.split(), [])
    assert str(error.value) == said


@pytest.mark.parametrize(
    "fold",
    [
        *(("45",), ("art_painting",), ("art painting",), ("all",), ("null",), ("1.0",), ("015",)),
        *(("0", "45"), ('a "b"', "c,d"), ("a\\",), ("[x]", "{y: z}"), ("True", "it's")),
    ],
)
def test_the_fold_of_a_job_survives_hydra_and_the_shell(fold):
    overrides = one_run(["trainer=basic", "holdout=all", "seeds=[0,1]"], fold, 7)
    line = shlex.split(command(overrides))
    assert line[:2] == ["dgavg", "trainer=basic"]
    assert line[3:] == ["seed=7"]
    (found,) = OmegaConf.to_container(compose(read_words(line[1:], []).overrides).holdout)
    names = found if isinstance(found, list) else [found]
    assert tuple(map(str, names)) == fold


def test_a_command_has_what_finds_its_settings():
    words = ["-m", "--config-dir", "my conf", "experiment=slow", "hydra/launcher=joblib"]
    found = read_words([*words, "hydra.searchpath=[file://x]"], [])
    overrides = [
        "experiment=slow",
        "trainer.irm.weight=null",
        "trainer.irm.weight={linear: {to: 5}}",
    ]
    assert command(overrides, found.kept) == (
        "dgavg --config-dir 'my conf' 'hydra.searchpath=[file://x]' experiment=slow "
        "'trainer.irm.weight={linear: {to: 5}}'"
    )
