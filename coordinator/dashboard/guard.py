"""What stands before every request: the right host, the token, reading only; and what goes with every answer."""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.dashboard.address import may_be_called

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Guard:
    """The application, behind its checks.

    Args:
        app: what answers.
        host: that the server listens on.
        port: likewise; cookies of one host are shared by its ports.
        token: that must be shown; "" where only this machine can ask.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, token: str) -> None:
        self._app = app
        self._host = host
        self._token = token
        self._cookie = f"tandem-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":  # no sockets here
            return
        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["method"] not in {"GET", "HEAD"}:
            return PlainTextResponse("for reading only\n", 405, {"Allow": "GET, HEAD"})
        if not may_be_called(headers.get("host", ""), self._host, loopback=not self._token):
            return PlainTextResponse("this server is not called that\n", 421)
        if not self._token:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = [value for name, value in query if name == "token"]
        if shown:
            return self._enter(scope["path"], shown, [(name, value) for name, value in query if name != "token"])
        if self._same(self._cookie_of(headers)):
            return None
        return PlainTextResponse("open the address that was printed, with its token\n", 401)

    def _enter(self, path: str, shown: list[str], rest: list[tuple[str, str]]) -> Response:
        """Keep a right token in a cookie and go on without it, so that it stays in no history and no link."""
        if len(shown) != 1 or not self._same(shown[0]):
            return PlainTextResponse("a wrong token: open the address that was printed\n", 403)
        # Of several slashes a browser would make another host.
        where = "/" + path.lstrip("/") + (f"?{urlencode(rest)}" if rest else "")
        answer = RedirectResponse(where, 303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        return answer

    def _cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return found.value if found is not None else ""

    def _same(self, shown: str) -> bool:
        return secrets.compare_digest(shown.encode(), self._token.encode())
