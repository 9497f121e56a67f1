"""Arguments and options that several commands of the command line have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(help="YAML job file", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override one field, as a.b=value; repeatable", show_default=False)
]
RunName = Annotated[str, typer.Argument(help="Name of a run, as train prints it", show_default=False)]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Which one, as checkpoints lists them [default: the newest]", show_default=False)
]
StateOption = Annotated[
    Path | None, typer.Option("--state-dir", help="Where runs live [default: $TIDEGATE_STATE or ./.tidegate]")
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray's dashboard, http://HOST:8265 [default: $RAY_API_SERVER_ADDRESS]", show_default=False
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow its output until it ends; exit status is the job's")]
Submitted = Annotated[str, typer.Argument(help="Name that it was submitted by", show_default=False)]
StateThere = Annotated[
    str | None,
    typer.Option(
        "--state-dir", help="On the cluster, seen by all nodes [default: $TIDEGATE_STATE there]", show_default=False
    ),
]
