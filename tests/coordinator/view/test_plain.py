from __future__ import annotations

import io
import json
import math

import pytest

from coordinator.stream import STOPPED, Advanced, Noted, RunEvent, RunFinished, Sampled, StepFinished, Validated
from coordinator.view.format import duration_text, loss_text, one_line, size_text
from coordinator.view.plain import JsonView, PlainView
from tests.coordinator.view.synthetic import (
    FACTS,
    FLEET,
    failing_run,
    fleet_metrics,
    started,
    step_metrics,
    validation_metrics,
    whole_run,
)


def lines(*events: RunEvent, quiet: bool = False) -> list[str]:
    stream = io.StringIO()
    view = PlainView(stream, quiet=quiet, clock=lambda: 0.0)
    for event in events:
        view.handle(event)
    view.close()
    return stream.getvalue().splitlines()


def test_a_run_reads_as_lines() -> None:
    text = lines(*whole_run())
    assert text[0] == "run 20260712-4f2a in adapters"
    assert text[1] == f"  model    {FACTS[0][1]}"
    assert "validation at step 0: loss 3.300" in text
    assert "sample at step 20: List the tables -> SELECT name FROM tables WHERE kind = 'user'" in text
    assert "saved adapters/0000020_adapters.safetensors" in text
    assert "warning: worker ended by signal 9; goes on from step 50" in text
    assert "test: loss 1.500, perplexity 4.482, 20,000 tokens" in text
    assert text[-2] == "try it:"
    assert text[-1].startswith("  coordinator generate --model")


def test_a_step_line_says_all_that_counts() -> None:
    metrics = step_metrics(10, loss=2.3141, tokens=1234, seconds=1.0, learning_rate=1e-5, peak_memory_bytes=3 << 29)
    found = lines(
        started(12), Validated(validation_metrics(0, val_loss=2.5), best=True), StepFinished(metrics, report=True)
    )[-1]
    assert found == "step 10/12  loss 2.314  val 2.500  1,234 tok/s  lr 1.00e-05  peak 1.5 GB  6.2 s left"


def test_a_fleet_reads_as_lines_and_steps_say_how_many_nodes() -> None:
    found = lines(FLEET, started(12), StepFinished(fleet_metrics(1), report=True))
    assert found[0] == "fleet: 2 machines: about 1.3 times Studio alone"
    assert found[4].startswith("  Mini is left out: ")
    assert "  2 nodes  peak" in found[-1]
    assert "  Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)" in found
    assert "nodes" not in lines(started(12), StepFinished(step_metrics(1), report=True))[-1]
    assert lines(FLEET, quiet=True) == []


def test_json_tells_of_the_fleet_and_of_each_node() -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    view.handle(FLEET)
    view.handle(StepFinished(fleet_metrics(1), report=False))
    formed, step = (json.loads(line) for line in stream.getvalue().splitlines())
    assert formed["event"] == "fleet"
    assert formed["members"][1] == {"name": "Air", "chip": "Apple M1", "memory_bytes": 16 << 30, "rows": 2}
    assert step["nodes"] == 2
    assert step["per_node"]["Air"]["wait_seconds"] == 0.1


def test_steps_that_no_report_was_asked_for_are_silent() -> None:
    assert len(lines(StepFinished(step_metrics(1), report=False))) == 0


def test_quiet_leaves_warnings_and_the_end() -> None:
    text = lines(*whole_run(), quiet=True)
    assert text[:2] == [
        "warning: worker ended by signal 9; goes on from step 50",
        "test: loss 1.500, perplexity 4.482, 20,000 tokens",
    ]
    assert text[2].startswith("done: 100 steps")


def test_a_validation_that_is_not_the_best_names_the_best() -> None:
    best = Validated(validation_metrics(10, val_loss=2.0), best=True)
    worse = Validated(validation_metrics(20, val_loss=2.5), best=False)
    assert lines(best, worse) == [
        "validation at step 10: loss 2.000  best so far",
        "validation at step 20: loss 2.500  best 2.000 at step 10",
    ]


def test_long_tasks_get_a_line_now_and_then() -> None:
    stream = io.StringIO()
    now = 0.0
    view = PlainView(stream, clock=lambda: now)
    for done in range(100):
        now = done / 10
        view.handle(Advanced("tokenising train", done * 100, 10_000))
    assert stream.getvalue().splitlines() == ["tokenising train: 5,000 of 10,000"]
    for done, total in ((0, 0), (7, 0), (0, 2)):
        now += 10
        view.handle(Advanced("measuring", done, total))
    now += 10
    view.handle(Advanced("sending the model", 5 << 20, 3 << 30, in_bytes=True))
    assert stream.getvalue().splitlines()[1:] == [
        "measuring",
        "measuring: 7",
        "measuring: 0 of 2",
        "sending the model: 5 MB of 3.0 GB",
    ]


def test_foreign_text_cannot_command_the_terminal() -> None:
    text = lines(Sampled(1, "a\x1b[2Jb", "line\nnext\x07\u202e"), Noted("x", "one\ntwo\x1b]0;title\x07", "error"))
    assert text == ["sample at step 1: a [2Jb -> line next", "error: one two ]0;title"]


def test_a_stream_that_knows_few_characters_gets_what_it_can_show() -> None:
    raw = io.BytesIO()
    view = PlainView(io.TextIOWrapper(raw, encoding="ascii"))
    view.handle(Noted("x", "Studio · M2 Max"))
    assert raw.getvalue() == b"Studio ? M2 Max\n"


def test_a_closed_pipe_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        for view in (PlainView(stream), JsonView(stream)):
            view.handle(Noted("x", "one"))
            view.handle(Noted("x", "two"))


@pytest.mark.parametrize("status", ["done", "stopped_early", "interrupted", "failed", "unheard of"])
def test_every_ending_is_said(status: str) -> None:
    text = lines(RunFinished(status, (("adapter", "a"),), (("go on", "coordinator train --resume"),)))
    assert len(text) == 4
    assert text[3] == "  coordinator train --resume"


@pytest.mark.parametrize("quiet", [False, True])
def test_why_it_failed_is_left_to_the_error_that_ends_the_program(quiet: bool) -> None:
    assert lines(*failing_run("Air is gone"), quiet=quiet) == [
        "warning: Air is silent",
        "failed: 0 steps",
        "  saved  checkpoint of step 40 in adapters",
        "go on:",
        "  coordinator train --resume --adapter-path adapters",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_where_it_was_stopped_is_left_to_the_last_line_of_the_program(quiet: bool) -> None:
    line = "stopped at step 40 of 100; everything is saved"
    end = RunFinished("interrupted", ((STOPPED, line),), (("go on", "coordinator train --resume"),))
    assert not any(line in shown for shown in lines(end, quiet=quiet))


def test_programs_are_told_why_it_failed() -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    for event in failing_run("Air is gone"):
        view.handle(event)
    _, note, finished = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (note["kind"], note["message"], note["level"]) == ("failed", "Air is gone", "error")
    assert finished["summary"][0] == ["failed", "Air is gone"]


def test_json_has_an_object_per_event() -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    events = list(whole_run())
    for event in events:
        view.handle(event)
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(found) == len(events)
    kinds = {"started", "step", "validation", "sample", "test", "progress", "note", "finished"}
    assert {line["event"] for line in found} == kinds
    steps = [line for line in found if line["event"] == "step"]
    assert steps[4] == {"event": "step", **step_metrics(5), "report": False}
    assert next(line for line in found if line["event"] == "validation")["val_loss"] == pytest.approx(3.3)


def test_json_is_json_whatever_a_run_contains() -> None:
    stream = io.StringIO()
    JsonView(stream).handle(StepFinished({"loss": math.nan, "odd": {1, 2}, "list": [math.inf]}, report=True))
    found = json.loads(stream.getvalue())
    assert (found["loss"], found["list"], found["odd"]) == (None, [None], "{1, 2}")


def test_numbers_read_well() -> None:
    assert [loss_text(x) for x in (0.0, 2.31449, 123.456, 1e-5, math.nan, math.inf, None)] == [
        *["0.000", "2.314", "123.5", "1.00e-05", "nan", "inf", "-"]
    ]
    assert [duration_text(x) for x in (0.0, 12.4, 59.7, 200, 7500, 300_000, None, math.inf)] == [
        *["0.0 s", "12 s", "1 min 00 s", "3 min 20 s", "2 h 05 min", "3 days 11 h", "-", "-"]
    ]
    assert [size_text(x) for x in (5 << 20, 1 << 30, 64 << 30, 512 << 30)] == ["5 MB", "1.0 GB", "64.0 GB", "512 GB"]
    assert one_line("a\r\n\tb  c") == "a b c"
