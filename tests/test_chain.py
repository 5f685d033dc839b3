"""Names to chains, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dgavg import Trainer, UserError, chain, check, fit, trainer
from dgavg.chain import adapt, known_trainers, plugins, renew, settings_of, spec_of
from dgavg.cli import main
from dgavg.testing import toy_model, toy_run
from dgavg.testing.contract import same
from dgavg.trainers import EMA, IRM, MA, SWA, Basic


def test_a_chain_by_name_is_the_chain_by_hand():
    by_name = chain("ma_swa_irm_basic", irm={"weight": 10.0}, swa={"start": 0.7})
    by_hand = MA(SWA(IRM(Basic(), weight=10.0), start=0.7))
    assert spec_of(by_name) == spec_of(by_hand) == "ma_swa_irm_basic"
    assert settings_of(by_name) == settings_of(by_hand)
    assert settings_of(by_name)["irm"]["weight"] == 10.0


def test_a_renewed_chain_has_the_settings_but_not_the_state():
    head = toy_run(MA(EMA(Basic(), decay=0.9))).trainer
    assert head.inner.average is not None
    again = renew(head)
    assert settings_of(again) == settings_of(head)
    assert again.inner.average is None


def test_one_chain_serves_any_number_of_runs():
    """Counters and averages belong to the run, not to the chain it was made from."""
    head = MA(EMA(Basic()), start=1, every=2)
    first, second = toy_run(head), toy_run(head)
    fit(first)
    fit(second)
    assert head.epochs == 0
    assert same(first.state_dict(), second.state_dict())
    assert first.trainer.average is not second.trainer.average


def test_settings_of_a_function_are_its_name():
    head = IRM(Basic(), weight=ramp)
    assert settings_of(head)["irm"]["weight"] == f"{__name__}.ramp"


def ramp(t: int) -> float:
    return 0.1 * t


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("ma_swda_basic", {}, r"no trainer 'swda' in 'ma_swda_basic'; did you mean 'swa'\?"),
        ("ma__basic", {}, "no trainer ''"),
        ("", {}, "no trainer ''"),
        ("MA_basic", {}, r"no trainer 'MA' in 'MA_basic'; did you mean 'ma'"),
        ("ema_basic", {"ema": 0.9}, "ema=0.9: settings are a dict, by name"),
        (None, {}, r"chain\(None\): a name such as 'ema_basic'"),
        ("irm_basic", {"irm": {"wieght": 1}}, r"no setting 'wieght' in trainer.irm; did you mean"),
        ("irm_basic", {"ema": {"decay": 0.9}}, "no trainer 'ema' in 'irm_basic', though it has"),
        ("ema_ema_basic", {}, "ema_ema_basic: 'ema' stands in the chain twice"),
        ("ma_irm", {}, "ma_irm: a chain ends in 'basic', .* write ma_irm_basic"),
        ("ma_basic_irm", {}, "write ma_irm_basic"),
        ("irm_ma_basic", {}, "irm_ma_basic: 'ma' rewrites the live weights, .* write ma_irm_basic"),
    ],
)
def test_a_chain_that_cannot_work_is_refused(spec, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        chain(spec, **settings)
    assert "\n" not in str(caught.value)


def test_domains_that_are_too_few_are_refused():
    with pytest.raises(UserError, match="'coral' needs at least 2 training domains, here is 1"):
        check(chain("coral_basic"), domains=1)
    with pytest.raises(UserError, match="'vrex' needs at least 2"):
        toy_run("vrex_basic", domains=1)
    toy_run("ema_basic", domains=1)


def test_a_link_that_compares_domains_is_refused_under_one_that_splits_them():
    @trainer("bydomain", splits_domains=True)
    class ByDomain(Trainer):
        """Hands down a domain at a time."""

    with pytest.raises(UserError, match="'coral' compares domains, but 'bydomain' feeds it one"):
        chain("bydomain_coral_basic")
    chain("bydomain_irm_basic")


def test_two_links_that_replace_the_step_are_refused():
    @trainer("stepa", owns_step=True)
    class StepA(Trainer):
        """Replaces the step."""

    @trainer("stepb", owns_step=True)
    class StepB(Trainer):
        """Replaces the step."""

    with pytest.raises(UserError, match="stepa and stepb each replace the step: choose one"):
        chain("stepa_stepb_basic")


def test_a_class_that_is_no_link_is_refused():
    class Plain(Trainer):
        """Not decorated."""

    with pytest.raises(UserError, match="Plain is not a trainer: decorate it with @trainer"):
        check(Plain(Basic()))


PLUGIN = '''
from dgavg import Trainer, trainer

@trainer("halved")
class Halved(Trainer):
    """Halves the learning rate."""
    factor: float = 0.5

    def lr(self, run):
        return self.factor * self.inner.lr(run)
'''


def test_a_link_of_another_package_is_usable_by_name_everywhere(tmp_path):
    """A real package with metadata on the path, in a new process: found, listed, composed."""
    (tmp_path / "dgavg_halved.py").write_text(PLUGIN)
    info = tmp_path / "dgavg_halved-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dgavg-halved\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dgavg.trainers]\nhalved = dgavg_halved:Halved\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from dgavg.chain import known_trainers\n"
        "from dgavg.config import compose\n"
        "from dgavg.testing import check_link, is_shadow\n"
        "assert 'halved' in known_trainers()\n"
        "config = compose(['trainer=ma_halved_basic', 'trainer.halved.factor=0.25'])\n"
        "assert list(config.trainer) == ['ma', 'halved', 'basic']\n"
        "assert config.trainer.halved.factor == 0.25\n"
        "check_link('halved', factor=0.1)\n"
        "assert not is_shadow('halved_basic', {'halved': {'factor': 0.1}})\n"
        "from dgavg.cli import main\n"
        "raise SystemExit(main(['list', 'trainers']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +halved +Halves the learning rate *$", done.stdout, re.MULTILINE)


@pytest.fixture
def broken_plugin(monkeypatch):
    def load():
        raise ImportError("no module named 'missing'")

    found = SimpleNamespace(name="broken", value="package:Broken", load=load)
    module = sys.modules["dgavg.chain"]  # `dgavg.chain` by attribute is the function
    monkeypatch.setattr(module, "entry_points", lambda group: [found])
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.mark.usefixtures("broken_plugin")
def test_a_plugin_that_does_not_load_harms_only_who_asks_for_it():
    chain("ma_basic")
    assert "broken" in known_trainers()
    with pytest.raises(UserError, match=r"trainer 'broken' \(package:Broken\): no module named"):
        chain("broken_basic")


@pytest.mark.parametrize("key", ["name", "outermost", "inner", "average"])
def test_what_is_no_setting_of_a_link_is_refused(key):
    with pytest.raises(UserError, match=f"no setting '{key}' in trainer.ema"):
        chain("ema_basic", ema={key: 1})


@pytest.mark.usefixtures("broken_plugin")
def test_a_plugin_that_does_not_load_is_listed_with_its_reason(capsys):
    assert main(["list", "trainers"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^ +broken +trainer 'broken' \(package:Broken\): no module named 'missing'", out, re.M
    )
    assert "ema " in out


@pytest.mark.parametrize("pair", ["pcgrad_andmask", "andmask_sandmask", "sandmask_pcgrad"])
def test_two_links_that_compare_the_domains_gradients_are_refused(pair):
    with pytest.raises(UserError, match="each compare the domains' gradients, of which the inner"):
        chain(f"{pair}_basic")


def test_a_model_is_changed_once_and_not_by_two_chains():
    model = toy_model()
    for _ in range(2):
        adapt(chain("ema_mtl_basic"), model, domains=3)
    assert model.classifier.embeddings.shape == (3, 8)
    assert model.classifier.linear.in_features == 16
    with pytest.raises(
        UserError, match=r"changed by \['mtl'\] already, the chain has \[\]: make a new"
    ):
        adapt(chain("basic"), model, domains=3)
