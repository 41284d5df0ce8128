"""How the demo looks: theme, style sheet, the frame of all plots.  Knows gradio's and plotly's options, no content."""

from __future__ import annotations

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

CSS = """
.gradio-container {max-width: min(1180px, 100vw) !important; min-width: 0 !important; margin: 0 auto !important;
  padding: 0 clamp(8px, 2vw, 14px) !important; box-sizing: border-box}
button[role=tab], .tab-container button {padding-left: clamp(7px, 1.6vw, 16px) !important; padding-right: clamp(7px, 1.6vw, 16px) !important;
  font-size: clamp(.84rem, 2.6vw, 1rem) !important}
.gradio-container > .main {padding-left: 0 !important; padding-right: 0 !important; width: 100%; min-width: 0}
.gradio-container .column, .gradio-container .row > *, .gradio-container .tabitem {min-width: 0}
footer {display: none !important}
#title h1 {font-size: 1.55rem; font-weight: 650; letter-spacing: -.01em; margin: 1.1rem 0 .1rem}
#title p {color: var(--body-text-color-subdued); margin: 0 0 .4rem; max-width: 46rem}
.lead, .lead p {color: var(--body-text-color-subdued); max-width: 46rem; margin: .1rem 0 .3rem}
.note {color: var(--body-text-color-subdued); font-size: .86rem; line-height: 1.45}
.note b {color: var(--body-text-color); font-weight: 600}
.grey {opacity: .62; font-size: .84rem; line-height: 1.5; color: var(--body-text-color-subdued)}
.grey span {border: 1px dashed var(--border-color-primary); border-radius: 6px; padding: 1px 7px; margin: 0 6px 4px 0;
  display: inline-block}
.empty {border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 3.2rem 1rem; text-align: center;
  color: var(--body-text-color-subdued)}
.html-container {padding: 0 !important}
button[role=tab].selected {color: #25717a !important}
.dark button[role=tab].selected {color: #6cc3cb !important}
button[role=tab].selected::after {background: #25717a !important}
.scroll {overflow-x: auto; padding: 2px}
.sheet, .sheet tr, .sheet tbody, .sheet thead {border: 0 !important; background: none !important}
.sheet {border-collapse: separate; border-spacing: 6px 4px; margin: 0; width: auto}
.sheet th {font-weight: 500; text-align: left; color: var(--body-text-color-subdued); font-size: .85rem; border: 0;
  padding: 0 4px; white-space: nowrap}
.sheet tbody th {position: sticky; left: 0; background: var(--body-background-fill); z-index: 1; vertical-align: middle}
.sheet tbody th b {display: block; color: var(--body-text-color); font-weight: 600; font-size: .92rem}
.sheet td {border: 0; padding: 0; vertical-align: top}
.cell {display: block; border: 1px solid transparent; border-radius: 8px; padding: 5px; background: none; cursor: pointer;
  text-align: left; color: var(--body-text-color); font: inherit}
.cell:hover {border-color: var(--border-color-primary)}
.cell:focus-visible, .player button:focus-visible, .player input:focus-visible {outline: 2px solid #2f7f86; outline-offset: 1px}
.cell.chosen {border-color: #2f7f86}
.cell img, .pic {image-rendering: pixelated; display: block; border-radius: 4px; width: 100%}
.cell img {width: 192px}
.cell small, .tile small {display: block; font-size: .78rem; line-height: 1.35; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; margin-top: 3px}
.cell small b, .tile small b {color: var(--body-text-color); font-weight: 600}
.cell small b.best {color: #c23b4f}
.dark .cell small b.best {color: #f08091}
.hole {width: 192px; height: 58px; border-radius: 4px; background: var(--border-color-primary); opacity: .35}
.bar {height: 3px; border-radius: 2px; background: var(--border-color-primary); margin: 2px 0 8px; overflow: hidden}
.bar i {display: block; height: 100%; background: #2f7f86; transition: width .2s}
.strip {display: flex; gap: 8px; overflow-x: auto; padding-bottom: 4px}
.tile {flex: 0 0 74px} .tile.wide {flex-basis: 104px}
td .tile {width: 104px}
.tile .pic + .pic {margin-top: 4px}
.player {display: grid; grid-template-columns: repeat(2, minmax(0, 208px)); gap: 6px 14px; align-items: start}
.player figure {margin: 0} .player figcaption {font-size: .82rem; color: var(--body-text-color-subdued); margin-bottom: 3px}
.player .controls {grid-column: 1 / -1; display: flex; gap: 10px; align-items: center; max-width: 430px}
.player button {border: 1px solid var(--border-color-primary); background: var(--block-background-fill); border-radius: 8px;
  padding: 4px 12px; color: var(--body-text-color); cursor: pointer; min-width: 76px}
.player input {flex: 1; accent-color: #2f7f86; min-width: 60px}
.player output {font-variant-numeric: tabular-nums; font-size: .82rem; min-width: 92px; color: var(--body-text-color-subdued)}
h4.part {font-size: .95rem; font-weight: 600; margin: 14px 0 6px}
canvas.draw {width: 100%; aspect-ratio: 1; border: 1px solid var(--border-color-primary); border-radius: 10px;
  touch-action: none; cursor: crosshair; background: var(--block-background-fill); display: block}
.js-plotly-plot text, .js-plotly-plot .annotation-text {fill: var(--body-text-color-subdued) !important}
.js-plotly-plot .gridlayer path {stroke: var(--border-color-primary) !important}
.js-plotly-plot .updatemenu-item-rect {fill: var(--block-background-fill) !important;
  stroke: var(--border-color-primary) !important}
.js-plotly-plot .slider-rail-rect, .js-plotly-plot .slider-rail-touch-rect {stroke: var(--border-color-primary) !important}
.js-plotly-plot .slider-grip-rect {fill: #2f7f86 !important; stroke: #2f7f86 !important}
@media (max-width: 640px) {
  .gradio-container .row > .column {min-width: 100% !important}
  .cell img, .hole {width: 128px}
  .hole {height: 40px}
  #title h1 {font-size: 1.3rem}
}
"""


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
