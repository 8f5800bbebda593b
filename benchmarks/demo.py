"""`make demo`: serves the shipped model on this CPU, streams one completion, stops again.

`python -m benchmarks.demo [--model DIR]`; exit code 0 if all of it went well.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from twotower.client import Client
from twotower.deployments.server.server import free_port

PROMPT = '''def read_config(path, encoding="utf-8"):
    """Return the sections of a configuration file."""
    with open(path, encoding=encoding) as f:'''
STOP_TIMEOUT_S = 60.0


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--max-tokens", type=int, default=96)
    arguments = parser.parse_args()
    with running_service(arguments.model) as (process, target):
        stream_completion(target, arguments.max_tokens)
        process.send_signal(signal.SIGINT)
        code = process.wait(STOP_TIMEOUT_S)
    print(f"the service has stopped with exit code {code}")
    return code


@contextmanager
def running_service(model: str | None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service process and its target, once it is ready; killed if it is left running."""
    port = free_port()
    command = [sys.executable, "-m", "twotower.cli", "serve", "--grpc-port", str(port)]
    command += ["--http-port", str(free_port())]
    command += ["--model", model] if model else []
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = _first_line(process)
        print(f"{line}   ({time.perf_counter() - begin:.1f} s)\n")
        yield process, f"127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def stream_completion(target: str, max_tokens: int) -> None:
    """Prints the prompt, its completion as it comes, and its tokens, passes and speed."""
    with Client(target) as client:
        _run(client, 16, show=False)
        print(PROMPT, end="", flush=True)
        _run(client, max_tokens, show=True)


def _run(client: Client, max_tokens: int, *, show: bool) -> None:
    begin = time.perf_counter()
    first: float | None = None
    stream = client.generate(PROMPT, max_tokens=max_tokens)
    for block in stream:
        first = first or time.perf_counter() - begin
        if show:
            print(block.text, end="", flush=True)
    seconds = time.perf_counter() - begin
    usage = stream.usage
    assert usage is not None
    assert first is not None
    if show:
        print(
            f"\n\n{usage.completion_tokens} tokens, {usage.nfe} NFE, "
            f"{usage.completion_tokens / max(usage.nfe, 1):.2f} tokens/NFE, "
            f"{usage.completion_tokens / seconds:.1f} tokens/s, "
            f"first block after {first * 1e3:.0f} ms"
        )


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        # The process has printed the reason.
        sys.exit(process.wait(STOP_TIMEOUT_S) or 1)
    return line


if __name__ == "__main__":
    sys.exit(main())
