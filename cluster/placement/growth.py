"""Detects clusters to which nodes may still come: autoscalers, KubeRay."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

from ray._private.state import state
from ray.experimental.internal_kv import _internal_kv_get

# KubeRay sets these in each of its containers; its pods join as they start, autoscaler or not.
_KUBERAY = ("RAY_CLUSTER_NAME", "KUBERAY_GEN_RAY_START_CMD")
# Ray's monitor calls a node that was started by hand by its id.
_BY_HAND = re.compile(r"node_[0-9a-f]+")
_AUTOSCALER_STATUS = b"__autoscaling_status"


def may_grow(environment: Mapping[str, str] = os.environ) -> bool:
    """True if the cluster that this process is connected to has an autoscaler, or KubeRay."""
    if any(name in environment for name in _KUBERAY):
        return True
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return True
    return autoscaler_runs(_internal_kv_get(_AUTOSCALER_STATUS))


def autoscaler_runs(status: bytes | None) -> bool:
    """True if the report of Ray's monitor is that of an autoscaler, which has types of nodes.

    Without an autoscaler the monitor reports as well, each node as a separate type.
    """
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    kinds = [*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {})]
    return any(not _BY_HAND.fullmatch(kind) for kind in kinds)
