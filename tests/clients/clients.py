"""The official SDK, as the tests make and read it."""

import openai

from processes import PATIENCE


def sdk(url, kind=openai.OpenAI, **options):
    """The SDK as its users make it, but that it neither waits for long nor hides a failure by trying again."""
    return kind(base_url=f"{url}/v1", api_key="any", **{"timeout": PATIENCE, "max_retries": 0, **options})


def joined(chunks, index=0):
    """The text of one choice of a streamed chat, and its finish reasons."""
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    text = "".join(choice.delta.content or "" for choice in mine)
    return text, [choice.finish_reason for choice in mine if choice.finish_reason]


def joined_call(chunks):
    """Name and arguments of the one tool call of a streamed chat."""
    parts = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or []]
    assert {part.index for part in parts} == {0} and len({part.id for part in parts if part.id}) == 1
    functions = [part.function for part in parts if part.function]
    return "".join(f.name or "" for f in functions), "".join(f.arguments or "" for f in functions)
