import contextlib
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge.errors import RangeError, RecipeError, UnknownNameError, UsageError
from simmerge.operators import OPERATORS, normal_form
from simmerge.recipe import Recipe, Step, from_dict, step, steps, to_dict
from simmerge.recipe_yaml import read_recipe, write_recipe

NAMES = st.sampled_from(["a", "b", "c", "d/e", "ü f"])


@st.composite
def a_step(draw: st.DrawFn, depth: int = 2) -> Step:
    spec = OPERATORS[draw(st.sampled_from(sorted(OPERATORS)))]
    count = 2 if spec.max_inputs == 2 else draw(st.integers(spec.min_inputs, 4))
    nested = a_step(depth=depth - 1) if depth else NAMES
    inputs = [draw(st.one_of(NAMES, nested)) for _ in range(count)]
    values: dict[str, object] = {}
    for coefficient in spec.coefficients:
        number = st.floats(max(coefficient.low, 0.125), min(coefficient.high, 1.0), allow_subnormal=False)
        if draw(st.booleans()):
            shape = st.tuples(*[number] * count) if coefficient.per_input and draw(st.booleans()) else number
            values[coefficient.name] = draw(shape)
    for option in spec.options:
        if draw(st.booleans()):
            values[option.name] = draw(st.sampled_from(option.choices))
    return step(spec.name, inputs, "base" if spec.needs_base else None, values)  # type: ignore[arg-type]


RECIPES = st.builds(
    Recipe,
    root=a_step(),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
)


@given(RECIPES)
@settings(deadline=None)
def test_plain_data_and_yaml_read_back(recipe: Recipe) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert read_recipe(write_recipe(recipe)) == normal_form(recipe)


@given(RECIPES)
@settings(deadline=None)
def test_the_normal_form_is_stable(recipe: Recipe) -> None:
    once = normal_form(recipe)
    assert normal_form(once) == once


def test_order_is_part_of_a_recipe() -> None:
    one = Recipe(root=step("slerp", ["a", "b"]))
    two = Recipe(root=step("slerp", ["b", "a"]))
    digests = {"a": "1", "b": "2"}
    assert one.recipe_id(digests) != two.recipe_id(digests)


def test_an_id_follows_contents_not_names() -> None:
    one = Recipe(root=step("slerp", ["a", "b"])).recipe_id({"a": "1", "b": "2"})
    assert one == Recipe(root=step("slerp", ["x", "y"])).recipe_id({"x": "1", "y": "2"})
    assert one != Recipe(root=step("slerp", ["a", "b"])).recipe_id({"a": "1", "b": "3"})
    assert len(one) == 16


def test_an_id_needs_every_digest() -> None:
    with pytest.raises(RecipeError, match="'b'"):
        Recipe(root=step("slerp", ["a", "b"])).recipe_id({"a": "1"})


def test_steps_come_before_their_users() -> None:
    inner = step("linear", ["a", "b"])
    outer = step("slerp", [inner, "c"])
    assert list(steps(outer)) == [inner, outer]
    recipe = Recipe(root=outer)
    assert recipe.sources() == ("a", "b", "c")
    assert recipe.bases() == ()


def test_mergekit_yaml_is_read() -> None:
    recipe = read_recipe(
        """
        merge_method: ties
        base_model: base
        models:
          - model: base
          - model: a
            parameters: {weight: 0.5, density: 0.4}
          - model: b
            parameters: {weight: 1.0, density: 0.4}
        parameters: {normalize: true, lambda: 0.8}
        dtype: float32
        out_dtype: bfloat16
        """
    )
    expected = {"density": 0.4, "lambda": 0.8, "weight": (0.5, 1.0)}
    assert recipe == Recipe(root=step("ties", ["a", "b"], "base", expected), dtype="bfloat16")


def test_mergekits_slerp_has_its_base_first() -> None:
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}\n"
    assert read_recipe(text).root.inputs == ("b", "a")


def test_plain_mergekit_export_spells_everything_out() -> None:
    recipe = Recipe(root=step("ties", ["a", "b"], "base", {"density": 0.5}), dtype="bfloat16")
    data = yaml.safe_load(write_recipe(recipe, mergekit=True))
    assert data == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1.0, "density": 0.5}} for m in ("a", "b")],
        "parameters": {"lambda": 1.0, "normalize": True, "rescale": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_what_mergekit_has_not_is_not_exported() -> None:
    with pytest.raises(RecipeError, match="rescale: l1"):
        write_recipe(Recipe(root=step("dare_ties", ["a", "b"], "base")), mergekit=True)
    with pytest.raises(RecipeError, match="several steps"):
        write_recipe(Recipe(root=step("slerp", [step("linear", ["a", "b"]), "c"])), mergekit=True)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("merge_method: [", RecipeError, "not YAML"),
        ("[1, 2]", RecipeError, "must be a mapping"),
        ("models: [{model: a}]", RecipeError, "lacks 'merge_method'"),
        ("merge_method: linear", RecipeError, "lacks 'models'"),
        ("merge_method: linear\nmodels: []", RecipeError, "at least one"),
        ("merge_method: linaer\nmodels: [{model: a}]", UnknownNameError, "Did you mean 'linear'"),
        ("merge_method: linear\nmodles: []", UnknownNameError, "Did you mean 'models'"),
        ("merge_method: linear\nmodels: [{modell: a}]", UnknownNameError, "Did you mean 'model'"),
        ("merge_method: linear\nmodels: [{model: a, merge: {}}]", RecipeError, "exactly one"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1]}}]", RecipeError, "number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 7}}]", RangeError, "[-2, 2], got 7"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", RangeError, "finite"),
        ("merge_method: linear\nmodels: [{model: a}]\nseed: -1", RecipeError, "seed"),
        ("merge_method: linear\nmodels: [{model: a}]\nout_dtype: float17", UnknownNameError, "float16"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: bfloat16", RecipeError, "computes in float32"),
        ("merge_method: slerp\nbase_model: c\nmodels: [{model: a}, {model: b}]", RecipeError, "t = 0"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_by_name(text: str, error: type[UsageError], said: str) -> None:
    with pytest.raises(error) as caught:
        read_recipe(text)
    assert said in str(caught.value)


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_is_a_recipe_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        read_recipe(text)
