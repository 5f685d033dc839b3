"""Compiled runs against runs as they are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dgavg import Run, UserError, chain, fit
from dgavg.benchmark.experiment import experiments
from dgavg.config import compose, plain
from dgavg.testing import ToyBatches, toy_model


def trained(compile):
    run = Run(
        chain("ema_sam_irm_basic", irm={"weight": 1.0, "anneal": 3}),
        toy_model(),
        ToyBatches(),
        steps=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
        compile=compile,
    )
    fit(run)
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_run_comes_to_the_same_weights_by_the_same_names():
    plain_run, compiled = trained(None), trained("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for name, found in compiled.candidates().items():
        expected = plain_run.candidates()[name].weights
        assert found.weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found.weights[key], tensor, rtol=1e-3, atol=1e-4)


def test_another_mode_is_refused():
    with pytest.raises(UserError, match="compile=fast: choose none or default, reduce-overhead"):
        Run("basic", toy_model(), ToyBatches(), steps=2, compile="fast")
    with pytest.raises(UserError, match="compile=fast: choose false, true, reduce-overhead"):
        experiments(plain(compose(["trainer=basic", "compile=fast"])))


def test_compiling_is_part_of_what_a_run_is():
    one, other = (
        experiments(plain(compose(["trainer=basic", f"compile={word}"])))[0]
        for word in ("false", "true")
    )
    assert (one.compile, other.compile) == (None, "default")
    assert "compile" not in one.identity
    assert one.folder != other.folder


def test_without_a_compiler_it_ends_in_one_line(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "dgavg", "trainer=basic", "compile=true", f"runs={tmp_path}/runs"],
        env={**os.environ, "CXX": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    line = "dgavg: compile=True needs a C++ compiler: install g++, or set CXX to one\n"
    assert found.stderr.endswith(line)
    assert not (tmp_path / "runs").exists()
