"""Run: what it hands to links, and saving and restoring it as a whole."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from dgavg import Candidate, Run, Trainer, UserError, fit, state, trainer
from dgavg.averaging import RunningMean
from dgavg.chain import chain
from dgavg.testing import ToyBatches, toy_model, toy_run
from dgavg.testing.contract import check_resume, same
from dgavg.trainers import EMA


def test_live_aliases_the_model_and_is_taken_once():
    run = toy_run("basic")
    live = run.live
    fit(run)
    assert run.live is live
    assert same(live, run.model.state_dict())
    assert {k: v.data_ptr() for k, v in live.items()} == {
        k: v.data_ptr() for k, v in run.model.state_dict().items()
    }


def test_taps_are_called_innermost_first_and_wraps_from_the_head():
    calls = []

    def link(name):
        @trainer(name)
        class Link(Trainer):
            """Notes its calls."""

            def after_step(self, run):
                calls.append(f"tap {name}")

            def loss(self, run, batch):
                calls.append(f"wrap {name}")
                return self.inner.loss(run, batch)

        return Link

    link("outer")
    link("inside")
    run = toy_run("outer_inside_basic", steps=1)
    fit(run)
    assert calls == ["wrap outer", "wrap inside", "tap inside", "tap outer"]


def test_a_lower_plane_is_entered_at_the_head_of_the_chain():
    """A link outside SAM still adds its term to both of SAM's passes."""
    passes = []

    @trainer("outside")
    class Outside(Trainer):
        """Counts the passes it takes part in."""

        def loss(self, run, batch):
            passes.append(run.t)
            return self.inner.loss(run, batch)

    fit(toy_run("outside_sam_basic", steps=2))
    assert passes == [0, 0, 1, 1]


def test_random_numbers_follow_from_seed_step_and_name():
    run = toy_run("basic")
    first = run.random("mixup").random(3).tolist()
    assert run.random("mixup").random(3).tolist() == first
    assert run.random("other").random(3).tolist() != first
    run.t = 1
    assert run.random("mixup").random(3).tolist() != first
    run.t, run.seed = 0, 1
    assert run.random("mixup").random(3).tolist() != first


def test_a_start_between_two_steps_is_refused():
    with pytest.raises(UserError, match=r"x.start=2\.5: a whole step, or below 1"):
        toy_run("basic").step_of(2.5, "x.start")
    with pytest.raises(UserError, match=r"x.start=inf: a whole step, or below 1"):
        toy_run("basic").step_of(float("inf"), "x.start")


@pytest.mark.parametrize(("start", "step"), [(0, 0), (0.25, 3), (0.999, 12), (1, 1), (7, 7)])
def test_a_start_is_a_share_below_1_and_a_step_from_1_on(start, step):
    run = toy_run("basic")
    if step == 12:
        with pytest.raises(UserError, match="past the end: the run has 12 steps"):
            run.step_of(start, "x.start")
    else:
        assert run.step_of(start, "x.start") == step


def test_a_module_that_a_link_offers_is_trained_and_saved():
    @trainer("scaler")
    class Scaler(Trainer):
        """Trains a temperature beside the model."""

        def module(self, run):
            return nn.Linear(3, 3)

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["scaler"] = run.extras["scaler"](out.logits).square().mean()
            return out

    run = toy_run("ema_scaler_basic")
    before = copy.deepcopy(run.extras.state_dict())
    fit(run)
    assert not same(dict(before), dict(run.extras.state_dict()))
    assert set(run.state_dict()["extras"]) == {"scaler.weight", "scaler.bias"}
    assert "scaler.weight" not in run.live
    again = toy_run("ema_scaler_basic")
    again.load_state_dict(run.state_dict())
    assert same(dict(again.extras.state_dict()), dict(run.extras.state_dict()))


def test_two_links_that_offer_one_candidate_name_are_refused():
    @trainer("copycat")
    class CopyCat(Trainer):
        """Offers the name of another link."""

        def candidates(self):
            return {"ema": Candidate({})}

    run = toy_run("copycat_ema_basic", steps=2)
    with pytest.raises(UserError, match="'ema' offers 'ema', which is taken"):
        fit(run)


def test_the_optimizer_forgets_its_moments_once():
    @trainer("reset")
    class Reset(Trainer):
        """Asks for a reset after step 3."""

        def after_step(self, run):
            if run.t == 3:
                run.reset_optimizer()
                run.reset_optimizer()

    run = toy_run("reset_basic")
    for t in range(4):
        run.step(run.batches(t))
        run.t += 1
        run.tap("after_step")
        if run.t == 3:
            assert not run.optimizer.state
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {1}


def test_a_checkpoint_of_another_chain_is_refused():
    saved = toy_run("ema_basic").state_dict()
    with pytest.raises(UserError, match=r"checkpoint is of the chain \{'ema': .*, the run is of"):
        toy_run("sma_basic", {"sma": {"start": 2}}).load_state_dict(saved)
    with pytest.raises(UserError, match=r"'decay': 0.99.* the run is of .*'decay': 0.5"):
        toy_run("ema_basic", {"ema": {"decay": 0.5}}).load_state_dict(saved)


def test_a_checkpoint_that_lacks_something_is_refused():
    run = toy_run("basic")
    saved = {k: v for k, v in run.state_dict().items() if k not in ("links", "t")}
    with pytest.raises(UserError, match="the checkpoint lacks links, t"):
        run.load_state_dict(saved)


def test_a_checkpoint_of_another_model_is_refused():
    run = toy_run("basic")
    saved = run.state_dict()
    saved["model"] = {**saved["model"], "classifier.weight": torch.zeros(4, 8)}
    with pytest.raises(UserError, match="of another model or optimizer: size mismatch"):
        toy_run("basic").load_state_dict(saved)


def test_a_checkpoint_holds_nothing_that_could_run_code():
    settings = {"sma": {"start": 2}, "irm": {"anneal": 3}}
    run = toy_run("ma_sma_ema_swa_irm_mixup_sam_basic", settings)
    fit(run)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), run.state_dict())


def test_all_global_generators_are_restored():
    import random

    import numpy as np

    run = toy_run("basic")
    saved = copy.deepcopy(run.state_dict())
    drawn = [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]
    run.load_state_dict(saved)
    assert [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()] == drawn


def test_bf16_trains_and_keeps_weights_and_averages_in_float32():
    run = Run(chain("ema_basic"), toy_model(), ToyBatches(), steps=8, precision="bf16")
    fit(run)
    features, logits = run.forward(run.batches(0).x)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(logits.bfloat16().float(), logits), "the forward pass was not in bfloat16"
    assert {v.dtype for v in run.live.values()} == {torch.float32, torch.int64}
    assert all(torch.isfinite(v).all() for v in run.live.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: a run has at least one step"),
        ({"steps": 2.5}, "steps=2.5 must be an integer"),
        ({"seed": -1}, "seed=-1: a number from 0 on"),
        ({"eval_every": -3}, "eval_every=-3: a number of steps"),
        ({"first_eval": 0}, "first_eval=0: a step from 1 on"),
        ({"batches": [1]}, "batches has no names: see dgavg.run.Batches"),
        ({"optimizer": 0.1}, "optimizer is a function of the parameters"),
        ({"trainer": EMA}, "is not a chain, such as EMA"),
        ({"trainer": "emma_basic"}, "no trainer 'emma' in 'emma_basic'; did you mean 'ema'"),
        ({"model": toy_model().requires_grad_(False)}, "Model has no parameter that could be"),
        ({"precision": "fp8"}, "precision=fp8: choose fp32, bf16, fp16"),
        ({"model": nn.Linear(4, 3)}, "Linear has no featurizer: wrap it as dgavg.models.Model"),
        ({"trainer": chain("coral_basic"), "batches": ToyBatches(1)}, "at least 2 training"),
    ],
)
def test_a_run_that_cannot_work_is_refused(changes, message):
    given = {"trainer": chain("basic"), "model": toy_model(), "batches": ToyBatches(), "steps": 3}
    with pytest.raises(UserError, match=message):
        Run(**{**given, **changes})


def test_state_that_is_no_setting_is_not_in_the_constructor():
    @trainer("mine")
    class Mine(Trainer):
        """A link."""

        count: int = state(int)

    with pytest.raises(UserError, match="no setting 'count'"):
        chain("mine_basic", mine={"count": 1})


def test_a_tensor_that_a_link_came_to_hold_is_restored_on_the_device_of_the_run():
    @trainer("collects")
    class Collects(Trainer):
        """Holds nothing until its first step."""

        seen: object = state()

        def after_step(self, run):
            self.seen = {"logits": [torch.ones(2, device=run.device)]}

    run = toy_run("collects_basic", steps=1)
    fit(run)
    saved = copy.deepcopy(run.state_dict())
    again = toy_run("collects_basic", steps=1)
    again.device = torch.device("meta")  # any device that is not the file's
    again.load_state_dict(saved)
    assert again.trainer.seen["logits"][0].device.type == "meta"


def test_groups_of_parameters_keep_their_own_learning_rates():
    """A backbone and a head at 1 : 100, both halved by the schedule."""
    model = toy_model()

    def optimizer(parameters):
        del parameters
        groups = [(model.featurizer, 1e-3), (model.classifier, 1e-1)]
        return torch.optim.SGD([{"params": m.parameters(), "lr": lr} for m, lr in groups], lr=1.0)

    run = Run("basic", model, ToyBatches(), steps=3, optimizer=optimizer, schedule=lambda t: 0.5)
    fit(run)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.5e-3, 0.5e-1]


def test_taps_build_no_graph_but_the_phase_after_the_last_step_may_train():
    seen = {}

    @trainer("phases")
    class Phases(Trainer):
        """Notes where gradients are on."""

        def after_step(self, run):
            seen["after_step"] = torch.is_grad_enabled()

        def after_fit(self, run):
            seen["after_fit"] = torch.is_grad_enabled()
            run.step(run.batches(run.t))

    fit(toy_run("phases_basic", steps=2))
    assert seen == {"after_step": False, "after_fit": True}


def test_an_object_that_setup_does_not_make_cannot_be_restored_and_says_so():
    @trainer("lazy")
    class Lazy(Trainer):
        """Makes its average at the first step."""

        average: object = state()

        def after_step(self, run):
            self.average = self.average or RunningMean(run.live)

    with pytest.raises(UserError, match=r"lazy\.average was a RunningMean; make it in setup"):
        check_resume("lazy_basic", {}, steps=(4,))


def test_buffers_that_no_state_dict_holds_are_restored():
    run = toy_run("basic")
    run.model.register_buffer("seen", torch.zeros(1), persistent=False)
    first = Run("basic", run.model, ToyBatches(), steps=2)
    saved = copy.deepcopy(first.state_dict())
    run.model.seen.fill_(7.0)
    first.load_state_dict(saved)
    assert run.model.seen.item() == 0.0


def test_scores_of_any_number_type_make_a_checkpoint_that_can_be_read():
    import numpy as np

    run = toy_run("basic", steps=3)
    run.evaluate = lambda run: {"live": {"accuracy": np.float64(0.5), "loss": np.float32(1)}}
    fit(run)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["scores"] == [{"live": {"accuracy": 0.5, "loss": 1}}]


def test_the_optimizer_of_a_run_that_names_none_is_fused_adam():
    optimizer = Run("basic", toy_model(), ToyBatches(), steps=1).optimizer
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["fused"]) == (1e-3, True)


def test_modules_beside_the_model_live_on_its_device():
    @trainer("beside")
    class Beside(Trainer):
        """Offers a module."""

        def module(self, run):
            return nn.Linear(2, 2)

    run = Run("beside_basic", toy_model().to("meta"), ToyBatches(), steps=1)
    assert run.extras["beside"].weight.device.type == "meta"


def test_seeding_chooses_deterministic_kernels_and_repeats_every_draw():
    import random

    import numpy as np

    from dgavg.seeding import seed_everything

    torch.backends.cudnn.deterministic = False
    seed_everything(3)
    assert torch.backends.cudnn.deterministic
    first = [random.random(), np.random.rand(), torch.rand(()).item()]
    seed_everything(3)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == first
