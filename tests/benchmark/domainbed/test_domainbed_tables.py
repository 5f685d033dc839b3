"""Tables against texts that DomainBed's own code printed for the same records."""

import json
from pathlib import Path

import pytest
from domainbed_records import CASES, Folder

from dgavg.benchmark.domainbed import read_folder, render
from dgavg.errors import UserError

EXPECTED = Path(__file__).with_name("expected")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ending", ["txt", "tex"])
def test_tables_are_domainbeds_character_for_character(tmp_path, case, ending):
    records = read_folder(CASES[case]().write(tmp_path)).records
    expected = (EXPECTED / f"{case}.{ending}").read_text()
    assert render(records, latex=ending == "tex") + "\n" == expected


def test_a_data_set_that_names_its_domains_gets_a_table_after_those_of_domainbed():
    folder = Folder()
    folder.sweep("Mine", "ERM", steps=(0,))
    folder.sweep("PACS", "ERM", steps=(0,))
    records = [record for run in folder.runs.values() for record in run]
    for record in records:
        if record["args"]["dataset"] == "Mine":
            record["environments"] = ["red", "green", "blue"]
    lines = render(records).splitlines()
    headers = [line.split(",")[0] for line in lines if line.startswith("---")]
    blocks = ["-------- Dataset: PACS", "-------- Dataset: Mine", "-------- Averages"]
    assert headers == blocks * 3
    assert [line.split() for line in lines if "red" in line] == [
        ["Algorithm", "red", "green", "blue", "Avg"]
    ] * 3


def test_the_environments_of_a_data_set_that_domainbed_knows_are_domainbeds():
    folder = Folder()
    (record,) = folder.run("PACS", "ERM", [0], steps=(0,))
    record["environments"] = ["art", "cartoon", "photo", "sketch"]
    assert "Algorithm             A " in render([record])


def test_a_wider_column_of_names_moves_nothing_else():
    folder = Folder()
    folder.sweep("PACS", "AnAlgorithmWithAVeryLongName", steps=(0,))
    records = [record for run in folder.runs.values() for record in run]
    narrow, wide = render(records).splitlines(), render(records, names=28).splitlines()
    cut = [line for line in narrow if line.startswith("AnAlg")]
    whole = [line for line in wide if line.startswith("AnAlg")]
    assert cut[0].startswith("AnAlgorithmWithAVery  ")
    assert whole[0] == "AnAlgorithmWithAVeryLongName" + cut[0][20:]
    assert whole[1] == "AnAlgorithmWithAVeryLongName" + cut[1][25:]


def test_no_table_at_all_is_refused():
    folder = Folder()
    folder.sweep("Mine", "ERM", steps=(0,))
    with pytest.raises(UserError, match=r"^DomainBed has no data set Mine, so there is no table"):
        render([record for run in folder.runs.values() for record in run])


def test_a_last_line_without_newline_is_read_and_noted(tmp_path):
    (first, last) = Folder().run("PACS", "ERM", [0], steps=(0, 1))
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "results.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(last))
    found = read_folder(tmp_path)
    assert list(found.records) == [first, last]
    assert found.notes == (
        f"{path} ends without a newline, where DomainBed stops; its last line is read",
    )


def _without(record, key):
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: json.dumps(r)[:-20], "damaged, not a record of DomainBed; delete the line"),
        (lambda r: "", "damaged"),
        (lambda r: "[1]", "damaged"),
        (lambda r: json.dumps(_without(r, "args")), "args.dataset, args.algorithm, args.test_envs"),
        (lambda r: json.dumps(_without(r, "step")), "step missing or of another type"),
        (lambda r: json.dumps(r | {"step": True}), "step missing"),
        (lambda r: json.dumps(r | {"args": r["args"] | {"trial_seed": "0"}}), "args.trial_seed m"),
        (lambda r: json.dumps(r | {"args": r["args"] | {"test_envs": [1, 1]}}), "args.test_envs m"),
        (lambda r: json.dumps(r | {"args": r["args"] | {"test_envs": []}}), "args.test_envs m"),
        (lambda r: json.dumps(r | {"args": r["args"] | {"test_envs": [-1]}}), "args.test_envs m"),
        (lambda r: json.dumps(_without(r, "env2_in_acc")), "env2_in_acc missing"),
        (lambda r: json.dumps(_without(r, "env2_out_acc")), "env2_out_acc missing"),
        (lambda r: json.dumps(_without(r, "env0_out_acc")), "env0_out_acc missing"),
        (lambda r: json.dumps(_without(r, "env1_out_acc")), "env1_out_acc missing"),
        (lambda r: json.dumps(r | {"env3_out_acc": None}), "env3_out_acc missing or of another"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage, message):
    first, second = Folder().run("PACS", "ERM", [2], steps=(0, 1))
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "results.jsonl"
    path.write_text(f"{json.dumps(first)}\n{damage(second)}\n")
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{path}, line 2: ")
    assert message in text
    assert "\n" not in text


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"run/results.jsonl cannot be read: 'utf-8' codec"):
        read_folder(tmp_path)


def test_no_folder_and_no_records(tmp_path):
    with pytest.raises(UserError, match=r"^no folder .*nowhere: give one of DomainBed runs"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "launched").mkdir()
    with pytest.raises(UserError, match=r"^no record in .*/\*/results.jsonl: give a folder of"):
        read_folder(tmp_path)
