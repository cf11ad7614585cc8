"""Write the file that has launchd or systemd start ``node serve``; deploy/install.sh calls it in the new environment.

    python deploy/services.py agent --log FILE --launcher FILE -- PROGRAM serve > local.mlx-tandem.node.plist

The kinds are ``agent`` and ``daemon`` (launchd, at login and at boot), ``user`` and ``system`` (systemd, likewise).
"""

from __future__ import annotations

import argparse
import os
import plistlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LABEL = "local.mlx-tandem.node"
"""What launchd calls the service, and macOS the app."""
PATIENCE_SECONDS = 60
"""How long the app asks for the local network before it starts the node all the same."""
OPEN_FILES = 8192
"""launchd allows 256, and a node has room for as many connections alone."""
TEMPLATES = Path(__file__).resolve().parent / "systemd"


def launchd_plist(
    kind: str,
    command: Sequence[str],
    *,
    user: str,
    home: Path,
    log: Path,
    launcher: Path | None,
    environment: Mapping[str, str],
) -> bytes:
    """A property list for launchd.

    Args:
        kind: ``agent``, for the user who is logged in, or ``daemon``, for the system.
        command: what serves, with an absolute path.
        user: as whom a daemon runs.
        home: that user's home folder.
        log: file for what it says; the node keeps it from growing without end.
        launcher: the app's main program, which starts the command; None starts it without.
        environment: further variables.
    """
    program = [*command, "--log", str(log)]
    if launcher is not None:
        program = [str(launcher), str(PATIENCE_SECONDS), *program]
    service: dict[str, object] = {
        "Label": LABEL,
        "ProgramArguments": program,
        "WorkingDirectory": str(home),
        "EnvironmentVariables": {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **environment},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": 90,  # it hands over its job between two steps
        "ProcessType": "Interactive",  # any other kind is slowed down
        "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "Umask": 0o077,
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    if kind == "agent":
        service |= {"LimitLoadToSessionType": "Aqua", "AssociatedBundleIdentifiers": [LABEL]}
    else:
        service |= {"UserName": user}
        service["EnvironmentVariables"] = {"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **environment}
    return plistlib.dumps(service)


def systemd_unit(
    kind: str,
    command: Sequence[str],
    *,
    user: str,
    home: Path,
    writable: Sequence[Path],
    environment: Mapping[str, str],
) -> str:
    """A unit for systemd.

    Args:
        kind: ``user`` or ``system``.
        command: what serves, with an absolute path.
        user: as whom the system's unit runs.
        home: that user's home folder.
        writable: where the system's unit may write; those that are missing are passed over.
        environment: further variables.
    """
    text = (TEMPLATES / f"{kind}.service").read_text()
    text = text[text.index("[Unit]") :]
    filled = {
        "@COMMAND@": " ".join(_quoted(word).replace("$", "$$") for word in command),
        "@ENVIRONMENT@": "\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()),
        "@HOME@": str(home).replace("%", "%%"),
        "@USER@": user,
        "@WRITABLE@": " ".join(_quoted(f"-{path}") for path in writable),
    }
    for place, value in filled.items():
        text = text.replace(place, value)
    return text


def _quoted(word: str) -> str:
    """A word as systemd reads it back."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def main(arguments: Sequence[str]) -> None:
    """Write what was asked for to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["agent", "daemon", "user", "system"])
    parser.add_argument("--user", default="")
    parser.add_argument("--home", type=Path, default=Path.home())
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    parser.add_argument("--launcher", type=Path)
    parser.add_argument("--writable", type=Path, action="append", default=[])
    parser.add_argument("--environment", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    environment = dict(item.split("=", 1) for item in given.environment)
    who = {"user": given.user, "home": given.home, "environment": environment}
    if given.kind in ("agent", "daemon"):
        made = launchd_plist(given.kind, given.command, log=given.log, launcher=given.launcher, **who)
        sys.stdout.buffer.write(made)
    else:
        sys.stdout.write(systemd_unit(given.kind, given.command, writable=given.writable, **who))


if __name__ == "__main__":
    main(sys.argv[1:])
