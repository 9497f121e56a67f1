"""Sweeps over a job under a budget. The only code, beside `launch/`, that imports Ray."""
