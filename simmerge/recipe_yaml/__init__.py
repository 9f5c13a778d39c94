"""Recipes as YAML: mergekit 0.1.5's form, and a few keys more for what mergekit has not.

    merge_method: ties
    base_model: base
    models:
      - model: german
        parameters: {weight: 1.0, density: 0.2}
      - model: code
        parameters:
          weight: [0.2, 1.0]                        # a gradient over the layers
          density:                                  # the first filter that is part of the tensor's name wins
            - {filter: mlp, value: 0.5}
            - {value: 0.2}
    parameters: {lambda: 1.0, normalize: true}
    out_dtype: float16

`slices` in place of `models` stacks layers, with `sources` of `model` and `layer_range`. Values of a
source go before those of its slice, those before the ones for all. A parameter that is left out has
mergekit's default (`OperatorSpec.peer_defaults`), so that one file means one merge in both programs.

What differs from mergekit:

* Merges are computed in float32 always. `dtype`, mergekit's dtype for computing, is that of the saved
  tensors where there is no `out_dtype`.
* Config and tokenizer go along from `files_from`, else from the first source; mergekit takes the base's.
* Unknown keys, keys given twice and YAML aliases are errors.

Keys that mergekit has not:

* `merge: {merge_method: …, models: […]}` in place of `model: NAME`: the result of a step of its own.
* `base: NAME` in place of `base_model`: a model of the same name stays an input. In a slice it is
  `base: {model: NAME, layer_range: [0, 4]}`.
* `merge_method` in a slice: stacked parts may be made by different operators.
* `seed`: the stream of random masks. `into`: a vision-language checkpoint into whose language tower the
  merge goes. `files_from`: whose config goes along.
* `fill` under `tokenizer`: what a checkpoint gets for a token that it lacks: mean, zero or donor.
"""

from simmerge.recipe_yaml.read import DTYPES, read_recipe
from simmerge.recipe_yaml.write import write_recipe

__all__ = ["DTYPES", "read_recipe", "write_recipe"]
