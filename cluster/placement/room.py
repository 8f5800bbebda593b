"""Room for a service's pairs: the resources that they need, compared with those of the hosts.

Ray waits for resources that do not exist, silently and without end. So both are compared first.
Only what can never fit is refused: totals count and not what is free now, and where placement is a
matter of luck the luck is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Ray counts in steps of this much.
_STEP = 1e-4
# Hosts that an error names.
_NAMED_HOSTS = 4
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Host:
    """A node of the cluster: all of its resources, and its labels."""

    name: str
    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """Resources that a service asks for: `pairs` pairs, by the setting `setting`, and `routers` of
    `router` each.

    `bundles` are a pair's parts as of `PairTopology.bundles`, all on one host if `one_host`, and on
    hosts that `labels` admit.
    """

    setting: str
    pairs: int
    bundles: Sequence[Resources]
    routers: int
    router: Resources
    one_host: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def pair(self) -> dict[str, float]:
        """Resources of a whole pair."""
        return _sum(self.bundles)


def lack_of_room(need: Need, hosts: Sequence[Host], where: str = "the cluster") -> str | None:
    """The reason why the pairs can never all fit, with the arithmetic; None if they may."""
    admitted = [host for host in hosts if _admits(need.labels, host)]
    reason = _lack_in_all(need, hosts, admitted, where) or _lack_on_hosts(need, admitted)
    if reason is not None:
        return f"no room for {need.setting} = {need.pairs}: {reason}"
    return _lack_for_routers(need, hosts, where)


def hosts_of(nodes: Sequence[Mapping[str, Any]]) -> list[Host]:
    """The hosts among `ray.nodes()` that are up."""
    return [
        Host(node["NodeManagerAddress"], node["Resources"], node.get("Labels") or {})
        for node in nodes
        if node["Alive"]
    ]


def in_words(resources: Resources, names: Sequence[str] = ("CPU", "GPU")) -> str:
    """CPUs and GPUs in words, those that are 0 left out if there is another."""
    parts = [f"{resources[name]:g} {name}" for name in names if resources.get(name)]
    return " and ".join(parts) or f"0 {names[0]}"


def _lack_in_all(
    need: Need, hosts: Sequence[Host], admitted: Sequence[Host], where: str
) -> str | None:
    """The first resource of which all hosts together have too little."""
    pairs = f"{need.pairs} {'pair' if need.pairs == 1 else 'pairs'}"
    for name, each in need.pair.items():
        asked, has, terms = need.pairs * each, _total(admitted, name), f"{pairs} x {each:g} {name}"
        if name == "CPU" and not need.labels:
            # Routers go anywhere, so next to labels they say nothing about the pairs' hosts.
            asked += need.routers * need.router[name]
            terms += f" + {_routers(need)} x {need.router[name]:g} CPU"
        if asked > has + _STEP:
            place = where
            if need.labels:
                labels = ", ".join(f"{key}: {value}" for key, value in need.labels.items())
                place = f"what carries {labels} ({len(admitted)} of {len(hosts)} hosts)"
            return f"{terms} = {round(asked, 4):g} {name}, {place} has {has:g} {name}"
    return None


def _lack_for_routers(need: Need, hosts: Sequence[Host], where: str) -> str | None:
    """The resource that routers alone take and of which there is too little."""
    for name, each in need.router.items():
        has = _total(hosts, name)
        if name not in need.pair and need.routers * each > has + _STEP:
            return f"no room for {_routers(need)}: each needs {each:g} {name}, {where} has {has:g}"
    return None


def _routers(need: Need) -> str:
    return f"{need.routers} {'router' if need.routers == 1 else 'routers'}"


def _lack_on_hosts(need: Need, hosts: Sequence[Host]) -> str | None:
    """The reason why a pair or a tower is too large for each host; None if it is not."""
    parts = [need.pair] if need.one_host else list(need.bundles)
    for part in parts:
        if not any(_times(part, host) for host in hosts):
            what = "a pair" if need.one_host else "a tower"
            return f"{what} needs {in_words(part)} on one host; {_named(hosts)}"
    fit = sum(_times(need.pair, host) for host in hosts)
    if need.one_host and fit < need.pairs:
        pair = f"a pair needs {in_words(need.pair)} on one host"
        return f"{pair}, so that {fit} of {need.pairs} fit; {_named(hosts)}"
    return None


def _times(part: Resources, host: Host) -> int:
    """Number of times that a part fits on a host."""
    ratios = [
        (host.resources.get(name, 0.0) + _STEP) / share for name, share in part.items() if share
    ]
    return int(min(ratios, default=1 << 30))


def _named(hosts: Sequence[Host]) -> str:
    named = [f"{host.name} has {in_words(host.resources)}" for host in hosts[:_NAMED_HOSTS]]
    if len(hosts) > _NAMED_HOSTS:
        named.append(f"{len(hosts) - _NAMED_HOSTS} more")
    return ", ".join(named)


def _admits(labels: Mapping[str, str], host: Host) -> bool:
    """True if a host has the labels. Ray's operators (`!`, `in(...)`) count as met: here only what
    is certain is refused."""
    return all(
        value.startswith(("!", "in(")) or host.labels.get(key) == value
        for key, value in labels.items()
    )


def _sum(parts: Sequence[Resources]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: round(sum(part.get(name, 0.0) for part in parts), 4) for name in names}


def _total(hosts: Sequence[Host], name: str) -> float:
    return round(sum(host.resources.get(name, 0.0) for host in hosts), 4)
