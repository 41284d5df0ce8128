"""The demo: ``python spaces_demo/app.py``, or a Gradio Space.

Knows the page and the queue; each tab is a module of its own in ``space``.  Host and port are Gradio's own environment
variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from space import compare_tab, error_lab_tab, playground_tab, trajectory_tab
from space.style import CSS, THEME

TABS = (
    ("Compare", "compare", compare_tab),
    ("Trajectory", "trajectory", trajectory_tab),
    ("2-D playground", "playground", playground_tab),
    ("Error lab", "error_lab", error_lab_tab),
)


def build() -> gr.Blocks:
    """The page: four tabs, and the API ``/compare``, ``/trajectory``, ``/playground``, ``/error_lab``."""
    with gr.Blocks(title="diffusers_sde", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(
            "# See the samplers differ\n"
            "Samplers for diffusers from one SDE/ODE family: one forward process, one coefficient table, one step.",
            elem_id="title",
        )
        with gr.Tabs():
            for title, name, tab in TABS:
                with gr.Tab(title, id=name) as page:
                    tab.build(page)
        for _, name, tab in TABS:
            gr.api(tab.api, api_name=name, concurrency_limit=2, concurrency_id="solve")
    return demo.queue(max_size=64, default_concurrency_limit=4)


def launch_options() -> dict:
    """What ``launch`` is called with."""
    return {"theme": THEME, "css": CSS, "show_error": True, "ssr_mode": False, "footer_links": [], "run_history": False}


if __name__ == "__main__":
    build().launch(**launch_options())
