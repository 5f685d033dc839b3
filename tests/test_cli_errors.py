"""Every mistake on the command line: one line on standard error, status 2, nothing written."""

from __future__ import annotations

import pytest
import torch
from links import ACTING

from dgavg import UserError, cli
from dgavg.data import DATASETS

TRAINERS = ", ".join(sorted(ACTING))
SETTINGS = (
    "trainer, data, model, optimizer, protocol, stopping, search, hparams_seed, holdout, seeds, "
    "init_seed, device, precision, scoring, compile, threads, stack, evaluate, candidates, "
    "eval_batch_size, also_batchnorm, logger, runs, name"
)
COMMANDS = "list, report, soup, ensemble, predict, export, features, domainbed"
USE = "settings are SETTING=VALUE, see dgavg --help"

NAMES = {
    "trainer=ema_bsic": f"no trainer 'bsic' in 'ema_bsic'; did you mean 'basic'? Known: {TRAINERS}",
    "data=digits_rotatd": "no data set 'digits_rotatd'; did you mean 'digits_rotated'? Known: "
    + ", ".join(sorted(DATASETS)),
    "model=resnet19": "no model 'resnet19'; did you mean 'resnet18'? Known: cnn, "
    "domainbed, mlp, resnet18, resnet50, timm, torchvision",
    "optimizer=adm": "no optimizer 'adm'; did you mean 'adam'? Known: adam, adamw, sgd",
    "protocol=quik": "no protocol 'quik'; did you mean 'quick'? Known: ",
    "holdout=[0,46]": "no domain '46' in data set 'digits_rotated'; did you mean '60'? Known: "
    "0, 15, 30, 45, 60, 75",
    "sedes=[1]": f"no setting 'sedes'; did you mean 'seeds'? Known: {SETTINGS}",
    "+sedes=[1]": f"no setting 'sedes'; did you mean 'seeds'? Known: {SETTINGS}",
    "trainer.ema.decy=0.5": "no setting 'decy' in trainer.ema; did you mean 'decay'? Known: "
    "decay, half_life, warmup, gamma, power, min_decay, start, every, batchnorm",
    "trainer.irm.weight=1": "no trainer 'irm' in the chain 'ema_basic'; Known: ema, basic",
    "protocol.stpes=3": "no setting 'stpes' in protocol; did you mean 'steps'? Known: name, steps, "
    "batch_size, eval_every, first_eval, holdout_fraction, test_split, selection, augment, splits",
    "+data.sise=8": "no setting 'sise' in data; did you mean 'size'? Known: angles, size, "
    "shuffle_seed",
    "+model.wdth=8": "model mlp: no setting 'wdth' in model; did you mean 'width'? Known: width, "
    "depth, batchnorm, dropout",
    "+optimizer.bta1=0": "no setting 'bta1' in optimizer; did you mean 'beta1'? Known: lr, "
    "weight_decay, beta1, beta2",
    "stopping.candidate=emma": "no candidate 'emma' in the chain 'ema_basic' (stopping.candidate); "
    "did you mean 'ema'? Known: live, ema",
    "protocol.augment=domainbet": "no augmentation 'domainbet'; did you mean 'domainbed'? Known: "
    "none, domainbed",
    "optimizer.schedule=cosin": "no schedule 'cosin' in optimizer.schedule; did you mean "
    "'cosine'? Known: constant, linear, cosine",
}
VALUES = {
    "protocol.steps=abc": "protocol.steps=abc must be an integer",
    "protocol.steps=1.5": "protocol.steps=1.5 must be an integer",
    "protocol.steps=0": "protocol.steps=0: at least 1",
    "protocol.batch_size=0": "protocol.batch_size=0: at least 1",
    "protocol.eval_every=-1": "protocol.eval_every=-1: at least 1",
    "protocol.holdout_fraction=2": "protocol.holdout_fraction=2.0 must lie between 0 and 1; "
    "DomainBed has 0.2",
    "protocol.selection=orakel": "protocol.selection=orakel: choose one of validation, last, "
    "loo, oracle, oracle_best",
    "protocol.splits=mine": "protocol.splits=mine: choose one of domainbed, official",
    "protocol.splits=official": "data set 'digits_rotated' has no official splits here "
    "(data=pacs takes them from data.lists=FOLDER); write protocol.splits=domainbed",
    "protocol.first_eval=0": "protocol.first_eval=0: at least 1, or null",
    "hparams_seed=1": "hparams_seed=1: protocol 'quick' has no search space; write "
    "hparams_seed=0, or search=NAME, such as search=domainbed2020",
    "also_batchnorm=[mean]": "no batch-norm policy 'mean' in also_batchnorm; Known: keep, "
    "recalibrate",
    "protocol.test_split=out": "protocol.test_split=out: choose one of in, all",
    "precision=fp8": "precision=fp8: choose one of fp32, bf16, fp16",
    "scoring=int8": "scoring=int8: choose one of null, fp32, bf16, fp16",
    "evaluate=some": "evaluate=some: choose one of selection, picked, all",
    "logger=wandb": "logger=wandb: choose one of null, tensorboard",
    "eval_batch_size=0": "eval_batch_size=0: at least 1",
    "threads=0": "threads=0: at least 1, or null",
    "threads=many": "threads=many must be an integer",
    "device=gpu": "no device 'gpu'; did you mean 'cpu'? Known: auto, cpu, cuda, cuda:1, mps",
    "optimizer.lr=abc": "optimizer.lr='abc' must be a number, not str",
    "optimizer.lr=0": "optimizer.lr=0: a number above 0",
    "optimizer.warmup=abc": "optimizer.warmup='abc' must be an integer, not str",
    "trainer.ema.decay=ten": "trainer.ema.decay='ten' must be a number, not str",
    "trainer.ema.decay=2": "trainer.ema.decay=2.0: a number in [0, 1)",
    "seeds=3": "seeds=3: write a list of numbers from 0 on, such as seeds=[0,1,2]",
    "seeds=[0,a]": "seeds=[0, 'a']: write a list of numbers from 0 on, such as seeds=[0,1,2]",
    "seeds=[]": "seeds=[]: write a list of numbers from 0 on, such as seeds=[0,1,2]",
    "init_seed=-1": "init_seed=-1: a number from 0 on, or null",
    "init_seed=4294967296": "init_seed=4294967296: a number from 0 on, or null",
    "init_seed=a": "init_seed=a must be an integer",
    "seeds=1,2": "seeds=1,2: write seeds=[1,2] for a list, or dgavg -m to run each of them",
    "holdout=[]": "holdout=[]: name at least one domain, or write holdout=all",
    "stopping.patience=0": "stopping.patience=0: at least 1 evaluation",
    "name=a/b": "name='a/b': not a folder name",
    "model.width=0": "model.width=0 is too small for model mlp; write 1 or more",
    "model.width=a": "model mlp: model.width='a' must be an integer, not str",
    "data.size=0": "data.size=0 must be at least 1 pixel",
    "data.angles=0": "data.angles=0 must be a list, each item a number, not int",
    "protocol.batch_size=241": "training domain '15' has 240 training images, fewer than "
    "protocol.batch_size=241; set protocol.batch_size=240 or less",
}
CHAINS = {
    "trainer=ema_ema_basic": "ema_ema_basic: 'ema' stands in the chain twice",
    "trainer=sma_ema": "sma_ema: a chain ends in 'basic', the training step itself: write "
    "sma_ema_basic",
    "trainer=ema_ma_basic": "ema_ma_basic: 'ma' rewrites the live weights, so it must come first: "
    "write ma_ema_basic",
    "~trainer": "trainer has no link: write trainer=..., such as ema_basic",
    "~data": "data.name is missing: write data=...",
    "~seeds": "seeds is missing: write seeds=...",
}
WORDS = {
    "trainer": f"no command 'trainer'; did you mean 'domainbed'? Known: {COMMANDS}; {USE}",
    "reprot": f"no command 'reprot'; did you mean 'report'? Known: {COMMANDS}; " + USE,
    "=3": f"no setting '=3'; {USE}",
    "trainer.ema.decay": f"no setting 'trainer.ema.decay'; {USE}",
    "trainer=null": f"'trainer=null' leaves nothing to choose: write trainer=NAME; {USE}",
    "data=": f"'data=' leaves nothing to choose: write data=NAME; {USE}",
    "optimizer=sgd optimizer.momentum=-1": "optimizer.momentum=-1: a number in [0, 1)",
    "--foo": f"unrecognized arguments: --foo; {USE}",
    "--seed": f"argument --seed: expected one argument; {USE}",
    "--seed=x": "seeds=['x']: write a list of numbers from 0 on, such as seeds=[0,1,2]",
    "optimizer.lr=[1,": f"optimizer.lr=[1,: no viable alternative at input '[1,'; {USE}",
}
PLACES = {
    "data=folder": "data.root is missing: write data.root=...",
    "data=folder data.root=nowhere": "no folder nowhere; set data.root=FOLDER to a tree "
    "FOLDER/domain/class/image",
    "model=resnet18 model.weights=none.pt": "no weights file 'none.pt'; write the path of a "
    "safetensors file or of a torch state dict, 'default' for the library's own weights, or null "
    "for none",
    "data.angles=[0,45] trainer=coral_basic": "coral_basic: 'coral' needs at least 2 training "
    "domains, here is 1",
    "data.angles=[0,45] trainer=vrex_basic": "vrex_basic: 'vrex' needs at least 2 training "
    "domains, here is 1",
    "trainer=swa_basic protocol.steps=20": "swa averages at the ends of epochs, but none of 30 "
    "steps ends from step 10 to 20: train longer, lower trainer.swa.start, or use sma",
    "-m trainer=ema_basic,ema_ma_basic": "ema_ma_basic: 'ma' rewrites the live weights, so it must "
    "come first: write ma_ema_basic",
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(words)`: the one line that `dgavg words` prints, once all else is checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DGAVG_DEBUG", raising=False)

    def run(words):
        status = cli.main(words)
        out, error = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert error.startswith("dgavg: ")
        assert error.count("\n") == 1
        assert not any(tmp_path.iterdir())
        return error.removeprefix("dgavg: ").rstrip("\n")

    return run


@pytest.mark.parametrize("word", [*NAMES, *VALUES, *CHAINS, *WORDS, *PLACES])
def test_a_mistake_is_one_line_and_leaves_nothing(word, refused):
    words = word.split()
    chain = [] if "trainer=" in word or word in ("trainer", "reprot") else ["trainer=ema_basic"]
    message = (NAMES | VALUES | CHAINS | WORDS | PLACES)[word]
    found = refused([*chain, *words])
    assert found == message or (message.endswith("Known: ") and found.startswith(message))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu_is_one_line(device, refused):
    words = ["trainer=ema_basic", "model=resnet18", "precision=bf16", f"device={device}"]
    assert refused(words) == (
        f"device={device}: there is no such device here; write device=auto or device=cpu"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("list", "list what? Write dgavg list trainers|data|models|protocols|zoo [NAME]"),
        ("list pairs irm", "dgavg list pairs takes no name: it prints the page of all pairs"),
        ("list modls", "no list 'modls'; did you mean 'models'? Known: trainers, data, models, "),
        ("list trainers imr", "no trainer 'imr'; did you mean 'irm'? Known: "),
        ("list data digts", "no data set 'digts'; did you mean 'digits'? Known: "),
        ("report", "no folder runs: give one of runs, such as runs/"),
        ("report .", "no finished run in ."),
        ("report --foo", "unrecognized arguments: --foo; write dgavg report [FOLDER ...] "),
    ],
)
def test_a_mistake_in_a_command_is_one_line(words, message, refused):
    assert refused(words.split()).startswith(message)


def test_debug_raises_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DGAVG_DEBUG", "1")
    with pytest.raises(UserError, match="no trainer 'bsic'"):
        cli.main(["trainer=bsic"])


def test_a_runs_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["trainer=ema_basic", "runs=file", "name=x", "holdout=[0]"]) == 2
    assert capsys.readouterr().err == (
        "dgavg: file/x/0/0 cannot be written: Not a directory; choose another runs=FOLDER\n"
    )


def test_tensorboard_that_is_not_installed_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert refused(["trainer=ema_basic", "logger=tensorboard"]) == (
        "logger=tensorboard needs TensorBoard: pip install 'dgavg[tensorboard]'"
    )
