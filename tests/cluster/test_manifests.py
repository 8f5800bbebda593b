"""The operator's files: what Serve's and Kubernetes' own rules say of them, and one deployment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

from twotower import TwoTower
from twotower.client import Client
from twotower.cluster.placement.surroundings import make_folder
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.router.ingress import SERVICER_FUNCTIONS
from twotower.deployments.router.router import SERVICE_NAME
from twotower.deployments.server.local_ray import OBJECT_STORE_BYTES
from twotower.deployments.server.server import free_port

FOLDER = Path(__file__).parents[2] / "cluster" / "manifests"
UP_S, LIMIT_S = 180.0, 60.0
# Kubernetes' quantities: a number and one suffix.
QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$")
DNS_LABEL = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
PORT_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$")
UNIT = {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}
# Of the custom resource's schema (ray.io/v1, KubeRay 1.6): what an object must and may have.
RAY_SERVICE = (
    set(),
    {
        "excludeHeadPodFromServeSvc",
        "managedBy",
        "rayClusterConfig",
        "rayClusterDeletionDelaySeconds",
        "serveConfigV2",
        "serveService",
        "upgradeStrategy",
    },
)
RAY_CLUSTER = (
    {"headGroupSpec"},
    {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "headServiceAnnotations",
        "managedBy",
        "rayVersion",
        "suspend",
        "upgradeStrategy",
        "workerGroupSpecs",
    },
)
HEAD_GROUP = (
    {"template"},
    {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType"},
)
WORKER_GROUP = (
    {"groupName", "maxReplicas", "minReplicas", "template"},
    {
        "idleTimeoutSeconds",
        "labels",
        "numOfHosts",
        "rayStartParams",
        "replicas",
        "resources",
        "scaleStrategy",
        "suspend",
    },
)


@pytest.fixture(scope="module")
def serve_config() -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text(encoding="utf-8"))
    return body


@pytest.fixture(scope="module", params=["rayservice.yaml", "rayservice_direct.yaml"])
def objects(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The Kubernetes objects of a manifest, by kind."""
    found = list(yaml.safe_load_all((FOLDER / request.param).read_text(encoding="utf-8")))
    by_kind = {own["kind"]: own for own in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def cluster(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    own: dict[str, Any] = objects["RayService"]["spec"]["rayClusterConfig"]
    return own


def group_of(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    """The worker group of that name."""
    (found,) = [own for own in cluster["workerGroupSpecs"] if own["groupName"] == name]
    return dict(found)


def front_of(cluster: dict[str, Any]) -> dict[str, Any]:
    """The worker group whose pods answer clients: the routers', where they have one."""
    names = {own["groupName"] for own in cluster["workerGroupSpecs"]}
    return group_of(cluster, "router" if "router" in names else "pair")


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {own["name"]: own["value"] for own in container["env"]}


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    return [own for pod in pods for own in [*pod.get("initContainers", []), *pod["containers"]]]


def amount(quantity: str) -> float:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity)
    assert match is not None
    return float(match[1]) * UNIT[match[2]]


def check_keys(own: dict[str, Any], rules: tuple[set[str], set[str]]) -> None:
    required, optional = rules
    assert required <= set(own) <= required | optional, set(own)


def test_serve_takes_the_config(serve_config: dict[str, Any]) -> None:
    schema = ServeDeploySchema(**serve_config)
    # The schemas let unknown keys pass: none may be dropped in silence.
    assert set(serve_config) <= set(ServeDeploySchema.model_fields)
    for part, model in (
        ("grpc_options", schema.grpc_options),
        ("http_options", schema.http_options),
    ):
        assert set(serve_config[part]) <= set(type(model).model_fields)
    (application,) = schema.applications
    assert set(serve_config["applications"][0]) <= set(type(application).model_fields)
    assert application.name == APP_NAME
    assert schema.grpc_options.grpc_servicer_functions == SERVICER_FUNCTIONS
    # A total limit would cut streams.
    assert schema.grpc_options.request_timeout_s is None


def test_the_builder_knows_every_argument(serve_config: dict[str, Any]) -> None:
    (application,) = serve_config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    config = ServiceConfig.from_settings(application["args"])
    # These belong to the file's own options, the service's are those of `twotower serve`.
    assert not {"grpc_port", "http_port"} & set(application["args"])
    # The topology reads the checkpoint's folder; any will do for the shape of a pair.
    topology = config.model_copy(update={"model": None}).topology()
    assert [bundle.get("GPU", 0) for bundle in topology.bundles()][1:] == [1.0, 1.0]


def test_the_manifest_embeds_the_same_service(
    serve_config: dict[str, Any], objects: dict[str, dict[str, Any]]
) -> None:
    embedded = yaml.safe_load(objects["RayService"]["spec"]["serveConfigV2"])
    assert ServeDeploySchema(**embedded)
    ServiceConfig.from_settings(embedded["applications"][0]["args"] | {"model": None})
    # Where routers have pods of their own.
    for name in ("num_routers", "router_resource"):
        embedded["applications"][0]["args"].pop(name, None)
    assert embedded == serve_config


def test_the_custom_resource_has_what_it_must_and_nothing_unknown(
    objects: dict[str, dict[str, Any]], cluster: dict[str, Any]
) -> None:
    service = objects["RayService"]
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    check_keys(service["spec"], RAY_SERVICE)
    check_keys(cluster, RAY_CLUSTER)
    check_keys(cluster["headGroupSpec"], HEAD_GROUP)
    for group in cluster["workerGroupSpecs"]:
        check_keys(group, WORKER_GROUP)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert DNS_LABEL.match(group["groupName"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # A map of strings to strings; a number is refused by the API server.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert cluster["authOptions"]["mode"] in ("token", "disabled")


def test_names_ports_and_quantities(
    objects: dict[str, dict[str, Any]], cluster: dict[str, Any]
) -> None:
    assert all(DNS_LABEL.match(own["metadata"]["name"]) for own in objects.values())
    for container in containers(cluster):
        assert DNS_LABEL.match(container["name"])
        assert all(PORT_NAME.match(port["name"]) for port in container.get("ports", []))
        resources = container["resources"]
        for quantities in resources.values():
            assert all(QUANTITY.match(value) for value in quantities.values()), quantities
        for name, value in resources["requests"].items():
            assert amount(value) <= amount(resources["limits"][name])
    storage = objects["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    # The released checkpoint, 63.2 G parameters in bf16.
    assert amount(storage) > 63_185_902_848 * 2


def test_a_worker_holds_one_pair(serve_config: dict[str, Any], cluster: dict[str, Any]) -> None:
    args = serve_config["applications"][0]["args"]
    bundles = ServiceConfig(**{**args, "model": None}).topology().bundles()
    group = group_of(cluster, "pair")
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) == sum(own.get("GPU", 0) for own in bundles)
    assert float(limits["cpu"]) >= sum(own["CPU"] for own in bundles)
    # Neither pairs without a pod nor pods without a pair.
    autoscaling = args["autoscaling"]
    pods = (group["minReplicas"], group["maxReplicas"])
    assert pods == (autoscaling["min_pairs"], autoscaling["max_pairs"])
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert limits["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"]


def test_versions_agree(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"].rsplit(".", 1)[0] == version("ray").rsplit(".", 1)[0]


def test_what_is_mounted_exists_and_the_token_is_a_secret(cluster: dict[str, Any]) -> None:
    model = "/models/nemotron-twotower"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            mounts = {own["name"]: own["mountPath"] for own in container["volumeMounts"]}
            assert set(mounts) <= volumes
            assert model.startswith(mounts["models"])
    (fetch,) = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]
    assert fetch["args"] == ["--local-dir", model]
    (token,) = fetch["env"]
    assert token["name"] == "HF_TOKEN"
    assert "value" not in token
    assert set(token["valueFrom"]["secretKeyRef"]) == {"name", "key"}


def test_health_probes_ask_what_is_there(
    serve_config: dict[str, Any], objects: dict[str, dict[str, Any]], cluster: dict[str, Any]
) -> None:
    template = front_of(cluster)["template"]
    (worker,) = template["spec"]["containers"]
    port = serve_config["grpc_options"]["port"]
    assert worker["readinessProbe"]["grpc"] == {"port": port, "service": SERVICE_NAME}
    ports = {own["name"]: own["containerPort"] for own in worker["ports"]}
    assert ports == {"serve": serve_config["http_options"]["port"], "grpc": port}
    service = objects["Service"]["spec"]
    labels = template["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    head_labels = cluster["headGroupSpec"]["template"]["metadata"]["labels"]
    assert not service["selector"].items() <= head_labels.items()
    assert [own["targetPort"] for own in service["ports"]] == ["grpc"]


def test_a_pod_lives_as_long_as_its_streams_may(
    serve_config: dict[str, Any], cluster: dict[str, Any]
) -> None:
    drained = serve_config["applications"][0]["args"]["graceful_shutdown_timeout_s"]
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drained


def test_routers_of_their_own_answer_on_the_ports_of_their_pods(
    serve_config: dict[str, Any], objects: dict[str, dict[str, Any]], cluster: dict[str, Any]
) -> None:
    embedded = yaml.safe_load(objects["RayService"]["spec"]["serveConfigV2"])
    config = ServiceConfig.from_settings(embedded["applications"][0]["args"] | {"model": None})
    group = front_of(cluster)
    if config.router_resource is None:
        assert group["groupName"] == "pair"
        return
    # As many pods as routers, each with one place for one.
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config.num_routers
    given = json.loads(json.loads(group["rayStartParams"]["resources"]))
    assert given == {config.router_resource: 1}
    ports = {
        "GRPC": serve_config["grpc_options"]["port"],
        "HTTP": serve_config["http_options"]["port"],
    }
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        set_here = variables(container)
        assert set_here["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
        for side, port in ports.items():
            prefix = "RAY_SERVE_DIRECT_INGRESS"
            # The last is not among them: one port is all that there is.
            ends = (set_here[f"{prefix}_MIN_{side}_PORT"], set_here[f"{prefix}_MAX_{side}_PORT"])
            assert ends == (str(port), str(port + 1))


class Deployed:
    """The Serve config on a small cluster of this machine."""

    def __init__(self, grpc_port: int, dashboard: str) -> None:
        self.address = f"127.0.0.1:{grpc_port}"
        self.dashboard = dashboard


@pytest.fixture(scope="module")
def deployed(serve_config: dict[str, Any]) -> Iterator[Deployed]:
    """`serve deploy` of the file, with ports, device and sizes of a small machine instead."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    folder = make_folder()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=True,
            dashboard_port=free_port(),
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        try:
            dashboard = f"http://{context.dashboard_url}"
            own = small(serve_config)
            path = folder / "serve.yaml"
            path.write_text(yaml.safe_dump(own), encoding="utf-8")
            run_serve("deploy", str(path), dashboard)
            await_running(dashboard)
            yield Deployed(own["grpc_options"]["port"], dashboard)
            serve.shutdown()
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def small(config: dict[str, Any]) -> dict[str, Any]:
    (application,) = config["applications"]
    args = {
        **application["args"],
        "model": None,
        "device": "cpu",
        "dtype": "float32",
        "transport": "grpc",
        "num_threads": 1,
        "max_num_seqs": 4,
        "max_context": 512,
        "graceful_shutdown_timeout_s": 1,
    }
    return {
        **config,
        "grpc_options": {**config["grpc_options"], "port": free_port()},
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [{**application, "args": args}],
    }


def run_serve(*arguments: str) -> str:
    """Serve's own command; the last argument is the dashboard's address."""
    command = [str(Path(sys.executable).with_name("serve")), *arguments[:-1], "-a", arguments[-1]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=UP_S, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def await_running(dashboard: str) -> None:
    end = time.monotonic() + UP_S
    while True:
        status = yaml.safe_load(run_serve("status", dashboard))["applications"].get(APP_NAME, {})
        if status.get("status") == "RUNNING":
            return
        assert status.get("status") != "DEPLOY_FAILED", status
        assert time.monotonic() < end, status
        time.sleep(1.0)


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_serve_deploys_the_file_and_it_generates(deployed: Deployed) -> None:
    prompt = [5, 6, 7, 8]
    alone = TwoTower.from_pretrained().generate([prompt], max_tokens=32)[0].token_ids
    with Client(deployed.address) as client:
        stream = client.generate(prompt, max_tokens=32, timeout=LIMIT_S)
        assert [token for block in stream for token in block.token_ids] == alone
    with grpc.insecure_channel(deployed.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=LIMIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
