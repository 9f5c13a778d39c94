"""Merges in memory: what does not depend on coefficients is prepared once per set of inputs.

The first merge of a set of checkpoints reads them, and measures what its operator asks for: angles, selected
magnitudes, ranks, draws. The next one with other coefficients is about one pass over the weights. Results equal
those of a folder bit for bit.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from simmerge.errors import UsageError
from simmerge.merge.engine import rounded
from simmerge.merge.flat import FlatLayout, Live, Sink, adopt
from simmerge.merge.jobs import Job
from simmerge.merge.sources import Sources
from simmerge.merge.workers import hold_freed_memory, spread
from simmerge.operators import ResolvedStep, operator, resolve
from simmerge.operators.kernels.flat import Affines, Batched, Flat, Int64
from simmerge.operators.kernels.operands import Affine, Blockwise, KernelCall, Operands
from simmerge.recipe import Recipe, Slice, Stack, Step, step, steps

_SHARED = 1 << 18
"""Entries from which a pass is shared among threads."""
_WIDENED = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose values float32 holds exactly."""


@dataclass(slots=True)
class _Set:
    """What is prepared for one set of inputs: operands by tensor, and of all tensors as one."""

    operands: dict[str, Operands] = field(default_factory=dict[str, Operands])
    whole: Flat | None = None


class MemoryMerger:
    """Turns recipes into tensors in memory; a checkpoint is read once, when it is first needed.

    Args:
        sources: all checkpoints that recipes may name; compatible with one another.
        device: where the weights are held and merged, such as 'cpu' or 'cuda'.
        sets: for how many sets of inputs prepared results are kept; each may take a few times as much memory as
            its inputs in float32.
    """

    def __init__(self, sources: Sources, *, device: str = "cpu", sets: int = 4) -> None:
        hold_freed_memory()
        self._sources = sources
        self._device = torch.device(device)
        self._sets = sets
        self._held: dict[str, dict[str, torch.Tensor]] = {}
        self._flat: dict[tuple[str, FlatLayout], torch.Tensor] = {}
        self._layouts: dict[object, FlatLayout] = {}
        self._prepared: OrderedDict[object, _Set] = OrderedDict()
        self._jobs: dict[object, Job] = {}
        self._now: dict[int, _Set] = {}
        self._merged: tuple[FlatLayout, torch.Tensor] | None = None
        self._live: WeakKeyDictionary[Any, tuple[FlatLayout, Live]] = WeakKeyDictionary()

    def tensors(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        """Every tensor of the merge in the dtype that a folder of it would store.

        Raises:
            MergeError: the result is not finite.
        """
        job, layout = self._job(recipe)
        flat = None if layout.dtype is None else torch.empty(layout.size, dtype=layout.dtype, device=self._device)
        slots = {} if flat is None else layout.views(flat)
        for name, dtype, shape in job.kinds:
            if name not in slots:
                slots[name] = torch.empty(shape, dtype=dtype, device=self._device)
        self._merge(job, layout, Live(slots, flat))
        return {name: slots[name] for name, _, _ in job.kinds}

    def load(self, recipe: Recipe, model: Any) -> None:
        """Write the merge into a live transformers model of the same architecture, in place.

        The weights are those that a folder of the merge would hold, rounded as it would round them. The model's
        parameters are moved into one vector at the first call; after a failed call they are undefined.

        Raises:
            KeyError: the model has no such parameter or buffer.
            MergeError: the result is not finite.
        """
        job, layout = self._job(recipe)
        known = self._live.get(model)
        if known is None or known[0] is not layout:
            with torch.no_grad():
                known = self._live[model] = (layout, adopt(model, layout))
        self._merge(job, layout, known[1])

    def load_checkpoint(self, name: str, model: Any) -> None:
        """Write one checkpoint's tensors into a live model, as `load` writes a merge."""
        self.load(Recipe(root=step("passthrough", [name])), model)

    def checkpoint(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one checkpoint; float32 where that holds their values exactly."""
        if name not in self._held:
            held: dict[str, torch.Tensor] = {}
            for tensor in self._sources[name].checkpoint.tensors:
                stored = self._sources.read(name, tensor)
                held[tensor] = (stored.float() if stored.dtype in _WIDENED else stored).clone().to(self._device)
            self._held[name] = held
        return self._held[name]

    def _read(self, name: str, tensor: str) -> torch.Tensor:
        return self.checkpoint(name)[tensor]

    def _vector(self, name: str, layout: FlatLayout) -> torch.Tensor:
        """One checkpoint as a vector; its tensors become views of it."""
        if (name, layout) not in self._flat:
            held = self.checkpoint(name)
            flat = self._flat[name, layout] = layout.gather(held, self._device)
            held.update({n: view for n, view in layout.views(flat).items() if held[n].dtype == torch.float32})
        return self._flat[name, layout]

    def _job(self, recipe: Recipe) -> tuple[Job, FlatLayout]:
        """The recipe's job; recipes over the same checkpoints share what names and shapes decide."""
        if recipe.vocabulary is not None or recipe.into is not None:
            raise UsageError(
                "a recipe with a vocabulary of its own, or into a vision-language checkpoint, changes the model's "
                "shape and cannot be loaded into a live model; merge it to a folder"
            )
        nested = any(isinstance(i, Step | Stack | Slice) for item in steps(recipe.root) for i in item.inputs)
        key = None if nested or isinstance(recipe.root, Stack) else (recipe.all_names(), recipe.dtype)
        known = self._jobs.get(key) if key is not None else None
        job = Job(recipe, self._sources, read=self._read, operands=self._operands, like=known)
        if key is not None:
            self._jobs[key] = job
        if job.kinds not in self._layouts:
            self._layouts[job.kinds] = FlatLayout(job.kinds)
        return job, self._layouts[job.kinds]

    def _merge(self, job: Job, layout: FlatLayout, live: Live) -> None:
        with torch.no_grad():
            sink = Sink(layout, live.slots, live.flat)
            for name, _, _ in layout.others:
                live.slots[name].copy_(job.engine.stored(name))
            self._now.clear()
            root = job.recipe.root
            flat = isinstance(root, Step) and all(isinstance(item, str) for item in root.inputs)
            if isinstance(root, Step) and flat and (resolved := resolve(root)).constant:
                self._plain(job, root, resolved, layout, sink)
            else:
                for part in layout.parts:
                    for start, values in job.engine.blocks(part.name):
                        sink.put(part.start + start, values)
            if not sink.finite():
                for part in layout.parts:
                    for _, values in job.engine.blocks(part.name):
                        rounded(part.name, values, part.dtype)

    def _plain(self, job: Job, node: Step, resolved: ResolvedStep, layout: FlatLayout, sink: Sink) -> None:
        """One step over checkpoints with the same coefficients everywhere: as few passes as its operator allows."""
        if not layout.parts:
            return
        made = self._at_once(job, node, resolved, layout)
        if made is None:
            self._by_tensor(job, node, layout, sink)
            return
        whole = self._whole(job, node, layout)
        if isinstance(made, Affine) and self._device.type == "cpu":
            made = Affines(np.tile(np.array(made.weights), (len(whole.names), 1)), made.lifted, whole)
        if isinstance(made, Batched):
            self._shared(made, whole, layout, sink)
        elif isinstance(made, Affine):
            for start, stop in layout.steps():
                sink.put(start, _combined(made, whole, start, stop))
        elif isinstance(made, torch.Tensor):
            sink.put(0, made)
        else:
            for block in whole.blocks():
                sink.put(block.start, made.apply(block))

    def _shared(self, made: Batched, whole: Flat, layout: FlatLayout, sink: Sink) -> None:
        """All tensors in compiled passes, by as many threads as torch has."""
        merged = self._scratch(layout)
        if whole.stored_base is not None:
            whole.changes()  # by this thread and once: it is torch that makes them
        shares = whole.shares(torch.get_num_threads() if whole.numel >= _SHARED else 1)

        def work(segments: Int64) -> None:
            made.whole(segments, merged)
            if sink.compiled:
                start, stop = int(segments[0, 0]), int(segments[-1, 1])
                sink.put(start, merged[start:stop])

        spread(work, shares)
        if not sink.compiled:
            # By this thread: every other one that calls torch gets threads of its own, and all are slow from then on.
            for start, stop in layout.steps():
                sink.put(start, merged[start:stop])

    def _at_once(
        self, job: Job, node: Step, resolved: ResolvedStep, layout: FlatLayout
    ) -> Batched | Blockwise | torch.Tensor | None:
        """What an operator makes of all tensors at once, None where it goes tensor by tensor."""
        spec = resolved.spec
        # Compiled passes are for the processor.
        if not (spec.uniform or (spec.batched and self._device.type == "cpu")):
            return None
        numbers, options = resolved.at("", 0.0)
        whole = self._whole(job, node, layout)
        made = spec.load()(KernelCall(operands=whole, numbers=numbers, options=options))
        return made if spec.uniform or isinstance(made, Batched) else None

    def _by_tensor(self, job: Job, node: Step, layout: FlatLayout, sink: Sink) -> None:
        """Tensor by tensor; combinations are collected in one vector, so that what follows is done at once."""
        whole = self._whole(job, node, layout)
        merged = self._scratch(layout)
        for part in layout.parts:
            call, made = job.engine.plan(part.name)
            place = merged[part.start : part.stop]
            if isinstance(made, Affine):
                _combined(made, whole, part.start, part.stop, out=place)
            elif isinstance(made, torch.Tensor):
                place.copy_(made.reshape(-1))
            else:
                for block in call.operands.blocks(made.by):
                    place[block.start : block.stop].copy_(made.apply(block).reshape(-1))
        for start, stop in layout.steps():
            sink.put(start, merged[start:stop])

    def _scratch(self, layout: FlatLayout) -> torch.Tensor:
        if self._merged is None or self._merged[0] is not layout:
            self._merged = (layout, torch.zeros(layout.size, device=self._device))
        return self._merged[1]

    def _set(self, node: Step, seed: int) -> _Set:
        key = (node.inputs, node.base, operator(node.operator).needs, seed)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = _Set()
            if len(self._prepared) > self._sets:
                self._prepared.popitem(last=False)
        elif len(self._prepared) > 1:
            self._prepared.move_to_end(key)
        return prepared

    def _operands(self, node: Step, tensor: str, seed: int, make: Callable[[], Operands]) -> Operands:
        found = self._now.get(id(node))
        if found is None:
            found = self._now[id(node)] = self._set(node, seed)
        prepared = found.operands
        if tensor not in prepared:
            prepared[tensor] = make()
            prepared[tensor].keep = True
        return prepared[tensor]

    def _whole(self, job: Job, node: Step, layout: FlatLayout) -> Flat:
        """The operands of all tensors as one."""
        prepared = self._set(node, job.recipe.seed)
        if prepared.whole is None:
            parts = layout.parts
            prepared.whole = Flat(
                [p.name for p in parts],
                np.array([(p.start, p.stop) for p in parts], dtype=np.int64).reshape(-1, 2),
                np.array([p.shape[-1] if p.shape else 1 for p in parts], dtype=np.int64),
                [self._vector(str(name), layout) for name in node.inputs],
                None if node.base is None else self._vector(str(node.base), layout),
                keys=job.engine.keys(node),
                seed=job.recipe.seed,
            )
        return prepared.whole


def _combined(made: Affine, whole: Flat, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """A combination over a range of all tensors as one; of the task vectors, which are kept, where it is lifted."""
    vectors = whole.deltas() if made.lifted else whole.stored
    base = whole.float_base() if made.lifted else None
    return made.of([v[start:stop] for v in vectors], None if base is None else base[start:stop], out=out)
