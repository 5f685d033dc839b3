"""Runs of dgavg in DomainBed's form, and back in its tables."""

import copy
import json
import math
from hashlib import md5

import pytest
from pictures import pictures

from dgavg.benchmark.domainbed import RULES, convert, export, read_folder, render, select
from dgavg.benchmark.domainbed.names import ALGORITHMS, EQUIVALENTS, algorithm_of, dataset_of
from dgavg.benchmark.reading import read_runs
from dgavg.chain import known_trainers
from dgavg.errors import UserError

IID, LOO, ORACLE = RULES
NAMES = ("art_painting", "cartoon", "photo", "sketch")


def pacs(names=NAMES, title="pacs"):
    """Noisy pictures that can be learnt, in PACS' domains."""
    return pictures(dict.fromkeys(names, 40), title)


@pytest.fixture
def trained(train):
    """CORAL and an average on two domains of PACS with two seeds: their table and records."""
    table, folder = train(
        "ema_coral_basic", pacs(), holdout=["art_painting", "photo"], seeds=[0, 1]
    )
    return table, read_runs([folder])[0]


def made_up(chain="irm_basic", held_out="photo", seed=0, accuracies=(0.5,), **more):
    """The records of a run as `read_runs` gives them, `more` in each."""
    links = {link: {} for link in chain.split("_")}
    outs = {f"{name}/out": {"accuracy": 0.4} for name in NAMES if name != held_out}

    def splits(accuracy):
        return {f"{held_out}/in": {"accuracy": accuracy}} | outs

    record = {
        "phase": "fit",
        "epoch": 1.0,
        "held_out": held_out,
        "seed": seed,
        "chain": chain,
        "trainer": links,
        "data": {"name": "pacs", "content": "abc"},
        "optimizer": {"name": "adam", "lr": 0.1},
        "protocol": {
            "name": "quick",
            "steps": 100,
            "batch_size": 8,
            "eval_every": 10,
            "holdout_fraction": 0.2,
            "augment": "none",
        },
        "losses": {"total": 1.5, "irm": 0.5, "risk/photo": 1.0},
    }
    every = [
        record | {"step": 10 * i, "candidates": {"live": {"splits": splits(a)}}} | more
        for i, a in enumerate(accuracies, 1)
    ]
    for one in every:  # the order of the data set
        found = one["candidates"]["live"]["splits"]
        one["candidates"]["live"]["splits"] = dict(
            sorted(found.items(), key=lambda item: NAMES.index(item[0].partition("/")[0]))
        )
    return every


def test_exported_runs_show_in_domainbeds_tables_what_ours_show(trained, tmp_path):
    table, runs = trained
    export(convert(runs), tmp_path / "out")
    records = read_folder(tmp_path / "out").records
    for candidate, algorithm in (("live", "ema_coral_basic"), ("ema", "ema_coral_basic:ema")):
        for held_out in ("art_painting", "photo"):
            env = NAMES.index(held_out)
            for seed in (0, 1):
                ours = [
                    r.accuracy
                    for r in table.results
                    if (r.candidate, r.held_out, r.seed) == (candidate, held_out, seed)
                ]
                group = [
                    r
                    for r in records
                    if r["args"]["algorithm"] == algorithm
                    and (r["args"]["test_envs"], r["args"]["trial_seed"]) == ([env], seed)
                ]
                assert [select(group, env, IID)] == ours
    text = render(records)
    assert "Dataset: PACS" in text
    row = next(line for line in text.splitlines() if line.startswith("ema_coral_basic  "))
    cells = [row[i : i + 20].strip() for i in range(22, 132, 22)]  # A, C, P, S, Avg
    assert [cell == "X" for cell in cells] == [False, True, False, True, True]


def test_the_layout_is_that_of_domainbeds_sweeps(tmp_path):
    conversion = convert({"a": [made_up(accuracies=(0.5, 0.75))]})
    export(conversion, tmp_path)
    (folder,) = tmp_path.iterdir()
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert sorted(p.name for p in folder.iterdir()) == ["done", "results.jsonl"]
    assert (folder / "done").read_text() == "done"
    assert lines == [json.dumps(json.loads(line), sort_keys=True) for line in lines]
    first = json.loads(lines[0])
    args = first["args"]
    sweep = (
        *("dataset", "algorithm", "test_envs", "holdout_fraction", "hparams_seed", "data_dir"),
        *("task", "trial_seed", "seed", "steps"),
    )
    text = json.dumps({k: args[k] for k in sweep}, sort_keys=True)
    assert folder.name == args["output_dir"] == md5(text.encode()).hexdigest()
    assert {k: v for k, v in args.items() if k != "output_dir"} == {
        "algorithm": "IRM",
        "checkpoint_freq": 10,
        "data_dir": None,
        "dataset": "PACS",
        "holdout_fraction": 0.2,
        "hparams": None,
        "hparams_seed": 0,
        "save_model_every_checkpoint": False,
        "seed": 0,
        "skip_model_save": True,
        "steps": 100,
        "task": "domain_generalization",
        "test_envs": [2],
        "trial_seed": 0,
        "uda_holdout_fraction": 0,
    }
    assert first["hparams"]["lr"] == 0.1
    assert first["hparams"]["batch_size"] == 8
    assert first["hparams"]["data_augmentation"] is False
    assert (first["step"], first["epoch"], first["loss"], first["irm"]) == (9, 1.0, 1.5, 0.5)
    assert "risk/photo" not in first
    accuracies = {k: v for k, v in first.items() if k.endswith("_acc")}
    assert math.isnan(accuracies.pop("env2_out_acc"))
    assert accuracies == {
        "env0_out_acc": 0.4,
        "env1_out_acc": 0.4,
        "env2_in_acc": 0.5,
        "env3_out_acc": 0.4,
    }


def test_what_a_link_did_after_training_is_a_step_of_its_own():
    records = made_up(accuracies=(0.5, 0.75))
    records.append(copy.deepcopy(records[-1]) | {"phase": "after_fit"})
    assert [r["step"] for r in convert({"a": [records]}).records] == [9, 19, 20]


def test_runs_of_two_domains_are_pairs_for_the_second_rule(train):
    """Steps match, so each fold finds its pairs; with one left out it has no result."""
    data = pacs(NAMES[:3], "toy")
    _, folder = train("basic", data, holdout="pairs", seeds=[0], steps=16)
    runs, _ = read_runs([folder])
    conversion = convert(runs)
    envs = sorted(run.train_args["test_envs"] for run in conversion.runs)
    assert envs == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    mine = [r for r in conversion.records if 0 in r["args"]["test_envs"]]
    single = {r["step"]: r for r in mine if r["args"]["test_envs"] == [0]}
    scores = {
        step: sum(
            r[f"env{v}_in_acc"]
            for r in mine
            for v in (1, 2)
            if r["args"]["test_envs"] == [0, v] and r["step"] == step
        )
        for step in single
    }
    assert list(single) == [7, 15]
    best = max(scores, key=lambda step: scores[step])
    assert select(mine, 0, LOO) == single[best]["env0_in_acc"]
    assert select([r for r in mine if r["args"]["test_envs"] != [0, 2]], 0, LOO) is None


def test_the_domains_of_a_pair_are_in_the_order_of_the_data_set():
    found = convert({"a": [made_up(held_out="photo", held_out_with="cartoon")]})
    assert found.runs[0].train_args["test_envs"] == [1, 2]


def test_a_data_set_that_domainbed_does_not_have_keeps_its_name_and_domains(tmp_path):
    runs = {"a": [made_up(data={"name": "mine", "content": "x"})]}
    export(convert(runs), tmp_path)
    assert "Dataset: mine, model" in render(read_folder(tmp_path).records)
    assert "art_painting" in render(read_folder(tmp_path).records)


@pytest.mark.parametrize(
    ("data", "domains", "name"),
    [
        ({"name": "pacs"}, NAMES, "PACS"),
        ({"name": "folder", "title": "PACS"}, NAMES, "PACS"),
        ({"name": "pacs"}, NAMES[1:], "pacs"),
        ({"name": "pacs"}, NAMES[:3], "pacs"),
        ({"name": "pacs"}, NAMES[::-1], "pacs"),
        ({"name": "vlcs"}, ("Caltech101", "LabelMe", "SUN09", "VOC2007"), "VLCS"),
        (
            {"name": "terra_incognita"},
            [f"location_{i}" for i in (100, 38, 43, 46)],
            "TerraIncognita",
        ),
        ({"name": "officehome"}, ("Art", "Clipart", "Product", "Real World"), "OfficeHome"),
        ({"name": "colored_mnist"}, ("+90%", "+80%", "-90%"), "ColoredMNIST"),
        ({"name": "camelyon17"}, [f"hospital_{i}" for i in range(5)], "WILDSCamelyon"),
        ({"name": "fmow"}, [f"region_{i}" for i in range(6)], "WILDSFMoW"),
        (
            {"name": "spawrious", "variant": "o2o_hard"},
            ("Test", "SC_group_1", "SC_group_2"),
            "SpawriousO2O_hard",
        ),
        ({"name": "digits_rotated"}, ("0", "15"), "digits_rotated"),
    ],
)
def test_data_sets_have_domainbeds_names(data, domains, name):
    assert dataset_of(data, domains) == name


def test_chains_have_domainbeds_names():
    assert algorithm_of("basic", {}) == "ERM"
    assert algorithm_of("basic", {}, "live", " lr=1") == "ERM lr=1"
    assert algorithm_of("irm_basic", {}, "ema", " lr=1") == "IRM:ema lr=1"
    assert algorithm_of("ema_irm_basic", {}) == "ema_irm_basic"
    assert algorithm_of("ema_irm_basic", {}, "ema") == "ema_irm_basic:ema"
    assert algorithm_of("causirl_basic", {"causirl": {"statistic": "mmd"}}) == "CausIRL_MMD"
    assert algorithm_of("mixup_basic", {"mixup": {"across": True}}) == "Mixup"
    assert algorithm_of("mixup_basic", {"mixup": {"across": False}}) == "mixup_basic"
    assert set(EQUIVALENTS.values()) <= set(ALGORITHMS)
    assert {chain.removesuffix("_basic") for chain in EQUIVALENTS} <= set(known_trainers())


def test_runs_of_other_settings_are_other_algorithms():
    runs = {
        "low": [made_up(optimizer={"name": "adam", "lr": 0.1})],
        "high": [made_up(optimizer={"name": "adam", "lr": 0.5})],
        "other": [made_up("vrex_basic")],
        "again": [made_up(seed=1)],  # the settings of `low`
    }
    found = [run.train_args["algorithm"] for run in convert(runs).runs]
    assert found == ["IRM optimizer.lr=0.1", "IRM optimizer.lr=0.5", "VREx", "IRM optimizer.lr=0.1"]


def test_draws_of_one_search_are_one_algorithm():
    protocol = made_up()[0]["protocol"]

    def drawn(seed, lr, size):
        search = {
            "group": "g",
            "hparams_seed": seed,
            "settings": ["optimizer.lr", "protocol.batch_size"],
        }
        settings = {"optimizer": {"lr": lr}, "protocol": protocol | {"batch_size": size}}
        return [made_up(accuracies=(0.1 * seed,), search=search, **settings)]

    found = convert({"a": drawn(0, 0.1, 8), "b": drawn(1, 0.2, 16), "c": drawn(2, 0.3, 32)})
    assert {run.train_args["algorithm"] for run in found.runs} == {"IRM"}
    assert [run.train_args["hparams_seed"] for run in found.runs] == [0, 1, 2]
    assert select(found.records, 2, IID) == pytest.approx(0.2)  # ties: the largest hparams_seed
    assert select(found.records, 2, ORACLE) is None
    assert found.notes == (
        "3 of 3 runs did not score the validation part of their held-out domain, so the oracle "
        "can't choose among their hyper-parameters: train with evaluate=all",
    )


def test_a_run_that_scored_everything_needs_no_note():
    records = made_up()
    for record in records:
        record["candidates"]["live"]["splits"]["photo/out"] = {"accuracy": 0.3}
    found = convert({"a": [records]})
    assert found.notes == ()
    assert found.records[0]["env2_out_acc"] == 0.3


def test_runs_that_no_table_may_mix_are_refused():
    protocol = made_up()[0]["protocol"]
    long = made_up(seed=1, protocol=protocol | {"steps": 200})
    with pytest.raises(UserError, match=r"b and a, both of PACS, differ in protocol \(protocol.st"):
        convert({"a": [made_up()], "b": [long]})
    other = made_up("vrex_basic", data={"name": "pacs", "content": "xyz"})
    with pytest.raises(UserError, match=r"^b and a, both of PACS, differ in data \(data.content="):
        convert({"a": [made_up()], "b": [other]})


def test_a_run_that_is_there_twice_is_refused():
    with pytest.raises(UserError, match=r"^a and b both hold irm_basic on PACS, held out photo, s"):
        convert({"a": [made_up()], "b": [made_up()]})


def test_what_domainbed_has_no_form_for_is_left_out_and_counted():
    protocol = made_up()[0]["protocol"] | {"holdout_fraction": 0}
    runs = {
        "a": [made_up()],
        "soup": [made_up(members=[])],
        "all": [made_up(protocol=protocol), made_up(seed=1, protocol=protocol)],
    }
    found = convert(runs)
    assert len(found.runs) == 1
    assert found.notes[:2] == (
        "left out 1 soup(s) or ensemble(s): DomainBed has no form for them",
        "left out 2 run(s) without validation data, which DomainBed selects by",
    )
    with pytest.raises(UserError, match=r"^no run to convert; left out 1 soup"):
        convert({"soup": runs["soup"]})


def test_only_the_candidates_that_are_named(trained):
    _, runs = trained
    found = convert(runs, ["ema"])
    assert {run.train_args["algorithm"] for run in found.runs} == {"ema_coral_basic:ema"}
    with pytest.raises(
        UserError, match=r"^no candidate 'emma'; did you mean 'ema'\? Known: live, "
    ):
        convert(runs, ["emma"])


def test_an_export_replaces_itself_but_joins_no_other_runs(tmp_path):
    conversion = convert({"a": [made_up(accuracies=(0.5,))]})
    export(conversion, tmp_path)
    again = convert({"a": [made_up(accuracies=(0.75,))]})
    export(again, tmp_path)
    assert [r["env2_in_acc"] for r in read_folder(tmp_path).records] == [0.75]
    with pytest.raises(
        UserError, match="holds other runs of IRM on PACS, which would count as the"
    ):
        export(convert({"a": [made_up(seed=1)]}), tmp_path)
    export(convert({"a": [made_up("vrex_basic")]}), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot be written: .*; choose another folder to export to"
    ):
        export(convert({"a": [made_up()]}), tmp_path / "file")
