"""The shipped dashboard and scrape config against the metrics that the code has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.dashboard import MANIFESTS, dashboard, expressions, names_in, panels
from twotower.deployments.telemetry.names import ALL, sample_names

PROMTOOL = shutil.which("promtool")
LABELS = re.compile(r"\{([^{}]*)\}")
BY = re.compile(r"\bby\s*\(([^)]*)\)")
MATCHER = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')


def of_sample(name: str) -> str:
    """The metric that a series belongs to."""
    [found] = [metric for metric in ALL if name in sample_names(metric)]
    return found


def test_names_of_an_expression() -> None:
    found = names_in('sum by (le) (rate(a_bucket{x="b(c)"}[5m])) / on (pair) d_total unless e')
    assert found == {"a_bucket", "d_total", "e"}


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_an_expression_names_what_is_exported(title: str, expression: str) -> None:
    names = names_in(expression)
    assert names, title
    known = {sample for metric in ALL for sample in sample_names(metric)}
    assert names <= known
    labels = {"job", "le", *(each for name in names for each in ALL[of_sample(name)].labels)}
    used = {each for part in LABELS.findall(expression) for each in MATCHER.findall(part)}
    used |= {each.strip() for part in BY.findall(expression) for each in part.split(",")}
    assert used <= labels, title
    if "_bucket" in expression:
        assert "histogram_quantile(" in expression
    if any(ALL[of_sample(name)].kind == "counter" for name in names):
        assert "rate(" in expression


def test_every_metric_is_drawn() -> None:
    drawn = {of_sample(name) for _, each in expressions() for name in names_in(each)}
    assert drawn == set(ALL)


def test_it_can_be_imported() -> None:
    whole = dashboard()
    assert whole["schemaVersion"] >= 36
    ids = [panel["id"] for panel in whole["panels"]]
    assert len(ids) == len(set(ids))
    assert not [panel for panel in whole["panels"] if "libraryPanel" in panel]
    taken: set[tuple[int, int]] = set()
    for panel in whole["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    for panel in panels():
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)) > 0
    variables = [each["name"] for each in whole["templating"]["list"]]
    assert variables == ["datasource", "job", "model", "pair"]
    used = set(re.findall(r"\$\{?([a-zA-Z_]+)", str(whole)))
    assert used - {"__rate_interval", "__all"} == set(variables)


def config() -> dict[str, Any]:
    text = (MANIFESTS / "prometheus.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_both_jobs_give_the_same_names() -> None:
    front, nodes = config()["scrape_configs"]
    assert (front["job_name"], front["metrics_path"]) == ("twotower", "/metrics")
    keep, rename, _ = nodes["metric_relabel_configs"]
    for metric in ALL:
        for name in sample_names(metric):
            assert re.fullmatch(keep["regex"], f"ray_{name}")
            found = re.fullmatch(rename["regex"], f"ray_{name}")
            assert found is not None
            assert found[1] == name
    assert not re.fullmatch(keep["regex"], "ray_node_cpu_utilization")


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian's package prometheus)")
def test_prometheus_takes_the_config(tmp_path: Path) -> None:
    shutil.copy(MANIFESTS / "prometheus.yml", tmp_path)
    (tmp_path / "twotower.key").write_text("key")
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "config", "prometheus.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
