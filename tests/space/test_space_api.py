"""The Space's API from outside: ``gradio_client`` against a server started as its users start it."""

from __future__ import annotations

import asyncio
import http.client
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from space_helpers import expected_particles, load, request_of, running_server

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
from gradio_client import Client
from gradio_client.exceptions import AppError
from space import visitors

HEAVY = ["pf-ode", "unipc", "ddim", "deis", "euler", "dpm++2m", "dpm-solver"]
CELLS = {"budgets": [2, 3], "samplers": ["pf-ode", "euler-a"]}
CLIENTS, SECONDS = 20, float(os.environ.get("SPACE_LOAD_SECONDS", "4"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server() as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url, verbose=False)


def test_the_api_is_four_endpoints(client: Client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/compare", "/trajectory", "/playground", "/error_lab"}


def test_no_change_of_a_control_is_dropped(client: Client) -> None:
    """With gradio's trigger mode "once", a change during an answer is dropped, and what is shown is not what is set."""
    watching = [d for d in client.config["dependencies"] if {e for _, e in d["targets"]} & {"change", "input"}]
    assert len(watching) >= 7
    assert {d["trigger_mode"] for d in watching} == {"always_last"}


def test_compare(client: Client) -> None:
    answer = client.predict(model="fashion", images=1, seed=5, api_name="/compare", **CELLS)
    assert [(c["sampler"], c["evaluations"]) for c in answer["cells"]] == [
        ("pf-ode", 2), ("euler-a", 2), ("pf-ode", 3), ("euler-a", 3)
    ]  # fmt: skip
    for cell in answer["cells"]:
        assert (cell["distance"] is None) == (cell["sampler"] == "euler-a")
        assert cell["picture"].startswith("data:image/") and cell["milliseconds"] > 0
    assert 0 < answer["reference_error"] < answer["cells"][2]["distance"] < 1


def test_trajectory(client: Client) -> None:
    answer = client.predict(model="fashion", steps=5, tau=0.5, seed=2, guidance=1.0, api_name="/trajectory")
    assert len(answer["frames"]) == len(answer["log_snr"]) == 6 and answer["log_snr"][-1] is None
    assert answer["alike"]["ODE, 40"] == pytest.approx(1)


def test_playground_answers_what_it_computes(client: Client) -> None:
    answer = client.predict(component=1, scale=2.0, **request_of(3), api_name="/playground")
    np.testing.assert_allclose(answer["particles"], expected_particles(3), atol=1e-9)
    assert len(answer["guided"]["effective_sample_size"]) == 13


def test_playground_takes_a_drawing(client: Client) -> None:
    answer = client.predict(
        distribution="drawn", points=[[0, 0], [1, 1]], particles=50, steps=10, api_name="/playground"
    )
    near = np.abs(np.array(answer["particles"])[:, None] - [[0, 0], [1, 1]]).max(2).min(1)
    assert np.quantile(near, 0.9) < 0.5


def test_error_lab(client: Client) -> None:
    answer = client.predict(samplers=["ddim"], noise=20, api_name="/error_lab")
    assert set(answer["budget"]["10"]) == {"initialisation", "discretisation", "score", "together"}
    assert 0.6 < answer["slopes"]["ddim"] < 1.4 and answer["csv"].startswith("part,name,nfe,value\n")


@pytest.mark.parametrize(
    ("endpoint", "bad", "words"),
    [
        ("/compare", {"budgets": [101]}, "from 1 to 100"),
        ("/compare", {"seed": -1}, "seed"),
        ("/compare", {"model": "sdxl"}, "Stable Diffusion XL"),
        ("/compare", {"prompt": "a" * 301}, "shorten"),
        ("/compare", {"budgets": [99, 100], "images": 8, "samplers": HEAVY[:6]}, "at most"),
        ("/trajectory", {"tau": 9}, "tau"),
        ("/playground", {"particles": 10**6}, "particles"),
        ("/error_lab", {"samplers": ["ddpm"]}, "stochastic"),
    ],
)
def test_the_server_refuses_kindly(client: Client, endpoint: str, bad: dict, words: str) -> None:
    with pytest.raises(AppError, match=words) as caught:
        client.predict(api_name=endpoint, **bad)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["upload", "upload/", "process_recording", "vibe-edit", "run/compare", "component_server"]
)
def test_what_no_part_of_the_page_sends_is_refused_unread(url: str, path: str) -> None:
    """The headers promise a gigabyte that is never sent."""
    headers = {"Content-Length": str(2**30), "Content-Type": "multipart/form-data; boundary=x"}
    status, _ = answer_to(url, "POST", f"/gradio_api/{path}", headers)
    assert status == 403


def test_a_request_has_a_bounded_body_and_leaves_no_link(url: str) -> None:
    assert answer_to(url, "POST", "/gradio_api/queue/join", {"Content-Length": str(2**20)})[0] == 413
    assert answer_to(url, "POST", "/gradio_api/call/compare", {"Transfer-Encoding": "chunked"})[0] == 411
    assert answer_to(url, "GET", "/gradio_api/deep_link?session_hash=x", {})[0] == 403


def answer_to(url: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body of what the server answers to headers alone."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.slow
def test_a_light_request_does_not_wait_for_two_maximal_ones(url: str, client: Client) -> None:
    """Neither one of another kind nor one of the same kind."""
    heavy = {"model": "fashion", "budgets": [100], "samplers": HEAVY[:6], "images": 8}
    sessions = [Client(url, verbose=False) for _ in range(2)]
    jobs = [session.submit(api_name="/compare", seed=k, **heavy) for k, session in enumerate(sessions)]
    time.sleep(5)
    start = time.monotonic()
    client.predict(api_name="/playground", **request_of(1))
    client.predict(model="fashion", images=1, budgets=[2], samplers=["unipc"], guidance=1, api_name="/compare")
    light = time.monotonic() - start
    assert not any(job.done() for job in jobs) and light < 45
    for job in jobs:
        job.cancel()


def test_a_visitor_waits_until_cancelled_gone_or_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(_id="request", session_hash="session", alive=True)
    queue = SimpleNamespace(active_jobs=[None, [event]])
    assert visitors.waits()()  # no server runs
    monkeypatch.setattr(visitors, "LocalContext", context("request", SimpleNamespace(_queue=queue)))
    waiting = visitors.waits()
    assert waiting()
    monkeypatch.setattr(visitors, "GRACE", 0)
    assert not waiting()
    monkeypatch.setitem(visitors._listening, "session", 1)
    assert waiting()
    event.alive = False  # gradio's word for a client that has left
    assert not waiting()
    event.alive, queue.active_jobs = True, [None, None]  # cancelled
    assert not waiting()


def context(event: str, blocks: SimpleNamespace) -> SimpleNamespace:
    """What gradio tells a function about the request that runs it."""
    known = {"event_id": event, "blocks": blocks}
    return SimpleNamespace(**{k: SimpleNamespace(get=lambda _=None, v=v: v) for k, v in known.items()})


def test_who_reads_answers_is_known_while_they_are_read() -> None:
    seen = []

    async def app(scope: dict, receive: object, send: object) -> None:
        seen.append(dict(visitors._listening))

    for path, query in (("queue/data", b"session_hash=s"), ("call/compare/e", b""), ("queue/status", b"")):
        scope = {"type": "http", "method": "GET", "path": f"/gradio_api/{path}", "query_string": query, "headers": []}
        asyncio.run(visitors.Guard(app)(scope, None, None))
    assert seen == [{"s": 1}, {"e": 1}, {}] and not visitors._listening


@pytest.mark.slow
def test_concurrent_clients_each_get_their_own_answers(url: str) -> None:
    outcome = load(url, CLIENTS, SECONDS)
    assert outcome["failed"] == [] and outcome["wrong"] == [] and outcome["requests"] >= CLIENTS
