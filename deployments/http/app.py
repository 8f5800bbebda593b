"""The HTTP front: OpenAI's API over the same requests as gRPC, and what operators ask for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

import twotower
from twotower.deployments.access.access import Access, Caller
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
    VersionAnswer,
)
from twotower.deployments.http.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from twotower.deployments.http.chat import chat
from twotower.deployments.http.completions import complete
from twotower.deployments.http.errors import add_handlers
from twotower.deployments.http.exchange import Exchange, check_model
from twotower.deployments.http.front import Front
from twotower.deployments.http.page import page_routes

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer} for code in (400, 401, 403, 404, 413, 429, 500, 503)
}


def build_http_app(
    service: Completions, config: ServiceConfig, access: Access
) -> FastAPI:
    """The ASGI application of a router."""
    app = FastAPI(
        title="TwoTower",
        version=twotower.__version__,
        description="OpenAI-compatible API of a two-tower block-diffusion language model.",
        docs_url=None,
        redoc_url=None,
    )
    routes = Routes(service, access)
    app.include_router(routes.open())
    app.include_router(routes.keyed())
    app.include_router(routes.admin())
    app.include_router(page_routes())
    add_handlers(app)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(Front, max_bytes=service.max_message)
    return app


class Routes:
    """The routes by whom they are for: everyone, callers with a key, administrators."""

    def __init__(self, service: Completions, access: Access) -> None:
        self._service = service
        self._access = access
        self._created = int(time.time())

    def caller(self, request: Request) -> Caller:
        """Who calls. Raises UnauthenticatedError."""
        peer = request.client.host if request.client is not None else None
        headers = request.headers
        forwarded = "x-forwarded-for" in headers
        return self._access.caller(headers.get("authorization"), peer, forwarded=forwarded)

    def administrator(self, request: Request) -> Caller:
        """Who calls, an administrator. Raises ForbiddenError, UnauthenticatedError."""
        caller = self.caller(request)
        caller.check_admin()
        return caller

    def open(self) -> APIRouter:
        """Routes for probes: no key."""
        router = APIRouter()

        @router.get("/health")
        async def health() -> dict[str, str]:
            """Liveness of this process."""
            return {"status": "ok"}

        @router.get("/ready", responses={503: {"model": ErrorAnswer}})
        async def ready() -> Response:
            """Readiness: a pair of towers can serve."""
            if await self._service.is_ready():
                return JSONResponse({"status": "ready"})
            return JSONResponse({"status": "no pair of towers is up"}, 503)

        @router.get("/version")
        async def version() -> VersionAnswer:
            """Version of the serving package."""
            return VersionAnswer(version=twotower.__version__)

        return router

    def keyed(self) -> APIRouter:
        """Routes for callers."""
        router = APIRouter(responses=_ERRORS)
        who = Annotated[Caller, Depends(self.caller)]
        service = self._service

        @router.post(
            "/v1/completions", response_model=CompletionAnswer, response_model_exclude_unset=True
        )
        async def completions(body: CompletionBody, request: Request, caller: who) -> Any:
            """Completes prompts; with `stream` as server-sent events."""
            with self._failing(caller) as admission:
                return await complete(self._exchange(request, body, admission), body)

        @router.post(
            "/v1/chat/completions", response_model=ChatAnswer, response_model_exclude_unset=True
        )
        async def chat_completions(body: ChatBody, request: Request, caller: who) -> Any:
            """Answers a conversation; with `stream` as server-sent events."""
            with self._failing(caller) as admission:
                return await chat(self._exchange(request, body, admission), body)

        @router.get("/v1/models")
        async def models(_: who) -> ModelList:
            """The model that is served."""
            return ModelList(object="list", data=[self._model()])

        @router.get("/v1/models/{model:path}")
        async def model(model: str, _: who) -> ModelAnswer:
            """The model that is served, by its name."""
            check_model(service, model)
            return self._model()

        @router.post("/tokenize")
        async def tokenize(body: TokenizeBody, _: who) -> TokenizeAnswer:
            """The ids of a text."""
            check_model(service, body.model)
            ids = await service.token_ids("prompt", body.prompt)
            most = service.model.max_context
            return TokenizeAnswer(count=len(ids), max_model_len=most, tokens=ids)

        @router.post("/detokenize")
        async def detokenize(body: DetokenizeBody, _: who) -> DetokenizeAnswer:
            """The text of ids."""
            check_model(service, body.model)
            return DetokenizeAnswer(prompt=await service.decode("tokens", body.tokens))

        return router

    def admin(self) -> APIRouter:
        """Routes for administrators: a key marked so, or from this machine where no key is set."""
        router = APIRouter(prefix="/admin", dependencies=[Depends(self.administrator)])

        @router.get("/stats")
        async def stats() -> dict[str, Any]:
            """Load and counters of this router and of the pairs."""
            return self._service.stats()

        return router

    def _model(self) -> ModelAnswer:
        served = self._service.model
        return ModelAnswer(
            id=served.name,
            object="model",
            created=self._created,
            owned_by="twotower",
            max_model_len=served.max_context,
            modes=list(served.modes),
            vocab_size=served.vocab_size,
            has_tokenizer=served.has_tokenizer,
        )

    def _exchange(self, request: Request, body: Any, admission: Admission) -> Exchange:
        return Exchange(self._service, body, request.state.request_id, admission)

    @contextmanager
    def _failing(self, caller: Caller) -> Iterator[Admission]:
        """A place among the caller's requests, given back here if no answer begins."""
        admission = caller.limits.admit()
        try:
            yield admission
        except BaseException:
            admission.release()
            raise
