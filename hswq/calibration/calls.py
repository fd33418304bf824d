"""Recorded calls of a denoiser: what `measure_impact` replays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hswq.errors import FormatError, InputError
from hswq.strict_json import parse_any

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_WORD = 1 << 64


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        args: positional arguments, tensors on the CPU.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, device: torch.device) -> Any:
        """Call a module with these arguments, tensors copied to the device."""
        args, kwargs = (
            map_tensors(part, lambda tensor: tensor.to(device, copy=True))
            for part in (self.args, self.kwargs)
        )
        return module(*args, **kwargs)

    def to_parts(self) -> tuple[str, list[Tensor]]:
        """Return the structure as JSON, and its tensors in the order in which it names them.

        Raises:
            InputError: an argument is no tensor, number, text, None, nor a list, tuple or dict of
                such.
        """
        tensors: list[Tensor] = []

        def store(tensor: Tensor) -> dict[str, int]:
            tensors.append(tensor.contiguous())
            return {_TENSOR: len(tensors) - 1}

        content = map_tensors([list(self.args), dict(self.kwargs)], store, mark=_TUPLE)
        try:
            return json.dumps(content), tensors
        except TypeError as error:
            raise InputError(
                f"a recorded call cannot be saved: {error}. Call the module with tensors, numbers, "
                "texts, None, lists, tuples and dicts, or drop calibration.records before saving."
            ) from error

    @classmethod
    def from_parts(cls, text: str, tensors: Sequence[Tensor]) -> Call:
        """Rebuild a call from what `to_parts` returned.

        Raises:
            FormatError: the text is damaged.
        """
        try:
            args, kwargs = _restore(parse_any(text, "it", constants=True), tensors)
            return cls(tuple(args), dict(kwargs))
        except (FormatError, ValueError, TypeError, LookupError) as error:
            raise FormatError(f"a recorded call is damaged: {error}.") from error


class Recorder:
    """A hook that keeps some calls of a module.

    Left to itself it keeps those whose numbers have the smallest hashes: a sample of all calls,
    however many there will be, that follows no rhythm of the caller's.

    Attributes:
        armed: whether the next calls are to be kept, for who knows which matter; None leaves the
            choice to the recorder.

    Args:
        count: how many calls the recorder keeps when the choice is its own.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[int, Call] = {}
        self._seen = 0
        self.armed: bool | None = None

    def attach(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Start recording."""
        return module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def records(self) -> tuple[Call, ...]:
        """Return the calls that were kept, in the order in which they were made."""
        return tuple(self._kept[number] for number in sorted(self._kept))

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = self._seen
        self._seen += 1
        if self.armed is None and len(self._kept) >= self._count:
            largest = max(self._kept, key=_hash, default=number)
            if _hash(number) >= _hash(largest):
                return
            del self._kept[largest]
        if self.armed is not False:
            # Copies made in inference mode could not be given to a module outside it.
            with torch.inference_mode(False):
                self._kept[number] = Call(map_tensors(args, _copy), map_tensors(kwargs, _copy))


def _hash(number: int) -> int:
    """Mix the bits of a call's number (the finalizer of SplitMix64)."""
    number = (number + 1) * 0x9E3779B97F4A7C15 % _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB % _WORD
    return number ^ number >> 31


def map_tensors(value: Any, function: Any, mark: str | None = None) -> Any:
    """Return nested lists, tuples and dicts with the function applied to every tensor.

    Args:
        value: the nest.
        function: takes a tensor.
        mark: key under which tuples are kept apart from lists; None leaves tuples tuples.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, function, mark) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(part, function, mark) for part in value]
        if isinstance(value, list):
            return parts
        return tuple(parts) if mark is None else {mark: parts}
    return value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _restore(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if value.keys() == {_TUPLE}:
            return tuple(_restore(part, tensors) for part in value[_TUPLE])
        return {key: _restore(part, tensors) for key, part in value.items()}
    return [_restore(part, tensors) for part in value] if isinstance(value, list) else value
