import math

import pytest

from simmerge.errors import RangeError, RecipeError, UnknownNameError
from simmerge.operators import check_recipe, describe, form, label, normal_form, resolve, shares
from simmerge.recipe import Filtered, Gradient, Recipe, Slice, Stack, step

RAMP = Gradient((0.0, 1.0))


def test_numbers_are_settled_per_tensor_and_layer() -> None:
    density = Filtered((("mlp", Gradient((0.2, 0.6))), ("norm", 1.0)))
    item = step(
        "ties", ["a", "b"], "base", {"density": (density, 0.5), "weight": Gradient((0.0, 1.0, 0.5)), "lambda": 0.7}
    )
    resolved = resolve(item)
    assert not resolved.constant
    numbers, options = resolved.at("model.layers.3.mlp.up_proj.weight", 0.5)
    assert numbers == {"weight": (1.0, 1.0), "density": (0.4, 0.5), "lambda": 0.7}
    assert options == {"normalize": "true", "rescale": "none", "vote": "weighted"}
    numbers, _ = resolved.at("model.norm.weight", 0.0)
    assert numbers == {"weight": (0.0, 0.0), "density": (1.0, 0.5), "lambda": 0.7}


def test_where_no_case_matches_the_operators_default_holds() -> None:
    resolved = resolve(step("ties", ["a"], "base", {"density": Filtered((("mlp", 0.9),))}))
    assert resolved.at("lm_head.weight", 0.0)[0]["density"] == (0.2,)


def test_options_are_settled_per_tensor() -> None:
    rescale = Filtered((("mlp", "l1"), ("attn", "none")))
    resolved = resolve(step("dare_ties", ["a"], "base", {"rescale": rescale}))
    got = [resolved.at(name, 0.0)[1]["rescale"] for name in ("mlp.up", "attn.q", "norm")]
    assert got == ["l1", "none", "inverse"]


def test_constant_steps_are_the_same_everywhere() -> None:
    resolved = resolve(step("slerp", ["a", "b"], None, {"t": 0.3}))
    assert resolved.constant
    assert resolved.at("x", 0.0) == resolved.at("y", 1.0) == ({"t": 0.3, "threshold": 0.9995}, {})


@pytest.mark.parametrize("layers", [2, 7, 32])
def test_a_gradient_hits_its_values_at_evenly_spaced_layers(layers: int) -> None:
    values = (0.1, 0.7, 0.4)
    resolved = resolve(step("slerp", ["a", "b"], None, {"t": Gradient(values)}))
    got = [resolved.at("x", k / (layers - 1))[0]["t"] for k in range(layers)]
    places = [2 * k / (layers - 1) for k in range(layers)]
    expected = [0.1 + 0.6 * p if p <= 1 else 0.7 - 0.3 * (p - 1) for p in places]
    assert got == pytest.approx(expected, abs=1e-12)


def test_weights_that_cancel_are_refused_where_they_do() -> None:
    item = step("linear", ["a", "b"], None, {"weight": (1.0, Gradient((1.0, -1.0)))})
    resolved = resolve(item)
    assert resolved.at("x", 0.0)[0]["weight"] == (1.0, 1.0)
    with pytest.raises(RangeError, match="sum to zero and cannot be normalised: tensor 'x'"):
        resolved.at("x", 1.0)


@pytest.mark.parametrize("name", ["linear", "multislerp"])
def test_constant_weights_that_cancel_are_refused_at_once(name: str) -> None:
    with pytest.raises(RangeError, match="sum to zero"):
        resolve(step(name, ["a", "b"], None, {"weight": (1.0, -1.0)}))


def test_weights_that_cancel_are_fine_where_nothing_is_divided() -> None:
    assert resolve(step("linear", ["a", "b"], None, {"weight": (1.0, -1.0), "normalize": "false"})).constant
    assert resolve(step("task_arithmetic", ["a", "b"], "base", {"weight": (1.0, -1.0)})).constant


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"t": Gradient((0.0, 1.2))}, RangeError, "[0, 1], got 1.2"),
        ({"t": Gradient((0.0, math.nan))}, RangeError, "finite"),
        ({"t": Filtered((("mlp", 0.1), ("*", -0.1)))}, RangeError, "got -0.1"),
        ({"t": Filtered((("mlp", Gradient((2.0,))),))}, RangeError, "got 2"),
        ({"t": Filtered((("mlp", "half"),))}, RangeError, "finite number, got 'half'"),
        ({"t": "0.5"}, RangeError, "finite number"),
        ({"t": (RAMP, RAMP)}, RecipeError, "takes one number"),
    ],
)
def test_every_number_inside_a_setting_is_checked(values, error, said) -> None:
    with pytest.raises(error) as caught:
        resolve(step("slerp", ["a", "b"], None, values))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "value", ["yes", 1.0, RAMP, Filtered((("mlp", "yes"),)), Filtered((("mlp", RAMP),)), ("true",)]
)
def test_every_choice_inside_a_setting_is_checked(value) -> None:
    with pytest.raises(UnknownNameError, match="option 'normalize'"):
        resolve(step("linear", ["a", "b"], None, {"normalize": value}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Gradient((0.3,)), 0.3),
        (Gradient((0.3, 0.3, 0.3)), 0.3),
        (Gradient((0.5, 0.5)), None),
        (Filtered((("*", 0.3), ("mlp", 0.1))), 0.3),
        (Filtered((("mlp", 0.5), ("*", 0.5))), None),
        (Filtered((("mlp", 0.1), ("norm", 0.5))), Filtered((("mlp", 0.1),))),
        (Filtered((("mlp", 0.5), ("layers", 0.1))), Filtered((("mlp", 0.5), ("layers", 0.1)))),
        (Filtered((("mlp", 0.1), ("attn", 0.2), ("*", 0.2), ("x", 0.9))), Filtered((("mlp", 0.1), ("*", 0.2)))),
        (Filtered((("mlp", Gradient((0.1, 0.1))), ("*", 0.5))), Filtered((("mlp", 0.1),))),
        (Filtered((("*", RAMP),)), RAMP),
    ],
)
def test_the_normal_form_has_no_more_than_is_needed(value, expected) -> None:
    got = normal_form(Recipe(root=step("slerp", ["a", "b"], None, {"t": value}))).root
    assert got == step("slerp", ["a", "b"], None, {} if expected is None else {"t": expected})


def test_the_normal_form_drops_what_has_no_effect() -> None:
    recipe = Recipe(root=step("linear", ["a", "b"], "base", {"weight": (RAMP, RAMP)}), files_from="a")
    assert normal_form(recipe) == Recipe(root=step("linear", ["a", "b"], None, {"weight": RAMP}))
    kept = Recipe(root=step("nuslerp", ["a", "b"], "base"), files_from="b", into="seeing")
    assert normal_form(kept) == kept
    assert normal_form(Recipe(root=step("linear", ["a"]), into="x", files_from="x")).files_from is None
    assert normal_form(Recipe(root=step("linear", ["a"]), into="x", files_from="a")).files_from == "a"


def test_descriptions_take_the_mean_of_what_changes() -> None:
    varied = {"density": Filtered((("mlp", Gradient((0.1, 0.3))), ("*", 0.6))), "weight": (Gradient((0.0, 1.0)), 0.5)}
    plain = {"density": 0.4, "weight": (0.5, 0.5)}
    one, two = (step("ties", ["a", "b"], "base", values) for values in (varied, plain))
    assert describe(one) == pytest.approx(describe(two))
    assert shares(one) == pytest.approx(shares(two))


def test_a_stack_is_described_by_its_parts() -> None:
    one = step("slerp", [Slice("a", 0, 3), Slice("b", 0, 3)], None, {"t": 0.2})
    two = step("passthrough", [Slice("a", 0, 1)])
    got, first, second = describe(Stack((one, two))), describe(one), describe(two)
    assert got == pytest.approx({name: (first[name] + second[name]) / 2 for name in first})
    assert shares(Stack((one, two))) == (0.75, 0.25)
    assert shares(Stack((step("linear", ["a"]), two))) == (0.5, 0.5)


def test_labels_show_every_kind_of_setting() -> None:
    density = Filtered((("mlp", RAMP), ("*", 0.5)))
    part = step("ties", [Slice("a", 0, 4), Slice("b", 0, 4)], Slice("base", 0, 4), {"density": (density, 0.25)})
    recipe = Recipe(root=Stack((part, step("passthrough", [Slice("a", 2, 4)], None, {"scale": 0.5}))), into="seeing")
    ties = "ties({0}[0:4], {1}[0:4]; density={{mlp: [0, 1], *: 0.5}}/0.25, lambda=1)"
    expected = f"stack({ties}, passthrough({{0}}[2:4]; scale=0.5)) into {{2}}"
    assert label(recipe) == expected.format("a", "b", "seeing")
    assert form(recipe) == expected.format("·", "·", "·")


@pytest.mark.parametrize(
    "inputs",
    [
        [Slice("a", 0, 1), Slice("b", 0, 2)],
        [step("linear", [Slice("a", 0, 1)]), Slice("b", 0, 2)],
        [Stack((step("linear", [Slice("a", 0, 1)]), step("linear", [Slice("a", 0, 2)]))), Slice("b", 0, 2)],
    ],
)
def test_inputs_of_different_depth_are_refused(inputs) -> None:
    with pytest.raises(RecipeError, match="equally many layers"):
        check_recipe(Recipe(root=step("linear", inputs)))


def test_layers_that_only_the_checkpoint_knows_are_left_to_the_merge() -> None:
    check_recipe(Recipe(root=step("ties", [Slice("a", 0, 2), "b"], Slice("base", 0, 2))))
