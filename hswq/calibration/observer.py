"""Dual Monitor: forward hooks that sum output moments and input magnitudes of every layer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hswq import kernels
from hswq.calibration.calls import Recorder
from hswq.calibration.gram import Gram, gather_grams, gram_layers
from hswq.calibration.statistics import Calibration, LayerStatistics, join_pairs
from hswq.errors import InputError
from hswq.kernels.fixed_point import CALLS_PER_ACCUMULATOR, MonitorAccumulators

logger = logging.getLogger(__name__)

_NAMES_IN_WARNING = 10


@contextmanager
def observe(
    module: nn.Module,
    backend: str | None = None,
    *,
    input_max: bool = False,
    record: int = 0,
    gram: bool = False,
    guidance: float | None = None,
) -> Iterator[Calibration]:
    """Watch every nn.Linear and nn.Conv2d of a module while the caller runs it.

    For each call of a layer with input x and output y: mean(y), mean(y^2) over all elements and
    mean |x| per input channel are added, with equal weight per call, to sums on the layer's
    device. Nothing waits for the device before the block ends. Layers that one forward feeds with
    the same tensor, unchanged in between, reduce it once. A call whose tensors hold NaN or Inf
    counts as skipped and adds nothing. A module registered under two names is one layer, under the
    first.

    Works with CUDA graphs that are captured inside the block, and with modules that torch.compile
    compiles inside it; code compiled before knows no hooks (torch.compiler.reset() discards it).

    Args:
        module: the denoiser, or any module with Linear or Conv2d layers.
        backend: kernel backend; None lets the dispatcher choose.
        input_max: find the largest |x| of each layer too, which static FP8 activations need.
        record: how many calls of the module to keep, for measuring impact: a sample of all calls,
            copied to the CPU.
        gram: gather the Gram matrices of the layers' inputs too, for compensated rounding:
            4 n^2 bytes for a weight of n columns, n^2 / blocks beyond 8192. Not inside CUDA graphs.
        guidance: scale of classifier-free guidance, where the first half of every batch is the one
            without prompt, as in diffusers' SDXL pipelines: the Gram matrices then count the
            combined inputs too, see `hswq.calibration.gather_grams`.
    Yields:
        A calibration that is empty inside the block and filled when it ends without an error.
        The hooks are removed in any case.
    Raises:
        InputError: the module has no such layer, or a layer is given or returns something else
            than a tensor.
    """
    recorder = Recorder(record) if record else None
    with watch(
        module, backend, input_max=input_max, recorder=recorder, gram=gram, guidance=guidance
    ) as calibration:
        yield calibration
    warn_of_gaps(calibration)


@contextmanager
def watch(
    module: nn.Module,
    backend: str | None = None,
    *,
    input_max: bool = False,
    recorder: Recorder | None = None,
    gram: bool = False,
    guidance: float | None = None,
) -> Iterator[Calibration]:
    """Do what `observe` does, with a recorder that the caller may direct, and warn of nothing."""
    shared = _SharedInputs()
    monitors = [
        _LayerMonitor(name, layer, shared, backend, input_max)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not monitors:
        raise InputError(
            f"{type(module).__name__} has no nn.Linear and no nn.Conv2d: there is nothing to "
            "observe. Pass the denoiser itself (pipeline.unet or pipeline.transformer)."
        )
    calibration = Calibration()
    with ExitStack() as hooks:
        hooks.callback(shared.forget)
        if recorder is not None:
            hooks.callback(recorder.attach(module).remove)
        grams: dict[str, Gram] = {}
        if gram:
            gathered = gather_grams(module, gram_layers(module), backend, guidance=guidance)
            grams = hooks.enter_context(gathered)
        for monitor in monitors:
            hooks.callback(monitor.attach().remove)
        # Nor do two captured forwards share what they know of an input that outlives them.
        hooks.callback(module.register_forward_hook(_uncompiled(shared.end_forward)).remove)
        yield calibration
    calibration.modules.update({monitor.name: monitor.statistics() for monitor in monitors})
    calibration.records = recorder.records() if recorder is not None else ()
    calibration.grams = grams
    calibration.shared_inputs = {
        monitor.name: min(monitor.inputs_of)
        for monitor in monitors
        if len(monitor.inputs_of) == 1 and monitor.kind == "linear"
    }


class _SharedInputs:
    """Reductions of inputs that are still alive, so that q, k and v reduce theirs once.

    An entry is found by the identity of the live tensor object and dies with it: an address would
    be reused by the allocator. The version counter tells of changes in place.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, int, Tensor, str]] = {}
        self._capturing = False

    def find(self, x: Tensor, dim: int) -> tuple[Tensor | None, str]:
        """Return the abs_mean that was kept for x as it is now, reduced to axis `dim`, and whose.

        Returns:
            None and an empty name where x is new.
        """
        # Replays of a CUDA graph find other values in x: what was known before is not part of it.
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing != self._capturing:
            self.forget()
            self._capturing = capturing
        entry = self._entries.get(id(x))
        if entry is None:
            return None, ""
        tensor, version, axis, abs_mean, name = entry
        known = tensor() is x and version == x._version and axis == dim
        return (abs_mean, name) if known else (None, "")

    def keep(self, x: Tensor, dim: int, abs_mean: Tensor, name: str) -> None:
        # Tensors made in inference mode have no version counter: their changes would go unseen.
        if x.is_inference():
            return
        key, entries = id(x), self._entries
        tensor = weakref.ref(x, lambda _: entries.pop(key, None))
        entries[key] = tensor, x._version, dim, abs_mean, name

    def end_forward(self, *_: object) -> None:
        """Forget, as a forward hook of the whole module."""
        self.forget()

    def forget(self) -> None:
        """Let go of everything; what outlives the observation would hold it in a cycle."""
        self._entries.clear()


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook at which the graph of a compiled module breaks.

    Kernels that change sums in place through their addresses cannot be traced.
    """
    disabled: Callable[..., None]
    disabled = torch.compiler.disable(hook, reason="hswq.observe")  # type: ignore[no-untyped-call]
    return disabled


class _LayerMonitor:
    """The hook of one layer and the sums that it adds into."""

    def __init__(
        self,
        name: str,
        layer: nn.Linear | nn.Conv2d,
        shared: _SharedInputs,
        backend: str | None,
        input_max: bool,
    ) -> None:
        self.name = name
        self._layer = layer
        self._shared = shared
        self._backend = backend
        convolution = isinstance(layer, nn.Conv2d)
        self.kind = "conv2d" if convolution else "linear"
        self._groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self._channels = layer.weight.shape[1] * self._groups
        # The axis comes from the layer: counted from the end it holds for any rank and no batch.
        self._dim = -3 if convolution else -1
        self._accumulators: list[MonitorAccumulators] = []
        self._room = 0
        # Layers whose inputs this one got: itself, or those that had them before in a forward.
        self.inputs_of: set[str] = set()
        self._finds_input_max = input_max
        self._input_max: dict[torch.device, Tensor] = {}

    def attach(self) -> torch.utils.hooks.RemovableHandle:
        return self._layer.register_forward_hook(_uncompiled(self._hook), with_kwargs=True)

    def _hook(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        x = self._tensor("input", args[0] if args else kwargs.get("input"))
        y = self._tensor("output", output)
        # Sums made in inference mode could not be added to outside it. Leaving a mode that is not
        # on would cost as much as a small reduction.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            known, owner = self._shared.find(x, self._dim)
            self.inputs_of.add(owner or self.name)
            sums = self._accumulators_on(y.device)
            try:
                abs_mean = kernels.monitor(
                    x, y, self._dim, sums, abs_mean=known, backend=self._backend
                )
            except InputError as error:
                raise InputError(f"layer {self.name!r} cannot be observed: {error}") from error
            if known is None:
                self._shared.keep(x, self._dim, abs_mean, self.name)
            if self._finds_input_max:
                self._find_input_max(x.detach())

    def _find_input_max(self, x: Tensor) -> None:
        """Take the largest |x| of a call into account, unless it is NaN or infinite."""
        if x.device not in self._input_max:
            self._input_max[x.device] = torch.zeros((), dtype=torch.float32, device=x.device)
        if x.numel():
            least, largest = torch.aminmax(x)
            found = torch.maximum(-least, largest).float()
            known = self._input_max[x.device]
            # In place, so that the replays of a CUDA graph find it.
            torch.maximum(known, torch.where(found.isfinite(), found, 0.0), out=known)

    def _tensor(self, what: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(
                f"{what} of layer {self.name!r} ({type(self._layer).__name__}) is "
                f"{type(value).__name__}; a tensor is needed. Observe a module whose Linear and "
                "Conv2d layers take and return single tensors."
            )
        return value

    def _accumulators_on(self, device: torch.device) -> MonitorAccumulators:
        """Return sums on the device of the output with room for one more call."""
        if self._room == 0 or self._accumulators[-1].calls.device != device:
            self._accumulators.append(MonitorAccumulators.zeros(self._channels, device))
            self._room = CALLS_PER_ACCUMULATOR
        self._room -= 1
        return self._accumulators[-1]

    def statistics(self) -> LayerStatistics:
        """Bring the sums to the CPU."""
        layout = self.kind, tuple(self._layer.weight.shape), self._groups
        largest = [float(value) for value in self._input_max.values()]
        total = LayerStatistics(
            *layout,
            *(0, 0, 0, 0),
            torch.zeros(self._channels, dtype=torch.int64, device="cpu"),
            input_max=max(largest, default=0.0) if self._finds_input_max else None,
        )
        for sums in self._accumulators:
            calls, skipped = int(sums.calls), int(sums.skipped)
            mean_y, mean_y2 = join_pairs(torch.stack((sums.mean_y, sums.mean_y2)))
            total = total.merged(
                LayerStatistics(
                    *layout,
                    *(calls, skipped, mean_y, mean_y2),
                    sums.abs_mean.cpu(),
                    input_max=total.input_max,
                )
            )
        return total


def warn_of_gaps(calibration: Calibration) -> None:
    """Name the layers whose statistics are missing or incomplete."""
    layers = calibration.modules.items()
    silent = [name for name, layer in layers if layer.calls + layer.skipped == 0]
    partly = [name for name, layer in layers if layer.calls > 0 and layer.skipped > 0]
    lost = [name for name, layer in layers if layer.calls == 0 and layer.skipped > 0]
    for names, what in (
        (silent, "were never called; they have no importance and no sensitivity"),
        (partly, "had calls with NaN, Inf or values out of range, which are not counted"),
        (
            lost,
            "had NaN, Inf or values out of range in every call; they have no importance and no "
            "sensitivity: run the model in bfloat16 or float32",
        ),
    ):
        if names:
            more = len(names) - _NAMES_IN_WARNING
            tail = f" and {more} more" if more > 0 else ""
            logger.warning(
                "%d of %d layers %s: %s%s",
                len(names),
                len(calibration.modules),
                what,
                ", ".join(names[:_NAMES_IN_WARNING]),
                tail,
            )
