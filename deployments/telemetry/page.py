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


def families_of(text: str) -> list[Metric]:
    """The service's metrics in a text of Ray's agents, under their own names.

    Raises ValueError for a text that is none of Prometheus'.
    """
    ours = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(_OURS))
    return [_renamed(family) for family in text_string_to_metric_families(ours)]


def _renamed(family: Metric) -> Metric:
    own = Metric(family.name.removeprefix(RAY_PREFIX), family.documentation, family.type)
    for sample in family.samples:
        labels = {key: value for key, value in sample.labels.items() if _kept(key)}
        own.add_sample(sample.name.removeprefix(RAY_PREFIX), labels, sample.value)
    return own


def _merged(pages: Iterable[Sequence[Metric]]) -> list[Metric]:
    """The metrics of several pages, each once."""
    found: dict[str, Metric] = {}
    for page in pages:
        for family in page:
            if family.name in found:
                found[family.name].samples += family.samples
            else:
                found[family.name] = family
    return list(found.values())


class _Collected(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        yield from self._metrics


def _rendered(texts: dict[Node, str | BaseException]) -> bytes:
    pages = {node: _read(text) for node, text in texts.items()}
    name = "node_up"
    up = GaugeMetricFamily(PREFIX + name, PAGE[name].text, labels=PAGE[name].labels)
    comments = ""
    for node, page in pages.items():
        up.add_metric([node.name], float(not isinstance(page, BaseException)))
        if isinstance(page, BaseException):
            comments += f"# {node.name} gives no metrics: {type(page).__name__}\n"
    good = [page for page in pages.values() if not isinstance(page, BaseException)]
    registry = CollectorRegistry()
    registry.register(_Collected([*_merged(good), up]))
    return generate_latest(registry) + comments.encode()


def _read(text: str | BaseException) -> list[Metric] | BaseException:
    if isinstance(text, BaseException):
        return text
    try:
        return families_of(text)
    except ValueError as error:
        return error


async def _text_of(client: httpx.AsyncClient, node: Node) -> str:
    answer = await client.get(node.url)
    answer.raise_for_status()
    return answer.text


def _kept(label: str) -> bool:
    return label not in _DROPPED and not label.startswith(_DROPPED_PREFIX)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
