"""Where the assistant's turns stand in a rendered conversation, exactly or not at all.

A template that marks generated text itself (``{% generation %}``) is believed. Otherwise a turn begins where the
conversation before it, rendered with the prompt for an answer, ends; and it ends where the conversation up to it ends.
Both must be prefixes of the whole conversation's tokens. Some templates close the conversation, or render its last
turn, in a way of their own (Phi-3, Qwen3), so that the second is no prefix: then the turn ends with the first
end-of-turn token after its beginning, which is found with a probe.
"""

from __future__ import annotations

from coordinator.data.rows import BadRow, Message, Row
from coordinator.data.tokenizer import ChatTemplate

PROBE = "PROBE7"
ADVICE = "use --mask-prompt, which trains on the last answer, or data without --mask"


class AssistantTurns:
    """Finds the assistant's turns.

    Args:
        template: of the model.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._end_of_turn: str | None = None
        self._probed = False

    def spans(self, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a conversation, and the span of each of the assistant's turns.

        Raises:
            BadRow: the template gives no exact boundaries for this row.
        """
        if self.template.marks_generation:
            tokens, mask = self.template.generation_mask(row.messages, row.tools)
            spans = _runs(mask)
            if spans or not any(message["role"] == "assistant" for message in row.messages):
                return tokens, spans
        return self._by_prefixes(row)

    def _by_prefixes(self, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
        whole = self.template.render(row.messages, row.tools)
        tokens = self._encode(whole)
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        starts = [self._start(row, turn, whole) for turn in turns]
        spans = []
        for index, turn in enumerate(turns):
            limit = starts[index + 1] if index + 1 < len(turns) else len(whole)
            end = self._end(row, turn, whole, starts[index], limit)
            start_token = self._tokens_before(whole[: starts[index]], tokens, turn)
            spans.append((max(1, start_token), self._tokens_before(whole[:end], tokens, turn)))
        return tokens, spans

    def _start(self, row: Row, turn: int, whole: str) -> int:
        if turn == 0:
            raise BadRow(f"the conversation begins with the assistant, whose turn has no exact start; {ADVICE}")
        before = self.template.render(row.messages[:turn], row.tools, answer_next=True)
        if not whole.startswith(before):
            raise BadRow(f"the chat template gives message {turn + 1} no exact start; {ADVICE}")
        return len(before)

    def _end(self, row: Row, turn: int, whole: str, start: int, limit: int) -> int:
        """Characters up to the end of a turn, which lies after ``start`` and not after ``limit``."""
        upto = whole if turn == len(row.messages) - 1 else self.template.render(row.messages[: turn + 1], row.tools)
        if whole.startswith(upto) and start < len(upto) <= limit:
            return len(upto)
        mark = self._end_mark()
        found = whole.find(mark, start, limit) if mark else -1
        if found < 0:
            raise BadRow(f"the chat template gives message {turn + 1} no exact end; {ADVICE}")
        return found + len(mark or "")

    def _end_mark(self) -> str | None:
        """The special token that follows the text of an assistant's turn, or None when there is none."""
        if not self._probed:
            self._probed = True
            messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
            text = self.template.render(messages, None)
            tail = self._encode(text[text.rfind(PROBE) + len(PROBE) :]) if PROBE in text else []
            if tail and tail[0] in self.template.tokenizer.all_special_ids:
                self._end_of_turn = self.template.tokenizer.decode(tail[:1])
        return self._end_of_turn

    def _tokens_before(self, prefix: str, tokens: list[int], turn: int) -> int:
        """Number of tokens of a prefix, which must be a prefix in tokens too."""
        encoded = self._encode(prefix)
        if tokens[: len(encoded)] != encoded:
            raise BadRow(f"a token reaches across the boundary of message {turn + 1}; {ADVICE}")
        return len(encoded)

    def _encode(self, text: str) -> list[int]:
        return list(self.template.tokenizer.encode(text, add_special_tokens=False))


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of ones; position 0 is no target."""
    runs: list[tuple[int, int]] = []
    for position, flag in enumerate(mask):
        if not flag or position == 0:
            continue
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
