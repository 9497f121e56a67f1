"""What a job would take on a cluster that nobody has rented yet: an analytic model, written down in docs/plan.md."""

from tidegate.plan.hardware import Hardware, parse_gpus
from tidegate.plan.search import Plan, make_plan

__all__ = ["Hardware", "Plan", "make_plan", "parse_gpus"]
