"""HTTP: the ``/rksc/*`` routes, and a thin middleware around SGLang's own."""

from __future__ import annotations

import json
from typing import Any

import sglang
import torch
import transformers
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sglang.srt.entrypoints.http_server import get_global_state

import rksc_sglang
from rksc_sglang.compat import extensions, has_extension
from rksc_sglang.contract import KEY, ContractError
from rksc_sglang.rsbcm.life_cycle import State
from rksc_sglang.serving.evicting import end_of, states_of
from rksc_sglang.serving.tokenizer_manager import RkscTokenizerManager, response_infos

HEADER = b"x-rksc"

router = APIRouter(prefix="/rksc")


def _manager() -> RkscTokenizerManager:
    return get_global_state().tokenizer_manager


@router.get("/status")
async def status() -> dict[str, Any]:
    """Versions, model, configuration, features, counters; one entry a data-parallel rank."""
    manager = _manager()
    states = await manager.get_internal_state()
    return {
        "versions": {
            "rksc_sglang": rksc_sglang.__version__,
            "sglang": sglang.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": manager.config_value("served_model_name"),
        "model_path": manager.config_value("model_path"),
        "mode": manager.rksc_config.mode,
        "config": vars(manager.rksc_config),
        "extension_points": extensions(),
        "frontend_counters": manager.rksc_counters.snapshot(),
        "ranks": [state[KEY] for state in states],
    }


class BranchStates(BaseModel):
    """Body of ``POST /rksc/branches``: what became of a group's branches.

    ``program`` names one that has ended, all of its groups with it. ``extra_key`` and
    ``cache_salt`` name the tenant, as on the requests themselves.
    """

    model_config = ConfigDict(extra="forbid")

    group: str | None = Field(default=None, min_length=1)
    states: dict[int, State] = {}
    program: str | None = Field(default=None, min_length=1)
    extra_key: str | None = None
    cache_salt: str | None = None

    @model_validator(mode="after")
    def _names_something(self) -> BranchStates:
        if self.group is None and (self.program is None or self.states):
            raise ValueError("group: is needed where states are reported; or program, alone")
        return self


@router.post("/branches")
async def branches(body: BranchStates) -> dict[str, Any]:
    """Take note of a group's life; a pruned branch that is still running is aborted.

    The cache hears of it between two passes, later than this answers.
    """
    manager = _manager()
    aborted: list[int] = []
    tenant = (body.extra_key, body.cache_salt)
    if body.group is not None:
        pruned = {branch for branch, state in body.states.items() if state == "pruned"}
        aborted = manager.abort_branches(body.group, pruned, tenant)
        manager.report(tenant, states_of(body.group, body.states))
    if body.program is not None:
        manager.report(tenant, end_of(body.program))
    return {"group": body.group, "aborted": aborted}


class RkscMiddleware:
    """Refuses a malformed contract before a stream starts, and sets the ``x-rksc`` header.

    SGLang begins a stream on ``/generate`` with status 200 and reports errors inside it, unless it
    has been patched; its OpenAI routes have no place for ``meta_info`` in most of their responses.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sglang_validates = has_extension("request_validation")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
        elif scope["path"] == "/generate" and not self.sglang_validates:
            await self._generate(scope, receive, send)
        elif scope["path"].startswith("/v1/"):
            await self._openai(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _generate(self, scope: Any, receive: Any, send: Any) -> None:
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        error = _contract_error(body)
        if error is not None:
            await JSONResponse({"error": {"message": error}}, status_code=400)(scope, receive, send)
            return
        replay = iter(messages)

        async def replaying_receive() -> Any:
            return next(replay, None) or await receive()

        await self.app(scope, replaying_receive, send)

    async def _openai(self, scope: Any, receive: Any, send: Any) -> None:
        infos: dict[str, dict[str, Any]] = {}
        token = response_infos.set(infos)

        async def send_with_header(message: Any) -> None:
            if message["type"] == "http.response.start" and infos:
                values = list(infos.values())
                value = json.dumps(values[0] if len(values) == 1 else values)
                message["headers"] = [*message["headers"], (HEADER, value.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_header)
        finally:
            response_infos.reset(token)


def _contract_error(body: bytes) -> str | None:
    # Requests without the contract, nearly all of them, pay for one substring search.
    if f'"{KEY}"'.encode() not in body:
        return None
    try:
        raw = json.loads(body)
    except ValueError:
        return None  # SGLang's own parser says what is wrong.
    try:
        _manager().check_contracts(raw.get("sampling_params") if isinstance(raw, dict) else None)
    except ContractError as error:
        return str(error)
    return None


def install(app: FastAPI) -> None:
    """Add routes and middleware to SGLang's FastAPI application, before it starts."""
    app.include_router(router)
    app.add_middleware(RkscMiddleware)
