import contextlib
import json
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from simmerge.errors import RecipeError, UsageError
from simmerge.operators import OPERATORS, check_recipe, describe, form, label, normal_form, resolve, shares
from simmerge.operators.spec import Coefficient, OperatorSpec
from simmerge.recipe import (
    Filtered,
    Gradient,
    Input,
    Node,
    Recipe,
    Slice,
    Stack,
    Step,
    TokenRule,
    Value,
    Vocabulary,
    from_dict,
    step,
    steps,
    to_dict,
)
from simmerge.recipe_yaml import read_recipe, write_recipe
from simmerge.recipe_yaml.peer import MERGEKIT

NAMES = ("a", "b", "c", "d/e", "ü f", "123", "x+adapter")
TEXTS = st.sampled_from(["*", "mlp", "self_attn", "layers.0.", ""])
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def numbers(coefficient: Coefficient) -> st.SearchStrategy[float]:
    low = max(coefficient.low, 0.125) if coefficient.name == "weight" else coefficient.low
    return st.floats(low, coefficient.high, allow_subnormal=False)


def filtered(values: st.SearchStrategy) -> st.SearchStrategy[Filtered]:
    return st.builds(Filtered, st.lists(st.tuples(TEXTS, values), min_size=1, max_size=4).map(tuple))


def settings_of(coefficient: Coefficient) -> st.SearchStrategy:
    plain = numbers(coefficient)
    gradient = st.builds(Gradient, st.lists(plain, min_size=1, max_size=4).map(tuple))
    return st.one_of(plain, gradient, filtered(st.one_of(plain, gradient)))


@st.composite
def values_of(draw: st.DrawFn, spec: OperatorSpec, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for coefficient in spec.coefficients:
        if draw(st.booleans()):
            one = settings_of(coefficient)
            several = coefficient.per_input and draw(st.booleans())
            values[coefficient.name] = draw(st.tuples(*[one] * count) if several else one)
    for option in spec.options:
        if draw(st.booleans()):
            choice = st.sampled_from(option.choices)
            values[option.name] = draw(st.one_of(choice, filtered(choice)))
    return values


@st.composite
def leaves(draw: st.DrawFn, layers: int | None, names: tuple[str, ...] = NAMES) -> str | Slice:
    name = draw(st.sampled_from(names))
    if layers is None:
        return name
    start = draw(st.integers(0, 5))
    return Slice(name, start, start + layers)


@st.composite
def a_step(draw: st.DrawFn, depth: int = 2, layers: int | None = None) -> Step:
    spec = OPERATORS[draw(st.sampled_from(sorted(OPERATORS)))]
    count = draw(st.integers(spec.min_inputs, spec.max_inputs or 3))
    inputs: list[Input] = []
    for _ in range(count):
        nested = depth > 0 and not spec.needs and draw(st.integers(0, 3)) == 0
        inputs.append(draw(a_node(depth - 1, layers)) if nested else draw(leaves(layers)))
    base = draw(leaves(layers, ("base", *NAMES))) if spec.needs_base or draw(st.booleans()) else None
    return step(spec.name, inputs, base, draw(values_of(spec, count)))


@st.composite
def a_node(draw: st.DrawFn, depth: int = 2, layers: int | None = None) -> Node:
    if layers is not None or draw(st.booleans()):
        return draw(a_step(depth, layers))
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return Stack(tuple(draw(a_step(depth, length)) for length in lengths))


RULES = st.builds(
    TokenRule,
    source=st.sampled_from(["zero", *NAMES]),
    force=st.booleans(),
).flatmap(
    lambda rule: (
        st.just(rule)
        if rule.source == "zero"
        else st.sampled_from([None, "<|other|>", 7]).map(lambda token: replace(rule, token=token))
    )
)
VOCABULARIES = st.builds(
    Vocabulary,
    source=st.sampled_from(["union", "base", *NAMES]),
    tokens=st.dictionaries(st.sampled_from(["<|x|>", "y", "42"]), RULES).map(lambda d: tuple(d.items())),
    fill=st.sampled_from(["mean", "zero", "donor"]),
    pad_to_multiple_of=st.sampled_from([None, 1, 64]),
)
OTHERS = st.sampled_from([None, "a", "base", "another"])
RECIPES = st.builds(
    Recipe,
    root=a_node(),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    vocabulary=st.one_of(st.none(), VOCABULARIES),
    files_from=OTHERS,
    chat_template=st.sampled_from([None, "auto", "a", "{{ messages }}\n"]),
    into=OTHERS,
)


def well_formed(recipe: Recipe) -> Recipe:
    try:
        check_recipe(recipe)
    except RecipeError:  # stacks of different depth met in one step
        assume(False)
    return recipe


@given(RECIPES)
@SETTINGS
def test_plain_data_and_yaml_read_back(recipe: Recipe) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert read_recipe(write_recipe(well_formed(recipe))) == normal_form(recipe)


@given(RECIPES)
@SETTINGS
def test_the_normal_form_is_stable_and_means_the_same(recipe: Recipe) -> None:
    once = normal_form(recipe)
    assert normal_form(once) == once
    for before, after in zip(steps(recipe.root), steps(once.root), strict=True):
        one, two = resolve(before), resolve(after)
        for tensor, position in (("model.layers.0.mlp.up", 0.0), ("model.layers.3.self_attn.q", 0.7), ("norm", 1.0)):
            assert one.at(tensor, position) == two.at(tensor, position)


@given(RECIPES)
@SETTINGS
def test_every_recipe_can_be_described(recipe: Recipe) -> None:
    keys = tuple(describe(step("linear", ["a", "b"])))
    assert tuple(describe(recipe.root)) == keys
    assert len(shares(recipe.root)) == len(recipe.root.inputs)
    assert label(recipe)
    names = [name for name in recipe.all_names() if len(name) > 3]
    assert not any(name in form(recipe) for name in names)


@given(RECIPES)
@SETTINGS
def test_an_id_needs_the_digests_of_exactly_the_names(recipe: Recipe) -> None:
    digests = {name: f"digest {k}" for k, name in enumerate(recipe.all_names())}
    known = recipe.recipe_id(digests)
    assert known == recipe.recipe_id(digests | {"auto": "x", "union": "y", "zero": "z", "{{ messages }}\n": "w"})
    assert set(recipe.renamed(digests).all_names()) == set(digests.values())


@st.composite
def a_peer_step(draw: st.DrawFn, spec: OperatorSpec, layers: int | None) -> Step:
    count = draw(st.integers(spec.min_inputs, spec.max_inputs or 3))
    names = draw(st.permutations(NAMES))[:count]
    inputs = [draw(leaves(layers, (name,))) for name in names]
    base = draw(leaves(layers, ("base",))) if spec.needs_base or (spec.takes_base and draw(st.booleans())) else None
    values: dict[str, Value] = {"rescale": "l1"} if spec.option("rescale") is not None else {}
    for name, value in draw(values_of(spec, count)).items():
        cases: tuple[tuple[str, Any], ...] = value.cases if isinstance(value, Filtered) else (("*", value),)
        if name not in MERGEKIT[spec.name] or any(v == "inverse" for _, v in cases):
            continue
        closed = name == "rescale" and isinstance(value, Filtered)  # mergekit cannot fall back to 'inverse'
        values[name] = Filtered((*cases, ("*", "l1"))) if closed else value
    fixed = {name: value for name, value in spec.peer_defaults.items() if name not in MERGEKIT[spec.name]}
    return step(spec.name, inputs, base, values | fixed)


@st.composite
def peer_recipes(draw: st.DrawFn) -> Recipe:
    spec = OPERATORS[draw(st.sampled_from(sorted(MERGEKIT)))]
    root: Node = draw(a_peer_step(spec, None))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        root = Stack(tuple(draw(a_peer_step(spec, length)) for length in lengths))
    vocabulary = draw(st.one_of(st.none(), VOCABULARIES))
    return Recipe(
        root=root,
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        vocabulary=None if vocabulary is None else replace(vocabulary, fill="donor"),
        chat_template=draw(st.sampled_from([None, "auto", "{{ messages }}\n"])),
    )


@given(peer_recipes())
@SETTINGS
def test_what_mergekit_is_told_reads_back_as_the_same_merge(recipe: Recipe) -> None:
    assert read_recipe(write_recipe(recipe, mergekit=True)) == normal_form(recipe)


@given(RECIPES)
@SETTINGS
def test_an_export_is_the_same_merge_or_is_refused(recipe: Recipe) -> None:
    recipe = replace(well_formed(recipe), files_from=None)
    try:
        text = write_recipe(recipe, mergekit=True)
    except RecipeError:
        return
    expected = replace(normal_form(recipe), seed=0, dtype=recipe.dtype or "float32")
    if isinstance(expected.root, Step) and any(isinstance(item, Slice) for item in expected.root.inputs):
        expected = replace(expected, root=Stack((expected.root,)))
    assert read_recipe(text) == expected


@given(st.text(max_size=200))
@SETTINGS
def test_any_text_is_a_recipe_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        read_recipe(text)


KEYS = st.sampled_from(
    ["merge_method", "models", "slices", "sources", "model", "merge", "parameters", "weight", "t", "base_model", "base",
     "layer_range", "tokenizer", "tokens", "source", "filter", "value", "modules", "text_decoder", "dtype", "seed"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**400), st.floats(), st.sampled_from(["linear", "slerp", "ties", "a"])
)
TREES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5))
)


@given(TREES)
@SETTINGS
def test_any_data_is_a_recipe_or_a_usage_error(data: object) -> None:
    with contextlib.suppress(UsageError):
        read_recipe(json.dumps(data))
    with contextlib.suppress(UsageError):
        from_dict(data)  # type: ignore[arg-type]


@given(st.dictionaries(KEYS, TREES, max_size=5), st.sampled_from(["linear", "ties", "slerp", "passthrough"]))
@SETTINGS
def test_any_data_beside_a_good_recipe_is_a_recipe_or_a_usage_error(data: dict[str, object], method: str) -> None:
    good = {"merge_method": method, "models": [{"model": "a"}], "base_model": "base"}
    with contextlib.suppress(UsageError):
        read_recipe(json.dumps(good | data))
    with contextlib.suppress(UsageError):
        read_recipe(json.dumps(good | {"slices": [{"sources": [data]}]} | data))
