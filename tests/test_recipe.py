import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from simmerge.errors import RangeError, RecipeError, UnknownNameError, UsageError
from simmerge.operators import form, normal_form, table
from simmerge.recipe import (
    Filtered,
    Gradient,
    Recipe,
    Slice,
    Stack,
    TokenRule,
    Vocabulary,
    from_dict,
    step,
    steps,
    to_dict,
)

SCORES = Path(__file__).parents[1] / "data" / "scores" / "mini.parquet"


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


def test_recorded_ids_are_those_of_today() -> None:
    rows = pq.read_table(SCORES).to_pylist()
    digests = {row["sources"][0]: row["subject"] for row in rows if row["kind"] == "checkpoint"}
    recorded = {row["subject"]: row for row in rows if row["kind"] == "recipe"}
    assert len(recorded) > 1000
    for known, row in recorded.items():
        recipe = from_dict(json.loads(row["recipe"]))
        assert recipe.recipe_id(digests) == known
        assert normal_form(recipe).canonical() == row["recipe"]
        assert form(recipe) == row["form"]


def test_new_keys_stand_in_the_data_only_where_they_are_set() -> None:
    recipe = Recipe(root=step("ties", ["a", "b"], "base", {"density": (0.2, 0.5)}), seed=3, dtype="float16")
    assert recipe.canonical() == (
        '{"dtype":"float16","root":{"base":"base","coefficients":{"density":[0.2,0.5]},"inputs":["a","b"],'
        '"operator":"ties"},"seed":3}'
    )


def test_every_new_type_has_plain_data() -> None:
    value = Filtered((("mlp", Gradient((0.0, 1.0))), ("*", 0.5)))
    part = step("ties", [Slice("a", 0, 2), Slice("b", 4, 6)], Slice("base", 0, 2), {"density": (value, 0.25)})
    vocabulary = Vocabulary("union", (("<x>", TokenRule("b", force=True, token=7)),), "mean", 8)
    recipe = Recipe(root=Stack((part,)), vocabulary=vocabulary, files_from="b", chat_template="auto", into="seeing")
    filtered = {"filtered": [["mlp", {"gradient": [0.0, 1.0]}], ["*", 0.5]]}
    assert to_dict(recipe) == {
        "root": {
            "stack": [
                {
                    "operator": "ties",
                    "inputs": [
                        {"slice": {"source": "a", "start": 0, "end": 2}},
                        {"slice": {"source": "b", "start": 4, "end": 6}},
                    ],
                    "base": {"slice": {"source": "base", "start": 0, "end": 2}},
                    "coefficients": {"density": [filtered, 0.25]},
                }
            ]
        },
        "seed": 0,
        "dtype": None,
        "vocabulary": {
            "source": "union",
            "tokens": [["<x>", {"source": "b", "force": True, "token": 7}]],
            "fill": "mean",
            "pad_to_multiple_of": 8,
        },
        "files_from": "b",
        "chat_template": "auto",
        "into": "seeing",
    }
    assert from_dict(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    "other",
    [
        Recipe(root=step("slerp", ["a", "b"], None, {"t": Gradient((0.0, 1.0))})),
        Recipe(root=step("slerp", ["a", "b"], None, {"t": Gradient((1.0, 0.0))})),
        Recipe(root=step("slerp", ["a", "b"], None, {"t": Filtered((("mlp", 0.1),))})),
        Recipe(root=Stack((step("slerp", ["a", "b"]),))),
        Recipe(root=step("slerp", [Slice("a", 0, 1), "b"])),
        Recipe(root=step("slerp", ["a", "b"]), vocabulary=Vocabulary("union")),
        Recipe(root=step("slerp", ["a", "b"]), vocabulary=Vocabulary("base")),
        Recipe(root=step("slerp", ["a", "b"]), files_from="b"),
        Recipe(root=step("slerp", ["a", "b"]), chat_template="auto"),
        Recipe(root=step("slerp", ["a", "b"]), into="b"),
        Recipe(root=step("slerp", ["a", "b"]), dtype="float16"),
    ],
)
def test_what_changes_a_merge_changes_its_id(other: Recipe) -> None:
    digests = {"a": "1", "b": "2"}
    assert other.recipe_id(digests) != Recipe(root=step("slerp", ["a", "b"])).recipe_id(digests)


def test_steps_come_before_their_users() -> None:
    inner = step("linear", ["a", "b"])
    outer = step("slerp", [inner, "c"])
    assert list(steps(outer)) == [inner, outer]
    recipe = Recipe(root=outer)
    assert recipe.sources() == ("a", "b", "c")
    assert recipe.bases() == ()


def test_steps_and_names_of_a_stack() -> None:
    inner = step("linear", [Slice("a", 0, 2), Slice("b", 2, 4)])
    one = step("ties", [inner, Slice("c", 0, 2)], Slice("base", 0, 2))
    two = step("passthrough", [Slice("a", 1, 5)])
    recipe = Recipe(root=step("slerp", [Stack((one, two)), "d"]))
    assert list(steps(recipe.root))[:3] == [inner, one, two]
    assert recipe.sources() == ("a", "b", "c", "d")
    assert recipe.bases() == ("base",)


def test_all_names_are_in_the_order_of_first_use_and_without_keywords() -> None:
    tokens = (("<x>", TokenRule("donor")), ("<y>", TokenRule("zero")))
    recipe = Recipe(
        root=step("ties", ["a", "b"], "base"),
        files_from="config",
        vocabulary=Vocabulary("words", tokens),
        chat_template="a",
        into="seeing",
    )
    assert recipe.all_names() == ("a", "b", "base", "config", "words", "donor", "seeing")
    assert Recipe(root=step("slerp", ["a", "b"]), vocabulary=Vocabulary("base")).all_names() == ("a", "b")


def test_renaming_reaches_every_name_and_no_keyword() -> None:
    tokens = (("a", TokenRule("a")), ("<y>", TokenRule("zero")))
    recipe = Recipe(
        root=Stack((step("ties", [Slice("a", 0, 1)], Slice("base", 0, 1)),)),
        files_from="a",
        vocabulary=Vocabulary("base", tokens),
        chat_template="a",
        into="a",
    )
    got = recipe.renamed({"a": "A", "base": "B", "zero": "no", "ties": "no"})
    assert got == Recipe(
        root=Stack((step("ties", [Slice("A", 0, 1)], Slice("B", 0, 1)),)),
        files_from="A",
        vocabulary=Vocabulary("base", (("a", TokenRule("A")), ("<y>", TokenRule("zero")))),
        chat_template="A",
        into="A",
    )


def test_a_template_is_a_name_only_where_the_recipe_names_the_checkpoint() -> None:
    recipe = Recipe(root=step("slerp", ["a", "b"]), chat_template="chatml")
    assert recipe.renamed({"chatml": "x"}) == recipe


@pytest.mark.parametrize(("position", "expected"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)])
def test_a_gradient_is_linear_between_its_values(position: float, expected: float) -> None:
    assert Gradient((0.0, 1.0, 0.5)).at(position) == expected


def test_a_gradient_of_one_value_is_constant_and_none_leaves_its_ends() -> None:
    assert Gradient((0.3,)).at(1.0) == 0.3
    equal = Gradient((0.1, 0.1, 0.1))
    assert {equal.at(k / 97) for k in range(98)} == {0.1}


@pytest.mark.parametrize("position", [-0.01, 1.01, float("nan")])
def test_a_position_outside_the_model_is_refused(position: float) -> None:
    with pytest.raises(RangeError, match=r"\[0, 1\]"):
        Gradient((0.0, 1.0)).at(position)


def test_the_first_case_that_matches_wins() -> None:
    value = Filtered((("layers.1.", 0.1), ("mlp", 0.2), ("*", 0.3), ("norm", 0.4)))
    assert value.of("layers.1.mlp") == 0.1
    assert value.of("layers.11.mlp") == 0.2
    assert value.of("norm") == 0.3
    assert Filtered((("mlp", 0.2),)).of("norm") is None


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Gradient(()), RecipeError, "at least one value"),
        (lambda: Filtered(()), RecipeError, "at least one case"),
        (lambda: Stack(()), RecipeError, "at least one part"),
        (lambda: Slice("a", 2, 2), RecipeError, "'a'"),
        (lambda: Slice("a", -1, 2), RecipeError, "0 <= start < end"),
        (lambda: Slice("a", 0, 2.0), RecipeError, "whole numbers"),  # type: ignore[arg-type]
        (lambda: Slice("a", False, True), RecipeError, "whole numbers"),
        (lambda: Vocabulary("union", fill="meen"), UnknownNameError, "Did you mean 'mean'"),
        (lambda: Vocabulary("union", pad_to_multiple_of=0), RangeError, "from 1 up, got 0"),
        (lambda: Vocabulary("union", (("x", TokenRule("a")), ("x", TokenRule("b")))), RecipeError, "two rules"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, error: type[UsageError], said: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert said in str(caught.value)


GOOD = {"root": {"operator": "linear", "inputs": ["a"], "coefficients": {}}}


def of_root(**changes: object) -> dict[str, object]:
    return {"root": GOOD["root"] | changes}


def nested(depth: int) -> dict[str, object]:
    data: dict[str, object] = GOOD["root"]
    for _ in range(depth):
        data = {"operator": "linear", "inputs": [data], "coefficients": {}}
    return {"root": data}


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], RecipeError, "not the data"),
        ({}, RecipeError, "root"),
        ({"root": {"operator": "linear", "inputs": ["a"]}}, RecipeError, "coefficients"),
        (GOOD | {"intoo": "a"}, UnknownNameError, "Did you mean 'into'"),
        (GOOD | {"into": 3}, RecipeError, "must be text, got 3"),
        (GOOD | {"seed": "x"}, RecipeError, "not the data"),
        (GOOD | {"vocabulary": {"tokens": []}}, RecipeError, "source"),
        (GOOD | {"vocabulary": {"source": "union", "tokens": [["a"]]}}, RecipeError, "not the data"),
        (GOOD | {"vocabulary": {"source": "union", "fil": "mean"}}, UnknownNameError, "Did you mean 'fill'"),
        (of_root(operator=3), RecipeError, "must be text, got 3"),
        (of_root(inputs=[3]), RecipeError, "must be text, got 3"),
        (of_root(inputs=[{"slice": {"source": "a", "start": 3, "end": 1}}]), RecipeError, "start < end"),
        (of_root(inputs=[{"slice": {"source": "a", "start": "0", "end": "1"}}]), RecipeError, "whole numbers"),
        (of_root(inputs=[{"stack": []}]), RecipeError, "at least one part"),
        (of_root(coefficients={"weight": None}), RecipeError, "got None"),
        (of_root(coefficients={"weight": True}), RecipeError, "got True"),
        (of_root(coefficients={"weight": {}}), RecipeError, "gradient or filtered"),
        (of_root(coefficients={"weight": {"gradient": []}}), RecipeError, "at least one value"),
        (of_root(coefficients={"weight": {"gradient": ["x"]}}), RecipeError, "must be a number"),
        (of_root(coefficients={"weight": {"filtered": [["a", {"filtered": [["*", 1.0]]}]]}}), RecipeError, "itself"),
        (nested(5000), RecipeError, "recursion"),
    ],
)  # fmt: skip
def test_other_data_are_refused(data, error: type[UsageError], said: str) -> None:
    with pytest.raises(error) as caught:
        from_dict(data)
    assert said in str(caught.value)


def test_an_operator_that_gives_other_weights_than_before_gives_other_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {"a": "1" * 64, "b": "2" * 64, "base": "3" * 64}
    ties = Recipe(root=step("ties", ["a", "b"], "base"))
    nested = Recipe(root=step("slerp", [step("ties", ["a", "b"], "base"), "a"]))
    linear = Recipe(root=step("linear", ["a", "b"]))
    ids: list[list[str]] = []
    for revisions in ({}, {"ties": 2}, {"ties": 3}):
        monkeypatch.setattr("simmerge.operators.table.revised", lambda r=revisions: r)
        ids.append([recipe.recipe_id(digests) for recipe in (ties, nested, linear)])
    of_ties, of_nested, of_linear = zip(*ids, strict=True)
    assert len({*of_ties}) == len({*of_nested}) == 3
    assert len({*of_linear}) == 1


def test_a_revision_is_read_from_the_operators_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = dict(table.operators())
    specs["ties"] = replace(specs["ties"], revision=2)
    table.revised.cache_clear()
    try:
        assert dict(table.revised()) == {}
        table.revised.cache_clear()
        monkeypatch.setattr(table, "operators", lambda: specs)
        assert dict(table.revised()) == {"ties": 2}
    finally:
        table.revised.cache_clear()
