from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coordinator.view.charts import Chart, Curve
from coordinator.view.curves import moving_mean
from coordinator.view.figures import charts_of, tiles_of
from coordinator.view.records import read_run
from coordinator.view.report import script_data, write_report
from coordinator.view.scales import fitting, linear, logarithmic, whole
from coordinator.view.sections import nodes_html
from tests.coordinator.view.synthetic import FACTS, fleet_metrics, step_metrics, write_run

HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u2028"
VOID_TAGS = {"meta", "link", "br", "img"}
COMMANDS = (("Try it", "coordinator generate --prompt 'a < b'"),)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser would make of a page, as far as these tests need it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data

    def data(self) -> list[dict[str, object]]:
        """What the page's script reads."""
        found: list[dict[str, object]] = json.loads(self.scripts[0])
        return found


def report(folder: Path, **options: object) -> str:
    path = folder / "report.html"
    write_report(path, folder, dict(FACTS), **options)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "adapters")
    return tmp_path / "adapters"


def test_a_report_shows_the_run(folder: Path) -> None:
    page = Page(report(folder, status="done", commands=COMMANDS))
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert ids == ["loss", "rate", "norm", "speed", "seconds", "memory"]
    for part in (
        *("adapters", "done", "Studio · M2 Max", "mlx-community/Mistral-7B-v0.3-4bit", "lora_parameters.rank"),
        *("worker ended by signal 9; goes on from step 250", "+4 min 10 s", "SELECT count(*) FROM players"),
        *("coordinator generate --prompt 'a < b'", "11.5 GB", "6 min 44 s", "at step 320"),
    ):
        assert part in page.text, part
    assert [chart["key"] for chart in page.data()] == ids


def test_a_fleet_has_its_machines_shares_and_the_parts_of_a_step(tmp_path: Path) -> None:
    names = ("Studio", "<Air>")
    rows = [fleet_metrics(step, names) if step > 10 else step_metrics(step) for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(tmp_path)
    page = Page(text)
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert ids == ["loss", "rate", "norm", "speed", "seconds", "shares", "seconds-1", "seconds-2", "memories"]
    charts = {chart.key: chart for chart in charts_of(read_run(tmp_path))}
    last = {curve.label: curve.points[-1][1] for curve in charts["seconds"].curves}
    assert last == pytest.approx({"compute": 0.875, "waiting for the slowest": 0.125, "network": 0.1, "other": 0.05})
    assert {c.label: c.points[0] for c in charts["shares"].curves} == {"Studio": (11, 75.0), "<Air>": (11, 25.0)}
    for part in ("Machines", "75 %", "2,000", "48.0 GB", "<Air>"):
        assert part in page.text, part
    assert "<Air>" not in text.partition("</main>")[0]


def test_steps_that_one_of_several_did_alone_are_its_own(tmp_path: Path) -> None:
    alone = fleet_metrics(1, ("Air",))["per_node"]
    alone["Air"]["rows"] = 8
    lost = fleet_metrics(50)["per_node"]
    lost["Studio"] = {"rows": 6}
    rows = [
        *(fleet_metrics(step) for step in range(1, 50)),
        fleet_metrics(50, per_node=lost),
        *(fleet_metrics(step, ("Air",), per_node=alone) for step in range(51, 101)),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path)
    charts = {chart.key: chart for chart in charts_of(record)}
    shares = {curve.label: curve.points for curve in charts["shares"].curves}
    assert (shares["Air"][0], shares["Air"][-1]) == ((1, 25.0), (100, 100.0))
    assert shares["Studio"][-1] == (100, 0.0)
    lines = re.findall("<th scope=row>(.*?)</th>(.*?)</tr>", nodes_html(record.nodes))
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in lines}
    assert cells["Air"][:3] == ["62 %", "100", "100"]
    assert cells["Studio"][:3] == ["38 %", "50", "50"]
    assert record.nodes["Studio"].compute_seconds == pytest.approx(49 * 0.75), "of the last one it told nothing"
    assert record.mean_compute[49] == 1.0
    (air,) = (chart for chart in charts.values() if chart.title == "Step of Air")
    assert min(value for _, value in air.curves[0].points) > 0, "no hole where it was alone"


def test_of_many_machines_the_report_draws_the_largest_shares(tmp_path: Path) -> None:
    names = tuple(f"node {index}" for index in range(64))
    rows = [fleet_metrics(step, names) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = next(chart for chart in charts_of(read_run(tmp_path)) if chart.key == "shares")
    assert [curve.label for curve in shares.curves][-1] == "59 others"
    assert len(shares.curves) == 6
    assert sum(curve.points[0][1] for curve in shares.curves) == pytest.approx(100)


@pytest.mark.parametrize("per_node", [7, [], {"a": 3}, {"a": {"rows": "x", "compute_seconds": None}}])
def test_damaged_figures_of_machines_are_survived(tmp_path: Path, per_node: object) -> None:
    rows = [step_metrics(step, per_node=per_node) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Training report" in report(tmp_path)


def test_a_report_needs_nothing_but_itself(folder: Path) -> None:
    text = report(folder)
    page = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in {"img", "iframe", "object", "embed"}
        assert "src" not in attributes
        assert attributes.get("href") in {None, "data:,"}
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy


def test_text_of_a_run_is_harmless(tmp_path: Path) -> None:
    write_run(tmp_path, total=20, evaluate=10)
    with (tmp_path / "events.jsonl").open("a") as events:
        for kind, level in (("sample", "info"), (HOSTILE, HOSTILE), ("warning", "warning")):
            line = {"time": 1.78e9, "kind": kind, "message": HOSTILE, "level": level, "step": 3}
            events.write(json.dumps({**line, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    (tmp_path / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "nested": {"list": [HOSTILE]}}))
    path = tmp_path / "report.html"
    write_report(path, tmp_path, {HOSTILE: HOSTILE}, title=HOSTILE, status=HOSTILE, commands=((HOSTILE, HOSTILE),))
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 10


def test_data_for_the_script_cannot_end_its_element() -> None:
    data = script_data([Chart("k", "T", "u", [Curve(HOSTILE, "main", [(1, 1.0)])], 1)])
    assert "<" not in data
    assert "\u2028" not in data
    assert json.loads(data)[0]["curves"][0]["label"] == HOSTILE


def test_a_report_can_be_used_without_eyes_and_without_a_script(folder: Path) -> None:
    text = report(folder)
    page = Page(text)
    assert ("html", {"lang": "en"}) in page.tags
    plots = [attributes for _, attributes in page.tags if attributes.get("class") == "plot"]
    assert len(plots) == 6
    assert all(plot["role"] == "img" for plot in plots)
    label = plots[0]["aria-label"]
    assert label is not None
    assert re.match(
        r"Loss, per token, over 400 steps: training, mean of 17 steps from 3\.\d+ to 1\.3\d*, lowest", label
    )
    tables = text.split("<table>")[1:]
    assert len(tables) == 6
    assert all(table.count("<tr>") == 21 for table in tables)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


@pytest.mark.parametrize("total", [1, 2, 9])
def test_a_short_run_has_a_report(tmp_path: Path, total: int) -> None:
    write_run(tmp_path, total=total, evaluate=1)
    charts = Page(report(tmp_path)).data()
    assert all(curve["x"] for chart in charts for curve in chart["curves"])  # type: ignore[attr-defined]


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    page = Page(report(tmp_path, status="failed"))
    assert "No training step has been recorded." in page.text
    assert page.data() == []


def test_damaged_and_odd_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [json.dumps(step_metrics(step)) for step in range(1, 31)]
    rows[4] = json.dumps(step_metrics(5, loss=math.nan, grad_norm=None))
    rows[5] = json.dumps({"step": 6})
    rows += ["[1, 2]", '{"no": "step"}', '{"step": 7, "loss": "x"', json.dumps(step_metrics(30, loss=7.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "events.jsonl").write_bytes(
        b'\xff\xfe\n{"time": 1e300, "kind": 5, "message": null}\n{"time": "soon"}\n'
    )
    (tmp_path / "config.yaml").write_text("a: [1")
    record = read_run(tmp_path)
    assert record.steps == list(range(1, 31))
    assert record.columns["loss"][29] == 7.0
    assert record.broken_lines == 3
    text = Page(report(tmp_path)).text
    assert "3 unreadable lines were left out" in text
    assert "2 steps had no finite loss" in text


def test_a_hundred_thousand_steps_stay_small(tmp_path: Path) -> None:
    rows = []
    for step in range(1, 100_001):
        loss = 30.0 if step == 77_777 else 2 + math.sin(step / 9000)
        rows.append(f'{{"step":{step},"loss":{loss},"tokens":900,"seconds":1.0,"compute_seconds":0.9,"grad_norm":1.5}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "events.jsonl").write_text(
        '{"time":1,"kind":"note","message":"again and again","level":"info"}\n' * 9999
    )
    text = report(tmp_path)
    assert len(text) < 500_000
    assert "9,599 more are in events.jsonl" in text
    raw = next(curve for curve in charts_of(read_run(tmp_path))[0].curves if curve.look == "raw")
    assert (77_777, 30.0) in raw.points, "a spike is never thinned out"


def test_tiles_tell_the_best_validation(folder: Path) -> None:
    tiles = {label: (value, remark) for label, value, remark in tiles_of(read_run(folder))}
    assert tiles["Best validation"] == ("1.516", "at step 320; last 1.535")
    assert tiles["Steps"][0] == "400"


def test_axes_are_round() -> None:
    assert linear(0.13, 3.2).ticks == (0, 1, 2, 3, 4)
    assert linear(1.31, 1.52).labels == ("1.30", "1.35", "1.40", "1.45", "1.50", "1.55")
    assert linear(0, 1e-5, 4).labels == ("0", "2.5e-6", "5e-6", "7.5e-6", "1e-5")
    assert linear(0, 48_000).labels == ("0", "10k", "20k", "30k", "40k", "50k")
    assert whole(7).ticks == (0, 2, 4, 6)
    assert whole(1).ticks == (0, 1)
    assert whole(100_000).labels[-1] == "100k"
    assert logarithmic(0.02, 900).labels == ("0.01", "0.1", "1", "10", "100", "1000")


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-3.0], [1e-30, 1e30], [-1e9, 1e9], [0.0, 1e-300]])
def test_any_values_have_an_axis(values: list[float]) -> None:
    scale = fitting(values, from_zero=True)
    assert scale.low < scale.high
    assert len(scale.ticks) == len(scale.labels)
    assert all(0 <= scale.place(value) <= 1 for value in values)


def test_outliers_make_the_axis_logarithmic_where_that_can_be() -> None:
    assert fitting([1.0] * 99 + [1000.0], from_zero=True).logarithmic
    assert not fitting([0.0] + [1.0] * 98 + [1000.0], from_zero=True).logarithmic


def test_the_moving_mean_weighs_and_skips() -> None:
    assert moving_mean([1.0, 4.0, math.nan, 2.0], [1, 2, 5, 1], 1) == pytest.approx([3.0, 3.0, 10 / 3, 2.0])
    assert math.isnan(moving_mean([math.nan], [1], 3)[0])


def test_areas_stand_on_each_other() -> None:
    curves = [Curve("a", "area-1", [(0, 1.0), (10, 1.0)]), Curve("b", "area-2", [(0, 3.0), (10, 1.0)])]
    drawn = Chart("k", "T", "u", curves, 10).html()
    assert 'class="area-1" d="M0 750L1000 750L1000 1000L0 1000Z"' in drawn
    assert 'class="area-2" d="M0 0L1000 500L1000 750L0 750Z"' in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_runs_the_script_under_the_policy(folder: Path, tmp_path: Path) -> None:
    report(folder)
    arguments = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(part) for part in [*arguments, "--dump-dom", (folder / "report.html").as_uri()]]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.count('role="slider"') == 6
    assert re.search(r'aria-valuetext="step 400: training 1\.\d+, validation \(step 400\) 1\.535"', shown)
