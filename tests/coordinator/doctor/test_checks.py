"""What several machines tell of each other, from made-up facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from coordinator.discovery import SILENT, unpaired
from coordinator.doctor.checks import Measured, check_links, check_together, no_answer
from coordinator.doctor.machine import Clock, Machine, clock_of
from coordinator.links import GIGABIT, Path, Paths
from coordinator.view.format import one_line, shortened
from node.doctor.finding import Diagnosis, Finding, Outcome, Reached
from node.hardware import Facts
from node.info import Interface, NodeInfo

OURS = Facts("a", None, None, None, None, None, "macOS 26.2", "3.12.1", "0.32.5", "0.32.2")
NAMES = ("anna", "ben", "cleo")


def info(name: str) -> NodeInfo:
    address = Interface("en0", "ethernet", f"10.0.0.{NAMES.index(name) + 1}")
    return NodeInfo(f"id-{name}", f"home-{name}", name, 1, "0.1.0", OURS, (address,), relay_port=7)


def at(name: str, port: int) -> str:
    return f"10.0.0.{NAMES.index(name) + 1}:{port}"


def machine(name: str) -> Machine:
    """One that hears all others and reaches them."""
    others = [other for other in NAMES if other != name]
    reached = tuple(Reached(at(other, port), "answers") for other in others for port in (21617, 7))
    said = Diagnosis(info(name), (), reached, tuple(f"id-{other}" for other in others))
    return Machine(name, name == "anna", at(name, 21617), True, said, clock=Clock(0.0, 0.01))


def says(one: Machine, **changed: object) -> Machine:
    assert one.diagnosis is not None
    return replace(one, diagnosis=replace(one.diagnosis, **changed))  # type: ignore[arg-type]


def paths(*lost: tuple[str, str], gbit: float = 9.0, latency: float = 0.0004) -> Paths:
    """Between all; ``lost`` are not reached."""
    found = {}
    for one in NAMES:
        for other in NAMES:
            if one != other:
                way = Path(at(other, 7), "ethernet", "en0", gbit * GIGABIT, latency)
                found[f"id-{one}", f"id-{other}"] = () if (one, other) in lost else (way,)
    return Paths(found, {f"id-{name}": name for name in NAMES})


ALL = [machine(name) for name in NAMES]
ANNA, BEN, CLEO = ALL


def only(check: str, one: Machine, machines: Sequence[Machine] = (), measured: Measured | None = None) -> Finding:
    found = check_together(one, machines or ALL, measured or Measured(paths()), OURS)
    (finding,) = (finding for finding in found if finding.check == check)
    return finding


@pytest.mark.parametrize("one", ALL, ids=NAMES)
def test_a_healthy_fleet_has_no_complaint(one: Machine) -> None:
    found = check_together(one, ALL, Measured(paths()), OURS)
    assert {finding.verdict for finding in found} == {"ok"}, found
    assert {finding.check for finding in found} >= {"clock", "bonjour", "reachable"}


def test_a_machine_alone_has_nothing_to_be_compared_with() -> None:
    found = check_together(ANNA, [ANNA], Measured(), OURS)
    assert [(finding.check, finding.verdict) for finding in found] == [("clock", "unknown")]


def test_other_versions_are_named_with_the_command() -> None:
    old = says(CLEO, info=replace(CLEO.info, facts=replace(OURS, mlx="0.31.0")))
    finding = only("versions", old)
    assert finding == Finding(
        "versions", "wrong", "it has mlx 0.31.0, here is 0.32.5", "on cleo: pip install 'mlx==0.32.5'"
    )


def clocks(*ahead: float, uncertain: float = 0.01) -> list[Finding]:
    machines = [replace(one, clock=Clock(by, uncertain)) for one, by in zip(ALL, ahead, strict=False)]
    return [only("clock", one, machines) for one in machines]


def test_the_clock_that_differs_from_most_is_wrong_even_if_it_is_ours() -> None:
    assert [finding.verdict for finding in clocks(0, 0.3, 3600)] == ["ok", "ok", "wrong"]
    assert "3600 s ahead" in clocks(0, 0.3, 3600)[2].seen
    assert "sntp" in clocks(0, 0.3, 3600)[2].mend
    # Ours is behind: both others are ahead of it by the same.
    ours, ben, cleo = clocks(0, 600, 600.2)
    assert (ours.verdict, ben.verdict, cleo.verdict) == ("wrong", "ok", "ok")
    assert "600 s behind" in ours.seen
    assert [finding.verdict for finding in clocks(0, 10)] == ["ok", "warning"], "of two, ours counts"
    assert [finding.verdict for finding in clocks(0, 10, uncertain=9)] == ["ok", "unknown"]


def test_a_clock_that_was_not_compared_is_unknown() -> None:
    assert only("clock", replace(BEN, clock=None)).verdict == "unknown"


def test_the_way_there_and_back_does_not_count_as_difference() -> None:
    said = Diagnosis(info("ben"), (), received=1000.5, replied=1010.5)
    # Half a second each way, ten seconds of work.
    assert clock_of(said, 1000.0, 1011.0) == Clock(0.0, 0.5)
    assert clock_of(said, 900.0, 911.0) == Clock(100.0, 0.5)


def test_who_hears_nobody_or_is_heard_by_nobody_is_cut_off_and_the_others_are_not() -> None:
    deaf = says(CLEO, heard=())
    silent = [says(ANNA, heard=("id-ben",)), says(BEN, heard=("id-anna",))]
    for cleo, others, words in (
        (deaf, [ANNA, BEN], "hears no other node: multicast"),
        (CLEO, silent, "is heard by none: multicast"),
        (deaf, silent, "hears no other node and is heard by none"),
    ):
        machines = [*others, cleo]
        assert words in only("bonjour", cleo, machines).seen
        assert only("bonjour", cleo, machines).verdict == "wrong"
        assert "5353" in only("bonjour", cleo, machines).mend
        assert [only("bonjour", other, machines).verdict for other in others] == ["ok", "ok"]


def test_one_advert_that_is_missed_is_a_warning_and_bonjour_that_is_off_is_no_fault() -> None:
    machines = [ANNA, says(BEN, heard=("id-anna",)), CLEO]
    assert only("bonjour", machines[1], machines) == Finding(
        "bonjour", "warning", "it does not hear cleo", only("bonjour", machines[1], machines).mend
    )
    off = [ANNA, BEN, says(CLEO, bonjour=False, heard=())]
    checks = [finding.check for finding in check_together(off[2], off, Measured(paths()), OURS)]
    assert "bonjour" not in checks
    # Who is not advertised is not to be heard.
    hidden = [replace(says(ANNA), advertised=False), says(BEN, heard=("id-cleo",)), says(CLEO, heard=("id-ben",))]
    assert [only("bonjour", one, hidden).verdict for one in hidden] == ["ok"] * 3


def reaches_cleo(outcome: Outcome, *who: Machine, port: int = 7) -> list[Machine]:
    """All, of whom some get this from one of cleo's ports."""
    bad = Reached(at("cleo", port), outcome)
    changed = [
        says(one, reached=tuple(bad if item.address == bad.address else item for item in one.diagnosis.reached))
        for one in who
        if one.diagnosis is not None
    ]
    return [next((two for two in changed if two.label == one.label), one) for one in ALL]


def test_a_port_that_nobody_reaches_is_its_machines_fault() -> None:
    machines = reaches_cleo("silent", ANNA, BEN)
    lost = Measured(paths(("anna", "cleo"), ("ben", "cleo")))
    finding = only("reachable", machines[2], machines, lost)
    assert finding.verdict == "wrong"
    assert finding.seen == "the relay's port 7 is not reached by anna (no answer), ben (no answer)"
    assert finding.mend.startswith("on cleo: System Settings › Network › Firewall")
    assert "PYTHON" not in finding.mend, "nobody can type that"
    assert [only("reachable", one, machines, lost).verdict for one in machines[:2]] == ["ok", "ok"]
    service = reaches_cleo("refuses", ANNA, BEN, port=21617)
    finding = only("reachable", service[2], service)
    assert "the service's port 21617 is not reached by anna (nothing listens there)" in finding.seen
    assert "`node serve`" in finding.mend


def test_what_opens_a_firewall_is_what_its_machine_says_or_its_systems_command() -> None:
    lost = Measured(paths(("anna", "cleo"), ("ben", "cleo")))
    machines = reaches_cleo("silent", ANNA, BEN)
    itself = says(machines[2], findings=(Finding("firewall", "unknown", "on", "sudo firewall --add /opt/python"),))
    assert only("reachable", itself, [*machines[:2], itself], lost).mend == "on cleo: sudo firewall --add /opt/python"
    linux = says(machines[2], info=replace(CLEO.info, facts=replace(OURS, os="Debian 12")))
    assert only("reachable", linux, [*machines[:2], linux], lost).mend == (
        "on cleo: sudo ufw allow proto tcp from 10.0.0.1 && sudo ufw allow proto tcp from 10.0.0.2, or as your firewall"
        " has it"
    )
    for system, words in (("macOS 26.2", "System Settings"), ("Debian 12", "ip route")):
        assert words in no_answer(silent("denied"), replace(OURS, os=system)).mend
    assert "without a word" not in no_answer(silent("refuses"), OURS).mend, "nobody knows that it ever ran there"


def test_nobody_to_hear_is_not_good() -> None:
    here = replace(says(ANNA, heard=("id-ben",)), advertised=False)  # it serves for the doctor only
    machines = [here, says(BEN, heard=())]
    assert only("bonjour", machines[0], machines).verdict == "ok"
    assert only("bonjour", machines[1], machines) == Finding(
        "bonjour", "unknown", "there is no other node that it could hear"
    )


@pytest.mark.parametrize(
    ("outcome", "verdict", "words"),
    [
        ("silent", "unknown", "10.0.0.3:21617: no answer"),
        ("refuses", "warning", "10.0.0.3:21617: nothing listens there"),
        ("answers", "wrong", "10.0.0.3:21617: it takes the connection, but nothing comes through"),
        ("failed", "unknown", "10.0.0.3:21617: the connection fails"),
    ],
)
def test_who_is_paired_and_missing_is_judged_by_its_last_address(outcome: Outcome, verdict: str, words: str) -> None:
    finding = no_answer(replace(silent(outcome), remembered=True), OURS)
    assert (finding.check, finding.verdict) == ("answer", verdict)
    assert finding.seen == f"it is paired, and was not found; where it answered last, {words}"
    other = replace(silent(None), problem=unpaired("10.0.0.3:21617"), remembered=True)
    assert no_answer(other, OURS).verdict == "unknown"
    assert "another machine answers at its last address, 10.0.0.3:21617" in no_answer(other, OURS).seen


def test_a_port_that_one_reaches_not_is_a_warning_and_a_denied_one_is_the_askers() -> None:
    machines = reaches_cleo("denied", ANNA)
    finding = only("reachable", machines[2], machines, Measured(paths(("anna", "cleo"))))
    assert finding.verdict == "warning"
    assert "on those that ask" in finding.mend


def test_a_connection_that_is_taken_and_carries_nothing_is_not_good() -> None:
    """As macOS's firewall does it."""
    lost = Measured(paths(("anna", "cleo"), ("ben", "cleo")))
    finding = only("reachable", CLEO, ALL, lost)
    assert (finding.verdict, "the connection fails" in finding.seen) == ("wrong", True)


def test_what_was_not_tried_is_unknown() -> None:
    machines = [says(ANNA, reached=()), BEN, CLEO]
    assert only("reachable", CLEO, machines, Measured()) == Finding("reachable", "unknown", "not tried by anna")


def test_what_a_machine_would_not_try_is_unknown_with_its_reason() -> None:
    why = "10.0.0.3 is far" + "\x1b[2J" * 100
    refused = tuple(Reached(at("cleo", port), "untried", why) for port in (21617, 7))
    machines = [says(ANNA, reached=refused), BEN, CLEO]
    finding = only("reachable", CLEO, machines, Measured())
    assert finding == Finding("reachable", "unknown", f"not tried by anna ({shortened(one_line(why), 200)})")
    assert "\x1b" not in finding.seen
    # What the link's measurement has found out counts.
    assert only("reachable", CLEO, machines, Measured(paths())).seen == finding.seen, "the service is another port"
    service = (refused[0], Reached(at("cleo", 21617), "answers"), refused[1])
    machines = [says(ANNA, reached=service), BEN, CLEO]
    assert only("reachable", CLEO, machines, Measured(paths())).verdict == "ok"


def test_nodes_of_one_machine_are_tried_where_who_asks_from_elsewhere_may() -> None:
    info = replace(
        ANNA.info, interfaces=(Interface("en0", "ethernet", "10.0.0.1"), Interface("lo0", "loopback", "127.0.0.1"))
    )
    two = Machine("two", own=False, address="10.0.0.1:4000", diagnosis=Diagnosis(info, ()))
    assert two.service_seen_from(replace(info, id="one")) == ("127.0.0.1:4000", "10.0.0.1:4000")


def test_links_are_shown_with_their_speed() -> None:
    found = check_links(ALL, Measured(paths()))
    assert [finding.seen for finding in found] == [
        f"{one} ↔ {other}: en0 9.0 Gbit/s 0.4 ms" for one, other in (NAMES[:2], NAMES[::2], NAMES[1:])
    ]
    assert {finding.verdict for finding in found} == {"ok"}
    slow = check_links(ALL[:2], Measured(paths(gbit=0.05)))
    assert [(finding.verdict, "cable" in finding.mend) for finding in slow] == [("warning", True)]
    far = check_links(ALL[:2], Measured(paths(latency=0.08)))
    assert far[0].verdict == "warning"


def test_a_link_that_is_lost_in_one_direction_is_lost() -> None:
    found = check_links(ALL, Measured(paths(("ben", "cleo"))))
    assert [finding.verdict for finding in found] == ["ok", "ok", "wrong"]
    assert found[2].seen == "ben ↔ cleo: ben does not reach cleo"


def test_machines_that_train_are_left_alone() -> None:
    found = check_links(ALL[:2], Measured(None, ("ben",)))
    assert found == (Finding("link", "unknown", "anna ↔ ben: not measured, ben trains"),)


def silent(outcome: Outcome | None) -> Machine:
    answer = None if outcome is None else Reached("10.0.0.3:21617", outcome)
    return Machine("Cleo Mini", False, "10.0.0.3:21617", problem=SILENT, answer=answer)


@pytest.mark.parametrize(
    ("one", "check", "verdict", "mend"),
    [
        (silent("silent"), "answer", "wrong", "firewall"),
        (silent("refuses"), "answer", "wrong", "node serve"),
        (silent("answers"), "answer", "wrong", "frozen"),
        (silent("denied"), "answer", "wrong", "Local Network"),
        (silent(None), "answer", "wrong", "firewall"),
        (replace(silent(None), problem=unpaired("Cleo Mini")), "pairing", "warning", "coordinator pair 'Cleo Mini'"),
        (
            replace(silent(None), problem="cleo does not know this machine (any more): pair the two again"),
            "pairing",
            "wrong",
            "coordinator unpair",
        ),
        (
            replace(silent(None), problem="runs mlx-tandem 9, too new for 1 here; on this machine: pip install x"),
            "answer",
            "wrong",
            "on this machine: pip install x",
        ),
    ],
)
def test_who_does_not_answer_is_named_with_the_reason(one: Machine, check: str, verdict: str, mend: str) -> None:
    finding = no_answer(one, OURS)
    assert (finding.check, finding.verdict) == (check, verdict)
    assert mend in finding.mend
    assert check_together(one, [one], Measured(), OURS) == (finding,)
