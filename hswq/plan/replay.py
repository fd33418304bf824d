"""A denoiser's recorded call, run again from the first block that a change can reach."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hswq.calibration import Call
from hswq.errors import InputError

logger = logging.getLogger(__name__)

# More than what products of another order of summation change; a random number changes it by far.
_REPEATED = 1e-4


class Replay:
    """One recorded call of a module and what its blocks gave.

    Blocks are the module's children and the elements of all its nn.ModuleLists, at any depth. A run
    for a changed layer takes the stored output of every block that had ended before the layer was
    first called; blocks within those are not even visited. A block counts only if one forward calls
    it once, and a stored output that somebody has changed in place since is computed again.

    Stored outputs stay on their device: about as many bytes as the activations that the blocks
    hand on, for one call.

    Args:
        module: the denoiser, in eval mode.
        call: one of its calls.
        layers: names of the layers that may be changed.
        device: where the module is.
    Raises:
        InputError: the module gives no tensor, or NaN, Inf or only zeros.
    """

    def __init__(
        self, module: nn.Module, call: Call, layers: Iterable[str], device: torch.device
    ) -> None:
        self._module = module
        self._call = call
        self._device = device
        self._entered: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._outputs: dict[str, tuple[Any, list[int]]] = {}
        self._skip_before = -1
        self._blocks = dict(_blocks(module))
        with torch.no_grad():
            self._record(set(layers))
        self.power = float(_sum_of_squares(self._reference))
        if not 0.0 < self.power < math.inf:
            raise InputError(
                "a recorded call gives NaN, Inf or only zeros, against which no change can be "
                "measured: calibrate with --calib-dtype bf16 or fp32."
            )
        times = sorted(self._entered.values())
        if times and self._change_from(times[len(times) // 2]) > _REPEATED:
            logger.warning(
                "%s gives other outputs when a call is repeated from the stored outputs of its "
                "first blocks: every run starts from the beginning",
                type(module).__name__,
            )
            self._outputs.clear()

    def change(self, layers: Iterable[str]) -> float:
        """Run the call with the module as it is now.

        Args:
            layers: names of the layers that differ from the module of the start.
        Returns:
            sum (y - y0)^2 / sum y0^2 in float64, y0 the output of the start; inf for NaN and Inf.
        """
        return self._change_from(min((self._entered.get(name, -1) for name in layers), default=-1))

    def was_called(self, layer: str) -> bool:
        """Tell whether the call reached a layer at all."""
        return layer in self._entered

    def _record(self, layers: set[str]) -> None:
        clock = 0
        calls: dict[str, int] = {}

        def tick() -> int:
            nonlocal clock
            clock += 1
            return clock

        def enter(name: str) -> None:
            self._entered.setdefault(name, tick())

        def leave(name: str, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            self._ended[name] = tick()
            self._outputs[name] = output, [tensor._version for tensor in _tensors(output)]

        with ExitStack() as hooks:
            for name, part in self._module.named_modules():
                if name in layers:
                    handle = part.register_forward_pre_hook(lambda *_, name=name: enter(name))
                    hooks.callback(handle.remove)
                if name in self._blocks:
                    handle = part.register_forward_hook(
                        lambda _m, _a, output, name=name: leave(name, output)
                    )
                    hooks.callback(handle.remove)
            self._reference = [
                tensor.clone()
                for tensor in self._output(self._call.run(self._module, self._device))
            ]
        for name, count in calls.items():
            if count > 1:
                del self._outputs[name]

    def _change_from(self, first: int) -> float:
        with torch.no_grad(), self._skipping(first):
            outputs = self._output(self._call.run(self._module, self._device))
        differences = (
            new.double() - old.double() for new, old in zip(outputs, self._reference, strict=True)
        )
        change = float(_sum_of_squares(differences))
        return change / self.power if math.isfinite(change) else math.inf

    @contextmanager
    def _skipping(self, first: int) -> Iterator[None]:
        """Let blocks that had ended before time `first` give their stored outputs."""
        names = [name for name in self._outputs if self._ended[name] < first]
        replaced = []
        try:
            for name in names:
                block = self._blocks[name]
                replaced.append((block, block.__dict__.get("forward")))
                block.forward = self._stored(name, block.forward)
            yield
        finally:
            for block, forward in replaced:
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.forward = forward

    def _stored(self, name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output, versions = self._outputs.get(name, (None, [-1]))
            if versions == [tensor._version for tensor in _tensors(output)]:
                return output
            self._outputs.pop(name, None)
            return forward(*args, **kwargs)

        return run

    def _output(self, output: Any) -> list[Tensor]:
        """Return the tensors of what a denoiser gives first: one, or one an image."""
        first = output
        if not isinstance(first, Tensor):
            first = next(iter(first.values() if hasattr(first, "values") else first), None)
        tensors = _tensors(first)
        if not tensors:
            raise InputError(
                f"{type(self._module).__name__} gives {type(output).__name__} without a tensor at "
                "its beginning: impact is measured on a tensor, tuple or ModelOutput."
            )
        return tensors


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        parent = module.get_submodule(name.rpartition(".")[0])
        if name and (parent is module or isinstance(parent, nn.ModuleList)):
            yield name, part


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "values"):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for tensor in tensors:
        total += tensor.double().square().sum().cpu()
    return total
