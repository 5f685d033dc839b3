"""`dgavg report`: the page, read as a browser reads it, and its figures."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from pictures import pictures
from PIL import Image

from dgavg import cli, leave_one_domain_out
from dgavg.benchmark.reading import read_runs
from dgavg.benchmark.table import Table
from dgavg.report.style import variables

NAMES = ["a<b>", 'c&"d"', "$e$"]
PARTS = ["tables", "domains", "curves", "ranking", "batchnorm", "cost", "settings", "environment"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page(HTMLParser):
    """Ids, links, texts of cells, and what stands in each `<svg>`."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.cells, self.tags, self.svgs = [], [], [], [], {}
        self.open, self.svg = [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[k] for k in ("src", "href", "xlink:href", "data") if k in found]
        if tag in ("td", "th"):
            self.cells.append("")
            self.open.append(tag)
        if tag == "svg":
            self.svg = found["id"]
            self.svgs[self.svg] = []
        elif self.svg:
            self.svgs[self.svg].append((tag, found))

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open.pop()
        if tag == "svg":
            self.svg = None

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def _train(folder, chain, names=NAMES, seeds=(0, 1), holdout=None, steps=24, **settings):
    dotted = {"model.width": 8, "protocol.steps": steps, "protocol.eval_every": 6}
    dotted |= {k.replace("__", "."): v for k, v in settings.items()}
    where = {"seeds": list(seeds), "holdout": holdout or names, "runs": folder, "quiet": True}
    data = pictures(dict.fromkeys(names, 60), "<toy> & co")
    leave_one_domain_out(chain, data, settings=dotted, **where)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two chains, all rules, another batch-norm policy, and an average without a window."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    sma = {"trainer__sma__start": 6, "evaluate": "all"}
    _train(folder, "sma_swad_aswa_basic", also_batchnorm=["keep"], **sma)
    _train(folder, "sma_basic", holdout="pairs", **sma)
    return folder


@pytest.fixture(scope="module")
def written(runs):
    """The page's text and the folder of its figures."""
    out = runs.parent / "out"
    out.mkdir()
    words = ["report", str(runs), "--html", str(out / "page.html"), "--figures", str(out / "png")]
    assert cli.main(words) == 0
    return (out / "page.html").read_text(encoding="utf-8"), out


@pytest.fixture
def small(tmp_path):
    """A folder of one run of `basic`: a page of few figures."""
    _train(tmp_path / "runs", "basic", seeds=[0], holdout=NAMES[:1], steps=12, evaluate="all")
    return tmp_path / "runs"


@pytest.fixture
def dgavg(capsys, monkeypatch):
    """`dgavg(words, ...)`: what it prints on standard output, and on standard error."""
    monkeypatch.delenv("DGAVG_DEBUG", raising=False)

    def run(*words, status=0):
        capsys.readouterr()
        found = cli.main([str(w) for w in words])
        out, error = capsys.readouterr()
        assert found == status, error
        return out, error

    return run


@pytest.mark.parametrize("rule", ["validation", "last", "loo", "oracle", "oracle_best"])
def test_every_number_of_every_table_is_in_the_page(rule, runs, written):
    text = written[0][: written[0].index('id="s1-domains"')]
    (part,) = [t for t in text.split('<section class="rule"')[1:] if f'data-rule="{rule}"' in t]
    table = Table(read_runs([runs])[0], rule)
    expected = [x for line in table.lines() for x in line if x and x != "chain"]
    expected += [x for line in table.difference_lines()[1] for x in line]
    assert [c for c in Page(part).cells if c] == expected
    assert ('<span class="badge">uses the test domain</span>' in part) == rule.startswith("oracle")


def test_the_first_table_and_the_figures_are_those_of_the_rule(small, dgavg):
    first = r'data-rule="(\w+)"'
    for rule, words in {"validation": (), "last": ("--rule", "last")}.items():
        dgavg("report", small, *words)
        text = (small / "report.html").read_text()
        assert re.search(first, text)[1] == rule
        assert f"Checkpoints are those of the rule\n<em>{rule}</em>" in text
        assert sorted(re.findall(first, text)) == ["last", "oracle", "oracle_best", "validation"]


def test_the_page_needs_nothing_but_itself(written):
    text, _ = written
    page = Page(text)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert all(name.startswith("#") for name in re.findall(r"url\(([^)]*)", text))
    assert "@import" not in text
    assert not {"link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_every_part_is_there_and_every_id_once(written):
    page = Page(written[0])
    assert [f"s1-{part}" for part in PARTS if f"s1-{part}" in page.ids] == [
        f"s1-{p}" for p in PARTS
    ]
    assert len(page.ids) == len(set(page.ids))
    inner = {link[1:] for link in page.links} | {
        a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a
    }
    assert inner <= set(page.ids)


def test_names_are_escaped_wherever_they_stand(written):
    text, _ = written
    for name in (*NAMES, "<toy> & co"):
        assert html.escape(name) in text or html.escape(name, quote=False) in text
        assert name not in text or name == "$e$"
    assert "<b>" not in text
    titles = re.findall(r"<title id=[^>]*>([^<]*)", text)
    assert any("held out: c&amp;&quot;d&quot;: " in title for title in titles)


def test_windows_are_drawn_for_averages_up_to_the_selected_checkpoint(written):
    text, _ = written
    chain = next(
        i for i in (1, 2) if f"s1-curves{i}-0" in text and f"s1-curves{i}-0-window-swad-0" in text
    )
    parts = Page(text).svgs[f"s1-curves{chain}-0"]
    lines = _lines(parts, f"s1-curves{chain}-0-")
    assert "window-aswa-0" not in lines
    assert "window-live-0" not in lines
    assert "No window is drawn for aswa" in text
    for seed in (0, 1):
        (first, last), selected = lines[f"window-sma-{seed}"], lines[f"selected-test-sma-{seed}"]
        assert first < last or first == selected[0]
        assert last == pytest.approx(selected[0], abs=0.1)  # it collects after every step


def _lines(parts, prefix):
    """By id: the first and last x of lines, or the x of markers."""
    found, name = {}, ""
    for tag, attributes in parts:
        if tag == "g" and "id" in attributes:
            name = attributes["id"].removeprefix(prefix)
        if tag == "path" and name.startswith("window"):
            numbers = re.findall(r"[ML] ([\d.]+)", attributes["d"])
            found[name] = float(numbers[0]), float(numbers[-1])
        if tag == "use" and name.startswith("selected"):
            found.setdefault(name, []).append(float(attributes["x"]))
    return found


def test_a_candidate_has_one_colour_in_all_figures(written):
    text, _ = written
    key = re.findall(r'style="color: ([^"]*)"></span>([^<]*)<', text)
    colours = {name: {c for c, n in key if n == name} for _, name in key}
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(colours, 1)
    assert colours["live"] == {"var(--live)"}
    assert len({next(iter(found)) for found in colours.values()}) == len(colours) == 4
    assert not re.search("#(1b1b1b|c9c9c9|0072b2)", text[text.index("<svg") :])
    for scheme in (False, True):
        assert variables(scheme) in text


def test_a_mean_that_lacks_a_seed_has_no_bar(small, dgavg):
    _train(small, "basic", seeds=[0, 1], holdout=NAMES[:2], steps=12, evaluate="all")
    (run,) = [d.parent for d in small.glob("*/*/1/done") if d.parent.parent.name == NAMES[1]]
    (run / "done").unlink()
    dgavg("report", small)
    titles = re.findall(r"<title id=[^>]*>(accuracy[^<]*)", (small / "report.html").read_text())
    assert [title.endswith("live X") for title in titles] == [False, True, True]


def test_policies_costs_and_settings_are_told(written, runs):
    cells = Page(written[0]).cells
    frame = Table(read_runs([runs])[0]).to_frame()
    assert {"with keep instead", "recalibrate", "seconds a run"} <= set(cells)
    for setting in ("protocol.steps", "optimizer.lr", "sma.start", "swad.n_converge"):
        assert setting in cells
    assert cells[cells.index("protocol.steps") + 1] == "24"
    assert cells[cells.index("torch") + 1] == torch.__version__
    own = frame[frame["candidate"] == "swad"]["accuracy"].mean()
    kept = frame[frame["candidate"] == "swad@keep"]["accuracy"].mean()
    at = cells.index("with keep instead")
    row = cells.index("swad", at)
    assert cells[row + 1] == "recalibrate"
    assert cells[row + 3].startswith(f"{100 * (kept - own):+.1f} ±")


def test_the_page_begins_with_what_one_would_ship(written, runs):
    text, _ = written
    table = Table(read_runs([runs])[0])
    for label in table.labels.values():
        lines = table.lines()
        at = next(i for i, line in enumerate(lines) if line[0] == label)
        shipped = next(line for line in lines[at:] if line[1] == "selected")
        assert f"<code>{label}</code>: <strong>{shipped[-2]} %</strong>" in text
        assert f"{shipped[-1]} against its live weights" in html.unescape(text)


def test_runs_that_noted_no_environment_say_unknown(small, dgavg):
    _train(small, "basic", seeds=[1], holdout=NAMES[:1], steps=12, evaluate="all")
    for expected in (
        ("torch", torch.__version__),
        ("torch", f"unknown (1 runs); {torch.__version__} (1 runs)"),
        ("environment", "unknown"),
    ):
        dgavg("report", small)
        cells = Page((small / "report.html").read_text()).cells
        assert cells[cells.index(expected[0]) + 1] == expected[1]
        next(iter([*sorted(small.rglob("environment.json")), small / "none"])).unlink(
            missing_ok=True
        )


def test_figures_are_pictures_of_something(written):
    files = sorted((written[1] / "png").iterdir())
    assert [f.stem for f in files] == [
        "accuracy", "curves-1", "curves-2", "gain", "ranking-1", "ranking-2",
    ]  # fmt: skip
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels[::5, ::5].reshape(-1, 3), axis=0)) > 20
        assert (pixels[:2] == 255).all()  # nothing is cut at the upper edge


def test_each_protocol_has_a_part_of_its_own(small, dgavg):
    _train(small, "basic", seeds=[0], holdout=NAMES[:1], steps=18)
    dgavg("report", small, "--figures", small / "png")
    page = Page((small / "report.html").read_text())
    both = {f"s{i}-{part}" for i in (1, 2) for part in ("tables", "curves", "environment")}
    assert both <= set(page.ids)
    assert page.links[:2] == ["#s1", "#s2"]
    names = sorted(f.name for f in (small / "png").iterdir())
    kinds = ("accuracy", "curves", "ranking")
    assert names == [f"{i}-toy-co-quick-{kind}.png" for i in (1, 2) for kind in kinds]


def test_the_page_is_written_where_one_looks_for_it(small, dgavg):
    out, error = dgavg("report", small, "--no-html")
    assert error == ""
    assert not (small / "report.html").exists()
    again, error = dgavg("report", small)
    assert again == out
    assert error == f"dgavg: wrote {small / 'report.html'}\n"
    assert not list(small.glob("*.part"))


def test_a_page_that_cannot_be_written_is_one_line(small, tmp_path, dgavg):
    _, error = dgavg("report", small, "--html", tmp_path / "missing" / "x.html", status=2)
    assert error.splitlines() == [
        f"dgavg: {tmp_path}/missing/x.html cannot be written: No such file or directory; choose "
        "another --html FILE"
    ]
    (tmp_path / "file").touch()
    _, error = dgavg("report", small, "--no-html", "--figures", tmp_path / "file" / "x", status=2)
    assert error.endswith("; choose another --figures DIR\n")
    assert len(error.splitlines()) == 1
    _, error = dgavg("report", small, "--html", "x.html", "--no-html", status=2)
    assert "not allowed with argument" in error


def test_the_page_nobody_asked_for_is_no_reason_to_fail(small, dgavg):
    (small / "report.html").mkdir()
    out, error = dgavg("report", small)
    assert "against live" in out
    assert error.startswith(f"dgavg: no page: {small}/report.html cannot be written")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_tables_do_without_what_the_page_needs(missing, small):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from dgavg import cli
print(cli.main(["report", {str(small)!r}]), cli.main(["report", {str(small)!r}, "--html", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needs = f"the page needs {missing}: pip install 'dgavg[report]'"
    assert done.stderr.splitlines() == [f"dgavg: no page: {needs}", f"dgavg: {needs}"]
    assert done.stdout.count("against live") == 2
    assert done.stdout.endswith("\n0 2\n")


SIZES = """<script>
const figures = [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect());
document.body.dataset.small = figures.filter((r) => r.width < 100 || r.height < 80).length;
document.body.dataset.figures = figures.length;
document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
const tables = [...document.querySelectorAll(".rule")];
document.body.dataset.tables = tables.filter((r) => r.checkVisibility()).length;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1200])
def test_chromium_shows_the_page_offline_without_an_error(width, written, tmp_path):
    text, _ = written
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", SIZES + "</body>"), encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--window-size={width},1000", "--dump-dom", file.as_uri()),
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    (body,) = [a for tag, a in Page(done.stdout).tags if tag == "body"]
    assert "CONSOLE" not in done.stderr
    assert int(body["data-figures"]) == text.count("<svg ")
    assert (body["data-small"], body["data-wide"], body["data-tables"]) == ("0", "false", "1")
    assert len(re.findall('<button type="button" aria-pressed', done.stdout)) == 5


@pytest.mark.slow
def test_a_usual_page_is_small(tmp_path, dgavg):
    chain, names = "sma_ema_swa_basic", [f"d{i}" for i in range(6)]
    some = {"seeds": [0, 1, 2], "steps": 60, "trainer__sma__start": 10}
    _train(tmp_path / "runs", chain, names=names, **some)
    dgavg("report", tmp_path / "runs")
    assert (tmp_path / "runs" / "report.html").stat().st_size < 2e6
