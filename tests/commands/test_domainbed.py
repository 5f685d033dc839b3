"""`dgavg domainbed` and `dgavg export --domainbed`, on real runs and toy folders."""

import shutil
from pathlib import Path

import pytest
import torch
from domainbed_records import CASES, Folder

from dgavg import leave_one_domain_out
from dgavg.commands.domainbed import domainbed
from dgavg.commands.export_domainbed import export_domainbed
from dgavg.data import Domain, DomainDataset
from dgavg.errors import UserError

EXPECTED = Path(__file__).parents[1] / "benchmark" / "domainbed" / "expected"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`basic` and an average on all domains of a small ColoredMNIST, and one run not ended."""
    folder = tmp_path_factory.mktemp("runs")
    rng = torch.Generator().manual_seed(0)
    domains = []
    for name in ("+90%", "+80%", "-90%"):
        images = torch.randint(256, (40, 2, 4, 4), generator=rng, dtype=torch.uint8)
        domains.append(Domain(name, images, torch.arange(40) % 2))
    data = DomainDataset("colored_mnist", tuple(domains), ("0", "1"))
    settings = {"model.width": 8, "protocol.steps": 4, "protocol.eval_every": 2}
    for chain in ("basic", "sma_ema_swa_basic"):
        more = settings | ({"trainer.sma.start": 1} if "sma" in chain else {})
        leave_one_domain_out(chain, data, settings=more, seeds=[0, 1], runs=folder, quiet=True)
    (next(folder.glob("basic*")) / "-90%" / "1" / "done").unlink()
    return folder


def rows(text):
    """Every row of every table, by its name, cut into cells at the columns of the header."""
    found = {}
    for line in text.splitlines():
        if line.startswith("Algorithm"):
            starts = [
                i for i in range(len(line)) if line[i] != " " and (not i or line[i - 1] == " ")
            ]
        elif line and not line.startswith(("---", "Total")):
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            found.setdefault(cells[0], []).append(cells[1:])
    return found


@pytest.mark.parametrize("case", CASES)
def test_prints_domainbeds_tables(tmp_path, capsys, case):
    CASES[case]().write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    domainbed([str(tmp_path)])
    out, err = capsys.readouterr()
    assert out == (EXPECTED / f"{case}.txt").read_text()
    note = "dgavg: DomainBed has no data set Mine: in no table\n"
    assert err == (note if case == "gaps" else "")
    domainbed(["--latex", str(tmp_path)])
    assert capsys.readouterr().out == (EXPECTED / f"{case}.tex").read_text()
    assert sorted(tmp_path.rglob("*")) == before


def test_exported_runs_are_a_folder_of_domainbed_runs(runs, tmp_path, capsys):
    export_domainbed([runs], tmp_path / "out")
    out, err = capsys.readouterr()
    assert out == (
        "29 runs of ERM, sma_ema_swa_basic, sma_ema_swa_basic:ema, sma_ema_swa_basic:sma, "
        f"sma_ema_swa_basic:swa in {tmp_path / 'out'}\n"
    )
    assert err.startswith("dgavg: 29 of 29 runs did not score the validation part of their held-")
    assert err.endswith("dgavg: left out 1 run(s) that have not ended\n")
    folders = list((tmp_path / "out").iterdir())
    assert len(folders) == 29
    assert {p.name for folder in folders for p in folder.iterdir()} == {"results.jsonl", "done"}
    domainbed([str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert out.startswith("Total records: 52\n\n-------- Dataset: ColoredMNIST, model selection")
    assert len(rows(out)["ERM"]) == 6


def test_runs_stand_beside_domainbeds_in_one_table(runs, tmp_path, capsys):
    """Rows of DomainBed's runs are as without ours; ours are as in the export's own tables."""
    folder = Folder()
    folder.sweep("ColoredMNIST", "ERM", trials=2)
    folder.sweep("ColoredMNIST", "Unheard", trials=2)
    folder.write(tmp_path / "theirs")
    export_domainbed([runs], tmp_path / "ours")
    capsys.readouterr()
    domainbed([str(tmp_path / "theirs")])
    alone = rows(capsys.readouterr().out)
    domainbed([str(tmp_path / "ours")])
    ours = capsys.readouterr().out
    domainbed([str(tmp_path / "theirs"), str(runs)])
    out, err = capsys.readouterr()
    both = rows(out)
    average = "sma_ema_swa_basic:sma"  # one character more than a column of DomainBed's has
    names = ["ERM", "Unheard", "ERM (dgavg)", "sma_ema_swa_basic", average]
    assert list(both)[:5] == names
    assert {name: both[name] for name in alone} == alone
    assert both["ERM (dgavg)"] == rows(ours)["ERM"]
    assert both[average][0] == rows(ours)[average[:20]][0]
    assert "29 of 29 runs did not score" in err
    assert "left out 1 run(s) that have not ended" in err


def test_some_candidates_alone(runs, tmp_path, capsys):
    export_domainbed([runs], tmp_path, ["ema"])
    assert capsys.readouterr().out == f"6 runs of sma_ema_swa_basic:ema in {tmp_path}\n"
    with pytest.raises(UserError, match=r"^no candidate 'emu'"):
        export_domainbed([runs], tmp_path / "none", ["emu"])
    assert not (tmp_path / "none").exists()


def test_copies_of_a_run_are_refused_before_anything_is_written(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    with pytest.raises(UserError, match=r" both hold .*basic on ColoredMNIST, held out \+80%"):
        export_domainbed([runs, tmp_path / "copy"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line_are_one_line(tmp_path, runs):
    with pytest.raises(UserError, match=r"; write dgavg domainbed DIR \[FOLDER ...\] \[--latex\]$"):
        domainbed([])
    with pytest.raises(UserError, match=r"--tex; write dgavg domainbed DIR"):
        domainbed(["--tex", str(tmp_path)])
    with pytest.raises(UserError, match=r"^no record in "):
        domainbed([str(runs)])
    folder = Folder()
    folder.sweep("PACS", "ERM", steps=(0,))
    folder.write(tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^no finished run in "):
        domainbed([str(tmp_path / "theirs"), str(tmp_path / "empty")])
