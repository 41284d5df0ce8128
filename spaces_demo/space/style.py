"""How the demo looks: theme, style sheet, the frame of all plots.  Knows gradio's and plotly's options, no content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

OURS, ACCENT, MUTED = "#d1495b", "#2f7f86", "#717b8a"
SYSTEM = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

# names of fonts that a machine has: nothing is fetched from anywhere
THEME = gr.themes.Base(
    primary_hue="teal", neutral_hue="slate", radius_size="md", text_size="md", font=SYSTEM, font_mono=MONO
).set(
    body_background_fill="#fafbfc",
    body_background_fill_dark="#12161c",
    block_background_fill="white",
    block_background_fill_dark="#191f27",
    block_border_width="1px",
    block_label_text_weight="500",
    block_title_text_weight="500",
    block_shadow="none",
    button_primary_background_fill="#25717a",
    button_primary_background_fill_hover="#1d5b62",
    button_primary_background_fill_dark="#2f7f86",
    button_primary_text_color="white",
    body_text_color_subdued="#586474",
    body_text_color_subdued_dark="#9ba7b6",
    block_title_text_color="#3c4654",
    block_title_text_color_dark="#c9d1db",
    block_info_text_color="#586474",
    block_info_text_color_dark="#9ba7b6",
    color_accent="#25717a",
    slider_color="#25717a",
    slider_color_dark="#3f9aa3",
    checkbox_background_color_selected="#25717a",
    checkbox_background_color_selected_dark="#2f7f86",
    checkbox_label_background_fill="#f1f4f6",
    checkbox_label_background_fill_dark="#222a34",
    button_secondary_background_fill="#eef2f4",
    button_secondary_background_fill_dark="#2a333e",
    input_background_fill="#f6f8f9",
    input_background_fill_dark="#222a34",
)

CSS = Path(__file__).with_suffix(".css").read_text()


def framed(figure: Any, height: int, **layout: Any) -> Any:
    """``figure`` on a transparent ground, with room for its labels and no tools of plotly in the way."""
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": ", ".join(SYSTEM), "size": 12, "color": MUTED},
        **{"margin": {"l": 52, "r": 14, "t": 30, "b": 44}, **layout},
    )
    figure.update_xaxes(zeroline=False, gridcolor="rgba(128,128,128,.18)", automargin=True)
    figure.update_yaxes(zeroline=False, gridcolor="rgba(128,128,128,.18)", automargin=True)
    return figure
