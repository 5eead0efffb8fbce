"""The simulated Triton, read by NVIDIA's own client: what the gateway's adapter is tested against is Triton's protocol."""

import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
from processes import PATIENCE, Worker, eventually
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def workers():
    with Worker("--engine", "triton") as text, Worker("--engine", "triton-ids") as ids:
        yield text, ids


def client(worker):
    return triton.InferenceServerClient(worker.url.removeprefix("http://"))


def tensor(name, values, kind):
    array = np.array([values], dtype={"BYTES": object, "INT32": np.int32, "BOOL": bool, "UINT64": np.uint64}[kind])
    made = triton.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def ask(client, inputs):
    """All results of one request, the last of which says that it is."""
    results = queue.Queue()
    client.start_stream(lambda result, error: results.put(error or result))
    client.async_stream_infer("m", inputs, request_id="7", enable_empty_final_response=True)
    every = []
    while True:
        result = results.get(timeout=PATIENCE)
        if isinstance(result, InferenceServerException):
            client.stop_stream()
            raise result
        every.append(result)
        response = result.get_response()
        assert (response.model_name, response.id) == ("m", "7")
        if response.parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return every


def text_inputs(most, stream):
    return [
        tensor("text_input", ["Wo liegt Kyōto? 🦀".encode()], "BYTES"),
        tensor("max_tokens", [most], "INT32"),
        tensor("seed", [5], "UINT64"),
        tensor("stream", [stream], "BOOL"),
        tensor("return_num_input_tokens", [True], "BOOL"),
        tensor("return_num_output_tokens", [True], "BOOL"),
    ]


def test_what_the_server_says_of_itself(workers):
    for worker, first, output in zip(workers, ("text_input", "input_ids"), ("text_output", "output_ids"), strict=True):
        server = client(worker)
        assert server.is_server_live() and server.is_server_ready() and server.is_model_ready("m")
        assert server.get_server_metadata().name == "triton"
        assert {model.name for model in server.get_model_repository_index().models} == {"preprocessing", "m"}
        config = server.get_model_config("m").config
        assert config.model_transaction_policy.decoupled and config.max_batch_size > 0
        assert (config.input[0].name, config.output[0].name) == (first, output)
        metadata = server.get_model_metadata("m")
        assert [tensor.name for tensor in metadata.inputs] == [tensor.name for tensor in config.input]
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            server.get_model_config("other")


def test_text_in_steps_is_the_text_of_one_piece(workers):
    server = client(workers[0])
    steps = ask(server, text_inputs(40, True))
    whole = ask(server, text_inputs(40, False))
    said = [step.as_numpy("text_output")[0].decode() for step in steps]
    assert len(whole) == 1 and "".join(said) == whole[0].as_numpy("text_output")[0].decode()
    counts = [int(step.as_numpy("num_output_tokens")[0, 0]) for step in steps]
    assert counts == [1] * 40 and int(whole[0].as_numpy("num_output_tokens")[0, 0]) == 40
    assert int(steps[0].as_numpy("num_input_tokens")[0, 0]) > 4


def test_ids_in_and_out(workers):
    def inputs(stream, *more):
        return [
            tensor("input_ids", [5, 6, 7], "INT32"),
            tensor("input_lengths", [3], "INT32"),
            tensor("request_output_len", [9], "INT32"),
            tensor("streaming", [stream], "BOOL"),
            *more,
        ]

    server = client(workers[1])
    steps = ask(server, inputs(True))
    streamed = [int(step.as_numpy("output_ids")[0, 0, 0]) for step in steps]
    assert len(streamed) == 9 and all(step.as_numpy("sequence_length")[0, 0] == 1 for step in steps)
    whole = ask(server, inputs(False))[0].as_numpy("output_ids")[0, 0].tolist()
    assert whole == [5, 6, 7, *streamed], "the prompt comes first unless it is left out"
    bare = ask(server, inputs(False, tensor("exclude_input_in_output", [True], "BOOL")))
    assert bare[0].as_numpy("output_ids")[0, 0].tolist() == streamed


def test_what_is_refused(workers):
    server = client(workers[0])
    with pytest.raises(InferenceServerException, match="decoupled"):
        server.infer("m", text_inputs(4, False))
    with pytest.raises(InferenceServerException, match="unexpected inference input"):
        ask(server, [*text_inputs(4, True), tensor("made_up", [1], "INT32")])


def test_a_stream_that_is_cancelled_frees_its_sequence():
    with Worker("--engine", "triton", speed=0.1) as worker:
        server = client(worker)
        server.start_stream(lambda result, error: None)
        server.async_stream_infer("m", text_inputs(400, True))
        eventually("the sequence to run", lambda: worker.running() == 1)
        server.stop_stream(cancel_requests=True)
        eventually("the sequence to be freed", lambda: worker.log()["sequences"]["aborted"] == 1)
