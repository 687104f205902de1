"""What recorded and typed settings leave behind where a line, an option or --without takes their place."""

from __future__ import annotations

from typing import Any

import pytest

from sdcli.request.replaced import given_fields, without_named, without_replaced


@pytest.mark.parametrize(
    ("without", "typed", "left"),
    [
        ("init-image", {}, {"steps", "refiner", "refiner_start"}),
        ("mask", {}, {"init_image", "strength", "steps", "refiner", "refiner_start"}),
        ("mask", {"extend": "left=64"}, {"init_image", "strength", "mask_blur", "steps", "refiner", "refiner_start"}),
        ("refiner,steps", {}, {"init_image", "strength", "mask", "mask_blur"}),
        ("extend", {}, {"init_image", "strength", "mask", "mask_blur", "steps", "refiner", "refiner_start"}),
        ("refiner", {"refiner": "other"}, {"init_image", "strength", "mask", "mask_blur", "steps", "refiner_start"}),
    ],
)
def test_what_needs_a_setting_that_is_left_out_goes_with_it(
    without: str, typed: dict[str, str], left: set[str]
) -> None:
    names = ["init_image", "strength", "mask", "mask_blur", "steps", "refiner", "refiner_start"]
    names += ["extend", "width"] if without == "extend" else []
    assert without_named(dict.fromkeys(names, "value"), without, typed=typed).keys() == left


@pytest.mark.parametrize(
    ("asked", "stays"),
    [
        ({"seed"}, {"steps", "width", "guidance_scale", "guidance_end"}),
        ({"extend"}, {"steps", "guidance_scale", "guidance_end"}),
        ({"guidance_scale"}, {"steps", "width"}),
        ({"guidance_end"}, {"steps", "width", "guidance_scale"}),
    ],
)
def test_what_is_asked_anew_takes_the_place_of_what_was_recorded(asked: set[str], stays: set[str]) -> None:
    assert (
        without_replaced(dict.fromkeys(("steps", "width", "guidance_scale", "guidance_end"), 1), asked).keys() == stays
    )


def test_a_scale_that_is_left_out_takes_its_end_with_it() -> None:
    recorded = {"guidance_scale": 7.0, "guidance_end": 2.0, "steps": 4}
    assert without_named(recorded, "guidance_scale", typed={}) == {"steps": 4}
    assert without_named(recorded, "guidance_end", typed={}) == {"guidance_scale": 7.0, "steps": 4}


SCHEDULE = {"guidance_scale": "7", "guidance_end": "3"}


@pytest.mark.parametrize(
    ("own", "typed", "recorded", "given"),
    [
        ({"guidance_scale": 5}, SCHEDULE, {}, {"guidance_scale": 5}),
        ({"guidance_scale": 5}, {}, SCHEDULE, {"guidance_scale": 5}),
        ({}, {"guidance_scale": "5"}, SCHEDULE, {"guidance_scale": "5"}),
        ({"guidance_scale": 5, "guidance_end": 1}, SCHEDULE, SCHEDULE, {"guidance_scale": 5, "guidance_end": 1}),
        ({"guidance_scale": 5}, {"guidance_end": "3"}, {}, {"guidance_scale": 5, "guidance_end": "3"}),
        ({"init_image": "b.png"}, {}, {"init_image": "a.png", "width": 64, "height": 72}, {"init_image": "b.png"}),
        ({"init_image": "b"}, {"width": 64}, {"init_image": "a", "width": 72}, {"init_image": "b", "width": 64}),
        ({"fast": True}, {}, {"steps": 30, "scheduler": "ddim", "seed": 1}, {"fast": True, "seed": 1}),
        ({"seed": None}, {"seed": 7}, {"seed": 1}, {"seed": None}),
    ],
)  # fmt: skip
def test_a_line_replaces_a_setting_with_all_that_belongs_to_it(
    own: dict[str, Any], typed: dict[str, Any], recorded: dict[str, Any], given: dict[str, Any]
) -> None:
    assert given_fields(own, typed, recorded) == given
