"""One vocabulary for checkpoints whose tokenizers differ: the output's tokenizer, and which row goes where.

A token is known by its text. For every checkpoint the rows of its embeddings and head are put into the output's
order before anything is merged; rows that it lacks are filled as the recipe says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from simmerge.checkpoint.checkpoint import Checkpoint, with_vocabulary_size
from simmerge.checkpoint.compatibility import EMBEDDINGS, HEADS, VOCABULARY
from simmerge.checkpoint.text import shown
from simmerge.errors import IncompatibleError, RecipeError, UnknownNameError
from simmerge.merge.tokenizer_union import Tokenizer, appended, read_tokenizer, tokenizer_files
from simmerge.recipe import TokenRule, Vocabulary

Read = Callable[[str, str], torch.Tensor]
"""`read(checkpoint, tensor)` gives a stored tensor."""

Rows = npt.NDArray[np.int64]
"""A row of a checkpoint for every row of the output; -1 where there is none."""

_ID_KEYS = ("_token_id", "_token_ids", "_token_index")
_MEAN_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularyPlan:
    """How checkpoints are brought to one vocabulary.

    Attributes:
        size: rows of the output's embeddings and head, padding included; the config's `vocab_size`.
        tokenizer: the output's.
        original: the tokenizer that it was appended to.
        rows_of: rows of each checkpoint's embeddings and head.
        own: each checkpoint's own row by output row; -1 where it lacks the token or a rule forces another row.
        donors: the rows that stand in for a missing one; where several checkpoints have one, their mean.
        by_mean: output rows that get the mean of the checkpoint's own rows instead.
        ids: id by token of every checkpoint's own tokenizer.
    """

    size: int
    tokenizer: Tokenizer
    original: Tokenizer
    rows_of: Mapping[str, int]
    own: Mapping[str, Rows]
    donors: Mapping[str, Rows]
    by_mean: npt.NDArray[np.bool_]
    ids: Mapping[str, Mapping[str, int]]

    def covers(self, tensor: str) -> bool:
        """Whether a tensor of that name has a row per token."""
        return tensor.endswith(VOCABULARY)

    def files(self) -> dict[str, bytes]:
        """Content by name of the output tokenizer's files; CheckpointError where one cannot be read."""
        return tokenizer_files(self.tokenizer, self.original)

    def config(self, checkpoint: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's config for the output: its number of rows, and its tokens under their new ids.

        Args:
            checkpoint: whose config it is.
            config: content of config.json.
        """
        return with_vocabulary_size(self.settings(checkpoint, config), self.size)

    def settings(self, checkpoint: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings such as generation_config.json with the ids of tokens (`eos_token_id`, …) in the output.

        A token that the output does not have becomes None, and leaves a list.
        """
        texts = {number: text for text, number in self.ids[checkpoint].items()}
        return _renumbered(settings, {k: self.tokenizer.ids.get(text) for k, text in texts.items()})

    def wrap(self, read: Read) -> Read:
        """A reader that gives tensors with a row per token in the output's order, and all others as they are."""
        return lambda checkpoint, tensor: (
            self.rows(checkpoint, tensor, read) if self.covers(tensor) else read(checkpoint, tensor)
        )

    def rows(self, checkpoint: str, tensor: str, read: Read) -> torch.Tensor:
        """A tensor of a checkpoint with the output's rows.

        Args:
            checkpoint: whose tensor.
            tensor: name of a tensor with a row per token.
            read: gives it, and the same tensor of those that stand in for missing rows.

        Returns:
            A tensor `size x …`: the stored one where nothing changes; in its dtype where rows are only copied;
            otherwise float32, not rounded.

        Raises:
            UnknownNameError: the checkpoint has no part in the plan.
            IncompatibleError: the tensor has another number of rows than the embeddings.
        """
        if checkpoint not in self.own:
            raise UnknownNameError("checkpoint of the vocabulary", checkpoint, self.own)
        own, stored = self.own[checkpoint], self._stored(checkpoint, tensor, read)
        if len(own) == len(stored) and np.array_equal(own, np.arange(len(own))):
            return stored
        lacking = np.flatnonzero(own < 0)
        givers = {n: self._stored(n, tensor, read) for n, rows in self.donors.items() if (rows[lacking] >= 0).any()}
        count = np.zeros(len(lacking), dtype=np.int64)
        for name in givers:
            count += self.donors[name][lacking] >= 0
        copied = not self.by_mean[lacking].any() and not (count > 1).any()
        copied = copied and all(giver.dtype == stored.dtype for giver in givers.values())
        out = torch.zeros((self.size, *stored.shape[1:]), dtype=stored.dtype if copied else torch.float32)
        has = np.flatnonzero(own >= 0)
        out[_index(has)] = stored[_index(own[has])].to(out.dtype)
        for name, giver in givers.items():
            rows = self.donors[name][lacking]
            out[_index(lacking[rows >= 0])] += giver[_index(rows[rows >= 0])].to(out.dtype)
        several = count > 1
        if several.any():
            divisor = torch.as_tensor(count[several]).reshape(-1, *[1] * (out.dim() - 1))
            out[_index(lacking[several])] /= divisor
        mean = lacking[self.by_mean[lacking]]
        if len(mean):
            out[_index(mean)] = _mean(stored, own[has])
        return out

    def _stored(self, checkpoint: str, tensor: str, read: Read) -> torch.Tensor:
        stored = read(checkpoint, tensor)
        if stored.dim() == 0 or stored.shape[0] != self.rows_of[checkpoint]:
            raise IncompatibleError(
                f"tensor '{tensor}' of '{checkpoint}' has the shape {list(stored.shape)}; it must have "
                f"{self.rows_of[checkpoint]} rows, as many as its embeddings. Leave this checkpoint out."
            )
        return stored


def _index(rows: Rows) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(rows))


def _mean(stored: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Mean of some rows, summed in float64 over blocks of a fixed size."""
    total = torch.zeros(stored.shape[1:], dtype=torch.float64)
    for start in range(0, len(rows), _MEAN_ROWS):
        total += stored[_index(rows[start : start + _MEAN_ROWS])].to(torch.float64).sum(dim=0)
    return (total / max(1, len(rows))).to(torch.float32)


def plan_vocabulary(
    vocabulary: Vocabulary, checkpoints: Mapping[str, Checkpoint], *, base: str | None = None
) -> VocabularyPlan | None:
    """Decide the output's tokenizer and every checkpoint's rows.

    The tokenizer is that of one checkpoint, or for 'union' the reference's with the tokens of the others appended, in
    the order of the checkpoints and of their ids; the reference is the base, or the first checkpoint without one. Ids
    from the first unused one on are not used, and `pad_to_multiple_of` adds rows of zeros.

    A token that a checkpoint lacks gets the row of the token's rule, if it has one; else, by `fill`:
    'donor' (mergekit's way) the base's row, or the mean of all that have it where the base does not;
    'mean' the mean of the checkpoint's own rows; 'zero' zeros. A rule with `force` also replaces rows that are there.

    Args:
        vocabulary: the recipe's.
        checkpoints: every checkpoint that is merged, every base and every name in the rules, in the recipe's order.
        base: the recipe's base, whose row goes before others'.

    Returns:
        The plan; None where all tokenizers and numbers of rows are equal and nothing else is asked.

    Raises:
        UnknownNameError: the vocabulary names a checkpoint that is not among them.
        IncompatibleError: a tokenizer that cannot be matched or appended to.
        RecipeError: a rule names a token that its source does not have.
    """
    reference = base if base is not None else next(iter(checkpoints))
    giver = reference if vocabulary.source in ("union", "base") else vocabulary.source
    for name in (reference, giver, *vocabulary.names()):
        if name not in checkpoints:
            raise UnknownNameError("checkpoint of the vocabulary", name, checkpoints)
    rows_of = {name: _rows_of(checkpoint) for name, checkpoint in checkpoints.items()}
    known = _tokenizers(checkpoints, rows_of, giver)
    step = vocabulary.pad_to_multiple_of or 1
    equal = len({(t.digest, rows_of[name]) for name, t in known.items()}) == 1
    if equal and not vocabulary.tokens and rows_of[giver] % step == 0:
        return None
    original = known[giver]
    tokenizer = appended(original, _new_tokens(vocabulary, known, rows_of, giver))
    used = 1 + max(tokenizer.ids.values(), default=-1)
    size = -(-used // step) * step
    has = {name: _own_rows(tokenizer, known[name], original, size, rows_of[name]) for name in checkpoints}
    donors, by_mean = _stand_ins(vocabulary, has, tokenizer, base)
    own = {name: rows.copy() for name, rows in has.items()}
    for token, rule in vocabulary.tokens:
        place = tokenizer.ids[token]
        by_mean[place] = False
        for name in donors:
            donors[name][place] = _rule_row(token, rule, known, rows_of) if name == rule.source else -1
            if rule.force:
                own[name][place] = -1
    return VocabularyPlan(
        size=size,
        tokenizer=tokenizer,
        original=original,
        rows_of=rows_of,
        own=own,
        donors=donors,
        by_mean=by_mean,
        ids={name: t.ids for name, t in known.items()},
    )


def _rows_of(checkpoint: Checkpoint) -> int:
    for endings in (EMBEDDINGS, HEADS):
        for name, info in checkpoint.tensors.items():
            if name.endswith(endings) and info.shape:
                return info.shape[0]
    raise IncompatibleError(
        f"{checkpoint.path} has no tensor that ends in {', '.join((*EMBEDDINGS, *HEADS))}, so its vocabulary cannot "
        "be changed. Merge checkpoints of one tokenizer without 'tokenizer'."
    )


def _tokenizers(checkpoints: Mapping[str, Checkpoint], rows_of: Mapping[str, int], giver: str) -> dict[str, Tokenizer]:
    """Tokenizer by checkpoint; one that has none is taken to have the giver's, if it has as many rows."""
    found = {name: read_tokenizer(checkpoint) for name, checkpoint in checkpoints.items()}
    first = found[giver]
    if first is None:
        raise IncompatibleError(
            f"{checkpoints[giver].path} has no tokenizer, and the output's is made from it. Copy tokenizer.json there."
        )
    for name, tokenizer in found.items():
        if tokenizer is None and rows_of[name] != rows_of[giver]:
            raise IncompatibleError(
                f"{checkpoints[name].path} has no tokenizer and {rows_of[name]} rows, '{giver}' has {rows_of[giver]}; "
                "which token a row belongs to cannot be told. Copy its tokenizer.json there."
            )
    return {name: tokenizer or first for name, tokenizer in found.items()}


def _new_tokens(
    vocabulary: Vocabulary, known: Mapping[str, Tokenizer], rows_of: Mapping[str, int], giver: str
) -> list[tuple[str, Tokenizer | None]]:
    """Tokens to append, with the tokenizer that each comes from."""
    new: dict[str, Tokenizer | None] = {}
    if vocabulary.source == "union":
        for name, tokenizer in known.items():
            for token, number in tokenizer.ids.items():
                # A token without a row was never trained, and nothing is known of it.
                if number < rows_of[name] and token not in known[giver].ids:
                    new.setdefault(token, tokenizer)
    for token, rule in vocabulary.tokens:
        source = known.get(rule.source)
        if token not in known[giver].ids:
            new.setdefault(token, source if source is not None and token in source.added else None)
    return list(new.items())


def _own_rows(output: Tokenizer, own: Tokenizer, original: Tokenizer, size: int, rows: int) -> Rows:
    """A checkpoint's row for every row of the output, by the text of the tokens."""
    result = np.full(size, -1, dtype=np.int64)
    if own.digest == original.digest:
        # Ids that no token has keep their row as well.
        used = 1 + max(original.ids.values(), default=-1)
        result[:used] = np.arange(used)
    else:
        for token, place in output.ids.items():
            result[place] = own.ids.get(token, -1)
    result[result >= rows] = -1
    return result


def _stand_ins(
    vocabulary: Vocabulary, has: Mapping[str, Rows], output: Tokenizer, base: str | None
) -> tuple[dict[str, Rows], npt.NDArray[np.bool_]]:
    """Rows that stand in for missing ones by `fill`, and which output rows get their checkpoint's mean."""
    size = len(next(iter(has.values())))
    by_mean = np.zeros(size, dtype=np.bool_)
    if vocabulary.fill == "mean":
        by_mean[: 1 + max(output.ids.values(), default=-1)] = True
    if vocabulary.fill != "donor":
        return {name: np.full(size, -1, dtype=np.int64) for name in has}, by_mean
    donors = {name: rows.copy() for name, rows in has.items()}
    if base is not None:
        of_base = has[base] >= 0
        for name in donors:
            if name != base:
                donors[name][of_base] = -1
    return donors, by_mean


def _rule_row(token: str, rule: TokenRule, known: Mapping[str, Tokenizer], rows_of: Mapping[str, int]) -> int:
    """The row of a rule's source that a token gets."""
    wanted = token if rule.token is None else rule.token
    row = wanted if isinstance(wanted, int) else known[rule.source].ids.get(wanted, -1)
    if not 0 <= row < rows_of[rule.source]:
        what = f"row {row}" if isinstance(wanted, int) else f"row for the token {shown(wanted)}"
        raise RecipeError(
            f"tokenizer: the rule for {shown(token)} takes its row from '{rule.source}', which has no {what} among its "
            f"{rows_of[rule.source]} rows. Name another token or another checkpoint."
        )
    return row


def _renumbered(settings: Mapping[str, Any], ids: Mapping[int, int | None]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result[key] = _renumbered(cast("dict[str, Any]", value), ids)
        elif key.endswith(_ID_KEYS) and isinstance(value, list):
            numbers = [ids.get(v, v) if type(v) is int else v for v in cast("list[Any]", value)]
            result[key] = [number for number in numbers if number is not None]
        elif key.endswith(_ID_KEYS) and type(value) is int:
            result[key] = ids.get(value, value)
        else:
            result[key] = value
    return result
