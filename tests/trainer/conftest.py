"""What several tests of whole runs share."""

import pytest


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without prediction and plots, which take longer than a few steps and have tests of their own."""
    monkeypatch.setattr("trainer.summary.prediction", lambda run, warn: {})
    monkeypatch.setattr("trainer.summary.draw", lambda run, folder, warn, predicted=None: None)
