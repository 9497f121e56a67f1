"""A cloud for Ray's autoscaler whose machines are nodes of this one; loaded by the autoscaler's own process."""

from __future__ import annotations

import functools
import tempfile
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

__all__ = ["FAKE_HEAD_NODE_ID", "PretendedCloud"]


class PretendedCloud(FakeMultiNodeProvider):
    """Ray's own, with a folder for each machine: in one folder nodes delete the packages that the others use."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        if self.provider_config["sold_out"]:
            raise RuntimeError("InsufficientInstanceCapacity")
        parent = self.provider_config["folder"]
        own = functools.partial(ray._private.parameter.RayParams, temp_dir=tempfile.mkdtemp(dir=parent))
        with mock.patch.object(ray._private.parameter, "RayParams", own):
            super()._create_node_with_resources_and_labels(*args)
