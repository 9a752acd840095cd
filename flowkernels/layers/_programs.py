"""What layers keep of their calls without gradient: on a CPU a small flow spends more time on finding and handing over its tensors than in
its loop. As long as nothing of a module has been replaced, a call gives C++ its input and the number of a stack that C++ knows."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._backend import prefers_compiled
from .._torch import any_autocast, dispatch_mode, has_global_hooks, tracing_state
from ..ops import Map
from ..ops._differentiation import transformed
from ..ops.autoregressive.kept import CAN_KEEP, KeptStack
from .masked_linear import MaskedLinear, Unitwise

Result = tuple[Tensor, Tensor]
_END = (object(),)
_OVERRIDDEN = {"forward", "inverse", "conditioner", "as_map"}
_NEVER_CALLED = (nn.ModuleList, MaskedLinear, Unitwise)
_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STORES = attrgetter("_parameters", "_buffers", "_modules")


class Step(NamedTuple):
    """Part of a call: layers that are maps which run together, and normalisations between them; or, without maps, one layer that is called.

    most_rows: the batch up to which the layers are these maps; None for any. write_affines: writes the normalisations as they are now into
    the maps' affine maps, and returns the sum of their log|det|s.
    """

    layers: Sequence[nn.Module] = ()
    maps: Sequence[Map] = ()
    most_rows: int | None = None
    write_affines: Callable[[], Tensor] | None = None


class _Settings:
    """The attributes that a module's class names in `map_settings`, on which the map rests that it is: as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._of = itemgetter(*type(module).map_settings)
        self._values = self._of(vars(module))

    def hold(self, attributes: dict) -> bool:
        return self._of(attributes) == self._values


def _has_settings(module: nn.Module) -> bool:
    return bool(getattr(type(module), "map_settings", ()))


class Watch:
    """Whether modules are as they were: the same tensors, parts, classes and settings, no more attributes and no hooks. What is written
    into the tensors is not looked at.

    Of the module that keeps this object, `owner`, nothing is kept here but its stores, so that both end together.
    """

    def __init__(self, owner: nn.Module, modules: Sequence[nn.Module]) -> None:
        others = [module for module in modules if module is not owner]
        stores = [store for module in (owner, *others) for store in _STORES(module) if store]
        self._values = [store.values() for store in stores]  # live views
        self._expected = [*self._now()]
        self._called = [module for module in others if not isinstance(module, _NEVER_CALLED)]
        self._classes = [*map(type, self._called)]
        self._hooks = [hooks for module in self._called for hooks in _HOOKS(module)]
        self._attributes = [vars(module) for module in self._called]
        self._counts = [*map(len, self._attributes)]
        self._settings = [(vars(module), _Settings(module)) for module in others if _has_settings(module)]
        self._owner, self._own_count = weakref.ref(owner), len(vars(owner))
        self._own_settings = _Settings(owner) if _has_settings(owner) else None

    def holds(self, owner: nn.Module) -> bool:
        if any(self._hooks) or not all(map(is_, self._now(), self._expected)):
            return False
        if [*map(len, self._attributes)] != self._counts or [*map(type, self._called)] != self._classes:
            return False
        for attributes, settings in self._settings:
            if not settings.hold(attributes):
                return False
        own = vars(owner)
        if self._owner() is not owner or len(own) != self._own_count:
            return False
        return self._own_settings is None or self._own_settings.hold(own)

    def knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are tensors of the modules, not made of them for one call."""
        known = {id(t) for t in self._expected}
        return all(id(t) in known and type(t) in (Tensor, nn.Parameter) for t in tensors)

    def _now(self) -> Iterator:
        return chain(chain.from_iterable(self._values), _END)


class Program:
    """The steps of one direction of a module, with what C++ keeps of them."""

    def __init__(self, owner: nn.Module, watch: Watch, steps: Sequence[Step], inverse: bool) -> None:
        maps = [map_ for step in steps for map_ in step.maps]
        limits = [step.most_rows for step in steps if step.most_rows is not None]
        self.watch, self.inverse = watch, inverse
        self.takes_context = all(map_.conditioner.context_weights for map_ in maps)
        self.most_rows = min(limits, default=None)
        self.calls, self.failed = 0, False
        others = lambda layers: [layer for layer in layers if layer is not owner]
        self.steps = [(KeptStack(step.maps) if step.maps else None, others(step.layers), step.write_affines) for step in steps]

    def fits(self, x: Tensor, context: Tensor | None) -> bool:
        if self.most_rows is not None and x.shape[0] > self.most_rows:
            return False
        return context is None or self.takes_context

    def __call__(self, x: Tensor, context: Tensor | None) -> Result | None:
        """None where the owner itself has to be asked, which is its only step."""
        self.calls += 1
        total = None
        for kept, layers, write_affines in self.steps:
            calls: Sequence[Callable[..., Result]] = [layer.inverse for layer in layers] if self.inverse else layers
            if kept is not None and not self.failed:
                try:
                    constant = None if write_affines is None else write_affines()
                    x, logabsdet = kept(x, context)
                except RuntimeError:  # the layers say what does not fit, or make it fit
                    self.failed = True
                else:
                    if constant is not None:
                        logabsdet = logabsdet + constant.to(logabsdet.dtype)
                    total = logabsdet if total is None else total + logabsdet
                    continue
            if kept is not None and not layers:  # here, or in another thread
                return None
            for layer, call in zip(layers, calls, strict=True):
                x, logabsdet = checked(layer, call(x, context))
                total = logabsdet if total is None else total + logabsdet
        return x, total


def checked(layer: nn.Module, result: Result) -> Result:
    """What a layer returned, where it is an output and its log|det|s: others would be broadcast."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"{len(result)} things" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ValueError(f"{type(layer).__name__} must return two things, its output and log|det| of each row; got {got}")
    x, logabsdet = result
    if not isinstance(logabsdet, Tensor) or logabsdet.shape != x.shape[:1]:
        got = list(logabsdet.shape) if isinstance(logabsdet, Tensor) else type(logabsdet).__name__
        raise ValueError(f"{type(layer).__name__} must return log|det| of each row beside its output, [{x.shape[0]}]; got {got}")
    return x, logabsdet


class Programs:
    """The programs of a module in both directions."""

    def __init__(self) -> None:
        self._of: dict[bool, Program] = {}
        self._calls, self._patience = 0, 1

    def clear(self) -> None:
        self._of.clear()
        self._calls, self._patience = 0, 1

    def run(self, owner: nn.Module, x: Tensor, context: Tensor | None, *, inverse: bool, by_modules: Callable[..., Result]) -> Result:
        """by_modules(x, context, inverse=inverse, steps=None), or the same by a program. `steps` is a list to which by_modules appends the
        steps it makes, and an empty one for what no program can do."""
        program = self._of.get(inverse)
        if program is not None and program.fits(x, context):
            holds = program.watch.holds(owner)
            result = program(x, context) if holds else None
            if result is None or program.failed:
                self._forget(inverse)
            other = None if holds else self._of.get(not inverse)
            if other is not None and not other.watch.holds(owner):  # it keeps what was replaced, and may not be called for long
                self._forget(not inverse)
            if result is not None:
                return result
        self._calls += 1
        if self._calls <= self._patience:
            return by_modules(x, context, inverse=inverse, steps=None)
        steps: list[Step] = []
        result = by_modules(x, context, inverse=inverse, steps=steps)
        if any(step.maps for step in steps):
            program = _learn(owner, steps, inverse)
            if program is None:
                self._wait()
            else:
                self._of[inverse] = program
        return result

    def _forget(self, inverse: bool) -> None:
        program = self._of.pop(inverse, None)  # another thread may have been here
        if program is None or program.calls > 20:
            self._calls, self._patience = 0, 1
        else:
            self._wait()

    def _wait(self) -> None:
        # getting to know tensors takes as long as finding them some ten times: where that is for nothing, it is done ever less
        self._calls, self._patience = 0, min(2 * self._patience, 1024)


def _learn(owner: nn.Module, steps: Sequence[Step], inverse: bool) -> Program | None:
    """The program of these steps, or None where their tensors or their classes' methods are not the modules' own."""
    if not all(step.layers for step in steps):
        return None
    modules = [module for step in steps if step.maps for layer in step.layers for module in layer.modules()]
    if any(is_parametrized(module) or _OVERRIDDEN & vars(module).keys() for module in modules):
        return None
    watch = Watch(owner, modules if owner in modules else [owner.layers, *modules])
    if not watch.knows([t for step in steps for map_ in step.maps for t in _tensors(map_)]):
        return None
    return Program(owner, watch, steps, inverse)


class KeepsPrograms(nn.Module):
    """A module that keeps programs of its calls. Copies and pickles begin with none.

    It forgets them when it is moved, cast or loaded: that may exchange what its tensors are made of, which torch refuses where somebody
    else holds them (torch.utils.swap_tensors).
    """

    _programs: Programs | None = None

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> Result:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_plain_call(x):
            return self._by_modules(x, context, inverse=inverse, steps=None)
        if self._programs is None:
            self._programs = Programs()
        return self._programs.run(self, x, context, inverse=inverse, by_modules=self._by_modules)

    def _by_modules(self, x: Tensor, context: Tensor | None, *, inverse: bool, steps: list[Step] | None) -> Result:
        raise NotImplementedError

    def _forget_programs(self) -> None:
        if self._programs is not None:
            self._programs.clear()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_programs"}

    def _apply(self, *args, **kwargs):
        self._forget_programs()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget_programs()
        super()._load_from_state_dict(*args, **kwargs)


def _is_plain_call(x: Tensor) -> bool:
    return (
        CAN_KEEP
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and prefers_compiled()
        and not any_autocast()
        and not transformed()
        and not has_global_hooks()
        and dispatch_mode() is None
        and tracing_state() is None
    )


def _tensors(map_: Map) -> list[Tensor]:
    network = map_.conditioner
    return [*network.weights, *network.biases, *network.context_weights, *network.context_biases]
