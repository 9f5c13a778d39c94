"""Damaged recipes: each is refused with a message that helps, or read, and then written and read back as the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simmerge.errors import RecipeError, UsageError
from simmerge.operators import OPERATORS
from simmerge.recipe import Recipe, from_dict, to_dict
from simmerge.recipe_yaml import read_recipe, write_recipe
from simmerge.rng import rng_for
from simmerge.testing.mutate import mutate_json, mutate_text, time_limit

CORPUS = (
    "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 0.7}\n  - model: b\n"
    "parameters: {normalize: true}\ndtype: bfloat16\n",
    "merge_method: slerp\nbase_model: a\nmodels:\n- model: a\n- model: b\nparameters:\n  t: 0.3\n",
    "merge_method: slerp\nbase_model: a\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n  - model: b\n"
    "    layer_range: [0, 2]\nparameters:\n  t:\n  - filter: self_attn\n    value: [0, 0.5, 1]\n  - filter: mlp\n"
    "    value: [1, 0.5, 0]\n  - value: 0.5\ndtype: bfloat16\n",
    "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 0.5, density: 0.4}\n"
    "  - model: b\n    parameters: {weight: [0.1, 0.9], density: 0.4}\nparameters: {lambda: 0.8, int8_mask: true}\n"
    "out_dtype: float16\n",
    "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\n"
    "parameters: {density: 0.5, rescale: false}\nseed: 7\n",
    "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {rescale: inverse}\n",
    "merge_method: della\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    "parameters: {density: 0.5, epsilon: 0.1}\n",
    "merge_method: breadcrumbs\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    "parameters: {density: 0.9, gamma: 0.01}\n",
    "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: a\n  parameters: {weight: -0.5}\n- model: b\n"
    "tokenizer:\n  source: union\n  tokens:\n    <pad>:\n      source: a\n      force: true\n"
    "  pad_to_multiple_of: 64\n",
    "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\n"
    "parameters: {filter_wise: true}\nchat_template: chatml\n",
    "merge_method: nuslerp\nmodels:\n- model: a\n  parameters: {weight: 0.3}\n"
    "- {model: b, parameters: {weight: 0.7}}\n",
    "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {max_iter: 20}\n",
    "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {select_topk: 0.5}\n",
    "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
    "- sources: [{model: b, layer_range: [1, 2]}]\ntokenizer_source: a\n",
    "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 4]\n    parameters:\n"
    "      scale:\n      - {filter: o_proj, value: 0.5}\n      - {value: 1.0}\n",
    "merge_method: slerp\nmodels:\n- merge:\n    merge_method: ties\n    base_model: base\n    models:\n"
    "    - {model: a}\n    - {model: b, parameters: {weight: 0.4}}\n- model: c\n"
    "parameters: {t: 0.25, threshold: 1.0}\n",
    "merge_method: linear\nmodels:\n- merge:\n    merge_method: linear\n    models:\n    - merge:\n"
    "        merge_method: slerp\n        models: [{model: a}, {model: b}]\n    - {model: c}\n- model: d\nseed: 3\n",
    'merge_method: "linear"\nmodels:\n  - {model: "ü/é x"}\n'
    "  - {model: org/name+adapter, parameters: {weight: 1e-3}}\n",
    "merge_method: &m linear\nmodels: &list\n- &a {model: a, parameters: &p {weight: !!float 0.5}}\n"
    "- {model: !!str 7}\n",
    "merge_method: nearswap\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.001}\n",
)


def laughs(depth: int, width: int = 9) -> str:
    """YAML of `width ** depth` words in a few hundred characters."""
    inner = "[x]" if depth == 0 else laughs(depth - 1, width)
    return f"[&n{depth} {inner}{f', *n{depth}' * (width - 1)}]"


LAUGHS = laughs(6)
BOMBED = (
    "merge_method: {}\nmodels: [{{model: a}}]\n",
    "merge_method: linear\nmodels: {}\n",
    "merge_method: linear\nmodels: [{}]\n",
    "merge_method: linear\nmodels: [{{model: {}}}, {{model: b}}]\n",
    "merge_method: linear\nmodels: [{{merge: {}}}, {{model: b}}]\n",
    "merge_method: linear\nmodels: [{{model: a, parameters: {}}}, {{model: b}}]\n",
    "merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {}}}}}, {{model: b}}]\n",
    "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{normalize: {}}}\n",
    "merge_method: ties\nbase_model: {}\nmodels: [{{model: a}}, {{model: b}}]\n",
    "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nseed: {}\n",
    "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nout_dtype: {}\n",
    "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\ntokenizer: {}\n",
    "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nchat_template: {}\n",
    "merge_method: passthrough\nslices: {}\n",
    "merge_method: passthrough\nslices: [{{sources: {}}}]\n",
    "merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {}}}]}}]\n",
    "{}",
    "{}: 1",
)

HOSTILE = {
    **{f"laughs {k}": text.format(LAUGHS) for k, text in enumerate(BOMBED)},
    **{f"list in itself {k}": text.format("&s [x, *s]") for k, text in enumerate(BOMBED)},
    **{f"mapping in itself {k}": text.format("&s {x: 1, y: *s}") for k, text in enumerate(BOMBED)},
    "itself": "&a\nmerge_method: linear\nmodels: [{merge: *a}, {model: b}]\n",
    "itself as models": "merge_method: linear\nmodels: &a [*a]\n",
    "itself as a key": "&a {*a : 1}",
    "lists": "[" * 50_000,
    "mappings": "{a: " * 20_000,
    "nested merges": "{merge_method: linear, models: [{model: a}, {merge: " * 3000,
    "dashes": "- " * 20_000,
    "questions": "? " * 20_000,
    "null": "merge_method: linear\0",
    "date": "merge_method: linear\nmodels: [{model: a}]\nseed: 2001-99-99\n",
    "time": "merge_method: linear\nmodels: [{model: a}]\nseed: 2001-01-01 99:99:99\n",
    "long number": "merge_method: linear\nmodels: [{model: a}]\nseed: " + "9" * 5000,
    "long float": "merge_method: linear\nmodels: [{model: a, parameters: {weight: " + "9" * 400 + "}}]\n",
    "sixty": "merge_method: linear\nmodels: [{model: a}]\nseed: 1" + ":59" * 3000,
    "binary": "merge_method: !!binary '='\nmodels: []\n",
    "int tag": "merge_method: linear\nmodels: [{model: a}]\nseed: !!int x\n",
    "float tag": "merge_method: linear\nmodels: [{model: a}]\nseed: !!float x\n",
    "set": "!!set {merge_method, models}",
    "python": "!!python/object/apply:os.system ['true']",
    "merge key": "<<: 1\nmerge_method: linear\n",
    "surrogate": 'merge_method: linear\nmodels: [{model: "\\ud800"}, {model: b}]\n',
    "surrogate itself": "merge_method: linear\nmodels: [{model: \udc80}, {model: b}]\n",
    "beyond Unicode": 'merge_method: "\\U00110000"\n',
    "far beyond Unicode": 'merge_method: "\\Uffffffff"\n',
    "odd key": '{"\\ud800": 1, "\\x1b[2J": 2}',
    "long key": "x" * 200_000 + ": 1",
    "sixty in a range": "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1"
    + ":59" * 3000
    + "]}]}]",
    "twice": "merge_method: linear\nmerge_method: slerp\nmodels: [{model: a}, {model: b}]\n",
    "two documents": "merge_method: linear\nmodels: [{model: a}]\n---\nmerge_method: linear\n",
    "nothing": "",
    "long name": "merge_method: " + "x" * 200_000,
    "bell": 'merge_method: "\\x07\\x1b[2J"\n',
    "mapping as a name": "merge_method: linear\nmodels: [{model: {a: b}}, {model: [a]}]\n",
    "nan": "merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}, {model: b}]\n",
}

# Among the words of the corpus: what YAML reads in a way of its own.
WORDS = (
    *sorted(OPERATORS), "merge_method", "base_model", "models", "model", "merge", "slices", "sources", "modules",
    "layer_range", "parameters", "filter", "value", "weight", "density", "lambda", "t", "normalize", "rescale",
    "dtype", "out_dtype", "seed", "tokenizer", "tokenizer_source", "chat_template", "into", "files_from", "fill",
    "float16", "bfloat16", "true", "false", "yes", "no", "null", "~", ".nan", ".inf", "-.inf", "1e400", "1e-3", "-0",
    "-1", "0x1f", "0b1", "1_0", "1:30", "2001-12-14", "9" * 30, "&a", "*a", "<<", "!!str", "!!binary", "!!int",
    "!!timestamp", "!x", "---", "...", "%YAML 1.1", "|", ">", "'", '"', "#", "? a", ": ", "[", "]", "{", "}", "- ",
    "\t", "\0", "\x1b", "\x85", "\u2028", "\ufeff", "\ud800", '"\\ud800"', '"\\U00110000"', "*", "''", "a", "b",
)  # fmt: skip
SEEDS = 8
EACH = 400


def useful(message: str) -> bool:
    """Says something, fits a screen or two, can be printed anywhere and sends no control code to the terminal."""
    message.encode()
    # YAML's own messages quote the line, in which a tab may stand.
    return 10 < len(message) < 2000 and re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", message) is None


def attempt(text: str) -> Recipe | str:
    """The recipe, or why there is none; any error but a UsageError goes through."""
    try:
        # PyYAML takes two seconds for a few thousand brackets, on a busy machine more.
        with time_limit(10):
            return read_recipe(text)
    except UsageError as error:
        return str(error)


def check(text: str) -> bool:
    """Whether the text is a recipe; asserts the property of the fuzzing."""
    result = attempt(text)
    if isinstance(result, str):
        assert useful(result), result[:3000]
        return False
    assert read_recipe(write_recipe(result)) == result
    assert from_dict(json.loads(result.canonical().encode())) == result
    digests = {name: str(k) for k, name in enumerate(result.all_names())}
    assert len(result.recipe_id(digests)) == 16
    return True


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_every_recipe_of_the_corpus_is_valid(number: int) -> None:
    assert check(CORPUS[number])


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_at_once(case: str) -> None:
    assert not check(HOSTILE[case])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_damaged_recipe_is_refused_usefully_or_reads_back(seed: int) -> None:
    accepted = 0
    for k in range(EACH):
        text = mutate_text(CORPUS[k % len(CORPUS)], rng_for(seed, "recipes", str(k)), WORDS, CORPUS)
        try:
            accepted += check(text)
        except BaseException as error:
            error.add_note(f"seed {seed}, input {k}: {text!r}")
            raise
    # Both sides of the property must be met, or nothing was tested.
    assert EACH / 20 < accepted < EACH / 2


@pytest.mark.parametrize("seed", ["1e400", "NaN", "-1", "1.5", '"7"', "true", "null", "[]", "1" + "0" * 4000])
def test_data_with_another_seed_than_a_whole_number_are_refused(seed: str) -> None:
    data = json.loads(f'{{"root":{{"operator":"linear","inputs":["a","b"],"coefficients":{{}}}},"seed":{seed}}}')
    with pytest.raises(RecipeError, match="seed"):
        from_dict(data)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_data_of_a_recipe_are_refused_or_read_back(seed: int) -> None:
    originals = [json.dumps(to_dict(read_recipe(text))).encode() for text in CORPUS]
    words = ("operator", "inputs", "base", "coefficients", "root", "seed", "dtype", "weight", "linear", "float16")
    accepted = 0
    for k in range(600):
        raw = mutate_json(originals[k % len(originals)], rng_for(seed, "recipe data", str(k)), words)
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        try:
            with time_limit(2):
                recipe = from_dict(data)
        except UsageError as error:
            message = str(error)
            assert useful(message), (k, message[:3000])
            continue
        except BaseException as error:
            error.add_note(f"seed {seed}, input {k}: {raw!r}")
            raise
        assert from_dict(json.loads(recipe.canonical().encode())) == recipe, raw
        assert recipe.dtype is None or isinstance(recipe.dtype, str), raw
        assert type(recipe.seed) is int, raw
        assert recipe.seed >= 0, raw
        accepted += 1
    assert accepted > 60


LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from simmerge.errors import RecipeError, UsageError
from simmerge.recipe_yaml import read_recipe
texts = json.loads(Path(sys.argv[1]).read_text())
try:
    read_recipe("merge_method: linear\\nmodels: [{model: a}, {model: b}]\\n")
finally:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 400_000_000, held + 400_000_000))
for text in texts:
    try:
        read_recipe(text)
    except UsageError:
        pass
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_no_hostile_recipe_asks_for_much_memory(tmp_path: Path) -> None:
    texts = [*HOSTILE.values(), *CORPUS]
    texts += [
        mutate_text(BOMBED[k % len(BOMBED)].format(laughs(12)), rng_for(5, "bombs", str(k)), WORDS) for k in range(100)
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "texts.json")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"
