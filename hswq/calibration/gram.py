"""Gram matrices of the layers' inputs, which compensated rounding needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hswq import kernels
from hswq.errors import InputError
from hswq.models.offload import execution_device

# Columns of one Gram matrix; wider weights get one that is block-diagonal.
MAX_COLUMNS = 8192
# Rows taken from a call: calibration runs make many calls, and neighbouring rows are alike.
ROWS_PER_CALL = 1024
# What a guided combination counts beside a row of the inputs themselves.
GUIDED_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class Gram:
    """Weighted sums over rows of a layer's inputs: x for a Linear, patches for a convolution.

    Attributes:
        matrix: sum w x x^T, float32 [blocks, n / blocks, n / blocks], columns as in the weight.
        total: sum w x, float64 [n].
        rows: sum w, the number of rows where all count alike; 0 where no call had finite inputs.
    """

    matrix: Tensor
    total: Tensor
    rows: float


@dataclass(frozen=True)
class GramLayer:
    """A layer whose inputs are gathered, and those that always get the same ones.

    Attributes:
        name: of the layer that is watched.
        sharing: names of all layers with its inputs, itself among them.
        columns: elements of a row of the weight.
    """

    name: str
    sharing: tuple[str, ...]
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of the Gram matrix: the fewest equal ones of at most MAX_COLUMNS."""
        return next(
            count
            for count in range(max(1, math.ceil(self.columns / MAX_COLUMNS)), self.columns + 1)
            if self.columns % count == 0
        )

    @property
    def nbytes(self) -> int:
        """Memory of the Gram matrix."""
        return 4 * self.columns * (self.columns // self.blocks)


def gram_layers(
    module: nn.Module, shared_inputs: Mapping[str, str] | None = None
) -> list[GramLayer]:
    """Return what is to be gathered for every Linear and Conv2d of one group.

    Args:
        module: the denoiser.
        shared_inputs: for each layer, the one whose inputs it always gets; None: all their own.
    """
    sharing: dict[str, list[str]] = {}
    columns = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1):
            owner = (shared_inputs or {}).get(name, name)
            sharing.setdefault(owner, []).append(name)
            columns[name] = part.weight[0].numel()
    return [
        GramLayer(owner, tuple(names), columns[owner])
        for owner, names in sharing.items()
        if owner in columns
    ]


def gram_groups(layers: Iterable[GramLayer], memory_bytes: int) -> list[list[GramLayer]]:
    """Cut layers into groups whose Gram matrices fit into memory together; at least one each."""
    groups: list[list[GramLayer]] = []
    left = 0
    for layer in layers:
        if not groups or layer.nbytes > left:
            groups.append([])
            left = memory_bytes
        groups[-1].append(layer)
        left -= layer.nbytes
    return groups


@contextmanager
def gather_grams(
    module: nn.Module,
    layers: Sequence[GramLayer],
    backend: str | None = None,
    *,
    guidance: float | None = None,
) -> Iterator[dict[str, Gram]]:
    """Gather the Gram matrices of some layers while the caller runs the module.

    At most ROWS_PER_CALL rows of a call are taken, evenly spread, other ones in every call.

    Under classifier-free guidance the sampler goes by y_u + g (y_c - y_u), the error of which is
    d (x_u + g (x_c - x_u)) for a layer with error d of its weight. Of these combined rows half as
    many are added, with the weight GUIDED_WEIGHT; alone they would leave the two predictions to
    drift apart where the combination does not show it.

    Args:
        module: the denoiser.
        layers: what to gather.
        backend: of the kernels.
        guidance: g, where the first half of every batch is x_u and the second x_c; None elsewhere.
    Yields:
        The Gram matrices by the names of all layers that share them; filled when the block ends.
    """
    grams: dict[str, Gram] = {}
    with ExitStack() as hooks:
        watches = []
        for layer in layers:
            part = module.get_submodule(layer.name)
            watch = _Watch(part, layer, backend, guidance)
            hooks.callback(part.register_forward_pre_hook(watch.hook, with_kwargs=True).remove)
            watches.append((layer, watch))
        yield grams
        for layer, watch in watches:
            grams.update(dict.fromkeys(layer.sharing, watch.gram()))


class _Watch:
    """The sums of one layer."""

    def __init__(
        self, part: nn.Module, layer: GramLayer, backend: str | None, guidance: float | None
    ) -> None:
        self._part = part
        self._layer = layer
        self._backend = backend
        self._guidance = guidance
        self._call = 0
        width = layer.columns // layer.blocks
        device = execution_device(part)
        self._matrix = torch.zeros(layer.blocks, width, width, dtype=torch.float32, device=device)
        self._total = torch.zeros(layer.columns, dtype=torch.float64, device=device)
        self._rows = torch.zeros((), dtype=torch.float64, device=device)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor):
            raise InputError(
                f"input of layer {self._layer.name!r} is {type(x).__name__}; a tensor is needed."
            )
        # The golden ratio's multiples are spread over the phases, whatever their number.
        phase = self._call * 0.6180339887498949 % 1.0
        self._call += 1
        if x.numel() == 0:
            return
        with torch.no_grad():
            x = x.detach()
            self._add(module, x, phase, ROWS_PER_CALL, 1.0)
            batched = x.dim() == 4 if isinstance(module, nn.Conv2d) else x.dim() > 1
            if self._guidance is not None and batched and len(x) % 2 == 0:
                limit = ROWS_PER_CALL // 2
                without, given = x.chunk(2)
                if isinstance(module, nn.Linear):
                    without, given = (_spread(half, phase, limit) for half in (without, given))
                guided = without.float() + self._guidance * (given.float() - without.float())
                scaled = guided * math.sqrt(GUIDED_WEIGHT)
                self._add(module, scaled, phase, limit, GUIDED_WEIGHT)

    def _add(self, module: nn.Module, x: Tensor, phase: float, limit: int, weight: float) -> None:
        """Add at most `limit` rows, which are scaled by the root of their weight."""
        if isinstance(module, nn.Conv2d):
            added, total = self._add_images(module, x, phase, limit)
        else:
            rows = _spread(x, phase, limit)
            added = kernels.gram(rows, self._matrix, backend=self._backend)
            total = rows.double().sum(0)
        # An integer's product with a number would have torch's default dtype.
        self._rows += added.double() * weight
        total *= math.sqrt(weight)
        self._total += torch.where(added > 0, total, torch.zeros_like(total))

    def _add_images(
        self, layer: nn.Conv2d, x: Tensor, phase: float, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Add patches; return how many, 0 where some are not finite, and their sum."""
        images = x if x.dim() == 4 else x.unsqueeze(0)
        every = math.ceil(len(images) / limit)
        images = images[int(phase * every) :: every]
        padded = nn.functional.pad(images, *_padding(layer))
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        strides = layer.stride
        positions = [
            (size - far - 1) // stride + 1
            for size, far, stride in zip(padded.shape[2:], reach, strides, strict=True)
        ]
        # Every k-th output position in both directions, from another one each call.
        step = 1
        while len(images) * math.prod(-(-count // step) for count in positions) > limit:
            step += 1
        first = [min(int(phase * step), count - 1) for count in positions]
        padded = padded[:, :, first[0] * strides[0] :, first[1] * strides[1] :]
        wide = (strides[0] * step, strides[1] * step)
        added = kernels.gram(
            padded,
            self._matrix,
            kernel_size=_pair(layer.kernel_size),
            stride=wide,
            dilation=_pair(layer.dilation),
            backend=self._backend,
        )
        return added, _patch_sums(padded, layer, wide, reach)

    def gram(self) -> Gram:
        return Gram(self._matrix, self._total.cpu(), float(self._rows))


def _spread(x: Tensor, phase: float, limit: int) -> Tensor:
    """Return at most `limit` rows of [..., C], as [R, C], evenly spread."""
    rows = x.reshape(-1, x.shape[-1])
    step = math.ceil(len(rows) / limit)
    return rows[int(phase * step) :: step]


def _patch_sums(
    padded: Tensor, layer: nn.Conv2d, strides: tuple[int, int], reach: Sequence[int]
) -> Tensor:
    """Return the sum of the patches, float64 [C * kh * kw], without making them."""
    height, width = padded.shape[2:]
    sums = []
    for row in range(layer.kernel_size[0]):
        for column in range(layer.kernel_size[1]):
            top, left = row * layer.dilation[0], column * layer.dilation[1]
            rows = slice(top, top + height - reach[0], strides[0])
            columns = slice(left, left + width - reach[1], strides[1])
            sums.append(padded[:, :, rows, columns].double().sum((0, 2, 3)))
    return torch.stack(sums, 1).flatten()


def _padding(layer: nn.Conv2d) -> tuple[tuple[int, ...], str]:
    """Return what nn.functional.pad needs to pad as the layer does."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # In the order of nn.functional.pad, the last dimension first; 'same' is worked out there.
    return tuple(layer._reversed_padding_repeated_twice), mode


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]
