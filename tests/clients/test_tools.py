"""Tools and constrained answers, as the SDK asks for them and reads them."""

import json

import pytest
from pydantic import BaseModel

from clients import joined, joined_call

MESSAGES = [{"role": "user", "content": "How high is the water in Paris?"}]


def tool(name):
    properties = {"city": {"type": "string"}, "unit": {"enum": ["metre", "foot"]}, "digits": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city", "unit"]}
    return {"type": "function", "function": {"name": name, "description": "Water level", "parameters": parameters}}


TOOLS = [tool("water_level"), tool("flow_rate")]
NAMED = {"type": "function", "function": {"name": "flow_rate"}}
CHOICES = pytest.mark.parametrize(
    ("choice", "name", "finish"),
    # A call forced by name ends with `stop`, as vLLM has it: the gateway does not correct its engine.
    [("required", "water_level", "tool_calls"), (NAMED, "flow_rate", "stop")],
)


def ask(client, **more):
    return client.chat.completions.create(**{"model": "m", "messages": MESSAGES, "tools": TOOLS, **more})


def is_call(function, name):
    arguments = json.loads(function.arguments)
    return function.name == name and arguments["unit"] == "metre" and isinstance(arguments["city"], str)


@CHOICES
def test_call(client, direct, choice, name, finish):
    answer = ask(client, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function" and call.id and is_call(call.function, name)
    assert answer.choices[0].finish_reason == finish
    assert answer.usage.prompt_tokens == ask(direct, tool_choice=choice).usage.prompt_tokens


@CHOICES
def test_streamed_call(client, choice, name, finish):
    chunks = list(ask(client, tool_choice=choice, stream=True))
    whole = ask(client, tool_choice=choice).choices[0].message.tool_calls[0].function
    assert joined_call(chunks) == (name, whole.arguments)
    assert joined(chunks) == ("", [finish])


def test_stream_helper_joins_a_call(client):
    with client.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS, tool_choice="required") as stream:
        final = stream.get_final_completion()
    assert is_call(final.choices[0].message.tool_calls[0].function, "water_level")


def test_tools_count_as_prompt(client, gateway):
    with_tools = ask(client, tool_choice="none")
    without = client.chat.completions.create(model="m", messages=MESSAGES)
    assert with_tools.choices[0].message.tool_calls is None and with_tools.choices[0].message.content
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens
    counted = gateway.post("/tokenize", json={"model": "m", "messages": MESSAGES, "tools": TOOLS}).json()["count"]
    assert counted == with_tools.usage.prompt_tokens


def test_result_of_a_call_goes_back(client, direct):
    message = ask(client, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"metres": 0.8}'}
    messages = [*MESSAGES, message, result]
    answer = ask(client, messages=messages)
    assert answer.choices[0].message.content
    expected = ask(direct, messages=messages)
    assert answer.choices == expected.choices
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


class Level(BaseModel):
    city: str
    metres: float
    rising: bool
    gauges: list[int]


def test_parsed_answer(client):
    answer = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=Level)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Level)
    assert parsed.city and parsed.rising is True and parsed.gauges


def test_streamed_and_parsed_answer(client):
    with client.chat.completions.stream(model="m", messages=MESSAGES, response_format=Level) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    whole = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=Level)
    assert parsed == whole.choices[0].message.parsed and parsed


def test_json_object(client):
    answer = client.chat.completions.create(model="m", messages=MESSAGES, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"answer": "water"}


def test_vllms_own_constraint(client):
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"structured_outputs": {"choice": ["high", "low"]}}
    )
    assert answer.choices[0].message.content == "high"
