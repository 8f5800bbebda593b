"""The operator's settings, checked once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from twotower.cluster.topology import PairTopology, Placement, Transport
from twotower.deployments.access.access import Access
from twotower.deployments.access.keys import ApiKey, check_distinct
from twotower.deployments.pair.autoscaling import PairAutoscaling
from twotower.deployments.pair.overload import OverloadDial
from twotower.deployments.settings_file import check_names, read_settings
from twotower.deployments.telemetry.logs import LogFormat
from twotower.kernels.quantized import ExpertProducts
from twotower.protos.incoming import (
    MESSAGE_VARIABLE,
    MOST_MESSAGE_BYTES,
    REQUEST_VARIABLE,
    longest_request,
)
from twotower.towers.checkpoint.checkpoint import Checkpoint
from twotower.towers.checkpoint.tower_loader import check_expert_products
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import ConfigError, shorten
from twotower.towers.limits import MOST_THREADS
from twotower.towers.text.text_limit import longest_token_bytes

APP_NAME = "twotower"
# Counts are 32 bits wide in Ray and in tensors' shapes. Rows have a call each in a tower's process,
# twice and with room beside them; processes have a place in Serve's tables.
MOST_COUNT, MOST_ROWS, MOST_PROCESSES = 2**31 - 1, 2**20, 2**14
_LAST_PORT = 65535
Ingress = Literal["proxy", "direct"]


_ORIGIN = re.compile(r"\*|https?://([0-9A-Za-z.-]{1,253}|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
# Earlier names of settings, and their names now.
RENAMED = {"threads_per_tower": "num_threads"}


class ServiceConfig(BaseModel):
    """Model, hardware and limits of a service.

    Every field can be set in a YAML file of the same names (`ServiceConfig.from_file`) or by the
    options of `twotower serve`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="folder or hub id; none = the shipped model")
    model_name: str | None = Field(None, description="name shown to clients; none = the folder's")
    device: str = Field("cpu", pattern=r"^(cpu|cuda)$")
    dtype: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = Field(
        PairTopology.deterministic,
        description="on cuda, give a row the same bits in any batch, at some cost of speed; on cpu "
        "it always has them",
    )
    expert_products: ExpertProducts = Field(
        PairTopology.expert_products,
        description="how routed experts that are stored in 8 bits are multiplied: widened = in "
        "dtype, fp8 = with tokens in 8 bits too; fp8 is refused for other experts",
    )
    grpc_port: int = Field(9000, ge=1, le=_LAST_PORT)
    http_port: int = Field(8000, ge=1, le=_LAST_PORT, description="port of the HTTP side")
    http_host: str = Field(
        "127.0.0.1",
        pattern=r"^[0-9A-Za-z.:-]{1,253}$",
        description="address on which `twotower serve` listens for HTTP; under a Serve config "
        "http_options has it. gRPC listens on all addresses: Serve has no setting for that",
    )
    ingress: Ingress = Field(
        "proxy",
        description="who listens: proxy = Serve's proxy, direct = the routers themselves, each on "
        "ports from grpc_port and http_port on, for a third less processor time (Ray calls it "
        "alpha). Under a Serve config the environment of Ray's processes decides",
    )
    api_keys: list[ApiKey] = Field(
        default_factory=list,
        description="with keys every request needs one, without keys only requests of this "
        "machine are answered; hashes alone, as `twotower key new` prints them",
    )
    allow_anonymous: bool = Field(
        False, description="answer other machines as well, without api_keys"
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="pages that may call from a browser, as `https://host:port`; `*` = all, with "
        "api_keys only",
    )
    cpus_per_tower: float = Field(0.4, ge=0, description="share of CPUs that a tower reserves")
    gpus_per_tower: float | None = Field(None, ge=0, description="none = 1 on cuda, 0 on cpu")
    num_threads: int | None = Field(
        None,
        ge=1,
        le=MOST_THREADS,
        description="threads of a tower's arithmetic; none = half of its CPUs",
    )
    max_context: int = Field(
        8192, ge=2, le=MOST_COUNT, description="most tokens of prompt and output together"
    )
    max_message_bytes: int | None = Field(
        None,
        ge=64 << 10,
        le=MOST_MESSAGE_BYTES,
        description="longest gRPC message that is taken; none = what a request of max_context "
        "tokens can have, as far as the tokenizer tells, otherwise 4 MiB. Proxies that were not "
        f"started here take it from their environment: {REQUEST_VARIABLE}, else "
        f"{MESSAGE_VARIABLE}, else 4 MiB; the latter, Serve's own, also limits answers",
    )
    # Fields of the engines have their least values in EngineOptions.
    max_num_seqs: int = Field(32, le=MOST_ROWS, description="rows that a pair works on at once")
    max_queued_requests: int = Field(
        256,
        ge=-1,
        le=MOST_ROWS,
        description="rows that wait for a pair; more are refused; -1 = no limit",
    )
    ease_from: int | None = Field(
        None,
        ge=0,
        le=MOST_COUNT,
        description="waiting rows of a pair up to which requests are served as asked, whatever "
        "floors they declare; none = 1/4 of max_num_seqs, and less than ease_full",
    )
    ease_full: int | None = Field(
        None,
        ge=1,
        le=MOST_COUNT,
        description="waiting rows of a pair from which on a request is served at its floors; "
        "none = max_num_seqs, or half of the queue if that is less",
    )
    memory_fraction: float | None = Field(
        None, description="share of free memory for states; none = 0.95, on cpu 0.25"
    )
    max_num_batched_tokens: int | None = Field(
        None, le=MOST_COUNT, description="tokens of a tower's pass; none = 512, on cuda 4096"
    )
    max_prefill_tokens: int | None = Field(
        None,
        le=MOST_COUNT,
        description="prompt tokens in a pass that other rows share; none = 256, on cuda 1024",
    )
    prefill_chunk: int | None = Field(
        None,
        le=MOST_COUNT,
        description="grid on which prompts are read; none = 256, on cuda 1024",
    )
    prefix_cache_mib: int = Field(
        256, le=MOST_COUNT, description="MiB of snapshots of the prefix cache; 0 = none"
    )
    transport: Transport = Field(
        PairTopology.transport, description="how states travel between the towers"
    )
    channel_tls: bool = Field(
        PairTopology.channel_tls,
        description="encrypt states on their way, by TLS; with transport grpc only",
    )
    self_test: bool | None = Field(
        PairTopology.self_test,
        description="run recorded passes of a tiny model on a tower's device before the tower "
        "takes rows, and refuse to serve if they are off; none = on cuda",
    )
    placement: Placement = Field(
        PairTopology.placement,
        description="separate = a process for each tower, colocated = one for both, "
        "ar_only = the context tower alone",
    )
    pack: Literal["host", "domain"] = Field(
        "host",
        description="host = all towers of a pair on one host, domain = on the hosts that "
        "label_selector names",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="Ray's labels of the nodes that may have pairs, as of a GPU domain; none = any",
    )
    denoisers_per_context: int = Field(
        PairTopology.denoisers_per_context,
        ge=1,
        le=MOST_PROCESSES,
        description="denoiser towers of a pair",
    )
    stall_timeout_s: float = Field(
        PairTopology.stall_timeout_s, gt=0, description="longest pass of a tower that works"
    )
    repair_timeout_s: float = Field(
        PairTopology.repair_timeout_s,
        gt=0,
        description="time in which a lost denoiser tower has to be back",
    )
    resume_timeout_s: float = Field(
        60.0, gt=0, description="longest wait of a request for another pair"
    )
    max_attempts: int = Field(
        8, ge=1, le=MOST_COUNT, description="pairs in a row that a request may be lost with"
    )
    num_routers: int = Field(
        1,
        ge=1,
        le=MOST_PROCESSES,
        description="2 or more: a lost router is a pause of a second or two",
    )
    router_resource: str | None = Field(
        None,
        pattern=r"^[A-Za-z][0-9A-Za-z_.-]{0,62}$",
        description="a resource of Ray's nodes of which each router takes one: a node that has one "
        "of it has one router; none = routers go anywhere",
    )
    num_pairs: int = Field(
        1, ge=1, le=MOST_PROCESSES, description="fixed number of pairs, without autoscaling"
    )
    autoscaling: PairAutoscaling | None = Field(
        None, description="pairs that come and go with the load, in place of num_pairs"
    )
    log_format: LogFormat = Field(
        "text", description="text or json: lines of the service's logs, with a request's name"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s]{1,2000}$",
        description="OpenTelemetry collector (OTLP over HTTP) that takes traces, as "
        "`http://localhost:4318`; needs the extra `tracing`; none = no traces",
    )
    trace_sample_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the requests without a trace context of their own that are traced",
    )
    health_check_period_s: float = Field(2.0, gt=0)
    health_check_timeout_s: float = Field(30.0, gt=0)
    graceful_shutdown_timeout_s: float = Field(20.0, ge=0)

    @model_validator(mode="after")
    def _check_label_selector(self) -> ServiceConfig:
        if self.pack == "domain" and not self.label_selector:
            raise ValueError("pack: got 'domain' without label_selector, which names the domain")
        for label, value in self.label_selector.items():
            if self.pack == "domain" and value.startswith(("in(", "!")):
                # Ray would spread a pair over all of them.
                raise ValueError(
                    f"label_selector.{label}: got {value!r}, expected one value with pack 'domain'"
                )
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> ServiceConfig:
        if self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port: got {self.grpc_port} for both")
        if self.ingress == "direct":
            self._check_port_ranges()
        return self

    def _check_port_ranges(self) -> None:
        apart = abs(self.grpc_port - self.http_port)
        if apart < self.num_routers:
            raise ValueError(
                f"grpc_port and http_port: got {self.grpc_port} and {self.http_port}, expected "
                f"{self.num_routers} apart, as each router has a port of each"
            )
        last = max(self.grpc_port, self.http_port) + self.num_routers - 1
        if last > _LAST_PORT:
            raise ValueError(
                f"num_routers: the last has port {last}, expected at most {_LAST_PORT}"
            )

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: list[ApiKey]) -> list[ApiKey]:
        check_distinct(keys)
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"got {shorten(origin)}, expected https://host, with or without a port, or *"
                )
        return origins

    @model_validator(mode="after")
    def _check_access(self) -> ServiceConfig:
        if self.api_keys and self.allow_anonymous:
            raise ValueError("allow_anonymous and api_keys exclude each other")
        if "*" in self.cors_origins and not self.api_keys:
            # A browser sends no key by itself, but it does reach what answers its own machine.
            raise ValueError(
                "cors_origins: got '*' without api_keys: any page could use the service"
            )
        return self

    @model_validator(mode="after")
    def _check_scaling(self) -> ServiceConfig:
        if self.autoscaling is not None and self.num_pairs != 1:
            raise ValueError("num_pairs and autoscaling exclude each other")
        return self

    @model_validator(mode="after")
    def _check_topology(self) -> ServiceConfig:
        self._topology(self.model or "")
        return self

    @model_validator(mode="after")
    def _check_overload_dial(self) -> ServiceConfig:
        self.dial()
        for name in ("ease_from", "ease_full"):
            given = getattr(self, name)
            if given is not None and 0 <= self.max_queued_requests < given:
                raise ValueError(
                    f"{name}: got {given}, expected at most max_queued_requests, "
                    f"which is {self.max_queued_requests}"
                )
        return self

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> ServiceConfig:
        """Reads a YAML file; `overrides` that are not None win. Raises ConfigError."""
        return cls.from_settings({**read_settings(path), **_given(overrides)})

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> ServiceConfig:
        """Checks settings, None meaning the default. Raises ConfigError naming the field."""
        check_names(settings)
        for old, new in RENAMED.items():
            if settings.get(old) is not None:
                raise ConfigError(f"{old}: the name of this setting is {new}")
        try:
            return cls(**_given(settings))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "settings"
            field = field if field.isprintable() else repr(field)
            raise ConfigError(f"{field}: {first['msg']}{_got(first)}") from None

    def shown_name(self) -> str:
        """The model's name for clients. Raises CheckpointError without a checkpoint."""
        return self.model_name or resolve_checkpoint(self.model).name

    def access(self) -> Access:
        """Who may call, as each of the service's routers decides it."""
        return Access(self.api_keys, self.allow_anonymous, share=self.num_routers)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint, with names, shapes and files checked. Raises CheckpointError, and
        ConfigError if its experts cannot be multiplied as `expert_products` says."""
        checkpoint = Checkpoint(resolve_checkpoint(self.model))
        check_expert_products(checkpoint, self.expert_products)
        return checkpoint

    def message_bytes(self) -> int:
        """The longest message that is taken. Raises CheckpointError without a checkpoint."""
        if self.max_message_bytes is not None:
            return self.max_message_bytes
        token_bytes = longest_token_bytes(resolve_checkpoint(self.model))
        return longest_request(self.max_context, token_bytes)

    def dial(self) -> OverloadDial:
        """From how many waiting rows on requests are served nearer to their floors."""
        least, full = self.ease_from, self.ease_full
        if full is None:
            queue = self.max_queued_requests
            full = self.max_num_seqs if queue < 0 else min(self.max_num_seqs, queue // 2)
            full = max(full, (least or 0) + 1)
        return OverloadDial(min(self.max_num_seqs // 4, full - 1) if least is None else least, full)

    def scaling(self) -> PairAutoscaling | None:
        """The options of the autoscaling policy; None for a fixed number of pairs."""
        return None if self.autoscaling is None else self.autoscaling.for_rows(self.max_num_seqs)

    def topology(self) -> PairTopology:
        """The layout of a pair."""
        # Actors run in other folders: a relative path would lead nowhere there.
        return self._topology(str(resolve_checkpoint(self.model).resolve()))

    def _topology(self, model_path: str) -> PairTopology:
        gpus = self.gpus_per_tower
        queued = None if self.max_queued_requests < 0 else self.max_queued_requests
        return PairTopology(
            model_path=model_path,
            device=self.device,
            dtype=self.dtype,
            deterministic=self.deterministic,
            engine=EngineOptions(
                max_num_seqs=self.max_num_seqs,
                max_context=self.max_context,
                memory_fraction=self.memory_fraction,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_prefill_tokens=self.max_prefill_tokens,
                prefill_chunk=self.prefill_chunk,
                max_queued_requests=queued,
                prefix_cache_mib=self.prefix_cache_mib,
            ),
            cpus_per_tower=self.cpus_per_tower,
            gpus_per_tower=(1.0 if self.device == "cuda" else 0.0) if gpus is None else gpus,
            num_threads=self.num_threads,
            transport=self.transport,
            channel_tls=self.channel_tls,
            self_test=self.self_test,
            placement=self.placement,
            denoisers_per_context=self.denoisers_per_context,
            stall_timeout_s=self.stall_timeout_s,
            repair_timeout_s=self.repair_timeout_s,
            expert_products=self.expert_products,
        )


def _got(error: ErrorDetails) -> str:
    """The value of a wrong setting; not of keys, where somebody may have put one for its hash."""
    value = error["input"]
    if error["loc"][:1] == ("api_keys",):
        return ""
    if not error["loc"] and isinstance(value, dict):
        value = {name: given for name, given in value.items() if name != "api_keys"}
    return f", got {shorten(value)}"


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
