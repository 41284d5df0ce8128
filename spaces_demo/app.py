"""The demo: ``python spaces_demo/app.py``, or a Gradio Space.

Knows the page and the queue; each tab is a module of its own in ``space``.  Host and port are Gradio's own environment
variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # past requests that gradio keeps for its statistics

import gradio as gr
from space import compare_tab, error_lab_tab, playground_tab, trajectory_tab
from space.style import CSS, THEME
from space.turns import SHARED
from space.visitors import Guard, bound_unread
from starlette.middleware import Middleware

LIGHT = {"concurrency_limit": 4, "concurrency_id": "playground"}
TABS = (
    ("Compare", "compare", compare_tab, SHARED),
    ("Trajectory", "trajectory", trajectory_tab, SHARED),
    ("2-D playground", "playground", playground_tab, LIGHT),
    ("Error lab", "error_lab", error_lab_tab, SHARED),
)
SESSIONS = 100  # pages whose state is kept, the longest unused one goes first


def build() -> gr.Blocks:
    """The page: four tabs, and the API ``/compare``, ``/trajectory``, ``/playground``, ``/error_lab``."""
    with gr.Blocks(title="diffusers_sde", analytics_enabled=False) as demo:
        gr.Markdown(
            "# See the samplers differ\n"
            "Samplers for diffusers from one SDE/ODE family: one forward process, one coefficient table, one step.",
            elem_id="title",
        )
        with gr.Tabs():
            for title, name, tab, _ in TABS:
                with gr.Tab(title, id=name) as page:
                    tab.build(page)
        for _, name, tab, queue in TABS:
            gr.api(tab.api, api_name=name, **queue)
    demo.queue(max_size=64, default_concurrency_limit=4)
    bound_unread(demo)
    return demo


def launch_options() -> dict:
    """What ``launch`` is called with."""
    return {
        "theme": THEME,
        "css": CSS,
        "show_error": True,
        "ssr_mode": False,
        "footer_links": [],
        "run_history": False,
        "state_session_capacity": SESSIONS,
        "app_kwargs": {"middleware": [Middleware(Guard)]},
    }


if __name__ == "__main__":
    build().launch(**launch_options())
