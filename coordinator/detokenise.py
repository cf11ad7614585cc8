"""Token ids to text while they arrive: what has been given out is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# Tokens that a character may still be waiting for; a longer wait means that the bytes are no UTF-8 at all.
LONGEST_WAIT = 12
# The window is decoded anew for each token: its length bounds the cost. When full it is cut to its last tokens.
WINDOW = 48
KEPT = 16


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the decoded whole.

    Decoding a token alone is wrong: characters can lie across tokens, and many decoders drop the space that begins
    what they are given. So a short window of the last tokens is decoded, and what is new at its end is handed out.

    Args:
        decode: text of token ids.
        before: tokens that the text continues, for the space between them; empty where the text stands alone.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before[-KEPT:])
        self._given = decode(self._window) if self._window else ""
        self._waiting = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain; "" while a character is incomplete."""
        return "".join(map(self._one, tokens))

    def _one(self, token: int) -> str:
        self._window.append(token)
        self._waiting += 1
        text = self._decode(self._window)
        if text.endswith(UNKNOWN) and self._waiting < LONGEST_WAIT:
            return ""
        return self._hand_out(text)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._hand_out(self._decode(self._window)) if self._waiting else ""

    def _hand_out(self, text: str) -> str:
        piece = text[len(self._given) :]
        self._given = text
        self._waiting = 0
        if len(self._window) >= WINDOW:
            self._cut()
        return piece

    def _cut(self) -> None:
        """Forget the window's older tokens, where that leaves the decoding of the rest as it is."""
        for count in range(KEPT, WINDOW):
            kept = self._window[-count:]
            text = self._decode(kept)
            if self._given.endswith(text) and (text or not self._given) and UNKNOWN not in text:
                self._window, self._given = kept, text
                return
        if len(self._window) >= 4 * WINDOW:
            self._window = self._window[-KEPT:]
            self._given = self._decode(self._window)
