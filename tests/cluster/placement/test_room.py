"""What pairs need beside what hosts have: refused with the arithmetic only where it never fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from twotower.cluster.placement.room import Host, Need, hosts_of, lack_of_room

CPU_PAIR = ({"CPU": 0.1}, {"CPU": 0.4}, {"CPU": 0.4})
GPU_PAIR = ({"CPU": 0.1}, {"CPU": 0.4, "GPU": 1.0}, {"CPU": 0.4, "GPU": 1.0})
NEED = Need("num_pairs", 1, CPU_PAIR, routers=1, router={"CPU": 0.1})


def host(name: str, cpus: float, gpus: float = 0.0, **labels: str) -> Host:
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return Host(name, resources, labels)


def test_what_fits_to_the_last_share_is_let_in() -> None:
    assert lack_of_room(NEED, [host("a", 1.0)]) is None
    assert lack_of_room(replace(NEED, pairs=2), [host("a", 2.0)]) is None
    # Shares of a tenth are not exact: nine of them in three hosts of one and a router's.
    assert lack_of_room(replace(NEED, pairs=3), [host(name, 1.0) for name in "abc"]) is None


def test_too_few_cpus_are_said_with_the_arithmetic() -> None:
    got = lack_of_room(replace(NEED, pairs=4), [host("a", 2.0)], "this machine")
    assert got == (
        "no room for num_pairs = 4: 4 pairs x 0.9 CPU + 1 router x 0.1 CPU = 3.7 CPU, "
        "this machine has 2 CPU"
    )
    routers = replace(NEED, routers=12)
    got = lack_of_room(routers, [host("a", 2.0)])
    assert got is not None
    assert "1 pair x 0.9 CPU + 12 routers x 0.1 CPU = 2.1 CPU, the cluster has 2 CPU" in got


def test_routers_that_take_a_resource_of_their_own_need_as_many() -> None:
    need = replace(NEED, routers=3, router={"CPU": 0.1, "front": 1.0})
    front = Host("f", {"CPU": 4.0, "front": 2.0})
    assert lack_of_room(need, [host("a", 2.0), front]) == (
        "no room for 3 routers: each needs 1 front, the cluster has 2"
    )
    assert lack_of_room(replace(need, routers=2), [host("a", 2.0), front]) is None


def test_absent_gpus() -> None:
    got = lack_of_room(replace(NEED, bundles=GPU_PAIR), [host("a", 64.0), host("b", 64.0)])
    assert got == "no room for num_pairs = 1: 1 pair x 2 GPU = 2 GPU, the cluster has 0 GPU"


def test_a_pair_is_packed_on_one_host() -> None:
    need = replace(NEED, bundles=GPU_PAIR)
    hosts = [host("10.0.0.1", 8, 1), host("10.0.0.2", 8, 1)]
    assert lack_of_room(need, hosts) == (
        "no room for num_pairs = 1: a pair needs 0.9 CPU and 2 GPU on one host; "
        "10.0.0.1 has 8 CPU and 1 GPU, 10.0.0.2 has 8 CPU and 1 GPU"
    )
    assert lack_of_room(replace(need, one_host=False), hosts) is None
    # Six GPUs are three pairs, but not in threes.
    hosts = [host("a", 8, 3), host("b", 8, 3)]
    got = lack_of_room(replace(need, setting="autoscaling.min_pairs", pairs=3), hosts)
    assert got is not None
    assert got.startswith("no room for autoscaling.min_pairs = 3: a pair needs 0.9 CPU and 2 GPU")
    assert "so that 2 of 3 fit; a has 8 CPU and 3 GPU, b has" in got
    assert lack_of_room(replace(need, pairs=2), hosts) is None


def test_a_tower_of_a_domain_still_needs_a_host() -> None:
    towers = ({"CPU": 0.1}, {"CPU": 6.0}, {"CPU": 6.0})
    need = replace(NEED, bundles=towers, one_host=False)
    assert lack_of_room(need, [host("a", 6.1), host("b", 6.1)]) is None
    got = lack_of_room(need, [host(name, 4.0) for name in "abcd"])
    assert got is not None
    assert "a tower needs 6 CPU on one host; a has 4 CPU" in got


def test_only_hosts_with_the_labels_count() -> None:
    need = replace(NEED, bundles=GPU_PAIR, labels={"domain": "south"})
    hosts = [host("a", 8, 8, domain="north"), host("b", 8, 1, domain="south")]
    got = lack_of_room(need, hosts)
    assert got is not None
    assert got.endswith(
        "1 pair x 2 GPU = 2 GPU, what carries domain: south (1 of 2 hosts) has 1 GPU"
    )
    assert lack_of_room(need, [*hosts, host("c", 8, 2, domain="south")]) is None
    # What Ray's operators admit is not guessed at.
    for selector in ("!north", "in(south, west)"):
        assert lack_of_room(replace(need, labels={"domain": selector}), hosts) is None


def test_many_hosts_are_not_all_named() -> None:
    hosts = [host(f"10.0.0.{n}", 8, 1) for n in range(9)]
    got = lack_of_room(replace(NEED, bundles=GPU_PAIR), hosts)
    assert got is not None
    assert got.endswith("10.0.0.3 has 8 CPU and 1 GPU, 5 more")


def test_no_host_at_all() -> None:
    got = lack_of_room(NEED, [])
    assert got is not None
    assert got.endswith("= 1 CPU, the cluster has 0 CPU")


def test_hosts_are_the_nodes_that_are_up() -> None:
    node: dict[str, Any] = {
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": 2.0},
        "Labels": {"a": "b"},
    }
    assert hosts_of([node, {**node, "Alive": False}]) == [
        Host("10.0.0.1", {"CPU": 2.0}, {"a": "b"})
    ]


@pytest.mark.parametrize("pairs", [1, 5])
def test_parts_that_need_nothing_always_fit(pairs: int) -> None:
    nothing: tuple[dict[str, float], ...] = ({"CPU": 0.1}, {}, {})
    assert lack_of_room(replace(NEED, pairs=pairs, bundles=nothing), [host("a", 1.0)]) is None
