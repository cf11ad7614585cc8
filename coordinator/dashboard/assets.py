"""What pages are made of besides their text. All of it is on this machine: nothing is fetched from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources

ASSETS = {
    "chart.js": "text/javascript",
    "dashboard.js": "text/javascript",
    "report.css": "text/css",
    "dashboard.css": "text/css",
}
# Chart.js as the package chartkick ships it.
_PLACES = {"chart.js": ("chartkick", "django/static/chartkick/Chart.bundle.js"), "report.css": ("coordinator.view", "")}


@cache
def asset(name: str) -> bytes:
    """One of ``ASSETS``."""
    package, path = _PLACES.get(name, ("coordinator.dashboard", ""))
    return resources.files(package).joinpath(path or name).read_bytes()
