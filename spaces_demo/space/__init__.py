"""The demo behind ``app.py``: for each tab one module that computes and one that shows.

What computes imports neither gradio nor plotly.
"""
