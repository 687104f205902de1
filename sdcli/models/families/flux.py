"""FLUX.1: known by name, so that models.yaml may list its models; nothing generates with them yet."""

from __future__ import annotations

from sdcli.models.families.family import Family

FLUX = Family(name="flux", supported=False)
