"""Which weights of a model are masked, and how a layer is made to compute on active blocks only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.distributed.adapters.protocol import shard_of
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.distributed.shard import Shard
from lightning_estdgm.sparse.conv import ConvGeometry, masked_conv2d
from lightning_estdgm.sparse.linear import masked_linear
from lightning_estdgm.sparse.topology import BlockTopology

__all__ = [
    "BLOCK_SIZES",
    "Candidate",
    "ForwardProbe",
    "Image",
    "Selector",
    "auto_block_size",
    "conv_geometry",
    "find_candidates",
    "fitting_block_sizes",
    "is_channels_last",
    "restore_dense_",
    "set_observing",
    "sparsify_",
    "unit_of",
]

BLOCK_SIZES = (16, 32, 64, 128)
"""Block sizes that a sparse operator may exist for; 1 stands for single weights."""

Selector = str | Callable[[str, nn.Module], bool]
"""A glob over module names such as ``"encoder.*"``, or a predicate of a module's name and the module."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MIN_BLOCKS_A_SIDE = 8
_FUSED_NAMES = ("qkv", "kv", "c_attn", "in_proj", "to_qkv", "to_kv", "Wqkv", "qkv_proj", "query_key_value")
_HEAD_NAMES = ("head", "lm_head", "classifier", "output_head", "output_layer")


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer whose weight can be masked.

    Attributes:
        name: as shown to the user.
        matches: whether a module is of this kind.
        weight_name: name of the parameter that is masked.
        transposed: the weight is stored ``(in, out)``.
        positions: how many positions (tokens, pixels) a forward applies the weight to, from module, inputs and output.
        why_dense: why no sparse operator can replace a module's forward, such as a subclass's own; empty where one can.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    positions: Callable[[Any, tuple[Any, ...], Any], int]
    why_dense: Callable[[Any], str]
    weight_name: str = "weight"
    transposed: bool = False


def _own_class(module: nn.Module) -> type:
    """Return a module's class, or the one that it had before ``fully_shard`` put its own over it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return type(module)
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, fsdp.FSDPModule))


def _is_named(module: nn.Module, root: str, name: str) -> bool:
    """Recognise a class of a library that need not be installed."""
    cls = _own_class(module)
    return cls.__name__ == name and cls.__module__.partition(".")[0] == root


def _is_fused_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def _tokens(module: Any, args: tuple[Any, ...], output: Any) -> int:
    out = output[0] if isinstance(output, tuple) else output
    return out.numel() // out.shape[-1]


def _pixels(module: Any, args: tuple[Any, ...], output: Any) -> int:
    return output.numel() // module.out_channels


def _input_pixels(module: Any, args: tuple[Any, ...], output: Any) -> int:
    return args[0].numel() // module.in_channels


def _no_operator(module: nn.Module) -> str:
    return f"no sparse operator for {_own_class(module).__name__}"


def _has_operator(module: nn.Module) -> str:
    return ""


def _why_linear_is_dense(module: nn.Module) -> str:
    return "" if _own_class(module) is nn.Linear else _no_operator(module)


def _why_convolution_is_dense(module: Any) -> str:
    if module.groups > 1:
        return "grouped convolution: no sparse operator"
    if _own_class(module) not in (nn.Conv1d, nn.Conv2d):
        return _no_operator(module)
    if module.padding_mode != "zeros":
        return f"no sparse operator for padding_mode={module.padding_mode!r}"
    if conv_geometry(module) is None:
        return f"no sparse operator for padding='same' with a kernel of {'x'.join(map(str, module.kernel_size))}"
    return ""


def conv_geometry(module: nn.Conv1d | nn.Conv2d) -> ConvGeometry | None:
    """Return how a convolution walks over its input, a 1-D one as of height 1.

    ``None`` where ``padding="same"`` asks for unequal sides (an even kernel at odd dilation).
    """
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    spread = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding: tuple[int, ...]
    if module.padding == "same":
        if any(total % 2 for total in spread):
            return None
        padding = tuple(total // 2 for total in spread)
    else:
        padding = (0,) * len(kernel) if isinstance(module.padding, str) else tuple(module.padding)
    if len(kernel) == 1:
        return ConvGeometry((1, kernel[0]), (1, stride[0]), (0, padding[0]), (1, dilation[0]))
    return ConvGeometry(
        (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1])
    )


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

LAYER_KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", lambda m: isinstance(m, nn.Linear), _tokens, _why_linear_is_dense),
    LayerKind("convolution", lambda m: isinstance(m, _CONVOLUTIONS), _pixels, _why_convolution_is_dense),
    LayerKind(
        "transposed convolution",
        lambda m: isinstance(m, _TRANSPOSED_CONVOLUTIONS),
        _input_pixels,
        lambda m: "no sparse operator for transposed convolutions",
    ),
    LayerKind(
        "attention projection",
        _is_fused_attention,
        _tokens,
        lambda m: "no sparse operator for attention projections",
        weight_name="in_proj_weight",
    ),
    LayerKind(
        "Hugging Face Conv1D",
        lambda m: _is_named(m, "transformers", "Conv1D"),
        _tokens,
        _has_operator,
        transposed=True,
    ),
    LayerKind("PyG linear", lambda m: _is_named(m, "torch_geometric", "Linear"), _tokens, _has_operator),
)
"""Kinds of maskable layers, the first match wins."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer with a weight that could be masked, and whether it is.

    Attributes:
        name: the module's name in the model, free of wrappers' parts.
        module: the layer.
        kind: what sort of layer it is.
        weight: as stored: the parameter that optimizers hold, which a sharded module's attribute is not at all times.
        shard: how the weight lies over ranks.
        why_dense: why no sparse operator can replace its forward; empty where one can.
        parts: matrices of one shape that are stacked along the outputs, such as query, key and value; each has its own
            density and budget, or the one with the largest weights would take the units of the others.
        masked: whether its weight is masked.
        why: the reason, in words.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    weight: Tensor
    shard: Shard
    why_dense: str
    parts: int
    masked: bool
    why: str

    @property
    def has_operator(self) -> bool:
        """Whether a sparse operator can replace its forward."""
        return not self.why_dense

    @property
    def is_convolution(self) -> bool:
        """Whether its operator, if it has one, is a convolution."""
        return isinstance(self.module, (nn.Conv1d, nn.Conv2d))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, ...)`` of the whole weight."""
        return self.shard.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole weight as the model stores it."""
        return self.shape[::-1] if self.kind.transposed else self.shape

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, ...)`` of one part of the weight."""
        out, *rest = self.shape
        return (out // self.parts, *rest)


def clean_name(name: str) -> str:
    """Take out of a module's name what torch.compile, FSDP and checkpoint wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _maskable(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    for name, module in model.named_modules():
        kind = next((kind for kind in LAYER_KINDS if kind.matches(module)), None)
        if kind is not None:
            yield clean_name(name), module, kind


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, selector) if isinstance(selector, str) else bool(selector(name, module))


def _fused_parts(name: str, shape: tuple[int, ...], kind: LayerKind) -> int:
    """Return how many square matrices a fused attention projection stacks; 1 for any other layer."""
    if kind.weight_name != "in_proj_weight" and name.rpartition(".")[2] not in _FUSED_NAMES:
        return 1
    out, inner = shape[:2]
    return out // inner if out in (2 * inner, 3 * inner) else 1


def find_candidates(
    model: nn.Module,
    include: Sequence[Selector] = (),
    exclude: Sequence[Selector] = (),
    held: Container[int] | None = None,
) -> tuple[Candidate, ...]:
    """List the linear and convolution layers of `model` and decide for each whether its weight is masked.

    All are masked but the output head (the last such layer, and layers named like one), weights that take no gradient,
    weights that no optimizer holds, and
    weights shared with another module, such as an embedding. `include` overrides the head rule, `exclude` the rest.
    Norms, biases and embeddings are never listed.

    Args:
        model: any module.
        include: selectors of layers to mask although they look like the output head.
        exclude: selectors of layers to leave dense.
        held: ids of the parameters that an optimizer holds; others are left dense. ``None``: all are held.

    Raises:
        ValueError: if a selector matches no layer, or no layer at all is left to mask; if a weight is not materialised
            yet (lazy modules); or if the model is masked by another controller.

    """
    if any(isinstance(module, _SparseForward) for module in model.modules()):
        raise ValueError("the model is under another DGMController already: close that one first")
    found = list(_maskable(model))
    for label, selectors in (("include", include), ("exclude", exclude)):
        for selector in selectors:
            if not any(_matches(selector, name, module) for name, module, _ in found):
                raise ValueError(
                    f"{label}={selector!r} matches none of the layers that can be masked: {[n for n, _, _ in found]}"
                )
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))

    def verdict(name: str, module: nn.Module, kind: LayerKind, is_last: bool) -> tuple[bool, str]:
        weight = getattr(module, kind.weight_name, None)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet: run one batch through the model first")
        if not isinstance(weight, nn.Parameter):
            return False, "its weight is not a plain parameter"
        if any(_matches(selector, name, module) for selector in exclude):
            return False, "excluded"
        if not weight.requires_grad:
            return False, "its weight takes no gradient"
        if held is not None and id(weight) not in held:
            return False, "no optimizer holds its weight"
        if len(owners[id(weight)]) > 1:
            return False, "its weight is shared with another module"
        if any(_matches(selector, name, module) for selector in include):
            return True, "included"
        if is_last or name.rpartition(".")[2] in _HEAD_NAMES:
            return False, "output head"
        return True, ""

    candidates = []
    for index, (name, module, kind) in enumerate(found):
        masked, why = verdict(name, module, kind, is_last=index == len(found) - 1)
        weight = getattr(module, kind.weight_name)
        shard = _shard(model, name, module, kind, asked_for=masked or not isinstance(weight, nn.Parameter))
        why_dense = f"no sparse operator: {shard.why_dense}" if shard.why_dense else kind.why_dense(module)
        parts = _fused_parts(name, shard.shape, kind) if masked else 1
        candidates.append(Candidate(name, module, kind, weight, shard, why_dense, parts, masked, why))
    if not any(candidate.masked for candidate in candidates):
        reasons = {candidate.name: candidate.why for candidate in candidates}
        raise ValueError(
            "the model has no layer to mask: expected at least one linear or convolution layer besides the output head"
            + (f"; found {reasons} (name one in include=)" if reasons else "")
        )
    return tuple(candidates)


def _shard(model: nn.Module, name: str, module: nn.Module, kind: LayerKind, asked_for: bool) -> Shard:
    """Return how a layer's weight lies over ranks; for a parameter that is not to be masked, its shape is enough."""
    try:
        return shard_of(model, module, kind.weight_name, kind.transposed)
    except ValueError as error:
        if asked_for:
            raise ValueError(f"layer {name!r}: {error}") from error
        return Whole(getattr(module, kind.weight_name), kind.transposed)


def fitting_block_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the block sizes, smallest first, that divide both dimensions of an ``(out, in)`` matrix."""
    return tuple(b for b in BLOCK_SIZES if shape[0] % b == 0 and shape[1] % b == 0)


def auto_block_size(candidate: Candidate) -> tuple[int, str]:
    """Choose a layer's unit: the largest block that fits and leaves 8 blocks a side; single weights otherwise.

    Returns:
        The block size and, where it is 1, the reason.

    """
    if candidate.why_dense:
        return 1, candidate.why_dense
    shape = candidate.part_shape
    fitting = fitting_block_sizes(shape)
    roomy = [b for b in fitting if min(shape[:2]) >= _MIN_BLOCKS_A_SIDE * b]
    if roomy:
        return roomy[-1], ""
    if fitting:
        return 1, f"fewer than {_MIN_BLOCKS_A_SIDE} blocks of {fitting[0]} a side"
    return 1, f"no block of {', '.join(map(str, BLOCK_SIZES))} divides both dimensions"


def unit_of(candidate: Candidate, block_size: int | str) -> tuple[int, str]:
    """Return the side of a layer's mask unit, as asked for or by `auto_block_size`, and the reason where there is one.

    Raises:
        ValueError: if the block size that is asked for does not fit the layer.

    """
    if isinstance(block_size, str):
        return auto_block_size(candidate)
    shape = candidate.part_shape
    if shape[0] % block_size or shape[1] % block_size:
        raise ValueError(
            f"block_size={block_size} does not fit layer {candidate.name!r} with weight {shape}: "
            f"block sizes that do are {(1, *fitting_block_sizes(shape))}; exclude the layer, "
            'or use block_size="auto"'
        )
    if candidate.why_dense:
        return block_size, candidate.why_dense
    if block_size == 1 and candidate.has_operator and candidate.shard.groups:
        return block_size, "no sparse operator for single weights of a sharded weight"
    if block_size == 1 and candidate.has_operator and candidate.is_convolution:
        return block_size, "no sparse operator for single weights of a convolution"
    return block_size, ""


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies in channels-last memory, and not in contiguous memory just as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@dataclass(frozen=True)
class Image:
    """What a convolution was given, one of length L as of height 1.

    Attributes:
        batch: how many.
        height: of the input.
        width: of the input.
        channels_last: whether the output lies in channels-last memory, as it does if input or weight do.

    """

    batch: int
    height: int
    width: int
    channels_last: bool


class ForwardProbe:
    """A forward hook that notes how many positions a layer's weight is applied to, and in which dtype.

    Silent while torch.compile traces. It refers to nothing, so that a model under way can be copied and pickled.

    Attributes:
        positions: tokens or pixels of the last forward; 0 before one.
        dtype: of its output.
        image: what it was, for a convolution that has an operator.

    """

    def __init__(self, candidate: Candidate) -> None:
        self._count = candidate.kind.positions
        self._sees_images = candidate.is_convolution and candidate.has_operator
        self.positions = 0
        self.dtype: torch.dtype | None = None
        self.image: Image | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note one forward."""
        if torch.compiler.is_compiling():
            return
        self.positions = max(1, self._count(module, args, output))
        self.dtype = (output[0] if isinstance(output, tuple) else output).dtype
        if self._sees_images and args:  # not where the input was passed by name
            batch, _, height, width = _as_images(module, args[0]).shape
            self.image = Image(max(1, batch), height, width, is_channels_last(_as_images(module, output)))


# --------------------------------------------------------------------------- swapping the forward

_TOPOLOGY_TENSORS = ("row_ptr", "col_idx", "col_ptr", "row_idx")


class _SparseForward:
    """Mixin of the swapped classes: a forward on active blocks only. All state lives on the instance.

    The topology's tensors follow the module through ``to``, but are no buffers: in no state dict, and out of reach of
    DDP's broadcast of buffers, which would hide masks that differ from rank to rank. A deepcopy or a pickle is the
    plain layer.
    """

    _estdgm_dense_class: type[nn.Module]
    _estdgm_backend: str
    _estdgm_transposed: bool
    _estdgm_block_size: int
    _estdgm_observing: bool
    _estdgm_frozen: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name in _TOPOLOGY_TENSORS:
            setattr(self, f"_estdgm_{name}", fn(getattr(self, f"_estdgm_{name}")))
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is the plain layer: nobody would tell it of later masks, and inactive weights are zero anyway (or, if
        # frozen, take part in the forward). So it is right for ever, and unpickles without this package.
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("_estdgm_")}
        return object.__new__, (self._estdgm_dense_class,), state


class _SparseLinear(_SparseForward):
    """A linear layer on active blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if self._estdgm_backend == "dense" or x.layout is not torch.strided:
            return super().forward(x)  # type: ignore[misc]
        return masked_linear(
            x,
            self.weight.t() if self._estdgm_transposed else self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            _topology(self),
            backend=self._estdgm_backend,
            dense_grad=self._estdgm_observing,
            frozen=self._estdgm_frozen,
        )


class _SparseConv(_SparseForward):
    """A convolution on active blocks; one over a length is computed as of height 1."""

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.weight.dim() - 2  # type: ignore[attr-defined]
        geometry = conv_geometry(self)  # type: ignore[arg-type]
        as_given = x.layout is not torch.strided or x.dim() not in (spatial + 1, spatial + 2)
        if self._estdgm_backend == "dense" or geometry is None or as_given:
            return super().forward(x)  # type: ignore[misc]
        y = masked_conv2d(
            _as_images(self, x),
            self.weight if spatial == 2 else self.weight.unsqueeze(2),  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            _topology(self),
            geometry,
            backend=self._estdgm_backend,
            dense_grad=self._estdgm_observing,
            frozen=self._estdgm_frozen,
        )
        y = y if spatial == 2 else y.squeeze(2)
        return y if x.dim() == spatial + 2 else y.squeeze(0)


def _as_images(module: Any, x: Tensor) -> Tensor:
    """View the input or output of a 1-D or 2-D convolution, batched or not, as ``[N, channels, H, W]``."""
    spatial = module.weight.dim() - 2
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    return x if spatial == 2 else x.unsqueeze(2)


_SWAPPED: dict[type, type] = {}


def _swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that puts `_SparseForward` over `cls`; always the same one, so that type guards hold."""
    if cls not in _SWAPPED:
        sparse = _SparseConv if issubclass(cls, _CONVOLUTIONS) else _SparseLinear
        _SWAPPED[cls] = type(f"Masked{cls.__name__}", (sparse, cls), {"_estdgm_dense_class": cls})
    return _SWAPPED[cls]


def _dense_class(cls: type) -> type:
    """Return what `_swapped_class` was given, also where ``fully_shard`` has put its own class on top since."""
    if "_estdgm_dense_class" in vars(cls):
        return cls._estdgm_dense_class  # type: ignore[attr-defined]
    top, *rest = cls.__bases__  # (FSDPModule, the swapped class)
    (swapped,) = rest
    dense = _dense_class(swapped)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")}
    return type(f"FSDP{dense.__name__}", (top, dense), own)


def _topology(module: Any) -> BlockTopology:
    tensors = [getattr(module, f"_estdgm_{name}") for name in _TOPOLOGY_TENSORS]
    row_ptr, _, col_ptr, _ = tensors
    return BlockTopology(module._estdgm_block_size, row_ptr.shape[0] - 1, col_ptr.shape[0] - 1, *tensors)


def sparsify_(candidate: Candidate, mask: Tensor, block_size: int, backend: str, frozen: bool = False) -> None:
    """Make a layer compute on the active blocks of `mask`; called again, follow a new mask or backend, in place.

    Only the module's class changes (and attributes come): parameters, buffers, state-dict keys, hooks and names stay.
    `restore_dense_` undoes it. A layer under FSDP2 keeps its place there, whether it was swapped before or after.

    Args:
        candidate: a layer with an operator.
        mask: bool, ``(out / block_size, in / block_size)``.
        block_size: side of a block.
        backend: a backend's name, or ``"dense"`` for the layer's own forward.
        frozen: inactive weights keep their value: only the weight gradient is sparse.

    """
    module = candidate.module
    if isinstance(module, _SparseForward):
        _topology(module).update_(mask)
        module._estdgm_backend = backend
        return
    topology = BlockTopology.from_mask(mask, block_size)
    for name in _TOPOLOGY_TENSORS:
        setattr(module, f"_estdgm_{name}", getattr(topology, name))
    swapped: Any = module
    swapped._estdgm_backend = backend
    swapped._estdgm_transposed = candidate.kind.transposed
    swapped._estdgm_block_size = block_size
    swapped._estdgm_observing = False
    swapped._estdgm_frozen = frozen
    module.__class__ = _swapped_class(type(module))


def set_observing(candidate: Candidate, observing: bool) -> None:
    """Have a swapped layer's backward yield the whole weight gradient, or the active blocks' only."""
    if isinstance(candidate.module, _SparseForward):
        candidate.module._estdgm_observing = observing


def restore_dense_(candidate: Candidate) -> None:
    """Give a swapped layer its own class and forward back; does nothing to any other layer."""
    module = candidate.module
    if not isinstance(module, _SparseForward):
        return
    module.__class__ = _dense_class(type(module))
    for name in [name for name in vars(module) if name.startswith("_estdgm_")]:
        delattr(module, name)
