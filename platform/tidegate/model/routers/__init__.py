"""Routers: one file each, all return `Routing`. A new router is a new file and one line in `RouterConfig`."""

from typing import Annotated

from pydantic import Field

from tidegate.model.routers.base import (
    Capabilities,
    Observe,
    RoutedStep,
    Router,
    RouterContext,
    RouterShape,
    Routing,
)
from tidegate.model.routers.comet import CometConfig
from tidegate.model.routers.decoupled import DecoupledConfig
from tidegate.model.routers.dense_to_sparse import DenseToSparseConfig
from tidegate.model.routers.dselect_k import DSelectKConfig
from tidegate.model.routers.expert_threshold import ExpertChoiceConfig, ExpertThresholdConfig
from tidegate.model.routers.fixed import HashConfig, RandomConfig, RoundRobinConfig, ThorConfig
from tidegate.model.routers.relu import ReluConfig
from tidegate.model.routers.sinkhorn import SinkhornConfig
from tidegate.model.routers.top_k import SigmoidTopKConfig, SoftmaxTopKConfig, SqrtSoftplusTopKConfig, TopKConfig
from tidegate.model.routers.top_p import TopPConfig

__all__ = [
    "Capabilities",
    "Observe",
    "RoutedStep",
    "Router",
    "RouterConfig",
    "RouterContext",
    "RouterShape",
    "Routing",
    "SigmoidTopKConfig",
    "SoftmaxTopKConfig",
    "ThorConfig",
    "TopKConfig",
]

RouterConfig = Annotated[
    SoftmaxTopKConfig
    | SigmoidTopKConfig
    | SqrtSoftplusTopKConfig
    | SinkhornConfig
    | DenseToSparseConfig
    | ReluConfig
    | TopPConfig
    | ExpertThresholdConfig
    | ExpertChoiceConfig
    | CometConfig
    | DSelectKConfig
    | DecoupledConfig
    | HashConfig
    | RandomConfig
    | ThorConfig
    | RoundRobinConfig,
    Field(discriminator="kind"),
]
