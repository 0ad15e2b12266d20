"""The KEDA example is YAML, asks the call that there is for a field that it has, and stays within the partitions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from contracts.topology import STAGES
from deploy.settings import Settings
from gateway.scaling import ScalingAnswer

yaml = pytest.importorskip("yaml")
EXAMPLE = Path(__file__).parents[2] / "deploy" / "keda" / "scaledobject.yaml"


def test_the_example_is_one_scaled_object_that_reads_the_scaling_call() -> None:
    (document,) = list(yaml.safe_load_all(EXAMPLE.read_text()))
    assert (document["apiVersion"], document["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    spec = document["spec"]
    assert 1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"] <= Settings.model_fields["partitions"].default
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "metrics-api"
    url = urlsplit(trigger["metadata"]["url"])
    assert url.port == Settings.model_fields["scaling_port"].default
    root, _, stage = url.path.rpartition("/")
    assert (root, stage in STAGES) == ("/ops/v1/scaling", True)
    assert trigger["metadata"]["valueLocation"] in {field.name for field in fields(ScalingAnswer)}
    assert trigger["metadata"]["targetValue"] == "1"
