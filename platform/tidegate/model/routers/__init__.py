"""Routers: one file each, all return `Routing`. A new router is a new file and one line in `RouterConfig`."""

from typing import Annotated

from pydantic import Field

from tidegate.model.routers.base import Router, Routing
from tidegate.model.routers.sigmoid_top_k import SigmoidTopKConfig
from tidegate.model.routers.softmax_top_k import SoftmaxTopKConfig

__all__ = ["Router", "RouterConfig", "Routing", "SigmoidTopKConfig", "SoftmaxTopKConfig"]

RouterConfig = Annotated[
    SoftmaxTopKConfig | SigmoidTopKConfig,
    Field(discriminator="kind"),
]
