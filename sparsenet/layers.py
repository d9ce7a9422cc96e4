"""SparseLinear: values on a block pattern."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sparsenet import functional
from sparsenet.after_step import after_every_step
from sparsenet.densities import choose_block_size
from sparsenet.elements import NM, to_semi_structured
from sparsenet.elements.masks import carried_mask, checked_mask, chosen_mask
from sparsenet.functional.bits import pack_mask, without_masked, zero_masked_
from sparsenet.functional.blocks import dense_blocks, take_blocks, uniform_, zero_outside
from sparsenet.functional.checks import check_activation
from sparsenet.pattern import BlockPattern, carried_from, warn_unreached
from sparsenet.topology import NO_WEIGHT, DenseWeight, LayerState, Topology, read_state, times_written

__all__ = ["SparseLinear"]


class SparseLinear(nn.Module):
    """A linear layer whose weights, gradients and optimizer state exist only at active blocks.

    Args:
        in_features, out_features: any sizes, multiples of the block size or not.
        bias: whether there is a bias [out_features].
        density: share of block places that are active, in [0, 1]; default 0.1. A pattern wins over it.
        block_size: 1, 4, 8, 16, 32, 64 or 128; default the pattern's, or the largest up to 32 that leaves every row of
            blocks 3 blocks on average, for 4 half of that (:func:`sparsenet.densities.choose_block_size`).
        pattern: the :class:`BlockPattern`, shape ``(out_features, in_features)``; default random.
        element_mask: bool [num_blocks, b, b]; elements where it is False are zero, now and after every step. Or a rule
            that draws it: ``"2:4"`` or another :class:`sparsenet.NM`; or the share of the elements in the blocks that
            are there, in (0, 1), exactly.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``, fused into the output.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64.
        generator: draws the pattern and the values.

    Raises:
        ValueError: sizes, density, block size and pattern contradict each other or are out of range.

    A drawn pattern gives every row and column of blocks at least one, if there are enough; else a warning says how many
    outputs and inputs have no weight.

    Values start uniform with the variance of He et al. (2015) before relu, gelu and silu, else as ``nn.Linear``'s,
    by the number of *active* inputs of each output.

    Shape: x [..., in_features] -> [..., out_features].

    Example:
        >>> import torch, sparsenet as sn
        >>> layer = sn.SparseLinear(1000, 300, density=0.2, block_size=16)
        >>> layer(torch.randn(7, 1000)).shape
        torch.Size([7, 300])
    """

    @torch.inference_mode(False)  # what is made in inference mode can be trained outside it
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float | None = None,
        block_size: int | None = None,
        pattern: BlockPattern | None = None,
        element_mask: Tensor | str | NM | float | None = None,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.activation = check_activation("SparseLinear", activation)
        drawn = pattern is None
        pattern = _resolve_pattern((out_features, in_features), density, block_size, pattern, generator)
        self.out_features, self.in_features = pattern.shape
        if drawn and density != 0:
            warn_unreached("SparseLinear", {"": pattern}, stacklevel=3)
        device = torch.device(device) if device is not None else torch.get_default_device()
        pattern = pattern.to(device)
        b, factory = pattern.block_size, {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(pattern.num_blocks, b, b, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        mask, rule = (None, None) if element_mask is None else chosen_mask(element_mask, pattern, None, generator)
        self.topology = Topology(pattern, mask, elements=rule)
        if mask is not None:
            after_every_step(self, _zero_masked_elements)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws values and bias anew; parts of edge blocks outside the matrix become zero."""
        if self.values.is_meta:
            return
        fan_in = self.active_fan_in()
        gain = 6.0 if self.activation != "none" else 1.0
        bound = (gain / fan_in.clamp(min=1)).sqrt()
        b = self.block_size
        with torch.no_grad():
            padded = nn.functional.pad(bound, (0, self.pattern.block_rows * b - self.out_features), value=1.0)
            per_row = padded.reshape(-1, b).to(self.values).index_select(0, self.pattern.row_indices)
            uniform_(self.values, generator).mul_(per_row.unsqueeze(2))
            zero_outside(self.values, self.pattern)
            _zero_masked_elements(self)
            if self.bias is not None:
                uniform_(self.bias, generator).mul_((fan_in > 0) / fan_in.clamp(min=1).sqrt())

    def active_fan_in(self) -> Tensor:
        """float32 [out_features]: how many inputs reach each output, masked elements not counted."""
        pattern, mask = self.pattern, self.element_mask
        b = pattern.block_size
        if mask is not None:
            fan = torch.zeros(pattern.block_rows, b, device=pattern.device)
            fan.index_add_(0, pattern.row_indices.long(), mask.sum(2).to(fan))
            return fan.flatten()[: self.out_features]
        fan = pattern.crow.diff().long() * b
        beyond = pattern.block_cols * b - self.in_features  # columns of the last blocks that no input has
        if beyond:
            fan[pattern.row_indices[pattern.col == pattern.block_cols - 1].long()] -= beyond
        fan = fan.float()
        return fan.repeat_interleave(b)[: self.out_features]

    # --- what it is ---

    @property
    def pattern(self) -> BlockPattern:
        """The active blocks. Replaced, never changed, by a rewire."""
        return self.topology.pattern

    @property
    def block_size(self) -> int:
        """Side of a block."""
        return self.pattern.block_size

    @property
    def density(self) -> float:
        """Active blocks / all block places."""
        return self.pattern.density

    @property
    def element_mask(self) -> Tensor | None:
        """Bool [num_blocks, b, b], made afresh of the bits that are kept, or None: every element is there."""
        return self.topology.element_mask

    @property
    def elements(self) -> NM | None:
        """The N:M rule that the element mask follows, or None: another mask, or none."""
        return self.topology.elements

    @property
    def weight(self) -> Tensor:
        """Stands for the dense weight: its dtype, device and shape; whatever wants its data is refused in words."""
        values = self._fast("values")
        return DenseWeight(self.out_features, self.in_features, values)

    @weight.setter
    def weight(self, _) -> None:
        raise RuntimeError(NO_WEIGHT)

    @weight.deleter
    def weight(self) -> None:
        raise RuntimeError(NO_WEIGHT)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; ``weight`` is refused."""
        if name == "weight":
            raise RuntimeError(NO_WEIGHT)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name == "values" and name in self._parameters:  # parametrize begins with this, and then fails half-way
            raise RuntimeError(
                "SparseLinear: values cannot be removed, parametrized or given a spectral norm; give computed values "
                "to torch.func.functional_call, or name values to torch.nn.utils.weight_norm or prune"
            )
        super().__delattr__(name)

    @property
    def num_active(self) -> int:
        """Active weights inside the matrix: the part of edge blocks outside it and masked elements are not counted."""
        if (mask := self.element_mask) is not None:
            return int(mask.sum())
        return int(self.active_fan_in().sum(dtype=torch.float64))  # float32 is exact to 2^24 only

    def extra_repr(self) -> str:
        """Sizes, density and block size."""
        parts = [f"{self.in_features}, {self.out_features}, density={self.density:.4g}, block_size={self.block_size}"]
        if self.bias is None:
            parts.append("bias=False")
        if self.activation != "none":
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)

    # --- computing ---

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if type(x) is Proxy:
            return self._called_in_graph(x)
        return functional.layer_linear(x, self._fast("values"), self.topology, self._fast("bias"), self.activation)

    def __prepare_scriptable__(self):
        """Refuses ``torch.jit.script``, which compiles Python code."""
        raise RuntimeError(
            "SparseLinear: torch.jit.script cannot compile it; use torch.jit.trace or torch.export, or script a dense "
            "copy, sparsenet.densify_(copy.deepcopy(model))"
        )

    def _called_in_graph(self, x: Proxy) -> Proxy:
        """What ``torch.fx.symbolic_trace`` records: a call of this layer as a whole, as of one of torch's own."""
        if x.tracer.root is self:
            raise RuntimeError(
                "SparseLinear: symbolic_trace records calls of the layer, it must be traced in a model; "
                "give it torch.nn.Sequential(layer)"
            )
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _fast(self, name: str) -> Tensor | None:
        """A parameter, or what torch.nn.utils put in its place, without nn.Module's slow look for attributes."""
        try:
            return self._parameters[name]
        except KeyError:
            return getattr(self, name)

    # --- changing the pattern ---

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_pattern(
        self, pattern: BlockPattern, values: Tensor | None = None, element_mask: Tensor | None = None
    ) -> Tensor:
        """Replaces the pattern; ``values`` stays the same Parameter object, ``.grad`` becomes None.

        Args:
            pattern: of the same shape and block size.
            values: [num_blocks, b, b] for the new pattern; default: blocks that stay keep theirs, new ones are zero.
            element_mask: bool, for the new pattern; default: carried along. New blocks then keep their largest elements
                by the layer's N:M rule, if it has one; else they are whole.

        Returns:
            int64 [num_blocks]: for each new block its old number, or -1; what optimizer state has to follow.

        Raises:
            ValueError: another shape or block size, or a mask that breaks the layer's N:M rule.
            RuntimeError: ``values`` is computed by a parametrization, weight norm or pruning of torch.

        Graphs recorded before keep the old tensors, and their backward raises ``StaleTopologyError``. Another
        thread may run forward, or backward by ``torch.autograd.grad``; one that adds to ``.grad`` has to wait, as torch
        itself does not guard that.
        """
        own = self._own()
        carried = carried_from(self.pattern, pattern)
        fresh = pattern.copy().to(self.values.device)
        if values is None:
            values = take_blocks(own, carried, 0.0)
        elif (values := functional.checks.as_tensor("SparseLinear", "values", values)).is_complex():
            raise TypeError(f"SparseLinear: values must be real numbers, got {values.dtype}")
        elif values.shape != (pattern.num_blocks, *self.values.shape[1:]):
            raise ValueError(
                f"SparseLinear: values must have shape {[pattern.num_blocks, *self.values.shape[1:]]}, "
                f"got {list(values.shape)}"
            )
        else:
            values = values.detach().to(self.values, copy=True, memory_format=torch.contiguous_format)
        if element_mask is None:
            element_mask = carried_mask(self.topology, fresh, carried, values)
        elif self.elements is not None:
            element_mask = checked_mask(element_mask, fresh)
            if not self.elements.holds(element_mask):
                raise ValueError(f"SparseLinear: element_mask must keep the layer's rule {self.elements}, got another")
        self._install(fresh, values, element_mask, self.elements)
        return carried

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_element_mask(self, element_mask: Tensor | str | NM | float | None) -> None:
        """Replaces mask and rule where the layer's blocks stay; ``.grad`` becomes None.

        Args:
            element_mask: as the constructor takes it, but the largest magnitudes stay where that would draw. None takes
                the mask away: elements that it kept off start to be trained, from zero.

        Raises, and makes graphs from before stale, as :meth:`set_pattern`. An optimizer's moments stay as they are.

        Example:
            >>> import sparsenet as sn
            >>> layer = sn.SparseLinear(64, 32, density=0.5, block_size=16)
            >>> layer.set_element_mask("2:4")
            >>> layer.num_active, str(layer.elements)
            (512, '2:4')
        """
        own = self._own()
        mask, rule = (None, None) if element_mask is None else chosen_mask(element_mask, self.pattern, own)
        self._install(self.pattern.copy(), own.clone(), mask, rule)

    def _own(self) -> Tensor:
        """The values, zero where the mask is off, if they are a Parameter and no product of something else."""
        if "values" not in self._parameters:
            raise RuntimeError(
                "SparseLinear: values must be a Parameter for the pattern to change, got one that a parametrization, "
                "weight norm or pruning computes; remove that first"
            )
        values, bits = self.values.detach(), self.topology.mask_bits
        return values if bits is None or values.is_meta else without_masked(values, bits)

    def _install(self, pattern: BlockPattern, values: Tensor, element_mask: Tensor | None, elements: NM | None = None):
        """Takes pattern, values (as their owner), mask and its rule together; what can fail comes before any change."""
        bits = None if element_mask is None else pack_mask(checked_mask(element_mask, pattern))
        if not values.is_meta:
            values = values if bits is None else without_masked(values, bits)
            zero_outside(values, pattern)
        self.topology.replace(pattern, bits, self.values, values, elements)
        if self.topology.written >= 0:
            self.topology.written = times_written(self)
        self.values.grad = None
        if bits is not None:
            after_every_step(self, _zero_masked_elements)

    # --- dense forms ---

    def weight_dense(self) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor, differentiable. Allocates all of it."""
        p, b, mask = self.pattern, self.block_size, self.element_mask
        values = self.values if mask is None else torch.where(mask, self.values, 0)
        dense = values.new_zeros(p.block_rows, p.block_cols, b, b)
        dense = dense.index_put((p.row_indices.long(), p.col_indices.long()), values)
        dense = dense.permute(0, 2, 1, 3).reshape(p.block_rows * b, p.block_cols * b)
        return dense[: self.out_features, : self.in_features]

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight and bias. A fused activation is not part of it."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        linear.weight = nn.Parameter(self.weight_dense().detach().clone(), self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear

    def to_semi_structured(self) -> nn.Linear:
        """For inference: the weight in torch's 2:4 format; see :func:`sparsenet.elements.to_semi_structured`."""
        return to_semi_structured(self)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        density: float | None = None,
        block_size: int | None = None,
        pattern: BlockPattern | None = None,
    ) -> SparseLinear:
        """The layer that keeps of ``linear`` the blocks of largest norm (or those of ``pattern``)."""
        if pattern is None:
            density = 0.1 if density is None else density
            block_size = choose_block_size(linear.in_features, density) if block_size is None else block_size
            pattern = BlockPattern.from_dense(linear.weight, density, block_size)
            warn_unreached("SparseLinear.from_linear", {"": pattern}, stacklevel=3)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            density=density,
            block_size=block_size,
            pattern=pattern,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            layer.values.copy_(dense_blocks(linear.weight, layer.pattern))
            layer.values.requires_grad_(linear.weight.requires_grad)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
                layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.train(linear.training)
        return layer

    # --- moving, saving, loading ---

    def _apply(self, fn, recurse=True):
        with torch.inference_mode(False):  # what is moved in inference mode can be trained outside it
            super()._apply(fn, recurse)
        if self.values.device.type != "meta":
            self.topology.move(self.values.device)
        return self

    def __deepcopy__(self, memo):
        import copy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        family = self.topology.family
        twin.topology.family = family
        family.update((self, twin))
        twin.topology.written = times_written(twin)
        if twin.topology.mask_bits is not None:
            after_every_step(twin, _zero_masked_elements)
        return twin

    def __setstate__(self, state):
        super().__setstate__(state)
        if not self._fast("values").is_meta:
            self.topology.move(self._fast("values").device)
        if self.topology.mask_bits is not None:
            after_every_step(self, _zero_masked_elements)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "crow_indices"] = self.pattern.crow_indices
        destination[prefix + "col_indices"] = self.pattern.col_indices
        if self.topology.mask_bits is not None:
            destination[prefix + "element_mask"] = self.topology.mask_bits.clone()
        if self.elements is not None:
            destination[prefix + "element_rule"] = self.elements.as_tensor()

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As of any module; the pattern and the element mask come with the values. A failed load changes nothing."""
        refuse_unfit_state(self, state_dict, "")
        if strict:
            refuse_other_keys(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        absent: list[str] = []

        def take(*_):
            try:
                state = read_state(self, state_dict, prefix)
            except (ValueError, TypeError) as error:
                raise _Unfit(str(error)) from error
            absent.extend(prefix + name for name in state.absent)
            for name in ("crow_indices", "col_indices", "element_mask", "element_rule"):
                state_dict.pop(prefix + name, None)
            if state.values is not None:
                self._take(state, local_metadata.get("assign_to_params_buffers", False))
                if not self.values.is_meta:  # else torch warns that nothing was copied
                    del state_dict[prefix + "values"]

        hook = self._register_load_state_dict_pre_hook(take)  # after those of others, which may rename keys
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        except _Unfit as error:
            errors.append(f"{prefix[:-1]}: {error}" if prefix else str(error))
            return
        finally:
            hook.remove()
        missing[:] = [key for key in missing if key != prefix + "values"] + (absent if strict else [])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self, state: LayerState, assign: bool) -> None:
        """Takes pattern, values and mask together; ``assign``: the tensor of values itself, as torch does."""
        pattern, values, mask, elements = state.pattern, state.values, state.element_mask, state.elements
        if values.is_meta and not assign and not self.values.is_meta:
            raise _Unfit("SparseLinear: values must hold data, got a meta tensor")
        if mask is None:
            carried, elements = carried_from(self.pattern, pattern), self.elements
            mask = carried_mask(self.topology, pattern, carried, values)
        if not assign:
            values = values.detach().to(self.values, copy=True, memory_format=torch.contiguous_format)
        if not values.is_meta:
            pattern = pattern.to(values.device)
        if assign:
            parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
            self.values, values = parameter.requires_grad_(self.values.requires_grad), parameter.detach()
        self._install(pattern, values, mask, elements)


# --- pieces ---------------------------------------------------------------------------------------------------------


def _resolve_pattern(shape, density, block_size, pattern, generator) -> BlockPattern:
    """The pattern that the constructor's arguments mean, with index memory of its own."""
    if pattern is None:
        density = 0.1 if density is None else density
        if block_size is None:
            block_size = choose_block_size(shape[1], density)
        return BlockPattern.random(shape, density, block_size, generator)
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"SparseLinear: pattern must be a BlockPattern, got {type(pattern).__name__}")
    if pattern.shape != tuple(shape):
        raise ValueError(f"SparseLinear: pattern must have shape {tuple(shape)} (out, in), got {pattern.shape}")
    if block_size is not None and block_size != pattern.block_size:
        raise ValueError(f"SparseLinear: block_size must be the pattern's {pattern.block_size}, got {block_size}")
    if density is not None and abs(density - pattern.density) * pattern.block_rows * pattern.block_cols > 1.0:
        raise ValueError(f"SparseLinear: density must be the pattern's {pattern.density:.6g}, got {density}")
    return pattern.copy()


def _zero_masked_elements(layer: SparseLinear) -> None:
    """Exactly zero, also where an optimizer divided zero by zero; elements that were zero before are not written to."""
    if (bits := layer.topology.mask_bits) is not None and not layer.values.is_meta:
        zero_masked_(layer.values, bits)


class _Unfit(Exception):
    """What ``state_dict`` holds for a layer does not fit it; leaves torch's loading of the layer."""


def refuse_unfit_state(model: nn.Module, state_dict, prefix: str, *_) -> None:
    """Pre-hook of ``load_state_dict`` on a whole model: no layer is touched unless all sparse layers' states fit.

    Raises:
        RuntimeError: naming each layer whose indices, sizes or mask do not fit, and why.
    """
    wrong = []
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        path = f"{prefix}{name}." if name else prefix
        if not layer._load_state_dict_pre_hooks:  # else its keys may have other names still
            try:
                read_state(layer, state_dict, path)
            except (ValueError, TypeError) as error:
                wrong.append(f"{path[:-1]}: {error}" if path else str(error))
    if wrong:
        raise RuntimeError("load_state_dict: nothing was loaded:\n\t" + "\n\t".join(wrong))


def refuse_other_keys(model: nn.Module, state_dict) -> None:
    """Says before anything is loaded what torch would say afterwards: keys that are missing or too many.

    Raises:
        RuntimeError: naming them.
    """
    for module in model.modules():
        hooks = [*module._load_state_dict_pre_hooks.values(), *module._state_dict_hooks.values()]
        own = type(module)._load_from_state_dict not in (
            nn.Module._load_from_state_dict,
            SparseLinear._load_from_state_dict,
        )
        if own or any(getattr(hook, "hook", hook) is not refuse_unfit_state for hook in hooks):
            return  # keys may have other names still
    wanted = set(model.state_dict())
    layers = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    masks, rules = ({f"{name}.{key}".lstrip(".") for name in layers} for key in ("element_mask", "element_rule"))
    missing, unexpected = wanted - rules - set(state_dict), set(state_dict) - wanted - masks - rules
    kinds = {"Missing": sorted(missing), "Unexpected": sorted(unexpected)}
    wrong = [
        f"{kind} key(s) in state_dict: " + ", ".join(f'"{k}"' for k in keys) for kind, keys in kinds.items() if keys
    ]
    if wrong:
        raise RuntimeError("load_state_dict: nothing was loaded:\n\t" + "\n\t".join(wrong))


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of ``model`` by name, each once, in module order. Compiled or not, the names are the same."""
    return {plain_name(name): m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def plain_name(name: str) -> str:
    """A name in a model without what ``torch.compile`` puts into it.

    Example:
        >>> from sparsenet.layers import plain_name
        >>> plain_name("0._orig_mod.values")
        '0.values'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name
