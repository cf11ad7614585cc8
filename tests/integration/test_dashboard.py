"""The dashboard in a real browser, beside a run that loses a node, and afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coordinator.dashboard.address import Place
from coordinator.dashboard.beside import beside
from tests.coordinator.view.synthetic import write_run
from tests.faults.harness import ITERS, arguments, faulty, make_inputs
from tests.fixtures.runs import Run, losses, notes, validations

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, and deploy/run could not install it (apt-get, as root)"),
]
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
LONGEST_WAIT_MS = 120_000


@pytest.fixture
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Watching:
    """A page, and everything that it complained of or asked for."""

    def __init__(
        self, browser: Browser, address: str, *, dark: bool = False, phone: bool = False, clock_hours: float = 0.0
    ) -> None:
        context = browser.new_context(viewport=PHONE if phone else DESK, color_scheme="dark" if dark else "light")  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        if clock_hours:
            self.page.add_init_script(f"const now = Date.now; Date.now = () => now() + {clock_hours * 3.6e6};")
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.address = address
        self.page.goto(address)
        self.until("document.body.dataset.connected === 'true'")

    def until(self, condition: str) -> None:
        """Wait until this holds in the page. (Playwright's own way takes `eval`, which the page rightly forbids.)"""
        self.page.evaluate(f"""new Promise((resolve, reject) => {{
            const look = () => ({condition}) ? resolve() : undefined;
            new MutationObserver(look).observe(
                document.documentElement, {{attributes: true, childList: true, characterData: true, subtree: true}}
            );
            setTimeout(() => reject(new Error("it never came: " + {json.dumps(condition)})), {LONGEST_WAIT_MS});
            look();
        }})""")

    def read(self, chart: str) -> str:
        """What the last point of a chart is, as a screen reader is told it."""
        return self.page.locator(f"#{chart} .plot").get_attribute("aria-valuetext") or ""

    def painted(self, chart: str) -> bool:
        """Whether something is drawn on a chart's canvas."""
        script = """canvas => {
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return data.some((value) => value !== 0);
        }"""
        return bool(self.page.locator(f"#{chart} canvas").evaluate(script))

    def background(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def check(self) -> None:
        """No complaint; nothing asked of anybody else; nothing wider than the screen."""
        assert self.complaints == []
        assert {re.sub(r"(?<=\d)/.*", "/", url) for url in self.asked if not url.startswith("data:")} == {
            re.sub(r"(?<=\d)/.*", "/", self.address)
        }
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def serve(port: int = 0, token: str = "") -> tuple[Place, str]:
    place = Place(socket.create_server(("127.0.0.1", port)), "127.0.0.1", token)
    return place, place.url


def test_during_and_after_a_run_that_loses_a_node(browser: Browser, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    adapter = tmp_path / "adapters"
    shots = tmp_path / "screenshots"
    with faulty(tmp_path, {"anna": [], "ben": [{"step": 23, "do": "kill worker"}], "cleo": []}) as nodes:
        command = arguments(inputs, adapter, list(nodes.values()), "--dashboard", "--dashboard-port", "0")
        run = Run(*command)
        assert run.process.stderr is not None
        address = run.process.stderr.readline().removeprefix("dashboard: ").strip()
        watching = Watching(browser, address)
        assert watching.page.locator("#status").inner_text() == "waiting for it to begin"
        run.until_step(10)
        watching.until("Number(document.body.dataset.step) >= 10")
        assert watching.page.locator("#status").inner_text() == "running"
        assert watching.page.locator("#live").inner_text() == "live"
        run.until_step(30)
        watching.until("document.querySelector('[data-part=events] .warning')?.textContent.includes('ben')")
        watching.until("Number(document.body.dataset.step) >= 30")
        machines = watching.page.locator(".nodes th[scope=row]").all_inner_texts()
        assert set(machines) == {"anna", "ben", "cleo"}
        links = watching.page.locator(".links th[scope=row]").all_inner_texts()
        assert {"anna ↔ ben", "anna ↔ cleo", "ben ↔ cleo"} <= set(links)
        assert all("bit/s" in row for row in watching.page.locator(".links tr:has(th[scope=row])").all_inner_texts())
        for chart in ("loss", "seconds", "shares", "seconds-1", "seconds-2", "seconds-3", "memories"):
            assert watching.painted(chart), chart
        assert re.search(r"compute 0\.\d+, network", watching.read("seconds-1"))
        watching.page.screenshot(path=shots / "during.png", full_page=True)
        run.until(lambda event: event["event"] == "finished")
        watching.until("document.getElementById('status').textContent === 'done'")
        watching.check()
        code, errors = run.wait()
        assert (code, errors) == (0, ""), "the address is told once"
        watching.until("document.body.dataset.connected === 'false'")  # it ended with the run
        assert watching.page.locator("#live").inner_text() == "the run has ended"
        assert watching.page.locator("#status").inner_text() == "done"
        assert address not in "".join(path.read_text(errors="replace") for path in adapter.glob("*.jsonl"))
    place, address = serve()
    with beside(place, [adapter]):
        after = Watching(browser, address)
        after.until(f"Number(document.body.dataset.step) === {ITERS}")
        _look_around(after, adapter, shots)
        for name, options in (
            ("dark", {"dark": True}),
            ("phone", {"phone": True}),
            ("dark-phone", {"dark": True, "phone": True}),
        ):
            other = Watching(browser, address, **options)
            other.until(f"Number(document.body.dataset.step) === {ITERS}")
            other.page.screenshot(path=shots / f"{name}.png", full_page=True)
            assert (other.background() != after.background()) == name.startswith("dark")
            other.check()
    report = browser.new_page(color_scheme="light", viewport=DESK)  # type: ignore[arg-type]
    report.goto((adapter / "report.html").as_uri())
    figures = report.locator("figure").evaluate_all("all => all.map((figure) => figure.id)")
    assert figures == after_charts(adapter)
    report.screenshot(path=shots / "report.png", full_page=True)


def after_charts(folder: Path) -> list[str]:
    from coordinator.view.figures import charts_of
    from coordinator.view.records import read_run

    return [chart.key for chart in charts_of(read_run(folder))]


def _look_around(after: Watching, adapter: Path, shots: Path) -> None:
    """The page of the run that has ended, by its values and by the keyboard."""
    page = after.page
    assert page.locator("#status").inner_text() == "done"
    assert page.locator("figure").evaluate_all("all => all.map((figure) => figure.id)") == after_charts(adapter)
    (lost,) = notes(adapter, "restarted")
    assert lost["message"] in page.locator(".timeline").inner_text()
    best_step, best = min(validations(adapter), key=lambda pair: pair[1])
    tile = page.locator(".tiles div", has_text="Best validation").inner_text()
    assert f"{best:.3f}" in tile
    assert f"at step {best_step}" in tile
    # By the keyboard: to the curves past the heading, the first step, one on.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('figure').id") == "loss"
    page.keyboard.press("Home")
    assert after.read("loss").startswith("step 1: ")
    page.keyboard.press("ArrowRight")
    assert after.read("loss").startswith("step 2: ")
    page.screenshot(path=shots / "read-out.png")
    page.keyboard.press("Escape")
    # The table says the same as the curve.
    page.locator("#shares summary").press("Enter")
    assert page.locator("#shares table").is_visible()
    assert page.locator("#shares thead th").count() == 4
    assert page.locator("#loss thead th").first.text_content() == "step"
    page.screenshot(path=shots / "after.png", full_page=True)
    assert losses(adapter)[-1][0] == ITERS
    after.check()


def test_runs_are_compared_and_a_silent_one_is_told(browser: Browser, tmp_path: Path) -> None:
    for name, total in (("a", 400), ("b", 300)):
        write_run(tmp_path / name / "adapters", total=total)
    with (tmp_path / "b" / "adapters" / "events.jsonl").open("a") as events:
        events.write(json.dumps({"time": 1.79e9, "kind": "resumed", "message": "resumed", "level": "info"}) + "\n")
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(tmp_path / "b" / "adapters" / name, (1.79e9, 1.79e9))
    place, address = serve()
    with beside(place, [tmp_path / name / "adapters" for name in ("a", "b")]):
        watching = Watching(browser, address)
        watching.until("document.querySelectorAll('figure').length === 4")
        assert watching.page.locator("#loss .legend li").all_inner_texts() == ["a/adapters", "b/adapters"]
        assert watching.painted("loss")
        assert "iters" in watching.page.locator("[data-part=options]").inner_text()
        watching.page.screenshot(path=tmp_path / "compare.png", full_page=True)
        watching.page.locator("nav a", has_text="b/adapters").click()
        watching.until("document.body.dataset.step === '300'")
        assert watching.page.locator("#status").inner_text() == "silent"
        assert "it may have been killed" in watching.page.locator("#live").inner_text()
        watching.check()


def test_a_run_is_not_called_silent_by_the_clock_of_the_browser(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path, total=30)
    events = [json.dumps({"time": 1.79e9, "kind": "resumed", "message": "resumed", "level": "info"}) + "\n"]
    (tmp_path / "events.jsonl").write_text("".join(events))
    place, address = serve()
    with beside(place, [tmp_path]):
        for hours in (30.0, -30.0):
            watching = Watching(browser, address, clock_hours=hours)
            watching.until("document.body.dataset.step === '30'")
            assert watching.page.locator("#live").inner_text() == "live"
            watching.check()
    watching.until("document.getElementById('live').textContent.endsWith('trying again')")
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(tmp_path / name, (1.7e9, 1.7e9))
    place, address = serve()
    with beside(place, [tmp_path]):
        watching = Watching(browser, address, clock_hours=-1e6)
        watching.until("document.body.dataset.step === '30'")
        assert watching.page.locator("#status").inner_text() == "silent"


def test_a_page_of_a_server_that_was_started_anew_says_what_to_open(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path, total=30)
    place, address = serve(token="first")
    port = place.socket.getsockname()[1]
    with beside(place, [tmp_path]):
        watching = Watching(browser, address)
        watching.until("document.body.dataset.step === '30'")
    watching.until("document.body.dataset.connected === 'false'")
    assert watching.page.locator("#live").inner_text() == "the run has ended", "nothing of it can be old"
    place, address = serve(port, token="second")
    with beside(place, [tmp_path]):
        watching.until("document.getElementById('live').textContent.includes('open the address that the command')")
        assert watching.page.locator("#status").inner_text() == "done", "what was shown stays"
        watching.page.goto(address)
        watching.until("document.body.dataset.step === '30'")
        assert watching.page.locator("#live").inner_text() == "the run has ended"


def test_names_of_options_keep_to_their_column(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path, total=30)
    with (tmp_path / "config.yaml").open("a") as config:
        config.write("grad_accumulation_steps: 1\nclear_cache_threshold: 0\nresume_adapter_file: /a/b/c.safetensors\n")
    place, address = serve()
    with beside(place, [tmp_path]):
        for width in (320, 390, 710, 1280):
            watching = Watching(browser, address, phone=True)
            watching.page.set_viewport_size({"width": width, "height": 844})
            watching.until("document.body.dataset.step === '30'")
            names = watching.page.locator(".options dt").all_inner_texts()
            assert "grad_accumulation_steps" in names
            wide = watching.page.locator(".options dt, .options dd").evaluate_all(
                "all => all.filter((cell) => cell.scrollWidth > cell.clientWidth).map((cell) => cell.textContent)"
            )
            assert wide == [], width
            watching.page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
            watching.check()
