"""The HTTP front: OpenAI's API over the same requests as gRPC, and what operators ask for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import twotower
from twotower.deployments.access.access import Access
from twotower.deployments.access.limits import Admission
from twotower.deployments.completions.completions import Completions
from twotower.deployments.config import ServiceConfig
from twotower.deployments.http.answers import (
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ErrorAnswer,
    ModelAnswer,
    ModelList,
    TokenizeAnswer,
    TokenizerAnswer,
    VersionAnswer,
)
from twotower.deployments.http.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from twotower.deployments.http.chat import chat
from twotower.deployments.http.completions import complete
from twotower.deployments.http.counted import CountedRoute
from twotower.deployments.http.errors import NotFoundError, add_handlers
from twotower.deployments.http.exchange import Exchange, check_model
from twotower.deployments.http.front import Front
from twotower.deployments.http.metrics import metrics_routes
from twotower.deployments.http.page import page_routes
from twotower.protos.incoming import longest_body

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer} for code in (400, 401, 403, 404, 413, 429, 500, 503)
}
_JSON_CONTENT: dict[str, Any] = {"content": {"application/json": {}}}
# Of a completion with `stream`, beside its answer in one piece.
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the completions; with `stream` chunks of them as server-sent events",
        "content": {"text/event-stream": {}},
    }
}


def build_http_app(service: Completions, config: ServiceConfig, access: Access) -> FastAPI:
    """The ASGI application of a router."""
    app = FastAPI(
        title="TwoTower",
        version=twotower.__version__,
        description="OpenAI-compatible API of a two-tower block-diffusion language model.",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(probe_routes(service))
    app.include_router(completion_routes(service))
    app.include_router(model_routes(service))
    app.include_router(admin_routes(service))
    app.include_router(metrics_routes(service.recorder.metrics.instruments))
    app.include_router(page_routes())
    add_handlers(app)
    _leave_out_422(app)
    app.add_middleware(
        Front,
        access=access,
        cors_origins=config.cors_origins,
        max_bytes=longest_body(service.max_message),
    )
    if config.cors_origins:
        # Outermost: what the front refuses carries its headers too, and a preflight has no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def probe_routes(service: Completions) -> APIRouter:
    """Routes that need no key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Liveness of this process."""
        return {"status": "ok"}

    @router.get(
        "/ready", responses={503: {"description": "no pair of towers is up", **_JSON_CONTENT}}
    )
    async def ready() -> Response:
        """Readiness: a pair of towers can serve."""
        if await service.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "no pair of towers is up"}, 503)

    @router.get("/version")
    async def version() -> VersionAnswer:
        """Version of the serving package."""
        return VersionAnswer(version=twotower.__version__)

    return router


def completion_routes(service: Completions) -> APIRouter:
    """Completions of prompts and of conversations."""
    router = APIRouter(responses=_ERRORS, route_class=CountedRoute)

    @router.post(
        "/v1/completions",
        response_model=CompletionAnswer,
        response_model_exclude_unset=True,
        responses=_EVENTS,
    )
    async def completions(body: CompletionBody, request: Request) -> Any:
        """Completes prompts; with `stream` as server-sent events."""
        with _place(request) as admission:
            return await complete(_exchange(service, request, body, admission), body)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatAnswer,
        response_model_exclude_unset=True,
        responses=_EVENTS,
    )
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        """Answers a conversation; with `stream` as server-sent events."""
        with _place(request) as admission:
            return await chat(_exchange(service, request, body, admission), body)

    return router


def model_routes(service: Completions) -> APIRouter:
    """The model, and its tokenizer."""
    router = APIRouter(responses=_ERRORS, route_class=CountedRoute)
    served = service.model
    answer = ModelAnswer(
        id=served.name,
        object="model",
        created=int(time.time()),
        owned_by="twotower",
        fingerprint=served.fingerprint,
        max_model_len=served.max_context,
        modes=list(served.modes),
        vocab_size=served.vocab_size,
        has_tokenizer=served.has_tokenizer,
    )

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(object="list", data=[answer])

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelAnswer:
        """The model that is served, by its name."""
        check_model(service, model)
        return answer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> TokenizeAnswer:
        """The ids of a text."""
        check_model(service, body.model)
        around = body.add_special_tokens is not False
        ids = await service.tokenize(body.prompt, around)
        return TokenizeAnswer(count=len(ids), max_model_len=served.max_context, tokens=ids)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> DetokenizeAnswer:
        """The text of ids."""
        check_model(service, body.model)
        return DetokenizeAnswer(prompt=await service.decode("tokens", body.tokens))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerAnswer:
        """Special tokens and chat template, for clients that cut texts themselves."""
        if service.tokenizer is None:
            raise NotFoundError("this model has no tokenizer", None, "no_tokenizer")
        template = service.chat_template
        return TokenizerAnswer(
            **service.special_tokens, chat_template=None if template is None else template.text
        )

    return router


def admin_routes(service: Completions) -> APIRouter:
    """Routes for administrators."""
    router = APIRouter(prefix="/admin", responses=_ERRORS)

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        """Load and counters of this router and of the pairs."""
        return service.stats()

    return router


def _leave_out_422(app: FastAPI) -> None:
    """Takes FastAPI's status for a faulty request out of the schema: here it is 400."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _exchange(service: Completions, request: Request, body: Any, admission: Admission) -> Exchange:
    state = request.state
    return Exchange(service, body, state.request_id, admission, state.traceparent)


@contextmanager
def _place(request: Request) -> Iterator[Admission]:
    """A place among the requests of a caller, given back here if no answer begins."""
    admission = request.state.caller.limits.admit()
    try:
        yield admission
    except BaseException:
        admission.release()
        raise
