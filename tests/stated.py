"""Numbers that a document states: the test that computes one quotes its sentence, so that neither changes alone."""

from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def stated(sentence: str) -> None:
    """Assert that README says this.  Quote it in the test whose assertions hold its numbers."""
    assert sentence in README, f"README no longer says: {sentence}"
