"""What the server answers: the pages, what they are made of, and a stream of snapshots for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from coordinator.dashboard.assets import ASSETS, asset
from coordinator.dashboard.compare import compare_snapshot
from coordinator.dashboard.feed import LOOK_EVERY_SECONDS, Feed, clock
from coordinator.dashboard.page import page
from coordinator.dashboard.snapshot import run_snapshot
from coordinator.dashboard.watched import Watched

ALIVE_EVERY_SECONDS = 15.0
ALL = "all"


def make_app(folders: Sequence[Path], ending: asyncio.Event) -> Starlette:
    """The application.

    Args:
        folders: of the runs, at least one.
        ending: set when the server is to stop; streams end then.
    """
    runs = [Watched(folder, title) for folder, title in zip(folders, titles(folders), strict=True)]
    lock = asyncio.Lock()
    feeds = {str(i): Feed([run], partial(run_snapshot, run), lock) for i, run in enumerate(runs)}
    if len(runs) > 1:
        feeds[ALL] = Feed(runs, partial(compare_snapshot, runs), lock)
    names = [(f"/run/{i}", run.title) for i, run in enumerate(runs)]
    links = [("/", "Compare"), *names] if len(runs) > 1 else []

    def feed_of(request: Request) -> Feed:
        found = feeds.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found

    async def first(request: Request) -> Response:
        del request
        return HTMLResponse(page(ALL if ALL in feeds else "0", "/", links))

    async def one(request: Request) -> Response:
        feed_of(request)
        name = request.path_params["name"]
        return HTMLResponse(page(name, f"/run/{name}", links))

    async def data(request: Request) -> Response:
        _, text = await feed_of(request).latest()
        return Response(text, media_type="application/json")

    async def stream(request: Request) -> Response:
        return StreamingResponse(_events(feed_of(request), ending), media_type="text/event-stream")

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404)
        return Response(asset(name), media_type=ASSETS[name], headers={"Cache-Control": "private, max-age=600"})

    routes: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/", first),
        ("/run/{name}", one),
        ("/data/{name}", data),
        ("/stream/{name}", stream),
        ("/assets/{name}", file),
    ]
    app = Starlette(routes=[Route(path, answer, methods=["GET"]) for path, answer in routes])
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    return app


def titles(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: their folders' names, with as much before them as tells them apart."""
    whole = [folder.expanduser().resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        short = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(short)) == len(set(whole)):
            break
    return [
        f"{name} ({short[:index].count(name) + 1})" if name in short[:index] else name
        for index, name in enumerate(short)
    ]


async def _events(feed: Feed, ending: asyncio.Event) -> AsyncIterator[str]:
    """Server-sent events: each snapshot as it is made; now and then the time, as a sign of life."""
    sent, silent = 0, 0.0
    while not ending.is_set():
        version, text = await feed.latest()
        if version != sent:
            sent, silent = version, 0.0
            yield f"data: {text}\n\n"
        elif silent >= ALIVE_EVERY_SECONDS:
            silent = 0.0
            yield f"event: clock\ndata: {clock()}\n\n"
        silent += LOOK_EVERY_SECONDS
        try:
            # Files tell nobody that they have grown.
            await asyncio.wait_for(ending.wait(), LOOK_EVERY_SECONDS)
        except TimeoutError:
            continue
    version, text = await feed.latest(last=True)
    if version != sent:  # how the run ended
        yield f"data: {text}\n\n"
