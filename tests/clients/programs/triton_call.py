"""tritonclient over gRPC: readiness, metadata, an answer, a stream."""

import json
import os
import queue

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(os.environ["TARGET"])
found = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": client.is_model_ready("pystdlib"),
    "inputs": [each.name for each in client.get_model_metadata("pystdlib").inputs],
}


def text_input(text):
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


parameters = {"max_tokens": 24, "seed": 5}
answer = client.infer("pystdlib", [text_input("def f(x):")], parameters=parameters)
found["text"] = answer.as_numpy("text_output")[0].decode()

results = queue.Queue()
client.start_stream(lambda result, error: results.put((result, error)))
stream = triton.InferInput("stream", [1], "BOOL")
stream.set_data_from_numpy(np.array([True]))
client.async_stream_infer("pystdlib", [text_input("def f(x):"), stream], parameters=parameters)
pieces = []
while True:
    result, error = results.get(timeout=60)
    assert error is None, error
    response = result.get_response()
    text = result.as_numpy("text_output")
    pieces.append(text[0].decode() if text is not None and len(text) else "")
    if response.parameters["triton_final_response"].bool_param:
        break
client.stop_stream()
found["streamed"] = "".join(pieces)

try:
    client.infer("other", [text_input("a")])
except triton.InferenceServerException as error:
    found["error"] = [error.status(), error.message()]
print(json.dumps(found))
