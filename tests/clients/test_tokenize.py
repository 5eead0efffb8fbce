"""`/tokenize` and `/detokenize` in vLLM's shapes. No SDK has them."""

import pytest

from conftest import CONTEXT

TEXT = "Water, 水, 🌊 <|im_start|> x"
MESSAGES = [{"role": "user", "content": TEXT}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": TEXT},
        {"prompt": TEXT, "add_special_tokens": False},
        {"prompt": TEXT, "return_token_strs": True},
        {"prompt": ""},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "tools": TOOLS},
        {"messages": MESSAGES, "add_generation_prompt": False},
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "It"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    ],
)
def test_equal_to_the_engine(gateway, direct, body):
    body = {"model": "m"} | body
    answer = gateway.post("/tokenize", json=body)
    assert answer.status_code == 200
    assert answer.json() == direct.post("../tokenize", body=body, cast_to=dict[str, object])
    assert answer.json()["count"] == len(answer.json()["tokens"])
    assert answer.json()["max_model_len"] == CONTEXT


def test_there_and_back(gateway):
    ids = gateway.post("/tokenize", json={"model": "llama", "prompt": TEXT}).json()["tokens"]
    assert ids
    answer = gateway.post("/detokenize", json={"model": "llama", "tokens": ids})
    assert answer.json() == {"prompt": TEXT}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": "m"}, 400, "prompt"),
        ("/tokenize", {"model": "m", "prompt": 5}, 400, "prompt"),
        ("/tokenize", {"model": "nothing", "prompt": "x"}, 404, "model"),
        ("/tokenize", {"prompt": "x"}, 400, "model"),
        ("/detokenize", {"model": "m"}, 400, "tokens"),
        ("/detokenize", {"model": "m", "tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"model": "m", "tokens": [-1]}, 400, "tokens"),
    ],
)
def test_refusals(gateway, path, body, status, param):
    answer = gateway.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split("[")[0] == param and isinstance(error["code"], str)
