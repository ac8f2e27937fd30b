"""The report as HTML, Markdown and JSON, and the command that writes it."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from helpers.run_files import DGM, falling, summary, write_arms, write_run
from lightning_estdgm.cli import app
from lightning_estdgm.tools.report import compare, html, markdown, read_run, write
from lightning_estdgm.tools.report._document import document
from lightning_estdgm.tools.report._figures import draw
from lightning_estdgm.tools.report._render import FORMATS

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "wbr"}
SAVING = re.compile(r"\d %? ?(?:less|more)\b|× as fast|% (?:less|more)")
FROM_JOULES = re.compile(r"\d (?:[kMG]?J|W)\b(?! ?\((?:partly )?estimated\))")


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "wbr":  # no blank, in the middle of a word
            self.text = self.text.removesuffix(" ")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "


def text_of(page):
    return " ".join(Page(page).text.replace("\N{NO-BREAK SPACE}", " ").split())


def compared(folders, *arguments):
    return compare([read_run(folder) for folder in folders], *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return compared(write_arms(tmp_path_factory.mktemp("measured")))


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    return compared(write_arms(tmp_path_factory.mktemp("estimated"), estimated=True))


def row(comparison, table, head):
    doc = document(comparison)
    (found,) = [t for t in (*doc.answers, *doc.results, *doc.provenance) if t.title.startswith(table)]
    (cells,) = [each.cells for each in found.rows if each.head == head]
    return cells


def test_the_first_sentence_says_what_was_saved_and_over_how_many_runs(measured):
    (headline,) = document(measured).headlines
    assert headline.tone == "saved"
    assert headline.text == "EST-DGM reached val_loss ≤ 2 with 51.8 ± 0.2 % less energy than dense."
    assert headline.details[0].startswith(
        "492 ± 12 J against 1020 ± 20 J; 12.00 ± 0.00 s against 20.00 ± 0.00 s, 1.667"
    )
    assert headline.details[1] == "3 runs of EST-DGM, 3 of dense; ± is the standard deviation over the runs."


def test_what_cost_more_is_said_to(tmp_path):
    folders = [
        write_run(tmp_path / "dense", falling(2.0)),
        write_run(tmp_path / "dgm", falling(2.0), method=DGM, watts=60),
    ]
    (headline,) = document(compared(folders)).headlines
    assert headline.tone == "cost more"
    assert headline.text == "EST-DGM reached val_loss ≤ 2 with 20.0 % more energy than dense."
    assert "a single run has no spread" in headline.details[1]


def test_a_difference_within_its_spread_is_called_none(tmp_path):
    watts = ((50.0, 60.0), (51.0, 49.0), (52.0, 48.0))
    folders = [
        write_run(tmp_path / f"{name}{seed}", falling(2.0), watts=w, seed=seed, method=method)
        for seed, pair in enumerate(watts)
        for name, method, w in zip(("dense", "dgm"), (None, DGM), pair, strict=True)
    ]
    (headline,) = document(compared(folders)).headlines
    assert headline.tone == "no difference"
    assert "with 2.8 ± 15.0 % more energy" in headline.text
    assert headline.details[-1] == "The difference is smaller than its spread over the runs: it may be chance."
    same = [write_run(tmp_path / name, falling(2.0), method=method) for name, method in (("a", None), ("b", DGM))]
    assert document(compared(same)).headlines[0].text == "EST-DGM reached val_loss ≤ 2 with as much energy as dense."


def test_large_runs_are_told_in_large_units(tmp_path):
    comparison = compared([write_run(tmp_path / "run", falling(2.0), watts=4e5, seconds=3.6e5)])
    assert row(comparison, "Whole runs", "energy, gross") == ("144.0 GJ",)
    assert row(comparison, "Whole runs", "time") == ("100.0 h",)
    assert row(comparison, "Whole runs", "mean power") == ("400000 W",)
    assert "over 100 h" in draw(comparison)[1].alt
    assert "energy since the start, GJ" in draw(comparison)[0].svg


def test_the_tables_hold_the_numbers_of_the_runs(measured):
    assert row(measured, "Energy to the target", "energy until then") == ("1020 ± 20 J", "492 ± 12 J")
    assert row(measured, "Energy to the target", "at step") == ("99", "79")
    assert row(measured, "Energy to the target", "mean power until then") == ("51.0 ± 1.0 W", "41.0 ± 1.0 W")
    assert row(measured, "Energy to the target", "energy against dense") == ("–", "51.8 ± 0.2 % less")
    assert row(measured, "At the same budget of 100 steps", "energy") == ("1020 ± 20 J", "615 ± 15 J")
    assert row(measured, "At the same budget", "speed against dense")[1] == "1.333 ± 0.000 × as fast"
    assert row(measured, "Whole runs", "of it in validation") == ("102.0 ± 2.0 J", "61.5 ± 1.5 J")
    phases = next(table for table in document(measured).results if table.title == "By phase")
    assert [r.cells[0] for r in phases.rows] == ["train", *DGM["phases"]]
    assert phases.rows[1].cells[1:] == ("205.0 ± 5.0 J", "5.000 ± 0.000 s", "41.0 ± 1.0 W")


@pytest.mark.parametrize("make", [html, markdown])
def test_where_it_comes_from_is_stated(measured, make):
    page = " ".join(make(measured).replace("\\", "").split())
    for part in (
        "rapl (counter, driver intel-rapl 6.1)", "node package-0", "nvml: no library", "99.90 %", "32-true", "2.13.0",
        "SingleDeviceStrategy", "sparse operators ran", "cpu: 3, dense: 1", "ByteGPT", "abababababababab", "finished",
        "exploration, consolidation, refinement", "batch size", "compiled", "gaps in all runs", "energy drivers",
    ):  # fmt: skip
        assert part in page


def test_every_figure_made_from_estimated_joules_says_so(estimated, measured):
    for page in (text_of(html(estimated)), markdown(estimated)):
        assert not FROM_JOULES.findall(page)
        assert "51.8 ± 0.2 % less energy (estimated) than dense" in page
        assert re.search(r"51\.8 ± 0\.2 % less \(estimated\)", page)
        assert "ESTIMATED, not measured" in page
    assert FROM_JOULES.search(text_of(html(measured)))  # the control
    assert not any("atts" in plot.title for plot in draw(estimated))
    for plot in draw(estimated):
        assert "(estimated)" in plot.title
        assert "(estimated)" in plot.svg.partition(">")[2]
        assert "(estimated)" in plot.alt
    for plot in draw(measured):
        assert "estimated" not in plot.svg + plot.title
    content = json.loads(as_json(estimated))
    assert "joules" not in json.dumps(content["arms"]).replace("joules_estimated", "")
    assert "share" not in content["contrasts"][0]["at_target"]
    assert content["contrasts"][0]["at_target"]["share_estimated"]["mean"] == pytest.approx(0.518, abs=1e-3)


def as_json(comparison):
    return FORMATS[".json"](comparison)


@pytest.mark.parametrize("missing", ["target", "kind"])
def test_what_is_not_comparable_prints_no_saving_anywhere(tmp_path, missing):
    losses = (2.0, 2.5) if missing == "target" else (2.0, 1.0)
    folders = write_arms(tmp_path, losses=losses)
    if missing == "kind":
        content = json.loads((folders[1] / "energy.json").read_text())
        content["energy"] |= {"measured_joules": None, "estimated_joules": 600.0}
        (folders[1] / "energy.json").write_text(json.dumps(content))
    comparison = compared(folders)
    for page in (text_of(html(comparison)), markdown(comparison)):
        assert "Not comparable: EST-DGM and dense." in page
        assert not SAVING.search(page)
        assert page.count("not comparable") == 4
    content = json.loads(as_json(comparison))
    assert content["contrasts"][0]["at_target"] is content["contrasts"][0]["at_budget"] is None
    assert content["contrasts"][0]["reasons"]


def test_the_control_of_the_search_for_savings(measured):
    for page in (text_of(html(measured)), markdown(measured)):
        assert len(SAVING.findall(page)) >= 5
        assert "not comparable" not in page


def test_idle_co2_and_cost_stand_apart_and_only_where_they_were_asked_for(tmp_path, measured):
    page = text_of(html(measured))
    assert "idle" not in page
    assert "CO2" not in page
    idle = {"watts": 12.5, "devices": [], "joules": 250.0, "net_joules": 750.0}
    footprint = {"grams_co2_per_kwh": 380.0, "price_per_kwh": 0.3, "pue": 1.2, "currency": "EUR"}
    footprint |= {"grams_co2": 0.1267, "cost": 0.0001}
    asked = compared([write_run(tmp_path / "run", falling(2.0), energy={"idle": idle, "footprint": footprint})])
    assert row(asked, "Whole runs", "energy less idle") == ("750.0 J",)
    assert row(asked, "Whole runs", "idle power before the run") == ("12.50 W",)
    assert row(asked, "CO2 and cost", "CO2 of the run, g") == ("0.1267",)
    assert row(asked, "CO2 and cost", "cost of the run") == ("0.0001000 EUR",)
    assert row(asked, "CO2 and cost", "stated: g CO2 a kWh") == ("380.0",)
    heads = [each.head for each in document(asked).results[0].rows]
    assert heads.index("energy, gross") < heads.index("energy less idle")


def test_the_page_is_one_file_without_script_or_request(measured):
    page = html(measured)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert {"img", "iframe", "object", "embed"}.isdisjoint(parsed.tags)
    assert [a for a in parsed.addresses if not a.startswith(("#", "data:,"))] == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert parsed.tags.count("svg") == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_names_are_text_never_markup(tmp_path, suffix):
    name = "<script>alert(1)</script>|*x*"
    runs = [
        read_run(write_run(tmp_path / "dense", falling(2.0), run={"host": name}), "dense"),
        read_run(write_run(tmp_path / "dgm", falling(1.0), method=DGM, run={"model": {"class": "ByteGPT"}}), name),
    ]
    write(compare(runs), tmp_path / f"page{suffix}")
    page = (tmp_path / f"page{suffix}").read_text()
    assert "<script>" not in page
    if suffix == ".html":
        assert "script" not in Page(page).tags
        assert name in text_of(page)
    else:
        assert r"\<script\>alert(1)\</script\>\|\*x\*" in page


def test_markdown_tables_have_as_many_cells_in_every_row(measured):
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", markdown(measured), re.MULTILINE)]
    doc = document(measured)
    tables = doc.answers + doc.results + doc.provenance
    assert [len(block) - 2 for block in blocks] == [len(table.rows) for table in tables]
    for block, table in zip(blocks, tables, strict=True):
        assert re.fullmatch(r"(\|---:?)+\|", block[1])
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in block} == {len(table.columns) + 1}


def test_json_is_strict_and_holds_the_runs_as_they_were_read(measured):
    content = json.loads(as_json(measured), parse_constant=lambda name: pytest.fail(name))
    assert content["format"] == "lightning_estdgm.report"
    assert content["target"] == {
        "metric": "val_loss", "value": 2.0, "mode": "min", "rule": "the worst of the baseline runs' best values"
    }  # fmt: skip
    assert [run["arm"] for run in content["runs"]] == ["dense"] * 3 + ["EST-DGM"] * 3
    assert content["runs"][0]["energy"]["total_joules"] == 1000.0
    assert content["arms"][1]["runs"][0]["reached"]["joules"] == pytest.approx(480.0)
    assert content["contrasts"][0]["at_target"]["share"]["values"] == pytest.approx(
        list(measured.contrasts[0].at_target.share["values"]), rel=1e-5
    )


def test_the_plots_draw_what_they_say(measured):
    metric, watts, phases = draw(measured)
    assert metric.alt == (
        "val_loss over energy. dense: 3 of 3 runs reached val_loss ≤ 2; EST-DGM: 3 of 3 runs reached val_loss ≤ 2."
    )
    for arm in ("dense", "EST-DGM"):
        assert f">{arm}</text>" in metric.svg
        assert f">{arm}</text>" in phases.svg
    for phase in DGM["phases"]:
        assert f" {phase}</text>" in watts.svg
        assert f">{phase}</text>" in phases.svg
    assert "50.0 W on average over 20.0 s" in watts.alt
    assert "EST-DGM, refinement: 205 J" in phases.alt
    assert all("var(--arm-1, #" in plot.svg and plot.svg.startswith("<svg ") for plot in (metric, watts, phases))


def test_runs_without_curves_have_a_page_too(tmp_path):
    folder = write_run(tmp_path / "run", {})
    (folder / "metrics.csv").unlink()
    comparison = compared([folder])
    assert [plot.name for plot in draw(comparison)] == ["phases"]
    assert "run used 1000 J in 20.00 s" in text_of(html(comparison)).replace("dense", "run")
    nothing = {"total_joules": None, "measured_joules": None, "sources": [], "by_phase": {"train": None}}
    nothing |= {"train_joules": None, "val_joules": None, "by_domain": {}, "method": "none"}
    blind = compared([write_run(tmp_path / "blind", falling(2.0), energy=nothing)])
    assert "no joules are known" in text_of(html(blind))
    assert document(blind).label == "no joules: no energy source"


# The command --------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    wide = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env=wide)


def test_the_command_writes_every_format_it_is_asked_for(tmp_path):
    folders = write_arms(tmp_path, seeds=1)
    files = [tmp_path / "out" / f"report{suffix}" for suffix in (".html", ".md", ".json")]
    result = invoke(*folders, *(part for file in files for part in ("-o", file)))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "EST-DGM reached val_loss ≤ 2 with 52.0 % less energy than dense.", *map(str, files)
    ]  # fmt: skip
    assert text_of(files[0].read_text()).count("52.0 % less") >= 2
    assert files[1].read_text().startswith("# EST-DGM reached")
    assert json.loads(files[2].read_text())["baseline"] == "dense"


def test_without_a_file_markdown_is_printed(tmp_path):
    result = invoke(*write_arms(tmp_path, seeds=1), "--metric", "val_loss", "--target", "3", "--mode", "min")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("# EST-DGM reached val_loss ≤ 3 with ")
    assert "as asked for" in result.output


def test_labels_name_the_arms_and_folders_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "lr=0.1", falling(2.0))
    write_run(tmp_path / "b", falling(1.0), method=DGM)
    result = invoke("lr=0.1", "masked=b")
    assert result.exit_code == 0, result.output
    assert "masked reached val_loss" in result.output
    assert "| lr=0.1 | dense |" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected the folder of a run, got nothing there"),
        (["dense", "-o", "report.pdf"], "got 'report.pdf', expected a file that ends in .html, .md, .json"),
        (["dense", "-o", "folder.html"], "got 'folder.html', expected a file that ends in"),
        (["dense", "-o", "dense/energy.json/x.html"], "dense/energy.json"),
        (["dense", "--metric", "bleu"], "dense has no metric 'bleu'; it has val_loss"),
        (["dense", "--metric", "val_loss", "--mode", "low"], "got 'low', expected min or max"),
        (["dense", "--target", "2"], "a target or a mode needs the metric"),
        (["dense", "other"], "expected runs of one model, got two"),
        (["dense", "broken"], "not readable as JSON"),
        (["dense", "unknown"], "unknown/energy.json: energy.sources.0.method: got nothing, expected str"),
        (["dense", "dense"], "named twice"),
        (["=dense"], "got '=dense', expected a folder, or a label, an equals sign and a folder"),
        (["empty"], "empty: no energy.json in it or below"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_was_expected(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "dense", falling(2.0))
    write_run(tmp_path / "other", falling(2.0), run={"model": {"fingerprint": "cd" * 32}})
    (write_run(tmp_path / "broken", falling(2.0)) / "energy.json").write_text(json.dumps(summary())[:99])
    write_run(tmp_path / "unknown", falling(2.0), energy={"sources": [{"name": "x"}]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert list(tmp_path.glob("report.*")) == []
