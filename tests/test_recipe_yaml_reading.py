import pytest

from simmerge.errors import RangeError, RecipeError, UnknownNameError, UsageError
from simmerge.recipe import Filtered, Gradient, Recipe, Slice, Stack, Step, TokenRule, Vocabulary, step
from simmerge.recipe_yaml import read_recipe, write_recipe


def root(text: str) -> Step:
    found = read_recipe(text).root
    assert isinstance(found, Step)
    return found


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
        parameters: {normalize: true, lambda: 0.8, int8_mask: true}
        dtype: float32
        out_dtype: bfloat16
        """
    )
    expected = {"density": 0.4, "lambda": 0.8, "weight": (0.5, 1.0)}
    assert recipe == Recipe(root=step("ties", ["a", "b"], "base", expected), dtype="bfloat16")


def test_slerp_with_layers_filters_and_gradients() -> None:
    recipe = read_recipe(
        """
        slices:
          - sources:
              - {model: org/first, layer_range: [0, 32]}
              - {model: org/second, layer_range: [0, 32]}
        merge_method: slerp
        base_model: org/second
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5]
            - value: 0.5
        dtype: bfloat16
        """
    )
    t = Filtered((("self_attn", Gradient((0.0, 0.5, 0.3, 0.7, 1.0))), ("mlp", Gradient((1.0, 0.5)))))
    inputs = [Slice("org/second", 0, 32), Slice("org/first", 0, 32)]
    assert recipe == Recipe(root=Stack((step("slerp", inputs, None, {"t": t}),)), dtype="bfloat16")


def test_layers_are_stacked() -> None:
    recipe = read_recipe(
        """
        merge_method: passthrough
        base_model: b
        slices:
          - sources: [{model: a, layer_range: [0, 24]}]
          - sources:
              - model: b
                layer_range: [8, 32]
                parameters:
                  scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: "0.5"}, {value: 1.0}]
        """
    )
    scale = Filtered((("o_proj", 0.0), ("down_proj", 0.5)))
    parts = (
        step("passthrough", [Slice("a", 0, 24)]),
        step("passthrough", [Slice("b", 8, 32)], None, {"scale": scale}),
    )
    assert recipe == Recipe(root=Stack(parts), files_from="b")


def test_the_base_of_a_slice_is_the_source_of_that_name() -> None:
    recipe = read_recipe(
        """
        merge_method: task_arithmetic
        base_model: base
        slices:
          - sources:
              - {model: a, layer_range: [0, 4], parameters: {weight: 0.5}}
              - {model: base, layer_range: [2, 6]}
          - base_model: other
            sources:
              - {model: other, layer_range: [0, 4]}
              - {model: a, layer_range: [4, 8]}
        """
    )
    parts = (
        step("task_arithmetic", [Slice("a", 0, 4)], Slice("base", 2, 6), {"weight": 0.5}),
        step("task_arithmetic", [Slice("a", 4, 8)], Slice("other", 0, 4)),
    )
    assert recipe == Recipe(root=Stack(parts))


def test_a_source_goes_before_its_slice_and_that_before_all() -> None:
    recipe = read_recipe(
        """
        merge_method: linear
        parameters: {weight: 0.1, normalize: false}
        slices:
          - parameters: {weight: 0.2, normalize: true}
            sources:
              - {model: a, layer_range: [0, 1], parameters: {weight: 0.3}}
              - {model: b, layer_range: [0, 1]}
          - sources:
              - {model: a, layer_range: [0, 1]}
              - {model: b, layer_range: [0, 1]}
        """
    )
    assert isinstance(recipe.root, Stack)
    assert [part.values() for part in recipe.root.parts] == [
        {"weight": (0.3, 0.2)},
        {"weight": 0.1, "normalize": "false"},
    ]


def test_what_no_filter_of_a_source_matches_falls_to_the_next_scope() -> None:
    found = root(
        """
        merge_method: linear
        models:
          - model: a
            parameters: {weight: [{filter: mlp, value: 0.3}]}
          - model: b
            parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.7}]}
        parameters: {weight: [{filter: attn, value: 0.4}]}
        """
    )
    one = Filtered((("mlp", 0.3), ("attn", 0.4)))
    two = Filtered((("mlp", Gradient((0.0, 1.0))), ("*", 0.7)))
    assert found.values() == {"weight": (one, two)}


def test_one_filter_may_stand_without_a_list() -> None:
    found = root("{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: {filter: mlp, value: 0.1}}}")
    assert found.values() == {"t": Filtered((("mlp", 0.1),))}


def test_a_list_is_a_gradient_for_every_input() -> None:
    found = root("{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: [0.0, 1.0]}}")
    assert found.values() == {"weight": Gradient((0.0, 1.0))}


@pytest.mark.parametrize(("written", "value"), [('"0.3"', 0.3), ("1e-1", 0.1), ("0", 0.0), ("5e-1", 0.5), ("1", 1.0)])
def test_numbers_may_be_text(written: str, value: float) -> None:
    found = root(
        f"{{merge_method: nearswap, base_model: a, models: [{{model: a}}, {{model: b}}], parameters: {{t: {written}}}}}"
    )
    assert found.values() == {"t": value}


@pytest.mark.parametrize(
    ("method", "written", "expected"),
    [
        ("dare_ties", "true", "l1"),
        ("dare_ties", "false", "none"),
        ("dare_ties", "l1", "l1"),
        ("dare_ties", "inverse", None),
        ("ties", "true", "l1"),
        ("ties", "false", None),
    ],
)  # fmt: skip
def test_rescale_is_a_way_or_mergekits_yes_and_no(method: str, written: str, expected: str | None) -> None:
    found = root(
        f"{{merge_method: {method}, base_model: base, models: [{{model: a}}], parameters: {{rescale: {written}}}}}"
    )
    assert found.values().get("rescale") == expected


def test_what_is_left_out_has_mergekits_default() -> None:
    text = "{merge_method: METHOD, base_model: base, models: [{model: a, parameters: {weight: 1}}]}"
    assert root(text.replace("METHOD", "ties")).values() == {"density": 1.0}
    assert root(text.replace("METHOD", "dare_ties")).values() == {"density": 1.0, "rescale": "l1"}
    partly = text.replace("METHOD", "ties").replace("weight: 1", "density: [{filter: mlp, value: 0.5}]")
    assert root(partly).values() == {"density": Filtered((("mlp", 0.5), ("*", 1.0)))}


@pytest.mark.parametrize("name", ["slerp", "nearswap", "arcee_fusion"])
def test_mergekits_base_of_two_peers_is_the_first_input(name: str) -> None:
    text = f"merge_method: {name}\nbase_model: b\nmodels: [{{model: a}}, {{model: b}}]"
    assert root(text) == step(name, ["b", "a"])
    assert root(f"merge_method: {name}\nbase_model: b\nmodels: [{{model: a}}]") == step(name, ["b", "a"])
    assert root(f"merge_method: {name}\nmodels: [{{model: a}}, {{model: b}}]") == step(name, ["a", "b"])


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_an_optional_base_is_kept(name: str) -> None:
    text = f"merge_method: {name}\nbase_model: c\nmodels: [{{model: a}}, {{model: c}}, {{model: b}}]"
    assert root(text) == step(name, ["a", "b"], "c")


def test_a_base_that_an_operator_does_not_use_gives_the_files() -> None:
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]"
    assert read_recipe(text) == Recipe(root=step("linear", ["a", "b"]), files_from="b")
    assert read_recipe(text.replace("base_model: b", "base_model: a")) == Recipe(root=step("linear", ["a", "b"]))


def test_a_base_that_is_not_listed_is_one_more_input_of_linear_as_in_mergekit() -> None:
    text = "merge_method: linear\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}"
    expected = Recipe(root=step("linear", ["a", "b", "c"], None, {"weight": 0.5}), files_from="c")
    assert read_recipe(text) == expected


def test_a_recipe_too_deep_for_yaml_is_refused() -> None:
    deep = step("linear", ["a"])
    for _ in range(2000):
        deep = step("linear", [deep])
    with pytest.raises(RecipeError, match="nested too deeply"):
        write_recipe(Recipe(root=deep))


def test_an_input_may_be_the_base_itself() -> None:
    recipe = Recipe(root=step("ties", ["a", "base"], "base"))
    assert "\nbase: base\n" in write_recipe(recipe)
    assert read_recipe(write_recipe(recipe)) == recipe


def test_adapters_and_revisions_stand_in_the_name() -> None:
    found = root(
        """
        merge_method: linear
        models:
          - model: {model: {path: org/a, revision: v2}, lora: org/adapter}
          - model: org/b+org/adapter
          - model: {model: org/c}
        """
    )
    assert found.inputs == ("org/a@v2+org/adapter", "org/b+org/adapter", "org/c")


def test_the_vocabulary_is_read() -> None:
    recipe = read_recipe(
        """
        merge_method: linear
        models: [{model: a}, {model: b}]
        tokenizer:
          source: union
          pad_to_multiple_of: 32
          fill: donor
          tokens:
            <|im_start|>: {source: a, force: true}
            <|pad|>: {source: {kind: zero}}
            <|end|>: {source: {kind: model_token, model: b, token: </s>}}
            <|tool|>: {source: {kind: model_token, model: b, token_id: 7}}
        chat_template: chatml
        """
    )
    tokens = (
        ("<|im_start|>", TokenRule("a", force=True)),
        ("<|pad|>", TokenRule("zero")),
        ("<|end|>", TokenRule("b", token="</s>")),
        ("<|tool|>", TokenRule("b", token=7)),
    )
    assert recipe.vocabulary == Vocabulary("union", tokens, "donor", 32)
    assert recipe.chat_template == "chatml"
    assert read_recipe(write_recipe(recipe)) == recipe


def test_the_older_tokenizer_source_is_read() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: "
    assert read_recipe(text + "base").vocabulary == Vocabulary("base")
    assert read_recipe(text + "{model: org/a}").vocabulary == Vocabulary("org/a")


def test_one_module_is_the_whole_model_and_its_parameters_go_before_all() -> None:
    recipe = read_recipe(
        """
        merge_method: linear
        parameters: {weight: 0.1, normalize: false}
        modules:
          default:
            parameters: {weight: 0.2}
            slices:
              - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
        """
    )
    part = step("linear", [Slice("a", 0, 2), Slice("b", 0, 2)], None, {"weight": 0.2, "normalize": "false"})
    assert recipe == Recipe(root=Stack((part,)))


def test_modules_that_come_from_one_checkpoint_are_what_the_merge_goes_into() -> None:
    recipe = read_recipe(
        """
        merge_method: passthrough
        modules:
          vision_tower: {models: [{model: seeing}]}
          text_decoder: {slices: [{sources: [{model: a, layer_range: [0, 4]}]}]}
          multi_modal_projector: {models: [{model: seeing}]}
        """
    )
    assert recipe == Recipe(root=Stack((step("passthrough", [Slice("a", 0, 4)]),)), into="seeing")


def test_steps_and_stacks_nest() -> None:
    recipe = read_recipe(
        """
        merge_method: slerp
        models:
          - merge:
              slices:
                - merge_method: ties
                  base: {model: base, layer_range: [0, 2]}
                  sources:
                    - {model: a, layer_range: [0, 2], parameters: {density: 0.5}}
                    - merge: {merge_method: linear, models: [{model: b, layer_range: [4, 6]}]}
                      parameters: {density: 0.5}
                - merge_method: passthrough
                  sources: [{model: c, layer_range: [0, 1]}]
          - model: d
        seed: 4
        into: seeing
        files_from: d
        """
    )
    inner = step("linear", [Slice("b", 4, 6)])
    parts = (
        step("ties", [Slice("a", 0, 2), inner], Slice("base", 0, 2), {"density": 0.5}),
        step("passthrough", [Slice("c", 0, 1)]),
    )
    assert recipe == Recipe(root=step("slerp", [Stack(parts), "d"]), seed=4, into="seeing", files_from="d")
    assert read_recipe(write_recipe(recipe)) == recipe


def test_the_dtype_of_the_output_goes_before_that_of_computing() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\n"
    assert read_recipe(text + "dtype: bfloat16").dtype == "bfloat16"
    assert read_recipe(text + "dtype: torch.float16").dtype == "float16"
    assert read_recipe(text + "dtype: float32\nout_dtype: bfloat16").dtype == "bfloat16"
    assert read_recipe(text).dtype is None


ONE = "merge_method: linear\nmodels: [{model: a}]\n"
TWO = "merge_method: slerp\nmodels: [{model: a}, {model: b}]\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodels: [*c, *c]\n"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("merge_method: [", RecipeError, "not YAML"),
        ("2024-13-45", RecipeError, "not YAML"),
        ("!!python/object:os.system {}", RecipeError, "not YAML"),
        ("[1, 2]", RecipeError, "must be a mapping"),
        ("", RecipeError, "must be a mapping"),
        ("models: [{model: a}]", RecipeError, "lacks 'merge_method'"),
        ("merge_method: linear", RecipeError, "lacks 'models'"),
        ("merge_method: linear\nmodels: []", RecipeError, "at least one"),
        ("merge_method: linear\nmodels: {model: a}", RecipeError, "must be a list"),
        ("merge_method: 3\nmodels: [{model: a}]", RecipeError, "must be text"),
        ("merge_method: linaer\nmodels: [{model: a}]", UnknownNameError, "Did you mean 'linear'"),
        ("merge_method: linear\nmodells: []", UnknownNameError, "Did you mean 'models'"),
        ("merge_method: linear\nmodels: [{modell: a}]", UnknownNameError, "Did you mean 'model'"),
        ("merge_method: linear\nmodels: [{model: null}]", RecipeError, "must be text, got None"),
        ("merge_method: linear\nmodels: [{model: 2024}]", RecipeError, "in quotes"),
        ("merge_method: linear\nmodels: [{model: {model: a, override_architecture: X}}]", RecipeError, "override"),
        ("merge_method: linear\nmodels: [{model: a, merge: {}}]", RecipeError, "exactly one"),
        ("merge_method: linear\nmodels: [{model: a, layer_range: [0]}]", RecipeError, "layer_range"),
        ("merge_method: linear\nmodels: [{model: a, layer_range: [0, x]}]", RecipeError, "whole number"),
        ("merge_method: linear\nmodels: [{model: a, layer_range: [2, 1]}]", RecipeError, "start < end"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]", RecipeError, "at least one"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: true}}]", RecipeError, "must be a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: half}}]", RecipeError, "must be a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: null}}]", RecipeError, "must be a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [0, {value: 1}]}}]", RecipeError, "mapping"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]", RecipeError, "'value'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: 3, value: 1}]}}]", RecipeError,
         "got 3"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filtr: x, value: 1}]}}]", UnknownNameError,
         "Did you mean 'filter'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {value: {value: 1}}}}]", RecipeError,
         "has filters as its value"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 7}}]", RangeError, "[-2, 2], got 7"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [0, 7]}}]", RangeError, "[-2, 2], got 7"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {value: 7}}}]", RangeError, "got 7"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", RangeError, "finite"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .inf}}]", RangeError, "finite"),
        ('merge_method: linear\nmodels: [{model: a, parameters: {weight: "inf"}}]', RangeError, "finite"),
        (f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1{'0' * 400}}}}}]", RecipeError,
         "not below 2^63"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]", RecipeError, "for all inputs"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", UnknownNameError, "mean 'weight'"),
        (ONE + "parameters: {normalize: maybe}", UnknownNameError, "normalize"),
        (ONE + "parameters: {normalize: [true, false]}", RecipeError, "use filters"),
        (ONE + "parameters: {normalize: 2}", RecipeError, "true, false"),
        (ONE + "parameters: [1]", RecipeError, "must be a mapping"),
        (ONE + "seed: -1", RecipeError, "seed"),
        (ONE + "seed: true", RecipeError, "seed"),
        (ONE + "seed: 1.5", RecipeError, "seed"),
        (ONE + "out_dtype: float17", UnknownNameError, "float16"),
        (ONE + "dtype: float64\nout_dtype: float32", UnknownNameError, "float64"),
        (ONE + "into: 3", RecipeError, "'into'"),
        (ONE + "chat_template: [x]", RecipeError, "'chat_template'"),
        (ONE + "models: [{model: b}]", RecipeError, "given twice"),
        (ONE + "slices: []", RecipeError, "exactly one of 'models' and 'slices'"),
        (ONE + "modules: {}", RecipeError, "exactly one"),
        (ONE + "base: b", RecipeError, "uses no base"),
        (ONE + "base_model: b", RecipeError, "without a weight"),
        (ONE + "tokenizer: {sorce: union}", UnknownNameError, "Did you mean 'source'"),
        (ONE + "tokenizer: {source: union}\ntokenizer_source: union", RecipeError, "at most one"),
        (ONE + "tokenizer: {tokens: [x]}", RecipeError, "must be a mapping"),
        (ONE + "tokenizer: {tokens: {x: {force: true}}}", RecipeError, "lacks 'source'"),
        (ONE + "tokenizer: {tokens: {x: {source: a, force: 1}}}", RecipeError, "true or false"),
        (ONE + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}", UnknownNameError, "Did you mean 'zero'"),
        (ONE + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", RecipeError, "exactly one"),
        (ONE + "tokenizer: {fill: meen}", UnknownNameError, "Did you mean 'mean'"),
        (ONE + "tokenizer: {pad_to_multiple_of: 0}", RecipeError, "from 1 up"),
        (TWO + "base_model: c", RecipeError, "t = 0"),
        (TWO + "parameters: {t: 1.5}", RangeError, "[0, 1], got 1.5"),
        ("merge_method: ties\nbase: a\nbase_model: a\nmodels: [{model: b}]", RecipeError, "at most one"),
        ("merge_method: ties\nmodels: [{model: b}]", RecipeError, "needs a base"),
        ("merge_method: ties\nbase_model: c\nslices: [{sources: [{model: b, layer_range: [0, 1]}]}]", RecipeError,
         "one of the sources"),
        ("merge_method: linear\nslices: [{sources: []}]", RecipeError, "at least one"),
        ("merge_method: linear\nslices: [{}]", RecipeError, "'sources'"),
        ("slices: [{sources: [{model: a}]}]", RecipeError, "lacks 'merge_method'"),
        ("merge_method: linear\nslices: [{base_model: b, sources: [{model: a}]}]", RecipeError, "uses no base"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}, "
         "{model: b, layer_range: [0, 2]}]}]", RecipeError, "equally many layers, got [1, 2]"),
        ("merge_method: ties\nbase_model: c\nslices: [{sources: [{model: b, layer_range: [0, 1]}, "
         "{model: c, layer_range: [0, 1]}, {model: c, layer_range: [1, 2]}]}]", RecipeError, "several ranges"),
        ("merge_method: linear\nmodules: {a: {models: [{model: a}]}, b: {models: [{model: b}]}}", RecipeError,
         "'into'"),
        ("merge_method: linear\nmodules: [a]", RecipeError, "must be a mapping"),
        ("merge_method: linear\nmodels: [{merge: {merge_method: linear, base_model: b, models: [{model: a}]}}]",
         RecipeError, "uses no base"),
        ("merge_method: linear\nmodels: [{merge: {merge_method: linear, models: [{model: a}], seed: 1}}]",
         UnknownNameError, "seed"),
        (BOMB, RecipeError, "aliases"),
        ("&a [*a]", RecipeError, "aliases"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, weight: 0.5}}]", RecipeError, "line 2"),
        ("? [a]\n: b", RecipeError, "not YAML"),
        ("[" * 3000, RecipeError, "nested too deeply"),
        ("{merge_method: linear, models: [{merge: " * 400 + "x" + "}]}" * 400, RecipeError, "nested too deeply"),
        ("x" * 5_000_000, RecipeError, "characters"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)  # fmt: skip
def test_bad_recipes_are_refused_by_name(text: str, error: type[UsageError], said: str) -> None:
    with pytest.raises(error) as caught:
        read_recipe(text)
    assert said in str(caught.value)
