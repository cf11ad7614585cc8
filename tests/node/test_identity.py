from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from node.errors import TandemError
from node.identity import Identity, identity
from node.peers import home_of


def machine(number: str) -> dict[str, Any]:
    return {"system": "Linux", "read": lambda path: number if path == "/etc/machine-id" else None}


def test_is_stable_and_differs_by_name(tmp_path: Path) -> None:
    first, again, other = (identity(tmp_path, name) for name in ("Studio", "Studio", "Mini"))
    assert first == again
    assert (first.home, first.secret) == (other.home, other.secret)
    assert first.id != other.id
    assert len(first.id) == len(first.home) == 16


def test_homes_differ(tmp_path: Path) -> None:
    assert identity(tmp_path / "a", "Studio").home != identity(tmp_path / "b", "Studio").home


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    identity(tmp_path / "new" / "home", "Studio")
    folder = tmp_path / "new" / "home" / "identity"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {"key.pem", "certificate.pem", "machine", "secret", "lock"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_a_copied_home_gets_a_new_key_and_keeps_the_old(tmp_path: Path) -> None:
    before = identity(tmp_path, "Studio", **machine("one"))
    assert identity(tmp_path, "Studio", **machine("one")) == before
    after = identity(tmp_path, "Studio", **machine("two"))
    assert after.id != before.id
    assert after.home != before.home
    assert after.secret != before.secret
    assert identity(tmp_path, "Studio", **machine("two")) == after
    assert len(list((tmp_path / "identity").glob("key.pem.of-another-machine-*"))) == 1


def test_a_copied_home_trusts_nobody_and_has_no_tokens(tmp_path: Path) -> None:
    folders = ("peers", "invites", "joined")
    marks = []
    for number in ("one", "two", "one", "two"):
        identity(tmp_path, "Studio", **machine(number))
        assert not any((tmp_path / folder).exists() for folder in folders), number
        for folder in folders:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / f"of-{number}").write_text("")
        identity(tmp_path, "Studio", **machine(number))
        assert (tmp_path / "peers" / f"of-{number}").exists(), "the same machine keeps its own"
        marks.append((tmp_path / "identity" / "key.pem").read_bytes())
    assert len(set(marks)) == 4
    for folder in folders:
        aside = sorted(path.name for path in tmp_path.glob(f"{folder}.of-another-machine-*/*"))
        assert aside == ["of-one", "of-one", "of-two"], "nothing that was put aside is lost"


def test_a_key_is_bound_as_soon_as_the_machine_is_known(tmp_path: Path) -> None:
    bound = tmp_path / "identity" / "machine"
    before = identity(tmp_path, "Studio", **machine(""))
    assert not bound.exists()
    for left in (None, ""):  # by a kill, or an older version
        bound.unlink(missing_ok=True)
        if left is not None:
            bound.write_text(left)
        assert identity(tmp_path, "Studio", **machine("one")) == before
        assert bound.read_text()
    assert identity(tmp_path, "Studio", **machine("two")) != before


def test_a_new_key_gets_a_new_certificate(tmp_path: Path) -> None:
    before = identity(tmp_path, "Studio")
    certificate = tmp_path / "identity" / "certificate.pem"
    kept = certificate.read_bytes()
    (tmp_path / "identity" / "key.pem").unlink()  # as is said when it is none
    after = identity(tmp_path, "Studio")
    assert after.home != before.home
    assert home_of(certificate.read_bytes()) == after.home
    for wrong in (kept, b"nonsense"):
        certificate.write_bytes(wrong)
        assert identity(tmp_path, "Studio") == after
        assert home_of(certificate.read_bytes()) == after.home
    right = certificate.read_bytes()
    identity(tmp_path, "Studio")
    assert certificate.read_bytes() == right, "one that fits stays: others know it"


def test_a_certificate_is_valid_by_a_clock_that_begins_anew(tmp_path: Path) -> None:
    identity(tmp_path, "Studio")
    found = x509.load_pem_x509_certificate((tmp_path / "identity" / "certificate.pem").read_bytes())
    assert found.not_valid_before_utc < datetime.fromtimestamp(0, UTC)


def test_a_machine_without_id_is_not_checked(tmp_path: Path) -> None:
    before = identity(tmp_path, "Studio", **machine("one"))
    assert identity(tmp_path, "Studio", **machine("")) == before


def test_a_mac_is_known_by_its_platform_uuid(tmp_path: Path) -> None:
    def mac(uuid: str) -> Identity:
        shown = f'  "IOPlatformUUID" = "{uuid}"\n  "IOPlatformSerialNumber" = "X"'
        return identity(tmp_path, "Studio", system="Darwin", run=lambda arguments: shown)

    assert mac("A-1") == mac("A-1")
    assert mac("A-1") != mac("B-2")


def test_a_broken_key_is_said_in_one_line(tmp_path: Path) -> None:
    identity(tmp_path, "Studio")
    (tmp_path / "identity" / "key.pem").write_text("nonsense")
    with pytest.raises(TandemError, match=r"key\.pem is no key; remove it"):
        identity(tmp_path, "Studio")


def test_a_home_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TandemError, match="cannot be kept there"):
        identity(tmp_path / "file", "Studio")


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from node.identity import identity; "
        "print(identity(Path(sys.argv[1]), 'Studio'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(said) == 1
