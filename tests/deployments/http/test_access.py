"""Who may use which path: keys, this machine, others; and the limits of a key."""

from __future__ import annotations

from tests.deployments.http.conftest import Fronts
from twotower.deployments.access.keys import ApiKey, new_key

OPEN = ["/", "/health", "/ready", "/version", "/openapi.json"]
KEYED = ["/v1/models", "/v1/models/tiny"]
ADMIN = ["/admin/stats"]
ELSEWHERE = "192.0.2.7"


async def test_this_machine_needs_no_key_and_others_are_kept_out(fronts: Fronts) -> None:
    here, there = fronts(model_name="tiny"), fronts(client=ELSEWHERE, model_name="tiny")
    for path in OPEN + KEYED + ADMIN:
        assert (await here.client.get(path)).status_code == 200, path
    for path in OPEN:
        assert (await there.client.get(path)).status_code == 200, path
    for path in [*KEYED, *ADMIN, "/nowhere"]:
        answer = await there.client.get(path)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_front_on_this_machine_does_not_make_its_clients_local(fronts: Fronts) -> None:
    front = fronts()
    answer = await front.client.get("/v1/models", headers={"x-forwarded-for": ELSEWHERE})
    assert answer.status_code == 401


async def test_an_operator_may_let_everyone_in_but_not_to_admin_paths(fronts: Fronts) -> None:
    front = fronts(client=ELSEWHERE, allow_anonymous=True)
    assert (await front.client.get("/v1/models")).status_code == 200
    assert (await front.client.get("/admin/stats")).status_code == 403


async def test_another_sites_page_cannot_use_a_browser_on_this_machine(fronts: Fronts) -> None:
    client = fronts().client
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        answer = await client.get("/v1/models", headers=headers)
        assert answer.status_code == 403, headers
    own = {"origin": "http://localhost:8000", "host": "localhost:8000"}
    assert (await client.get("/v1/models", headers=own)).status_code == 200


async def test_with_keys_each_request_needs_one(fronts: Fronts) -> None:
    (plain, hashed), (chief, chief_hash) = new_key(), new_key()
    front = fronts(
        api_keys=[
            ApiKey(name="team", sha256=hashed),
            ApiKey(name="chief", sha256=chief_hash, admin=True),
        ]
    )
    get = front.client.get

    async def status(path: str, authorization: str | None = None) -> int:
        headers = {} if authorization is None else {"authorization": authorization}
        return (await get(path, headers=headers)).status_code

    for wrong in (None, "", "Bearer", f"Basic {plain}", f"Bearer {plain}x", plain, "Bearer a b"):
        assert await status("/v1/models", wrong) == 401, wrong
    assert await status("/v1/models", f"Bearer {plain}") == 200
    assert await status("/v1/models", f"bearer {plain}") == 200
    assert await status("/admin/stats", f"Bearer {plain}") == 403
    assert await status("/admin/stats", f"Bearer {chief}") == 200
    # A request is refused before its body is looked at.
    answer = await front.client.post("/v1/completions", content=b"{")
    assert answer.status_code == 401


async def test_a_key_has_so_many_requests_at_a_time_and_tokens_a_minute(
    fronts: Fronts,
) -> None:
    plain, hashed = new_key()
    key = ApiKey(name="team", sha256=hashed, max_concurrent=1, tokens_per_minute=30)
    front = fronts(api_keys=[key])
    headers = {"authorization": f"Bearer {plain}"}
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 16, "ignore_eos": True}

    async def post() -> tuple[int, str]:
        answer = await front.client.post("/v1/completions", json=body, headers=headers)
        return answer.status_code, answer.text

    # 4 of the prompt and 16 of the output each time: the second takes the last 10.
    assert (await post())[0] == 200
    assert (await post())[0] == 200
    status, text = await post()
    assert status == 429
    assert "'team'" in text
    assert "tokens a minute" in text
    # The others go on, and what the key may not do costs no row.
    assert front.handle.rows() == 0
    assert (await front.client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_place_of_a_key_is_free_again_whatever_ended_the_request(fronts: Fronts) -> None:
    plain, hashed = new_key()
    front = fronts(api_keys=[ApiKey(name="team", sha256=hashed, max_concurrent=1)])
    headers = {"authorization": f"Bearer {plain}"}
    bodies = [
        {"prompt": 5},
        {"prompt": "a", "top_p": 7},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": 2, "stream": True},
        {"prompt": "a", "model": "none"},
        {"prompt": "a", "max_tokens": 2},
    ]
    for body in bodies:
        answer = await front.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code != 429, body
    assert answer.status_code == 200


async def test_cors_is_off_unless_origins_are_named(fronts: Fronts) -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    front = fronts()
    assert "access-control-allow-origin" not in (await front.client.get("/health")).headers
    _, hashed = new_key()
    front = fronts(
        api_keys=[ApiKey(name="team", sha256=hashed)], cors_origins=["https://a.example"]
    )
    preflight = await front.client.options("/v1/completions", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    ask["origin"] = "https://b.example"
    refused = await front.client.options("/v1/completions", headers=ask)
    assert "access-control-allow-origin" not in refused.headers
