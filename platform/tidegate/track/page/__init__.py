"""The run page: one HTML file, without network, which says what a run is, whether it is healthy, and shows why."""

from tidegate.track.page.recording import EVENTS_FILE, LOADS_FILE, SAMPLES_FILE, read_loads, read_samples
from tidegate.track.page.render import run_page

__all__ = ["EVENTS_FILE", "LOADS_FILE", "SAMPLES_FILE", "read_loads", "read_samples", "run_page"]
