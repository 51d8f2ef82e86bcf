"""``torch.compile(model, backend="lipfast")``: the graphs that dynamo cuts out, run in lanes.

Found by torch through the entry point group ``torch_dynamo_backends``. dynamo hands over parameters as dense
arguments: which weights are pruned is read off the graph or off the numbers.

- In training a weight is pruned where the graph multiplies it by a mask of zeros and ones, as the hooks of
  ``torch.nn.utils.prune`` do; a zero without a mask may be trained away from zero and counts as a weight.
- In inference every zero counts as pruned.

Each call asks whether the numbers that this rests on were written (``engine/watch.py``), and packs or plans anew
where they changed.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from lipfast.engine.capture import Call, Recording, record
from lipfast.engine.lane_module import PLANS_KEPT, Compiled, is_pruned, runs_in_lanes
from lipfast.engine.lower import lower
from lipfast.engine.products import exchange_weights, masks_in_graph, read_in_lanes, weight_of
from lipfast.engine.survey import Forms
from lipfast.engine.watch import Watch
from lipfast.errors import ConfigError, InputError

_TRANSFORMS = ("torch._functorch", "torch._C._functorch", "torch.autograd.forward_ad")
_CHANGES = ("writes", "contents")


def lipfast(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, str] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The dynamo backend: a function that computes what ``module`` does.

    What the engine has no kernel for runs in torch, and a warning names it once.

    Args:
        module: the graph.
        example_inputs: not used; shapes are taken from each call.
        options: ``{"changes": "writes"}`` (the default) lets torch say whether a watched weight was written, which
            takes no time and sees every way through torch and numpy; ``{"changes": "contents"}`` reads them in each
            call and sees raw pointers, too, that were handed out before.
        mode: refused; the modes of ``torch.compile`` are presets of another backend.

    Raises:
        ConfigError: a mode, an unknown option or value.
    """
    if mode is not None:
        raise ConfigError(f"torch.compile: lipfast has no mode {mode!r}; leave mode out")
    chosen = {"changes": _CHANGES[0], **(options or {})}
    if unknown := chosen.keys() - {"changes"}:
        raise ConfigError(f"torch.compile: lipfast has no option {min(unknown)!r}; it has 'changes'")
    if chosen["changes"] not in _CHANGES:
        raise ConfigError(f"torch.compile: option 'changes' is {chosen['changes']!r}; use one of {', '.join(_CHANGES)}")
    return _CompiledGraph(module, reads=chosen["changes"] == "contents")


@dataclasses.dataclass
class _Variant:
    """A graph for one set of sizes, and the masks it was planned for.

    Attributes:
        masks: leaf name -> which of its weights live.
        sources: leaf name -> the leaf that holds its mask in the graph; absent where zeros were counted.
        training: gradients are wanted, so weights are packed by a differentiable step in each call.
        reads: all watched numbers in each call, instead of asking torch for writes.
        watch: over what the masks (and, in inference, the packed weights) were made from.
        packed: the packed weights, in inference.
    """

    compiled: Compiled
    masks: dict[str, Tensor]
    sources: dict[str, str]
    training: bool
    reads: bool
    watch: Watch = dataclasses.field(init=False)
    packed: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def unchanged(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether everything the variant was made from still holds."""
        return self.watch.unchanged(self._watched(tensors))

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no weight lives that the masks call dead."""
        for name, mask in self.masks.items():
            if name in self.sources and not torch.equal(tensors[self.sources[name]].float(), mask.float()):
                return False
            if name not in self.sources and bool((tensors[name][~mask] != 0).any()):
                return False
        return True

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what the variant was made from."""
        self.watch = Watch(self._watched(tensors), reads=self.reads)
        if not self.training:
            self.packed = {name: tensors[name].detach()[mask] for name, mask in self.masks.items()}

    def _watched(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        sources = list(self.sources.values())
        return [tensors[name] for name in (sources if self.training else [*sources, *self.masks])]


class _CompiledGraph:
    def __init__(self, module: torch.fx.GraphModule, *, reads: bool) -> None:
        self._module, self._reads = module, reads
        self._variants: dict[Any, _Variant | None] = {}
        self._warned: set[str] = set()
        placeholders = module.graph.find_nodes(op="placeholder")
        self._names = [str(place) for place, _ in enumerate(placeholders)]
        self._of_module = {name for name, node in zip(self._names, placeholders, strict=True) if _is_of_module(node)}
        self._forms: Forms | None = None

    def __call__(self, *args: Any) -> Any:
        tensors = {name: arg for name, arg in zip(self._names, args, strict=True) if isinstance(arg, Tensor)}
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
        others = tuple(arg for arg in args if not isinstance(arg, Tensor))
        forms = self._forms = Forms.of(tensors.values(), self._forms)
        key = (training, others, forms)
        variant = self._variants.get(key)
        changed = variant is not None and not variant.unchanged(tensors)
        if variant is not None and changed and variant.fits(tensors):
            variant.settle(tensors)  # the weights moved, the masks did not
        elif changed or key not in self._variants:
            variant = self._variants[key] = self._plan(args, tensors, training)
            if len(self._variants) > PLANS_KEPT:
                self._say(f"more than {PLANS_KEPT} input sizes: those planned longest ago are planned anew")
                del self._variants[next(iter(self._variants))]
        if variant is None:
            return self._module(*args)
        return variant.compiled.run([], {**tensors, **variant.packed})

    def _plan(self, args: Sequence[Any], tensors: Mapping[str, Tensor], training: bool) -> _Variant | None:
        def call(stand_ins: dict[str, Tensor]) -> Any:
            return self._module(*[stand_ins.get(str(place), arg) for place, arg in enumerate(args)])

        if not all(runs_in_lanes(tensor.device) for tensor in tensors.values()):
            self._say("torch.compile runs in lanes on a CPU only; on a GPU use lipfast.accelerate(model)")
            return None
        if transform := _transform_in(self._module):
            self._say(f"a graph runs in torch: it takes derivatives or maps over a batch inside ({transform})")
            return None
        try:
            recording = record(call, [], tensors)
        except InputError as reason:
            self._say(f"a graph runs in torch: {reason}")
            return None
        masks, sources, products = masks_in_graph(recording, tensors)
        zeros = {} if training else _zeros(recording, tensors)
        of_module = {name for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)}
        of_module |= {*sources.values(), *self._of_module}
        lowered = lower(recording, {**zeros, **masks}, tensors.keys() - of_module)
        # Layers that stay in torch know of no masks: they read the product.
        exchange_weights((item for item in lowered.items if isinstance(item, Call)), products)
        masks = read_in_lanes(lowered, {**zeros, **masks})
        sources = {name: source for name, source in sources.items() if name in masks}
        for refused in lowered.refused:
            self._say(f"{refused}; it runs in torch, and maps are converted to torch's layout and back around it")
        compiled = Compiled(lowered, masks, exact=False, packed={} if training else masks, reads=self._reads)
        variant = _Variant(compiled, masks, sources, training, self._reads)
        variant.settle(tensors)
        return variant

    def _say(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"lipfast: {reason}", stacklevel=2)


def _is_of_module(placeholder: torch.fx.Node) -> bool:
    """Whether dynamo found a tensor in a module, not among the arguments. It says so of buffers, too, which are tensors
    like any other."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def _transform_in(module: torch.fx.GraphModule) -> str | None:
    """A function of ``torch.func`` or of forward-mode derivatives in the graph: they look into the functions between
    them, where a segment is one function without a derivative of that kind."""
    functions = [node.target for node in module.graph.nodes if node.op == "call_function"]
    found = [f for f in functions if str(getattr(f, "__module__", "")).startswith(_TRANSFORMS)]
    return found[0].__name__ if found else None


def _zeros(recording: Recording, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that are zero often enough to matter."""
    found = {}
    for call in recording.calls:
        weight = weight_of(call)
        name = recording.leaves.get(weight.number) if weight else None
        alive = tensors[name] != 0 if name is not None else None
        if alive is not None and is_pruned(alive):
            found[str(name)] = alive
    return found
