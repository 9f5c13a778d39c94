"""A language model inside a vision-language checkpoint: which tensor of the one is which of the other.

transformers 5 writes `model.layers.0…` of a Llama as `model.language_model.layers.0…`, older versions as
`language_model.model.layers.0…`. The prefix is found by what fits, not by a list of model types.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, cast

from simmerge.checkpoint.checkpoint import Checkpoint
from simmerge.checkpoint.compatibility import EMBEDDINGS, VOCABULARY
from simmerge.errors import IncompatibleError

_HEADS = tuple(name for name in VOCABULARY if name not in EMBEDDINGS)
_SHOWN = 5

Fits = Callable[[str, str], bool]
"""Whether a tensor of the model, by name, fits one of the host."""


def tower_names(
    host: Checkpoint, model: Checkpoint, prefixes: Mapping[str, str] | None = None, *, vocabulary: bool = False
) -> dict[str, str]:
    """The host's tensor for every tensor of a language model, by name.

    Args:
        host: a checkpoint that holds a language model of the same kind and more, such as a vision tower.
        model: the language model.
        prefixes: beginnings of the model's names and what they are in the host, such as
            {'model.': 'model.language_model.', 'lm_head.': 'lm_head.'}; the longest that fits holds. None: found by
            names and shapes.
        vocabulary: whether the rows of embeddings and heads may differ, because the merge gives both one vocabulary.

    Returns:
        Names sorted by those of the model, one-to-one. A tied head that the model stores although the host does not is
        left out.

    Raises:
        IncompatibleError: a tensor of the model has no partner or two of them have the same, more than one tower fits,
            or the host has a head of its own and the model's is tied.
    """
    fits = _fit(host, model, vocabulary)
    names = _by_prefixes(model, prefixes) if prefixes is not None else _found(host, model, fits)
    for name in [n for n in names if n.endswith(_HEADS) and names[n] not in host.tensors and _tied(model)]:
        del names[name]
    bad = [name for name in names if not fits(name, names[name])]
    if bad:
        _no_partner(host, model, names, bad)
    owners: dict[str, str] = {}
    for name, partner in names.items():
        if owners.setdefault(partner, name) != name:
            raise IncompatibleError(
                f"'{owners[partner]}' and '{name}' of {model.path} would both be '{partner}' of {host.path}; give "
                "prefixes that lead every tensor to one of its own"
            )
    _check_head(host, model, names)
    return dict(sorted(names.items()))


def tower(host: Checkpoint, names: Mapping[str, str], model: Checkpoint) -> Checkpoint:
    """The host's language model as a checkpoint with the names and the architecture of `model`.

    What is compared or merged with the tower then needs no other names: `require_compatible(model, tower(…))`.

    Args:
        host: the checkpoint that holds the tower.
        names: what `tower_names` gave.
        model: the language model.
    """
    text = host.config.get("text_config")
    settings = dict(host.config) | (cast("dict[str, Any]", text) if isinstance(text, dict) else {})
    settings.pop("text_config", None)
    kind = {key: model.config[key] for key in ("architectures", "model_type") if key in model.config}
    if host.adapter is not None:
        raise IncompatibleError(
            f"{host.path} is an adapter, and a tower is taken from a whole checkpoint; merge it into its base first"
        )
    tensors = {name: replace(host.tensors[partner], name=name) for name, partner in names.items()}
    return Checkpoint(path=host.path, tensors=dict(sorted(tensors.items())), config=settings | kind)


def _fit(host: Checkpoint, model: Checkpoint, vocabulary: bool) -> Fits:
    def fits(name: str, partner: str) -> bool:
        ours, theirs = model.tensors[name], host.tensors.get(partner)
        if theirs is None:
            return False
        if vocabulary and name.endswith(VOCABULARY):
            return ours.shape[1:] == theirs.shape[1:] and len(ours.shape) == len(theirs.shape)
        return ours.shape == theirs.shape

    return fits


def _tied(checkpoint: Checkpoint) -> bool:
    # transformers 4 leaves the field out where it has its default, which is true.
    return checkpoint.setting("tie_word_embeddings") is not False


def _by_prefixes(model: Checkpoint, prefixes: Mapping[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in model.tensors:
        found = [prefix for prefix in prefixes if name.startswith(prefix)]
        if not found:
            raise IncompatibleError(
                f"tensor '{name}' of {model.path} starts with none of the prefixes {', '.join(map(repr, prefixes))}; "
                "add one for it ('' matches every name)"
            )
        longest = max(found, key=len)
        names[name] = prefixes[longest] + name.removeprefix(longest)
    return names


def _found(host: Checkpoint, model: Checkpoint, fits: Fits) -> dict[str, str]:
    """Partner by name: one prefix for all of the model but its heads, and one name for each head."""
    heads = [name for name in model.tensors if name.endswith(_HEADS)]
    trunk = [name for name in model.tensors if name not in heads]
    before = _common(trunk)
    rests = [name.removeprefix(before) for name in trunk]
    # The embedding is in no vision tower, so it leaves the fewest prefixes to try.
    probe = next((rest for rest in rests if rest.endswith(EMBEDDINGS)), rests[0] if rests else "")
    tried = [name.removesuffix(probe) for name in host.tensors if name == probe or name.endswith(f".{probe}")]
    hits = {
        prefix: [name for name, rest in zip(trunk, rests, strict=True) if fits(name, prefix + rest)] for prefix in tried
    }
    whole = [prefix for prefix, found in hits.items() if len(found) == len(trunk)]
    if len(whole) > 1:
        raise IncompatibleError(
            f"{model.path} fits {len(whole)} parts of {host.path}: {', '.join(map(repr, whole))}; give prefixes to say "
            "which is meant"
        )
    best = whole[0] if whole else max(tried, key=lambda prefix: len(hits[prefix]), default=before)
    names = {name: best + rest for name, rest in zip(trunk, rests, strict=True)}
    return names | {head: _head(host, head, best, fits) for head in heads}


def _common(names: list[str]) -> str:
    """The longest common beginning of dotted names, up to and with a dot."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)


def _head(host: Checkpoint, head: str, prefix: str, fits: Fits) -> str:
    """The host's name of a head: the one that shares most of the tower's prefix, else the head's own."""
    found = [name for name in host.tensors if (name == head or name.endswith(f".{head}")) and fits(head, name)]
    inside = [name for name in found if prefix.startswith(name.removesuffix(head))]
    return max(inside or found, key=len, default=head)


def _check_head(host: Checkpoint, model: Checkpoint, names: Mapping[str, str]) -> None:
    embeddings = [partner for name, partner in names.items() if name.endswith(EMBEDDINGS)]
    if any(name.endswith(_HEADS) for name in names) or not embeddings or not _tied(model) or _tied(host):
        return
    own = [name for name in host.tensors if name.endswith(_HEADS)]
    if own:
        raise IncompatibleError(
            f"the head of {model.path} is tied to its embedding, but {host.path} stores '{own[0]}', which the merge "
            "would leave as it is; use a host whose head is tied too, or untie the model's and save it"
        )


def _no_partner(host: Checkpoint, model: Checkpoint, names: Mapping[str, str], bad: list[str]) -> NoReturn:
    lines: list[str] = []
    for name in bad[:_SHOWN]:
        theirs = host.tensors.get(names[name])
        what = "which is not there" if theirs is None else f"whose shape is {list(theirs.shape)}"
        lines.append(f"  '{name}' {list(model.tensors[name].shape)}: looked for '{names[name]}', {what}")
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    raise IncompatibleError(
        f"{len(bad)} of {len(model.tensors)} tensors of {model.path} have no partner in {host.path}:\n"
        + "\n".join(lines)
        + "\nUse a language model of the host's own kind and size, or give prefixes."
    )
