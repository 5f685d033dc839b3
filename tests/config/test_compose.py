"""What `dgavg SETTINGS` composes: every example, the chain's order, overlays, Python's door."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from dgavg import Trainer, UserError, chain, cli, leave_one_domain_out, trainer
from dgavg.benchmark.experiment import build
from dgavg.config import compose, explained, plain

SMALL = ["model.width=8", "protocol.steps=4", "seeds=[0]", "holdout=[45]"]


def settings(*words):
    return plain(compose(words))


def test_the_default_is_the_recipe_of_the_readme():
    found = settings()
    assert list(found["trainer"]) == ["sma", "ema", "swa", "basic"]
    assert (found["data"]["name"], found["model"]["name"]) == ("digits_rotated", "mlp")
    assert (found["holdout"], found["seeds"]) == ("all", [0, 1, 2])
    assert found["protocol"]["steps"] == 600
    assert (found["optimizer"]["lr"], found["protocol"]["batch_size"]) == (0.01, 8)


def test_a_chain_with_a_setting_folds_and_seeds():
    found = settings(
        "trainer=ma_swa_irm_basic", "trainer.irm.weight=10", "holdout=[0,45]", "seeds=[0,1,2]"
    )
    assert list(found["trainer"]) == ["ma", "swa", "irm", "basic"]
    assert found["trainer"]["irm"]["weight"] == 10.0
    assert (found["holdout"], found["seeds"]) == ([0, 45], [0, 1, 2])


def test_a_run_on_a_gpu_composes_and_says_that_there_is_none():
    found = settings(
        *("trainer=ema_basic", "model=resnet18", "data=digits", "optimizer.lr=1e-3"),
        *("device=cuda:99", "precision=bf16"),
    )
    assert (found["model"]["name"], found["data"]["name"]) == ("resnet18", "digits")
    assert (found["optimizer"]["lr"], found["precision"]) == (0.001, "bf16")
    with pytest.raises(UserError, match=r"^device=cuda:99: there "):
        build(found)


@pytest.mark.parametrize("spec", ["ema_irm_basic", "irm_ema_basic", "sma_sam_ema_mixup_basic"])
def test_the_order_of_the_keys_is_the_chain(spec):
    found = settings(f"trainer={spec}", "trainer.ema.decay=0.5")
    assert "_".join(found["trainer"]) == spec
    assert build(found).spec == spec


def test_settings_are_typed():
    config = compose(["trainer=irm_basic", "trainer.irm.anneal=10", "protocol.steps=7"])
    assert config.trainer.irm.anneal == 10.0
    assert isinstance(config.trainer.irm.anneal, float)
    with pytest.raises(UserError) as caught, explained():
        compose(["trainer=ema_basic", "trainer.ema.every=1.5"])
    assert str(caught.value) == "trainer.ema.every=1.5 must be an integer"


def test_a_link_with_a_setting_that_must_be_given():
    @trainer("needy")
    class Needy(Trainer):
        amount: float

    assert settings("trainer=needy_basic", "trainer.needy.amount=2")["trainer"]["needy"] == {
        "amount": 2.0
    }
    for words, message in {
        "trainer=needy_basic": "trainer.needy.amount is missing: write trainer.needy.amount=...",
        "trainer=needy_needy_basic": "needy_needy_basic: 'needy' stands in the chain twice",
    }.items():
        with pytest.raises(UserError) as caught, explained():
            settings(words)
        assert str(caught.value) == message


@pytest.fixture
def overlays(tmp_path):
    """A user's own folder of experiments."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "quickly.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /trainer: ma_basic\n  - override /optimizer: sgd\n"
        "protocol:\n  steps: 40\n  eval_every: 20\n"
        "seeds: [3]\nholdout: [45]\nmodel:\n  width: 8\n"
    )
    (folder / "typo.yaml").write_text("# @package _global_\nprotocol:\n  stpes: 40\n")
    (folder / "wrong.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /trainer: ema_ma_basic\n"
    )
    return str(tmp_path / "mine")


def test_an_experiment_of_the_users_own_overrides_chain_and_settings(
    overlays, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["--config-dir", overlays, "experiment=quickly", "trainer.ma.feedback=false"]) == 0
    )
    out = capsys.readouterr().out
    assert "protocol quick: 40 steps" in out
    (config,) = tmp_path.rglob("config.yaml")
    found = OmegaConf.load(config)
    assert (list(found.trainer), found.trainer.ma.feedback) == (["ma", "basic"], False)
    assert (found.optimizer.name, found.held_out, found.seed) == ("sgd", "45", 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo", "no setting 'stpes' in protocol; did you mean 'steps'?"),
        ("wrong", "write ma_ema_basic"),
        ("quikly", "no experiment 'quikly'; did you mean 'quickly'?"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_line(name, message, overlays, capsys):
    assert cli.main(["--config-dir", overlays, f"experiment={name}", "--cfg", "job"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_line_and_python_name_a_run_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    irm = ["trainer.irm.weight=10", "trainer.irm.anneal=2"]
    words = ["trainer=ema_irm_basic", *irm, "optimizer.lr=1e-3", *SMALL]
    assert cli.main([*words, "runs=cli"]) == 0
    links = chain("ema_irm_basic", irm={"weight": 10, "anneal": 2})
    dotted = {"optimizer.lr": 1e-3, "model.width": 8, "protocol.steps": 4}
    table = leave_one_domain_out(
        links, settings=dotted, seeds=[0], holdout=[45], runs="python", quiet=True
    )
    (by_cli,), (by_python,) = (list((tmp_path / x).iterdir()) for x in ("cli", "python"))
    assert by_cli.name == by_python.name
    configs = [(x / "45" / "0" / "config.yaml").read_text() for x in (by_cli, by_python)]
    assert configs[0] == configs[1]
    assert str(table) == capsys.readouterr().out.strip()


def test_python_takes_names_and_sequences_too(tmp_path):
    table = leave_one_domain_out(
        "ema_basic",
        settings={"protocol.steps": 4, "trainer.ema.decay": 0.5, "data.angles": (0, 45)},
        seeds=range(2),
        holdout=("45",),
        model="mlp",
        runs=tmp_path,
        quiet=True,
    )
    assert (table.seeds, table.held_out) == ([0, 1], ["45"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol.stpes": 4}, "no setting 'stpes' in protocol; did you mean 'steps'?"),
        ({"protocol.steps": "ten"}, "protocol.steps=ten must be an integer"),
        ({"trainer.ema.decay": 0.5}, "settings 'trainer.ema.decay': trainer is an object here"),
        ({"model.width": 0}, "model.width=0 is too small for model mlp; write 1 or more"),
    ],
)
def test_python_refuses_settings_in_the_same_words(settings, message, tmp_path):
    with pytest.raises(UserError) as caught:
        leave_one_domain_out(chain("ema_basic"), settings=settings, runs=tmp_path / "runs")
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_chain_that_a_setting_makes_legal_composes():
    words = ("trainer=fish_mixup_basic", "trainer.mixup.across=false")
    assert settings(*words)["trainer"]["mixup"]["across"] is False
