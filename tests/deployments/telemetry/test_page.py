"""The page of a cluster: nodes that answer, one that hangs up, and what of Ray's is left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client.parser import text_string_to_metric_families

from twotower.deployments.telemetry.page import Node, nodes_of, page_of

RAYS = (
    'Component="core_worker",NodeAddress="10.0.0.{node}",SessionName="s",Version="2.60.0",'
    'WorkerId="w{node}",otel_scope_name="ray",otel_scope_version=""'
)
# As Ray's agent writes them.
PAGE = """\
# HELP ray_node_cpu CPUs of a node
# TYPE ray_node_cpu gauge
ray_node_cpu{{{rays}}} 2.0
# HELP ray_twotower_nfe_total Passes.
# TYPE ray_twotower_nfe_total counter
ray_twotower_nfe_total{{{rays},mode="ar",model="m",pair="p \\"1\\""}} {nfe}.0
# HELP ray_twotower_prefill_seconds Time.
# TYPE ray_twotower_prefill_seconds histogram
ray_twotower_prefill_seconds_bucket{{{rays},le="0.1",mode="ar"}} 1.0
ray_twotower_prefill_seconds_bucket{{{rays},le="+Inf",mode="ar"}} 3.0
ray_twotower_prefill_seconds_count{{{rays},mode="ar"}} 3.0
ray_twotower_prefill_seconds_sum{{{rays},mode="ar"}} 0.5
"""


@contextmanager
def agent(node: int, text: str, status: int = 200) -> Iterator[Node]:
    """A node whose agent gives this page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Node(f"10.0.0.{node}", f"http://127.0.0.1:{server.server_port}/metrics")
        server.shutdown()
        thread.join()


def page(node: int, nfe: int) -> str:
    return PAGE.format(rays=RAYS.format(node=node), nfe=nfe)


async def test_one_page_of_two_nodes_while_a_third_is_broken() -> None:
    gone = Node("10.0.0.9", "http://127.0.0.1:9/metrics")
    with agent(1, page(1, 7)) as one, agent(2, page(2, 5)) as two, agent(3, "", 500) as three:
        text = (await page_of([one, two, three, gone])).decode()
    families = {each.name: each for each in text_string_to_metric_families(text)}
    assert set(families) == {"twotower_nfe", "twotower_prefill_seconds", "twotower_node_up"}
    nfe = families["twotower_nfe"]
    assert (nfe.type, nfe.documentation) == ("counter", "Passes.")
    assert [(each.name, each.value) for each in nfe.samples] == [
        ("twotower_nfe_total", 7),
        ("twotower_nfe_total", 5),
    ]
    assert nfe.samples[0].labels == {
        "NodeAddress": "10.0.0.1",
        "WorkerId": "w1",
        "mode": "ar",
        "model": "m",
        "pair": 'p "1"',
    }
    assert families["twotower_prefill_seconds"].type == "histogram"
    assert len(families["twotower_prefill_seconds"].samples) == 8
    up = {each.labels["node"]: each.value for each in families["twotower_node_up"].samples}
    assert up == {"10.0.0.1": 1, "10.0.0.2": 1, "10.0.0.3": 0, "10.0.0.9": 0}
    assert "# 10.0.0.3 gives no metrics: HTTPStatusError" in text
    assert "# 10.0.0.9 gives no metrics: ConnectError" in text


async def test_a_node_whose_page_is_none_is_left_out() -> None:
    with agent(1, page(1, 7)) as good, agent(2, "ray_twotower_nfe_total{") as bad:
        text = (await page_of([good, bad])).decode()
    assert 'twotower_node_up{node="10.0.0.2"} 0.0' in text
    assert 'twotower_node_up{node="10.0.0.1"} 1.0' in text


def test_nodes_that_are_alive() -> None:
    listed = [
        {"NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080, "Alive": True},
        {"NodeManagerAddress": "10.0.0.2", "MetricsExportPort": 8080, "Alive": False},
        {"NodeManagerAddress": "fd00::1", "MetricsExportPort": 9, "Alive": True},
    ]
    assert nodes_of(listed) == [
        Node("10.0.0.1", "http://10.0.0.1:8080/metrics"),
        Node("fd00::1", "http://[fd00::1]:9/metrics"),
    ]
