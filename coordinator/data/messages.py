"""Conversations: checks of every message, and ShareGPT's form read as the usual one."""

from __future__ import annotations

import difflib
import json
from typing import Any

from coordinator.data.rows import BadRow, Message

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "chatgpt": "assistant"}
SHAREGPT_ROLES = {
    **{role: role for role in KNOWN_ROLES},
    **FOREIGN_ROLES,
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def read_messages(value: Any, key: str) -> tuple[Message, ...]:
    """Check a conversation and bring it into the form that chat templates take.

    Args:
        value: what the row holds under ``key``: a list of ``{"role", "content"}`` or ``{"from", "value"}``.
        key: for the reason of an error.

    Raises:
        BadRow: a message that cannot be used.
    """
    if not isinstance(value, list):
        raise BadRow(f'"{key}" must be a list of messages, not {kind_of(value)}')
    if not value:
        raise BadRow(f'"{key}" is empty; a conversation needs at least one message')
    return tuple(_read_message(message, f"message {number}") for number, message in enumerate(value, 1))


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f'{where} must be an object with "role" and "content", not {kind_of(message)}')
    if "role" in message:
        return _read_openai(message, where)
    if "from" in message:
        return _read_sharegpt(message, where)
    raise BadRow(f'{where} has no "role"')


def _read_openai(message: Message, where: str) -> Message:
    role = message["role"]
    _check_role(role, where)
    read = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in read:
        read["tool_calls"] = _read_tool_calls(read["tool_calls"], where)
    if "content" in read:
        read["content"] = _read_content(read["content"], where)
    elif not read.get("tool_calls"):
        raise BadRow(f'{where} ({role}) has no "content"')
    return read


def _check_role(role: Any, where: str) -> None:
    """Templates know roles of their own, so an unusual one passes; one that looks like a slip does not."""
    if not isinstance(role, str) or not role.strip():
        raise BadRow(f'"role" of {where} must be a name such as "user", not {kind_of(role) if role != "" else "empty"}')
    if role in KNOWN_ROLES:
        return
    meant = FOREIGN_ROLES.get(role.lower()) or next(
        iter(difflib.get_close_matches(role.strip().lower(), KNOWN_ROLES, n=1, cutoff=0.75)), None
    )
    if meant:
        raise BadRow(f'{where} has the unknown role "{role}"; did you mean "{meant}"?')


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_read_part(part, where) for part in content)
    raise BadRow(f'"content" of {where} must be text, not {kind_of(content)}')


def _read_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise BadRow(f'"content" of {where} holds something that is not text ({kind}); only text can be trained on')


def _read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRow(f'"tool_calls" of {where} must be a list, not {kind_of(calls)}')
    return [_read_tool_call(call, where) for call in calls]


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call with its arguments as an object: most templates turn them into JSON by themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f'a tool call of {where} must be an object with a function "name" and "arguments"')
    read = {**function, "arguments": _read_arguments(function.get("arguments", {}), where)}
    return {**call, "function": read} if "function" in call else {"type": "function", "function": read}


def _read_arguments(arguments: Any, where: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow(f'"arguments" of a tool call in {where} is not JSON: {error}') from error
    if not isinstance(arguments, dict):
        raise BadRow(f'"arguments" of a tool call in {where} must be an object, not {kind_of(arguments)}')
    return arguments


def _read_sharegpt(message: Message, where: str) -> Message:
    sender, value = message["from"], message.get("value")
    role = SHAREGPT_ROLES.get(sender.strip().lower()) if isinstance(sender, str) else None
    if role is None:
        raise BadRow(f"{where} is from {json.dumps(sender)}; known are human, gpt, system, tool and the like")
    if value is None:
        raise BadRow(f'{where} has no "value"')
    if not isinstance(value, str):
        raise BadRow(f'"value" of {where} must be text, not {kind_of(value)}')
    if sender.strip().lower() in ("function_call", "tool_call"):
        try:
            calls = json.loads(value)
        except ValueError as error:
            raise BadRow(f"{where} is a function call that is not JSON: {error}") from error
        return {"role": role, "tool_calls": _read_tool_calls(calls if isinstance(calls, list) else [calls], where)}
    return {"role": role, "content": value}


def with_string_arguments(messages: tuple[Message, ...]) -> list[Message]:
    """The same messages with tool-call arguments as JSON text, for templates that join them to strings."""
    return [
        {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ],
        }
        if message.get("tool_calls")
        else message
        for message in messages
    ]
