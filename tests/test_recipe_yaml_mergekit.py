from typing import Any

import pytest
import yaml

from simmerge.errors import RecipeError
from simmerge.operators import OPERATORS
from simmerge.recipe import Filtered, Gradient, Recipe, Slice, Stack, TokenRule, Value, Vocabulary, step
from simmerge.recipe_yaml import write_recipe
from simmerge.recipe_yaml.peer import MERGEKIT


def exported(recipe: Recipe) -> dict[str, Any]:
    return yaml.safe_load(write_recipe(recipe, mergekit=True))


def test_plain_mergekit_export_spells_everything_out() -> None:
    recipe = Recipe(root=step("ties", ["a", "b"], "base", {"density": 0.5}), dtype="bfloat16")
    assert exported(recipe) == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1.0, "density": 0.5}} for m in ("a", "b")],
        "parameters": {"lambda": 1.0, "normalize": True, "rescale": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("name", "values", "shared", "own"),
    [
        ("linear", {}, {"normalize": True}, {"weight": 1.0}),
        ("slerp", {}, {"t": 0.5}, {}),
        ("nuslerp", {}, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, {"weight": 1.0}),
        ("multislerp", {}, {"eps": 1e-8, "normalize_weights": True}, {"weight": 1.0}),
        ("karcher", {}, {"max_iter": 10, "tol": 1e-5}, {}),
        ("task_arithmetic", {}, {"lambda": 1.0, "normalize": False}, {"weight": 1.0}),
        ("dare_ties", {"rescale": "l1"}, {"lambda": 1.0, "normalize": False, "rescale": True},
         {"weight": 1.0, "density": 0.5}),
        ("dare_linear", {"rescale": "none"}, {"lambda": 1.0, "normalize": False, "rescale": False},
         {"weight": 1.0, "density": 0.5}),
        ("della", {"rescale": "l1"}, {"lambda": 1.0, "normalize": True, "rescale": True},
         {"weight": 1.0, "density": 0.5, "epsilon": 0.15}),
        ("breadcrumbs", {}, {"lambda": 1.0, "normalize": False, "rescale": False},
         {"weight": 1.0, "density": 0.9, "gamma": 0.01}),
        ("model_stock", {"floor": "mergekit"}, {"filter_wise": False}, {}),
        ("sce", {"floor": "mergekit"}, {"select_topk": 1.0}, {}),
        ("ram", {}, {"epsilon": 1e-5}, {}),
        ("ramplus_tl", {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, {}),
        ("nearswap", {}, {"t": 1e-3}, {}),
        ("arcee_fusion", {}, {}, {}),
    ],
)  # fmt: skip
def test_parameters_are_those_of_mergekit(
    name: str, values: dict[str, Value], shared: dict[str, object], own: dict[str, float]
) -> None:
    spec = OPERATORS[name]
    data = exported(Recipe(root=step(name, ["a", "b"], "base" if spec.needs_base else None, values)))
    assert data.get("parameters", {}) == shared
    assert data["models"] == [{"model": m} | ({"parameters": own} if own else {}) for m in ("a", "b")]
    assert data.get("base_model") == ("base" if spec.needs_base else "a" if spec.peer_base else None)


def test_every_method_of_mergekit_has_its_operator() -> None:
    for name, parameters in MERGEKIT.items():
        spec = OPERATORS[name]
        assert {*parameters} <= {c.name for c in spec.coefficients} | {o.name for o in spec.options}
        assert {*spec.peer_defaults} <= {c.name for c in spec.coefficients} | {o.name for o in spec.options}


def test_gradients_filters_and_defaults_for_the_rest_are_written() -> None:
    t = Filtered((("mlp", Gradient((0.0, 1.0))), ("attn", 0.25)))
    assert exported(Recipe(root=step("slerp", ["a", "b"], None, {"t": t})))["parameters"] == {
        "t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "attn", "value": 0.25}, {"filter": "*", "value": 0.5}]
    }
    rescale = Filtered((("mlp", "l1"), ("*", "none")))
    data = exported(Recipe(root=step("dare_ties", ["a"], "base", {"rescale": rescale})))
    assert data["parameters"]["rescale"] == [{"filter": "mlp", "value": True}, {"filter": "*", "value": False}]


def test_a_stack_is_written_as_slices_with_the_base_among_the_sources() -> None:
    parts = tuple(step("task_arithmetic", [Slice("a", k, k + 2)], Slice("base", 0, 2), {"weight": 0.5}) for k in (0, 4))
    assert exported(Recipe(root=Stack(parts), dtype="float16")) == {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [k, k + 2], "parameters": {"weight": 0.5}},
                    {"model": "base", "layer_range": [0, 2]},
                ],
                "parameters": {"lambda": 1.0, "normalize": False},
            }
            for k in (0, 4)
        ],
        "dtype": "float32",
        "out_dtype": "float16",
    }


def test_slices_of_different_bases_name_their_own() -> None:
    parts = (
        step("slerp", [Slice("a", 0, 1), Slice("b", 0, 1)]),
        step("slerp", [Slice("b", 1, 2), Slice("a", 1, 2)]),
    )
    data = exported(Recipe(root=Stack(parts)))
    assert "base_model" not in data
    assert [part["base_model"] for part in data["slices"]] == ["a", "b"]


def test_the_giver_of_files_is_mergekits_base_where_the_operator_has_none() -> None:
    assert exported(Recipe(root=step("linear", ["a", "b"]), files_from="b"))["base_model"] == "b"
    part = step("passthrough", [Slice("a", 0, 1)])
    assert exported(Recipe(root=Stack((part,)), files_from="b"))["base_model"] == "b"
    assert exported(Recipe(root=step("ties", ["a"], "b"), files_from="b"))["base_model"] == "b"


def test_the_vocabulary_and_template_are_written_as_mergekit_has_them() -> None:
    tokens = (
        ("<x>", TokenRule("zero")),
        ("<y>", TokenRule("a", force=True)),
        ("<z>", TokenRule("b", token=7)),
        ("<w>", TokenRule("b", token="<v>")),
    )
    vocabulary = Vocabulary("union", tokens, pad_to_multiple_of=8)
    data = exported(Recipe(root=step("linear", ["a", "b"]), vocabulary=vocabulary, chat_template="auto"))
    assert data["tokenizer"] == {
        "source": "union",
        "pad_to_multiple_of": 8,
        "tokens": {
            "<x>": {"source": {"kind": "zero"}},
            "<y>": {"source": "a", "force": True},
            "<z>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}},
            "<w>": {"source": {"kind": "model_token", "model": "b", "token": "<v>"}},
        },
    }
    assert data["chat_template"] == "auto"


LINEAR = step("linear", ["a", "b"])


def test_a_method_that_mergekit_has_not_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: parameters for name, parameters in MERGEKIT.items() if name != "linear"}
    monkeypatch.setattr("simmerge.recipe_yaml.peer.MERGEKIT", known)
    with pytest.raises(RecipeError, match=r"no method 'linear'; choose one of .*ties"):
        write_recipe(Recipe(root=LINEAR), mergekit=True)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(root=step("dare_ties", ["a", "b"], "base")), "rescale: l1"),
        (Recipe(root=step("della", ["a"], "base", {"rescale": Filtered((("mlp", "l1"),))})), "rescale: l1"),
        (Recipe(root=step("slerp", [LINEAR, "c"])), "several steps"),
        (Recipe(root=step("slerp", [Stack((LINEAR,)), "c"])), "several steps"),
        (Recipe(root=step("slerp", ["a", "b"], None, {"threshold": 0.9})), "mergekit's is 0.9995"),
        (Recipe(root=step("ties", ["a", "b"], "base", {"vote": "unweighted"})), "vote: weighted"),
        (Recipe(root=step("model_stock", ["a", "b"], "base")), "floor: mergekit"),
        (Recipe(root=LINEAR, into="seeing"), "'seeing'"),
        (Recipe(root=LINEAR, files_from="c"), "files_from 'c'"),
        (Recipe(root=step("ties", ["a"], "base"), files_from="c"), "files_from 'c'"),
        (Recipe(root=LINEAR, chat_template="b"), "chat template of checkpoint 'b'"),
        (Recipe(root=LINEAR, vocabulary=Vocabulary("union", fill="zero")), "fill 'zero'"),
        (Recipe(root=step("linear", ["a", "a"])), "'a' stands twice"),
        (Recipe(root=step("ties", ["a", "base"], "base")), "'base' stands twice"),
        (Recipe(root=Stack((LINEAR,))), "layers of 'a'"),
        (Recipe(root=Stack((step("ties", [Slice("a", 0, 1)], "base"),))), "layers of 'base'"),
        (Recipe(root=Stack((step("linear", [Slice("a", 0, 1)]), step("passthrough", [Slice("a", 0, 1)])))),
         "one method for all slices"),
    ],
)  # fmt: skip
def test_what_mergekit_has_not_is_not_exported(recipe: Recipe, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        write_recipe(recipe, mergekit=True)
    assert said in str(caught.value)
