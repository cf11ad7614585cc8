from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from coordinator.stream import Advanced, Noted, RunEvent, Sampled, StepFinished, Validated
from coordinator.view import make_view
from coordinator.view.blocks import bar, plot
from coordinator.view.frame import frame, wrapped
from coordinator.view.plain import JsonView, PlainView
from coordinator.view.pressure import pressure_style
from coordinator.view.state import RunState
from coordinator.view.terminal import TerminalView
from tests.coordinator.view.synthetic import (
    FLEET,
    failing_run,
    fleet_metrics,
    started,
    step_metrics,
    validation_metrics,
    whole_run,
)

GIB = 1 << 30


def lines(*events: RunEvent, width: int = 80, height: int = 30, memory: int = 16 * GIB) -> list[str]:
    state = RunState()
    for event in events:
        state.apply(event)
    return [line.plain for line in frame(state, width, height, memory)]


def during(steps: int) -> list[RunEvent]:
    """The events of a run until a step is done."""
    events: list[RunEvent] = []
    for event in whole_run():
        events.append(event)
        if isinstance(event, StepFinished) and event.metrics["step"] == steps:
            return events
    raise AssertionError


@pytest.mark.parametrize("width", [1, 7, 20, 25, 39, 40, 71, 72, 80, 108, 250])
@pytest.mark.parametrize("height", [1, 3, 9, 24, 60])
def test_a_frame_never_leaves_its_room(width: int, height: int) -> None:
    wide: list[RunEvent] = [
        Sampled(20, "提示" * 30, "文" * 200),
        Noted("x", "語" * 200, "warning"),
        Advanced("検証" * 20, 3, 10),
    ]
    found = lines(*during(57), *wide, width=width, height=height)
    assert len(found) <= height
    assert max(cell_len(line) for line in found) <= width
    assert found[0 if height < 24 else -1]


def test_eighty_columns_show_it_all() -> None:
    text = "\n".join(lines(*during(57)))
    for part in (
        "step 57/100",
        "57%",
        "56 s left",
        "1.631 at step 40",
        "945 tokens/s",
        "72% · 11.5 GB peak",
        "3.91e-06",
    ):
        assert part in text
    for part in ("Studio · M2 Max", "worker ended by signal 9", "SELECT name FROM tables", "█"):
        assert part in text


def test_the_step_and_its_figures_outlive_the_rest_on_a_small_screen() -> None:
    found = lines(*during(57), height=5)
    assert found[0].startswith("adapters") or found[0].startswith("step 57/100")
    assert any(line.startswith("step 57/100") for line in found)
    assert any("tokens/s" in line for line in found)
    assert not any("█" in line for line in found)


def test_a_long_task_has_its_own_bar_before_training() -> None:
    assert lines(Advanced("tokenising train", 2500, 10_000)) == [
        "tokenising train ━━━━━━━━━━" + "─" * 30 + " 2,500/10,000"
    ]
    assert lines(Advanced("loading model", 0, 0)) == ["loading model …"]
    assert lines(Advanced("sending the model", 3 << 28, 1 << 30, in_bytes=True))[0].endswith(" 0.8 GB/1.0 GB")


def test_no_validation_and_unknown_memory_read_as_missing() -> None:
    metrics = step_metrics(1, peak_memory_bytes=None)
    text = "\n".join(lines(started(), StepFinished(metrics, report=True)))
    assert "validation -" in text
    assert "memory     -" in text
    assert "11.5 GB peak" in "\n".join(lines(*during(57), memory=0))


def test_each_machine_of_a_fleet_has_a_row() -> None:
    events: list[RunEvent] = [FLEET, started()]
    events += [StepFinished(fleet_metrics(step), report=True) for step in range(1, 30)]
    found = lines(*events)
    rows = [line.split("  ") for line in found if line.startswith(("node ", "Studio", "Air"))]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["node", "share", "tokens/s", "compute", "wait", "memory"],
        ["Studio", "75 %", "2,000", "0.8 s", "0.3 s", "48.0 GB", "trains"],
        ["Air", "25 %", "500", "1.0 s", "0.1 s", "15.0 GB", "slowest"],
    ]
    assert "memory     11.4 GB peak" in "\n".join(found), "a part of this machine's memory would mislead"
    assert not any("left out" in line for line in found), "the plan makes room for what happens"


def test_how_a_machine_is_and_who_is_away_stands_in_its_row() -> None:
    def states(*events: RunEvent) -> dict[str, str]:
        found = lines(FLEET, started(), *events)
        rows = [line for line in found if line.startswith(("Studio ", "Air ", "Mini "))]
        return {line[:18].strip(): line[65:] for line in rows if "↔" not in line}

    both = [StepFinished(fleet_metrics(step), report=True) for step in range(1, 5)]
    alone = StepFinished(fleet_metrics(5, ("Studio", "Mini")), report=True)
    hot = Noted("condition", "Studio: it is hot", "warning", {"node": "Studio", "now": "hot, memory red"})
    well = Noted("condition", "Studio: it is no longer hot", "warning", {"node": "Studio", "now": ""})
    preparing = Noted("preparing", "preparing Air to take part", details={"node": "Air"})
    assert states(*both, hot) == {"Studio": "hot, memory red", "Air": "slowest"}
    assert states(*both, hot, well)["Studio"] == "trains"
    assert states(*both, alone) == {"Studio": "trains", "Mini": "slowest", "Air": "away"}
    assert states(*both, alone, preparing)["Air"] == "is prepared"
    air = Noted("condition", "Air: it is hot", "warning", {"node": "Air", "now": "hot"})
    assert states(*both, air, alone, *both)["Air"] == "slowest", "it came back"
    assert states(*both, alone, preparing, *both) == {"Studio": "trains", "Air": "slowest", "Mini": "away"}


def test_the_plan_is_shown_until_the_first_step() -> None:
    link = "Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)"
    assert link in lines(FLEET, started())
    first = StepFinished(fleet_metrics(1), report=True)
    assert link not in lines(FLEET, started(), first)
    unnamed = StepFinished(step_metrics(2), report=True)
    assert link not in lines(FLEET, started(), first, unnamed), "it is false by then"


def test_the_last_machine_keeps_its_row_beside_those_who_are_gone() -> None:
    events: list[RunEvent] = [FLEET, started()]
    events += [StepFinished(fleet_metrics(step), report=True) for step in range(1, 30)]
    events += [StepFinished(fleet_metrics(step, ("Studio",)), report=True) for step in range(30, 32)]
    rows = [line.split("  ") for line in lines(*events) if line.startswith(("node ", "Studio", "Air"))]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["node", "share", "tokens/s", "compute", "wait", "memory"],
        ["Studio", "100 %", "1,935", "0.8 s", "0.3 s", "48.0 GB", "trains"],
        ["Air", *["-"] * 5, "away"],
    ]


def test_a_machine_alone_needs_no_table() -> None:
    found = lines(started(), StepFinished(fleet_metrics(1, ("Studio",)), report=True))
    assert not any(line.startswith(("node ", "Studio  ")) for line in found)


LOST = "birch is gone: the connection to it broke; went on from step 223 on amber, 0.1 s lost; 3 steps computed again"


@pytest.mark.parametrize(("width", "height"), [(80, 23), (40, 30), (200, 49)])
def test_what_happened_is_told_to_its_end(width: int, height: int) -> None:
    notes = [Noted("checkpoint", f"saved checkpoint {step:07d}") for step in range(4)]
    found = lines(*during(57), *notes, Noted("restarted", LOST, "warning"), width=width, height=height)
    assert LOST in " ".join(" ".join(found).split())
    assert len(found) <= height


def test_what_is_longer_than_its_room_ends_where_that_does() -> None:
    found = lines(started(), Noted("x", "word " * 400), Noted("y", "word " * 200, "warning"))
    told = [line for line in found if "word" in line]
    assert len(told) == 5
    assert told[-1].endswith("word …")


def test_on_a_small_screen_the_newest_is_told() -> None:
    notes = [Noted("checkpoint", f"saved checkpoint {step}") for step in range(4)]
    assert lines(*during(57), *notes, height=10)[-1] == "saved checkpoint 3"


def test_the_loss_curve_grows_with_the_screen_and_pushes_nothing_out() -> None:
    def drawn(height: int, *more: RunEvent) -> list[str]:
        return [line for line in lines(*during(57), *more, height=height) if set(line) & set("▁▂▃▄▅▆▇█")]

    assert [len(drawn(height)) for height in (23, 24, 39, 49, 80)] == [3, 5, 9, 14, 20]
    many = [Noted("x", "word " * 40, "warning") for _ in range(8)]
    for height in (30, 39, 49):
        found = lines(*during(57), *many, height=height)
        assert len(found) <= height
        assert any("SELECT name FROM tables" in line for line in found), "what is the first to go"
    assert len(drawn(49, *many)) == 14


@pytest.mark.parametrize("width", [12, 40, 80])
@pytest.mark.parametrize("address", ["http://127.0.0.1:21700/", f"http://studio.local:21700/?token={'x' * 32}"])
def test_the_address_of_the_page_is_always_there_and_whole(width: int, address: str) -> None:
    for events in ([Advanced("loading model", 0, 0)], during(57)):
        state = RunState()
        for event in events:
            state.apply(event)
        found = [line.plain for line in frame(state, width, 30, 0, address)]
        assert address in "".join(line.removeprefix("dashboard  ") for line in found)
        assert max(map(cell_len, found)) <= width
    assert "dashboard" not in "".join(lines(*during(57)))


def test_long_words_and_wide_ones_are_wrapped() -> None:
    assert wrapped("aa bb cc", 5) == ["aa bb", "  cc"]
    assert wrapped("a bbbbbbb c", 5) == ["a bbb", "  bbb", "  b c"]
    assert wrapped("語語語", 4) == ["語", "  語", "  語"]
    assert wrapped("", 4) == [""]


@pytest.mark.parametrize("width", [10, 36, 46, 60, 80, 120])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_a_large_fleet_takes_a_third_of_the_screen(width: int, height: int) -> None:
    names = tuple(f"機械 number {index}" for index in range(64))
    found = lines(started(), StepFinished(fleet_metrics(1, names), report=True), width=width, height=height)
    assert max(cell_len(line) for line in found) <= width
    assert len(found) <= height
    if height >= 24:
        assert sum(line.startswith("機械") for line in found) == height // 3 - 1
        assert any(line.startswith(f"and {64 - (height // 3 - 1)}") for line in found)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, 0.0, -1.0, 1e30])
def test_any_loss_can_be_drawn(loss: float | None) -> None:
    events = [StepFinished(step_metrics(s, loss=loss), report=True) for s in range(1, 20)]
    found = lines(started(), *events, Validated(validation_metrics(19, val_loss=loss), best=False))
    assert ("not a finite number" in "\n".join(found)) == (loss is not None and not math.isfinite(loss))


def test_markup_in_a_run_is_text() -> None:
    found = lines(started(name="[red]x[/nope]", facts=(("[b]", "[/b]"),)), Noted("x", "[bold]done[/"))
    assert found[0].startswith("[red]x[/nope]")
    assert "[bold]done[/" in found


def test_a_hundred_thousand_steps_are_drawn_from_bounded_memory() -> None:
    state = RunState()
    state.apply(started(100_000))
    for number in range(1, 100_001):
        state.apply(
            StepFinished({"step": number, "loss": 5 - number / 50_000, "tokens": 1, "seconds": 0.1}, report=False)
        )
    assert len(state.smoothed.buckets) <= 1000
    found = [line.plain for line in frame(state, 80, 30, 0)]
    assert any(line.lstrip().startswith("4.9") for line in found)
    assert any(line.lstrip().startswith("3.0") for line in found)


def test_pressure_has_three_colours() -> None:
    assert [pressure_style(part, 100) for part in (50, 80, 95)] == ["green", "yellow", "bold red"]


def test_bars_and_plots() -> None:
    assert bar(0.25, 10) == ("━━╸", "─" * 7)
    assert bar(7.0, 4) == ("━━━━", "")
    assert plot([0, 1], 2, 2) == [" █", "▁█"]
    assert plot([5, 5, 5], 3, 1) == ["▄▄▄"]
    assert plot([], 3, 1) == []


def recorded(width: int = 80, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, record=True, highlight=False)


def test_the_summary_stays_and_commands_stay_on_one_line() -> None:
    console = recorded(width=50)
    view = TerminalView(console, live=False)
    for event in whole_run():
        view.handle(event)
    view.close()
    text = console.export_text()
    assert "Done: 100 steps in 1 min 41 s" in text
    assert "test: loss 1.500" in text
    assert "worker ended by signal 9" in text[text.index("step 100/100") :]
    command = "coordinator generate --model mlx-community/Mistral-7B-v0.3-4bit --adapter-path adapters -p Hi"
    assert f"  {command}\n" in text


def test_why_it_failed_is_left_to_the_error_that_ends_the_program() -> None:
    console = recorded()
    view = TerminalView(console, live=False)
    for event in (*during(30), *failing_run("Air is gone")):
        view.handle(event)
    view.close()
    text = console.export_text()
    assert "Air is gone" not in text
    assert "Air is silent" in text
    assert "Failed: 30 steps" in text
    assert "checkpoint of step 40 in adapters" in text


def test_an_interrupted_run_gives_the_terminal_back() -> None:
    console = recorded()
    view = TerminalView(console, live=False)
    for event in during(30):
        view.handle(event)
    view.close()
    view.close()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


def test_a_resized_terminal_is_drawn_anew() -> None:
    console = recorded()
    view = TerminalView(console, live=False)
    for event in during(30):
        view.handle(event)
    console.width = 50
    before = len(console.file.getvalue())  # type: ignore[attr-defined]
    console.print(view.renderable())
    drawn = console.file.getvalue()[before:]  # type: ignore[attr-defined]
    assert "\x1b[2J" in drawn
    view.close()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_view_fits_what_standard_output_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(make_view("auto"), PlainView)
    assert isinstance(make_view("json"), JsonView)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view("auto"), PlainView)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view("auto"), TerminalView)
    assert isinstance(make_view("plain"), PlainView)
    assert isinstance(make_view("quiet"), PlainView)


def test_what_only_a_terminal_needs_is_not_imported_for_lines() -> None:
    code = "import sys, coordinator.view; sys.exit('rich' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
