"""A Ray cluster of one node on this machine, to which tests add nodes and of which they kill some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import REPOSITORY


@contextlib.contextmanager
def cluster_of_one_node(cpus: int) -> Iterator[Any]:
    """With room for so many workers, and quick to find that a node has died."""
    from ray.cluster_utils import Cluster

    config = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    node = {"num_cpus": cpus, "num_gpus": 0, "include_dashboard": False, "_system_config": config}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # a worker that cannot write would leave truncated bytecode
        cluster = Cluster(initialize_head=True, head_node_args=node)
        yield cluster
        cluster.shutdown()
