"""Stand-ins for modules: whatever is done with a name of one happens to the real thing."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest

from sdcli.io.deferred_modules import DeferredDistributions, DeferredModule, DeferredName


def test_a_name_is_its_object_when_it_is_used() -> None:
    fraction = DeferredModule("fractions").Fraction
    assert fraction(1, 2) + fraction("1/2") == 1
    assert fraction.from_float(0.5) == fraction(1, 2)
    assert isinstance(fraction(1), fraction)
    assert issubclass(type(fraction(1)), fraction)
    assert not isinstance(1.5, fraction)

    class Half(fraction):  # type: ignore[misc]
        pass

    assert issubclass(Half, type(fraction(1)))


def test_a_name_stands_in_annotations_without_an_import() -> None:
    sys.modules.pop("this", None)  # prints a poem when it is imported
    name = DeferredModule("this").Poem

    assert name | None == None | name == Any
    assert "this" not in sys.modules


def test_a_name_needed_while_its_module_is_left_out_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fractions", DeferredModule("fractions"))
    with pytest.raises(ImportError, match=r"fractions\.Fraction is needed"):
        DeferredName("fractions", "Fraction")(1)


def test_a_module_has_its_version_and_no_other_private_names() -> None:
    module = DeferredModule("accelerate")
    assert module.__version__ == importlib.metadata.version("accelerate")
    assert not hasattr(module, "__wrapped__")
    assert importlib.util.find_spec("accelerate") is not None


def test_distributions_are_those_of_the_real_table() -> None:
    deferred = DeferredDistributions()
    assert deferred
    assert dict(deferred) == importlib.metadata.packages_distributions()
    assert "PIL" in deferred
    assert "no such package" not in deferred
