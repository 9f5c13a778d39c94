"""What can be evaluated: catalogued checkpoints, and recipes over them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmerge.errors import RecipeError, UnknownNameError, UsageError
from simmerge.ledger.values import CheckpointEntry
from simmerge.operators import check_recipe, normal_form
from simmerge.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from simmerge.pipeline.project import Project

EVERYTHING = "all"
"""Stands for every checkpoint of the catalog, unless one is called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to score: a checkpoint, or the merge that a recipe describes.

    Attributes:
        label: what it is called where scores are shown.
        key: what its scores are recorded under: digest of the checkpoint's weights, or the recipe's id.
        model: the checkpoint's name, or the recipe in normal form.
        base: the catalogued checkpoint whose architecture and tokenizer it has.
    """

    label: str
    key: str
    model: str | Recipe
    base: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every checkpoint that is needed to make it, its base first."""
        others = self.model.all_names() if isinstance(self.model, Recipe) else (self.model,)
        return tuple(dict.fromkeys((self.base, *others)))


def subject_of(project: "Project", asked: str | Recipe, label: str | None = None) -> Subject:
    """A checkpoint's name, a recipe's id or a recipe as a subject; no weights are read.

    Args:
        project: the workspace.
        asked: the name or the recipe.
        label: what to call it; by default its name or id.

    Raises:
        UnknownNameError: no such checkpoint or recipe, or the recipe names one that is not in the catalog.
        RangeError: a coefficient of the recipe is out of its range.
        UsageError: the recipe changes the model's shape, so that it cannot be loaded into its base.
    """
    return _subject({entry.name: entry for entry in project.catalog.list()}, project, asked, label)


def subjects_of(project: "Project", asked: Sequence[str | Recipe | Subject]) -> tuple[Subject, ...]:
    """Subjects in the order asked; 'all' stands for every checkpoint of the catalog, in the order they were added.

    Raises:
        UsageError: nothing is asked, or all of an empty catalog.
        UnknownNameError: as `subject_of`; likewise RangeError and UsageError.
    """
    known = {entry.name: entry for entry in project.catalog.list()}
    found: list[Subject] = []
    for item in asked:
        if isinstance(item, Subject):
            found.append(item)
        elif item == EVERYTHING and EVERYTHING not in known:
            if not known:
                raise UsageError("the catalog is empty; add checkpoints with: simmerge catalog add PATH")
            found += [_checkpoint(entry, entry.name) for entry in known.values()]
        else:
            found.append(_subject(known, project, item, None))
    if not found:
        raise UsageError(f"nothing to evaluate; name a checkpoint, a recipe, or '{EVERYTHING}'")
    return tuple(found)


def _subject(
    known: Mapping[str, CheckpointEntry], project: "Project", asked: str | Recipe, label: str | None
) -> Subject:
    if isinstance(asked, Recipe):
        return _recipe(known, asked, label)
    if asked in known:
        return _checkpoint(known[asked], label or asked)
    if re.fullmatch("[0-9a-f]{16}", asked):
        return _recipe(known, _recorded(known, project, asked), label or asked)
    hint = "Give a catalogued checkpoint, a recipe's file (.yaml), the id of a recorded recipe, or 'all'."
    if Path(asked).is_dir():
        hint = f"'{asked}' is a folder; add it with: simmerge catalog add {asked}"
    raise UnknownNameError("checkpoint", asked, known, hint)


def _checkpoint(entry: CheckpointEntry, label: str) -> Subject:
    return Subject(label=label, key=entry.digest, model=entry.name, base=entry.base or entry.name)


def _recipe(known: Mapping[str, CheckpointEntry], recipe: Recipe, label: str | None) -> Subject:
    check_recipe(recipe)
    for name in recipe.all_names():
        if name not in known:
            raise UnknownNameError(
                "checkpoint", name, known, "The recipe names it; add it with: simmerge catalog add PATH."
            )
    if recipe.vocabulary is not None or recipe.into is not None:
        raise UsageError(
            f"{label or 'the recipe'}: a recipe with a vocabulary of its own, or into a vision-language checkpoint, "
            "changes the model's shape; merge it to a folder, add that to the catalog, and evaluate it there"
        )
    plan = normal_form(recipe)
    key = plan.recipe_id({name: known[name].digest for name in plan.all_names()})
    first = known[plan.sources()[0]]
    return Subject(label=label or key, key=key, model=plan, base=first.base or first.name)


def _recorded(known: Mapping[str, CheckpointEntry], project: "Project", recipe_id: str) -> Recipe:
    """The recipe of an id in the ledger, over the catalog's names."""
    recipe = from_dict(json.loads(project.ledger.recipe(recipe_id).canonical))
    names: dict[str, str] = {}
    for entry in known.values():
        names.setdefault(entry.digest, entry.name)
    for digest in recipe.all_names():
        if digest not in names:
            raise RecipeError(
                f"recipe '{recipe_id}' merges a checkpoint with digest {digest[:16]}, which is not in the catalog (any "
                "more); add it with: simmerge catalog add PATH"
            )
    return recipe.renamed(names)
