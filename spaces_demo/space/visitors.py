"""What the server refuses before gradio reads it, and whether a visitor still waits for an answer.

Knows the paths of gradio's server and its queue; knows no tab.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.context import LocalContext

LARGEST_BODY = 64 * 1024  # bytes of a request; a full drawing of the playground takes a tenth of it
GRACE = 30.0  # seconds in which a client must begin to listen for the answer to its request
UNREAD = 300  # sessions whose unread answers are kept, the longest unused one goes first
POSTS = (
    "queue/join",
    "cancel",
    "reset",
    "call/",
)  # all that the page and gradio_client send; no component takes a file

_listening: Counter[str] = Counter()  # open streams of answers, by session or by request

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware: refuses what no part of the demo sends, unread, and knows who listens for answers."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = refusal(scope)
        if refused:
            return await _answer(send, *refused)
        key = _stream(scope)
        _listening.update([key] if key else [])
        try:
            await self.app(scope, receive, send)
        finally:
            _listening.subtract([key] if key else [])
            if key and _listening[key] <= 0:
                del _listening[key]


def refusal(scope: Message) -> tuple[int, str] | None:
    """Status and reason where a request is refused, else None."""
    path = scope["path"].rpartition("/gradio_api/")[2].strip("/")
    if path == "deep_link":  # would write a file for each call
        return 403, "This demo has no links to share."
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    if not path.startswith(POSTS):
        return 403, "This demo takes no files: use its four endpoints."
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit():
        return 411, "Say how long the request is."
    return (413, f"A request has at most {LARGEST_BODY} bytes.") if int(length) > LARGEST_BODY else None


def _stream(scope: Message) -> str | None:
    """Whose answers a request listens for: its session, or the request that it names."""
    path = scope["path"].rpartition("/gradio_api/")[2]
    if path.startswith("queue/data"):
        return parse_qs(scope["query_string"].decode()).get("session_hash", [None])[0]
    return path.rpartition("/")[2] if path.startswith("call/") and scope["method"] == "GET" else None


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def bound_unread(blocks: gr.Blocks) -> None:
    """Keep answers that nobody reads for :data:`UNREAD` sessions only, where gradio keeps them for 2000."""
    blocks._queue.pending_messages_per_session.max_size = UNREAD


def waits() -> Callable[[], bool]:
    """Whether the visitor whose request runs now still waits for it: not cancelled, not disconnected, and listening
    after :data:`GRACE`.  Always, where no server runs."""
    blocks, name, start = LocalContext.blocks.get(None), LocalContext.event_id.get(None), time.monotonic()
    if blocks is None or name is None:
        return lambda: True

    def waiting() -> bool:
        running = [event for job in list(blocks._queue.active_jobs) for event in job or () if event._id == name]
        if not running or not running[0].alive:
            return False
        heard = _listening[running[0].session_hash] > 0 or _listening[name] > 0
        return heard or time.monotonic() - start < GRACE

    return waiting
