"""What the public functions on a key-value cache do with their arguments: check, choose operators, run them.

What only depends on shapes, dtypes, devices and options is checked once for all calls that agree in them, as the
decoding steps of a model do.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import operator_arguments
from .autocast import autocast_is_on
from .call import object_to_the_portable_path
from .inputs import PackedLayout
from .kvcache_checks import check_length, check_no_derivative, check_shapes, check_splits
from .kvcache_inputs import CacheTensors
from .kvcache_operators import CacheOperators, choose_operators
from .kvcache_values import check_values
from .modifiers import make_modifiers
from .options import as_number, as_window, make_options


class CacheOptions(NamedTuple):
    """What is no tensor in a call of attention on a cache, as it was given."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    rotary_interleaved: bool
    num_splits: int
    batch_invariant: bool


def attend(tensors: CacheTensors, given: CacheOptions, validate: bool, strict: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call, after the append if there are new keys."""
    tensors = _in_the_dtype_of_the_cache(tensors)
    options, optional_count, operators = _plan(tensors, given)
    _check_call(tensors, operators, strict)
    if validate:
        check_values(tensors, attends=True)
    caches = tensors.q, tensors.k_cache, tensors.v_cache, _cache_seqlens(tensors)
    optional: tuple[Any, ...] = ()
    if optional_count > 0:
        slopes_and_sink = _per_head(tensors, operators)
        optional = _optional_arguments(tensors, given, *slopes_and_sink)[:optional_count]
    if tensors.k is None:
        return operators.decode(*caches, *options, *optional)
    result = operators.append_and_decode(*caches, tensors.k, tensors.v, *options, *optional)
    _note_the_write(tensors, operators)
    return result


def _optional_arguments(
    tensors: CacheTensors, given: CacheOptions, slopes: Tensor | None, sink: Tensor | None
) -> tuple[Any, ...]:
    """What the operators take behind the options."""
    layout = tensors.block_table, tensors.cache_batch_idx, tensors.cu_seqlens_q
    modifiers = tensors.cache_leftpad, slopes, sink
    if tensors.k is None:
        return *layout, *modifiers
    rotary = tensors.rotary_cos, tensors.rotary_sin, given.rotary_interleaved
    return *rotary, *layout, tensors.cu_seqlens_new, *modifiers


def append(
    tensors: CacheTensors, rotary_interleaved: bool, rotate_q_per_position: bool, validate: bool, strict: bool
) -> Tensor | None:
    """Write the new keys and values into the cache; the rotated queries, if there are any."""
    tensors = _in_the_dtype_of_the_cache(tensors)
    *_, operators = _plan(tensors, None)
    _check_call(tensors, operators, strict)
    if validate:
        check_values(tensors, attends=False)
    rotated = operators.append_kv(
        *(tensors.k_cache, tensors.v_cache, tensors.k, tensors.v, _cache_seqlens(tensors)),
        *(tensors.q, tensors.rotary_cos, tensors.rotary_sin, rotary_interleaved, rotate_q_per_position),
        *(tensors.block_table, tensors.cache_batch_idx, tensors.cu_seqlens_q, tensors.cu_seqlens_new),
    )
    _note_the_write(tensors, operators)
    return None if tensors.q is None else rotated


def _per_head(tensors: CacheTensors, operators: CacheOperators) -> tuple[Tensor | None, Tensor | None]:
    """Slopes, (1 or B, H), and the sink, in the form that the operators take."""
    slopes, sink = tensors.alibi_slopes, tensors.learnable_sink
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.unsqueeze(0)
    if operators.are_compiled:
        return operator_arguments.per_head(slopes), operator_arguments.per_head(sink)
    return slopes, sink


def _note_the_write(tensors: CacheTensors, operators: CacheOperators) -> None:
    """As every operation in place: a graph that has saved the caches must notice."""
    if operators.are_compiled and not is_compiling():
        torch.autograd.graph.increment_version([tensors.k_cache, tensors.v_cache])


def _in_the_dtype_of_the_cache(tensors: CacheTensors) -> CacheTensors:
    """Under autocast, queries, keys and values in the dtype that the cache has: it cannot be cast, only written."""
    cache = tensors.k_cache
    if not (isinstance(cache, Tensor) and autocast_is_on(cache)):
        return tensors

    def cast(x: Tensor | None) -> Tensor | None:
        return x.to(cache.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tensors._replace(q=cast(tensors.q), k=cast(tensors.k), v=cast(tensors.v))


def _check_call(tensors: CacheTensors, operators: CacheOperators, strict: bool) -> None:
    """What has to be asked in every call."""
    check_length(tensors)
    check_no_derivative(tensors)
    if operators.why_portable:
        device_type = tensors.k_cache.device.type
        object_to_the_portable_path(operators.why_portable, device_type, strict, stacklevel=6)


def _cache_seqlens(tensors: CacheTensors) -> Tensor:
    """int32 (B,). A number is filled in on the device: nothing is copied there."""
    lengths = tensors.cache_seqlens
    if isinstance(lengths, Tensor):
        return lengths
    length = tensors.capacity if lengths is None else lengths
    return torch.full((tensors.batch,), length, dtype=torch.int32, device=tensors.k_cache.device)


OperatorOptions = tuple[float | int | bool, ...]


class Plan(NamedTuple):
    """Of a call: what the operators get from softmax_scale on, how many of the optional arguments behind it, and the
    operators themselves. Arguments that are left out have their defaults. An append alone has neither."""

    options: OperatorOptions
    optional_count: int
    operators: CacheOperators


# Bounded, since packed queries may be of another number in every call.
_PLANS_KEPT = 1024
_plans: dict[Any, Plan] = {}


def _plan(tensors: CacheTensors, given: CacheOptions | None) -> Plan:
    """Options and operators of a call whose shapes were checked; an append alone has no options.

    Raises:
        ValueError: for tensors or options that do not fit together.
    """
    key = None if is_compiling() else _key(tensors, given)
    if key is not None:
        try:
            return _plans[key]
        except KeyError:
            pass
        except TypeError:  # a list as the window, or symbolic sizes, cannot be hashed
            key = None
    check_shapes(tensors)
    k_cache, v_cache = tensors.k_cache, tensors.v_cache
    # As constants of the graph, see _constant.
    head_dim, head_dim_v = operator.index(k_cache.shape[-1]), operator.index(v_cache.shape[-1])
    options: OperatorOptions = ()
    optional_count = 0
    if given is not None:
        options = _checked_options(tensors, given, head_dim)
        optional = _optional_arguments(tensors, given, tensors.alibi_slopes, tensors.learnable_sink)
        # Their defaults are None and, for the rotary layout, True.
        differing = [n for n, x in enumerate(optional, 1) if x is not None and x is not True]
        optional_count = differing[-1] if differing else 0
        if optional_count == 0:
            options = _without_defaults(options)
    operators = choose_operators(k_cache.device, k_cache.dtype, head_dim, head_dim_v)
    plan = Plan(options, optional_count, operators)
    if key is not None:
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        _plans[key] = plan
    return plan


def _key(tensors: CacheTensors, given: CacheOptions | None) -> Any:
    """All that the checks of shapes and options look at; None if something is no tensor that should be.

    None also if a number is a tensor: it is the same key when it has changed in place.
    """
    if given is not None and (isinstance(given.softmax_scale, Tensor) or isinstance(given.softcap, Tensor)):
        return None
    try:
        return (
            given,
            tensors.k_cache.stride(),
            tensors.v_cache.stride(),
            *(
                (x.shape, x.dtype, x.device) if x is not None and not isinstance(x, int) else x is None
                for x in tensors
            ),
        )
    except AttributeError:
        return None


def _checked_options(tensors: CacheTensors, given: CacheOptions, head_dim: int) -> OperatorOptions:
    check_splits(given.num_splits, given.batch_invariant)
    q = tensors.q
    if tensors.alibi_slopes is not None or tensors.learnable_sink is not None:
        cu_seqlens = tensors.cu_seqlens_q
        packed = None if cu_seqlens is None else PackedLayout(cu_seqlens, cu_seqlens)
        assert q is not None  # since its shape was checked
        make_modifiers(
            q, tensors.k_cache, packed, None, None, None, tensors.alibi_slopes, tensors.learnable_sink
        )
    scale = given.softmax_scale
    options = make_options(
        head_dim=head_dim,
        softmax_scale=None if scale is None else _constant(as_number("softmax_scale", scale)),
        causal=given.causal,
        window_size=as_window(given.window_size),
        softcap=_constant(as_number("softcap", given.softcap)),
        dropout_p=0.0,
        deterministic=False,
    )
    window = operator_arguments.window(options)
    return options.softmax_scale, *window, options.softcap, given.num_splits, given.batch_invariant


def _constant(x: float) -> float:
    """torch.compile may trace a number as a symbol; asking for its parts makes it a constant of the graph."""
    return math.ldexp(*math.frexp(x))


def _without_defaults(options: OperatorOptions) -> OperatorOptions:
    """Without the last ones as far as they are what the operators take for them: each that is passed costs time."""
    *_, softcap, num_splits, batch_invariant = options
    if batch_invariant:
        return options
    if num_splits != 0:
        return options[:-1]
    return options[:-2] if softcap != 0.0 else options[:-3]
