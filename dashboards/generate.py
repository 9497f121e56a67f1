"""Write the dashboards and rules in this folder again: PYTHONPATH=platform:kernels python dashboards/generate.py"""

from __future__ import annotations

from pathlib import Path

from tidegate.launch.dashboards import write_dashboards, write_rules

if __name__ == "__main__":
    here = Path(__file__).parent
    write_dashboards(here / "grafana" / "dashboards")
    write_rules(here / "prometheus" / "tidegate.rules.yml")
