"""One page with the metrics of all processes of the application, in Prometheus' text format.

The agent of Ray on each node exports what the processes of that node count, Ray's own metrics among
them. The page has the service's, of all nodes, under their own names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from twotower.deployments.telemetry.names import PAGE, PREFIX

# The whole page has to come within the time of one scrape, 10 s by Prometheus' default.
NODE_TIMEOUT_S = 3.0
RAY_PREFIX = "ray_"
_OURS = (f"{RAY_PREFIX}{PREFIX}", f"# HELP {RAY_PREFIX}{PREFIX}", f"# TYPE {RAY_PREFIX}{PREFIX}")
# What tells nothing of the service; WorkerId stays, as routers differ in nothing else.
_DROPPED = ("Component", "SessionName", "Version")
_DROPPED_PREFIX = "otel_scope_"


@dataclass(frozen=True)
class Node:
    """A node's name for the page, and where its agent exports."""

    name: str
    url: str


def nodes_of(listed: Iterable[dict[str, object]]) -> list[Node]:
    """The nodes that are alive, out of Ray's list."""
    return [
        Node(
            str(node["NodeManagerAddress"]),
            f"http://{_host(str(node['NodeManagerAddress']))}:{node['MetricsExportPort']}/metrics",
        )
        for node in listed
        if node["Alive"]
    ]


async def cluster_page() -> bytes:
    """The page of the cluster that this process belongs to."""
    # A question to Ray's head, which blocks.
    nodes = nodes_of(await asyncio.to_thread(ray.nodes))
    return await page_of(nodes)


async def page_of(nodes: Sequence[Node]) -> bytes:
    """The page of these nodes. One that does not answer is missing, with a comment that says so
    and 0 in the gauge `twotower_node_up`."""
    # Environment variables name proxies, which are none for nodes of a cluster.
    async with httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False) as client:
        answers = await asyncio.gather(
            *(_text_of(client, node) for node in nodes), return_exceptions=True
        )
    texts = dict(zip(nodes, answers, strict=True))
    # A few hundred kilobytes of a node are read: beside the event loop, which has streams.
    return await asyncio.to_thread(_rendered, texts)


def merged(texts: Iterable[str]) -> list[Metric]:
    """The service's metrics in texts of Ray's agents, each once, under their own names.

    Raises ValueError for a text that is none of Prometheus'.
    """
    found: dict[str, Metric] = {}
    for text in texts:
        ours = "\n".join(line for line in text.splitlines() if line.startswith(_OURS)) + "\n"
        for family in text_string_to_metric_families(ours):
            name = family.name.removeprefix(RAY_PREFIX)
            if name not in found:
                found[name] = Metric(name, family.documentation, family.type)
            for sample in family.samples:
                labels = {key: value for key, value in sample.labels.items() if _kept(key)}
                own = sample.name.removeprefix(RAY_PREFIX)
                found[name].add_sample(own, labels, sample.value)
    return list(found.values())


class _Collected(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        yield from self._metrics


def _rendered(texts: dict[Node, str | BaseException]) -> bytes:
    name = "node_up"
    up = GaugeMetricFamily(PREFIX + name, PAGE[name].text, labels=PAGE[name].labels)
    good, comments = [], []
    for node, text in texts.items():
        if isinstance(text, str):
            good.append(text)
        else:
            comments.append(f"# {node.name} gives no metrics: {type(text).__name__}\n")
        up.add_metric([node.name], float(isinstance(text, str)))
    registry = CollectorRegistry()
    registry.register(_Collected([*merged(good), up]))
    return generate_latest(registry) + "".join(comments).encode()


async def _text_of(client: httpx.AsyncClient, node: Node) -> str:
    answer = await client.get(node.url)
    answer.raise_for_status()
    return answer.text


def _kept(label: str) -> bool:
    return label not in _DROPPED and not label.startswith(_DROPPED_PREFIX)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
