"""Search spaces: values that DomainBed's own code drew, and every way to write a space wrong."""

import json
import math
from functools import cache
from pathlib import Path

import pytest

from dgavg.benchmark import search
from dgavg.chain import chain
from dgavg.config import compose, plain
from dgavg.errors import UserError

DRAWS = json.loads((Path(__file__).parent / "domainbed" / "expected" / "draws.json").read_text())
LR = {"name": "lr", "log10": [-5, -3.5]}

EVERYWHERE = {
    "lr": "optimizer.lr",
    "lr_g": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "weight_decay_g": "optimizer.weight_decay",
    "beta1": "optimizer.beta1",
    "batch_size": "protocol.batch_size",
    "resnet_dropout": "model.dropout",
}
ADVERSARY = {
    "lambda": "weight",
    "grad_penalty": "grad_penalty",
    "d_steps_per_g_step": "d_steps",
    "lr_d": "lr_factor",
}
LINKS = {
    "andmask": {"tau": "tau"},
    "causirl": {"mmd_gamma": "weight"},
    "cdann": ADVERSARY,
    "coral": {"mmd_gamma": "weight"},
    "dann": ADVERSARY,
    "eqrm": {"eqrm_quantile": "alpha", "eqrm_burnin_iters": "burnin", "eqrm_lr": "rate"},
    "fish": {"meta_lr": "meta_lr"},
    "fishr": {"lambda": "weight", "penalty_anneal_iters": "anneal", "ema": "ema"},
    "groupdro": {"groupdro_eta": "eta"},
    "iberm": {"ib_lambda": "weight", "ib_penalty_anneal_iters": "anneal"},
    "ibirm": {
        "ib_lambda": "weight",
        "ib_penalty_anneal_iters": "anneal",
        "irm_lambda": "irm_weight",
        "irm_penalty_anneal_iters": "irm_anneal",
    },
    "iga": {"penalty": "weight"},
    "irm": {"irm_lambda": "weight", "irm_penalty_anneal_iters": "anneal"},
    "mixup": {"mixup_alpha": "alpha"},
    "mldg": {"mldg_beta": "beta", "n_meta_test": "n_meta_test"},
    "mmd": {"mmd_gamma": "weight"},
    "mtl": {"mtl_ema": "ema"},
    "rsc": {"rsc_f_drop_factor": "f_drop", "rsc_b_drop_factor": "b_drop"},
    "sandmask": {"tau": "tau", "k": "k"},
    "sd": {"sd_reg": "weight"},
    "vrex": {"vrex_lambda": "weight", "vrex_penalty_anneal_iters": "anneal"},
}


@cache
def space_of(protocol):
    return plain(compose([f"protocol={protocol}"]))["search"]


def ours(hparams, link):
    """DomainBed's hyper-parameters by the settings that they are here."""
    own = {name: f"trainer.{link}.{key}" for name, key in LINKS.get(link, {}).items()}
    found = {(EVERYWHERE | own)[name]: value for name, value in hparams.items()}
    if "lr_d" in hparams:  # a factor of the rate that the rest has; Adam's beta2 is DomainBed's
        found[f"trainer.{link}.lr_factor"] /= hparams["lr_g"]
        found["optimizer.beta2"] = 0.9
    if link == "eqrm":  # the first step that is not before it
        found["trainer.eqrm.burnin"] = math.ceil(hparams["eqrm_burnin_iters"])
    if link == "arm":
        found["trainer.arm.support"] = hparams["batch_size"]
    return found


@pytest.mark.parametrize("protocol", ["domainbed2020", "domainbed2024"])
def test_draws_are_domainbeds_to_the_bit(protocol):
    space = space_of(protocol)
    for spec, data, hparams_seed, trial, hparams in DRAWS:
        link = spec.removesuffix("basic").strip("_")
        wanted = ours(hparams, link)
        if protocol == "domainbed2020" and link == "mixup":
            wanted["trainer.mixup.alpha"] = 0.1
        drawn = search.draw(space, hparams_seed, trial, data=data, links=spec.split("_"))
        assert drawn == wanted, (spec, data)
        assert {k: type(v) for k, v in drawn.items()} == {k: type(v) for k, v in wanted.items()}
        assert set(search.names(space, data=data, links=spec.split("_"))) == set(drawn)


def test_the_recorded_draw():
    drawn = search.draw(space_of("domainbed2024"), 1, 0, data="vlcs", links=["basic"])
    assert drawn == {
        "optimizer.lr": 2.7028930742148706e-05,
        "optimizer.weight_decay": 0.00044832883881609976,
        "protocol.batch_size": 39,
        "model.dropout": 0.5,
    }


@pytest.mark.parametrize("protocol", ["domainbed2020", "domainbed2024", "eoa", "diwa"])
def test_draws_are_settings_that_links_take(protocol):
    space = space_of(protocol)
    for link in [*LINKS, "arm"]:
        for draw in range(1, 6):
            found = search.draw(space, draw, 0, data="pacs", links=[link, "basic"])
            prefix = f"trainer.{link}."
            own = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            assert own
            chain(f"{link}_basic", **{link: own})


def test_the_defaults_are_domainbeds():
    space = space_of("domainbed2024")
    assert search.defaults(space, data="RotatedMNIST", links=["irm", "basic"]) == {
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.0,
        "protocol.batch_size": 64,
        "model.dropout": 0.0,
        "trainer.irm.weight": 100.0,
        "trainer.irm.anneal": 500,
    }
    found = search.defaults(space, data="domainnet", links=["arm", "basic"])
    assert (found["optimizer.lr"], found["protocol.batch_size"]) == (5e-5, 8)


def test_draw_0_is_the_defaults():
    assert search.draw(space_of("domainbed2024"), 0, 3, data="pacs", links=["basic"]) == {}


def test_a_trial_has_draws_of_its_own():
    drawn = [search.draw({"optimizer.lr": LR}, 1, t, data="pacs", links=[]) for t in range(3)]
    assert len({d["optimizer.lr"] for d in drawn}) == 3


def test_diwa_and_eoa():
    links = ["basic"]
    for draw in range(1, 30):
        found = search.draw(space_of("diwa"), draw, 0, data="pacs", links=links)
        assert found["optimizer.lr"] in (1e-5, 3e-5, 5e-5)
        assert found["optimizer.weight_decay"] in (1e-4, 1e-6)
        assert found["model.dropout"] in (0.0, 0.1, 0.5)
        assert found["protocol.batch_size"] == 32
        found = search.draw(space_of("eoa"), draw, 0, data="pacs", links=links)
        assert (found["optimizer.lr"], found["protocol.batch_size"]) == (5e-5, 32)
        assert 1e-6 <= found["optimizer.weight_decay"] <= 1e-4


def test_swads_grid():
    space = space_of("swad")
    assert search.grid_size(space) == 18
    combinations = [tuple(search.grid(space, i).values()) for i in range(18)]
    assert combinations == [
        (lr, dropout, decay)
        for lr in (1e-5, 3e-5, 5e-5)
        for dropout in (0.0, 0.1, 0.5)
        for decay in (1e-4, 1e-6)
    ]
    names = ("optimizer.lr", "model.dropout", "optimizer.weight_decay")
    assert tuple(search.grid(space, 0)) == search.names(space, data="pacs", links=[]) == names
    for index in (-1, 18):
        with pytest.raises(
            UserError, match=rf"^combination {index} of a grid that has 18, from 0$"
        ):
            search.grid(space, index)


def test_a_grid_may_hold_fixed_values_and_differ_by_data_set():
    space = {
        "optimizer.lr": {"grid": [1, 2], "for": {"pacs": {"grid": [3]}, "vlcs": {"fixed": 4}}},
        "model.dropout": {"fixed": 0.5},
    }
    assert search.grid_size(space) == 2
    assert search.grid(space, 1) == {"optimizer.lr": 2, "model.dropout": 0.5}
    assert search.grid(space, 0, data="PACS") == {"optimizer.lr": 3, "model.dropout": 0.5}
    assert search.grid(space, 0, data="vlcs") == {"optimizer.lr": 4, "model.dropout": 0.5}
    assert search.grid_size(space, data="vlcs") == 1


def test_entries_of_links_need_the_link():
    space = {"trainer.irm.weight": LR, "optimizer.lr": LR, "optimizer.beta1": LR | {"only": ["a"]}}
    assert search.names(space, data="", links=["basic"]) == ("optimizer.lr",)
    assert search.names(space, data="", links=["irm", "a"]) == tuple(space)


def test_the_first_name_that_fits_counts():
    forms = {"irm": {"fixed": 1}, "terra_incognita": {"fixed": 2, "for": {"sd": {"fixed": 3}}}}
    space = {"optimizer.lr": LR | {"for": forms}}

    def value(data, *links):
        (found,) = search.draw(space, 1, 0, data=data, links=links).values()
        return found

    assert value("TerraIncognita", "irm") == 1
    assert value("TerraIncognita", "basic") == 2
    assert value("TerraIncognita", "sd", "basic") == 3
    assert value("pacs", "sd") == value("pacs")
    assert 1e-5 < value("pacs") < 10**-3.5


def test_a_step_past_the_end_is_never():
    space = {"trainer.irm.anneal": {"name": "irm_penalty_anneal_iters", "int_log10": [4, 5]}}
    late = search.draw(space, 1, 0, data="", links=["irm"], steps=600)["trainer.irm.anneal"]
    assert late >= 10_000
    space["trainer.irm.anneal"]["step"] = True
    assert search.draw(space, 1, 0, data="", links=["irm"]) == {"trainer.irm.anneal": late}
    for steps, value in ((600, math.inf), (late, math.inf), (late + 1, late)):
        found = search.draw(space, 1, 0, data="", links=["irm"], steps=steps)
        assert found == {"trainer.irm.anneal": value}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "x", "log_10": [1, 2]}, "no kind or key 'log_10' in search.s; did you mean 'log"),
        ({"name": "x"}, "search.s has no kind: write one of log10, uniform"),
        ({"name": "x", "log10": [1, 2], "fixed": 1}, "search.s is both log10 and fixed: write one"),
        ({"name": "x", "log10": [1]}, r"search.s.log10=\[1\]: write \[least, most\]"),
        ({"name": "x", "log10": [2, 1]}, r"search.s.log10=\[2, 1\]: write \[least, most\]"),
        ({"name": "x", "uniform": ["a", "b"]}, r"search.s.uniform=\['a', 'b'\]: write \[least"),
        ({"name": "x", "int_log2": 3}, r"search.s.int_log2=3: write \[least, most\]"),
        ({"name": "x", "choice": []}, r"search.s.choice=\[\]: write a list of values"),
        ({"grid": "abc"}, r"search.s.grid=abc: write a list of values"),
        ({"log10": [1, 2]}, "search.s.name is missing: draws are made from a name"),
        ({"name": 3, "log10": [1, 2]}, "search.s.name is missing"),
        ({"fixed": 1, "only": "irm"}, "search.s.only=irm: write a list of links"),
        (5, "search.s=5: write a kind and its values"),
        ({"fixed": 1, "for": ["pacs"]}, r"search.s.for=\['pacs'\]: write names of data sets"),
        ({"fixed": 1, "for": {"pacs": 3}}, "search.s.for.pacs=3: write a kind"),
        ({"fixed": 1, "for": {"pacs": {"log10": [1, 2]}}}, "search.s.for.pacs.name is missing"),
        ({"fixed": 1, "over": "t"}, "no setting that is always drawn 't' in search.s.over; "),
    ],
)
def test_what_is_no_space_is_refused(entry, message):
    with pytest.raises(UserError, match=f"^{message}"):
        search.check({"s": entry})


def test_a_space_is_drawn_or_a_grid():
    axis = {"grid": [1, 2]}
    with pytest.raises(
        UserError, match=r"^search.b is an axis of a grid and search.a is drawn: a "
    ):
        search.check({"a": LR, "b": axis})
    with pytest.raises(UserError, match=r"^search.b is an axis of a grid: take it by index"):
        search.draw({"b": axis}, 1, 0, data="", links=[])
    with pytest.raises(UserError, match=r"^search.a is drawn at random: not of a grid"):
        search.grid({"a": LR}, 0)
    with pytest.raises(
        UserError, match=r"^search=\[1\]: write settings and what they are drawn by"
    ):
        search.check([1])
