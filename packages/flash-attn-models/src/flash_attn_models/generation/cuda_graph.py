"""Decoding steps as CUDA graphs: captured once, replayed for every token, so that the host launches one thing a step.

What is captured belongs to the model and is kept with it (weakly: it goes when the model does). Buffers of keys and
values are kept for the largest batch and length so far, and steps over the first rows and positions of them by batch
size, capacity and options. So a step is captured again
- for another batch size, another capacity (lengths in steps of 128 tokens), or other options of choosing and ending;
- if the buffers have to grow, or if parameters lie elsewhere in memory (moved, cast or replaced; training and
  ``load_state_dict`` write in place and are no reason).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from flash_attn_ops.attention import explain_kvcache
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.caches import (
    CacheKind,
    attention_dtype,
    cache_capacity,
    count_pages,
    make_cache,
    make_page_pool,
)
from flash_attn_models.generation.evaluation import evaluating
from flash_attn_models.generation.paged_cache import PagedKVCache, PagePool
from flash_attn_models.generation.step import DecodingState, StepOptions, decode_step
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers import CausalSelfAttention
from flash_attn_models.layers.kv_cache import Cache

_WARMUP_STEPS = 2
_MOST_STEPS_KEPT = 8  # for one set of buffers; the least recently used one goes


class Graph(Protocol):
    """What can be replayed."""

    def replay(self) -> None:
        """Run again what was captured."""


@dataclass
class CapturedStep:
    """A step and the tensors that it reads and writes. ``kept`` are other tensors whose memory it knows."""

    graph: Graph
    cache: Cache
    state: DecodingState
    generator: torch.Generator | None
    kept: list[Tensor]


class _Buffers:
    """Memory for keys and values, and the steps that were captured over it; for one run at a time.

    Holds tensors but not the pool they belong to, so that a pool lives no longer than its owner wants.
    """

    def __init__(self, k: list[Tensor], v: list[Tensor]) -> None:
        self.k, self.v = k, v
        self.is_busy = False
        self.steps: OrderedDict[Hashable, CapturedStep] = OrderedDict()


class _GraphsOfModel:
    """Everything that is kept for one model."""

    def __init__(self, fingerprint: tuple[tuple[int, torch.dtype], ...]) -> None:
        self.fingerprint = fingerprint
        self.contiguous: _Buffers | None = None
        self.own_pool: PagePool | None = None
        self.pools: WeakKeyDictionary[PagePool, _Buffers] = WeakKeyDictionary()


_graphs: WeakKeyDictionary[GPTLMHeadModel, _GraphsOfModel] = WeakKeyDictionary()


def release_cuda_graphs(model: GPTLMHeadModel) -> None:
    """Free what ``generate`` keeps for a model on a GPU: captured steps and their buffers of keys and values. They come
    back with the next call that needs them."""
    _graphs.pop(model, None)


def why_no_graph(model: GPTLMHeadModel) -> str | None:
    """What keeps decoding steps of a model from being captured; None is nothing."""
    weight = model.head_weight
    if weight.device.type != "cuda":
        return f"a model on {weight.device}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast, whose casts are of one call"
    if model.parallel.is_parallel or _is_fully_sharded(model):
        return "a model over several devices"
    page = weight.new_empty(1, 1, model.cache_heads, model.config.head_dim, dtype=attention_dtype(model))
    explanation = explain_kvcache(page, page)
    return None if explanation.path == "cuda" else f"attention off its kernels ({explanation})"


def _is_fully_sharded(model: GPTLMHeadModel) -> bool:
    """Whether weights come from other ranks when a layer is called."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


class GraphRun:
    """Steps of one request, replayed. Same interface as an eager run."""

    def __init__(
        self, buffers: _Buffers, captured: CapturedStep, options: StepOptions, pages: PagedKVCache | None
    ) -> None:
        self.cache = captured.cache
        self.state = captured.state
        self._captured = captured
        self._buffers = buffers
        self._pages = pages
        draws = captured.generator is not None
        self._source = options.choice.source(captured.state.tokens.device) if draws else None

    def step(self) -> None:
        """Feed the last tokens, choose the next ones."""
        self.cache.check_room(self.cache.batch_size, 1)
        inner = self._captured.generator
        if inner is not None and self._source is not None:
            # The graph can draw from the generator alone that it was captured with.
            inner.set_state(self._source.get_state())
            self._captured.graph.replay()
            self._source.set_state(inner.get_state())
        else:
            self._captured.graph.replay()
        self.cache.length += 1  # the device's count is in the graph

    def close(self) -> None:
        """Give the buffers back, and pages."""
        if self._pages is not None:
            self._pages.free()
            self._pages = None
        self._buffers.is_busy = False


def capture(
    model: GPTLMHeadModel,
    cache: Cache,
    state: DecodingState,
    options: StepOptions,
    generator: torch.Generator | None,
) -> Graph:
    """Record a decoding step on these tensors. It first runs a few times, so that what is made in a first call exists;
    afterwards the cache is empty."""
    device = state.tokens.device
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream), evaluating(model):
        for _ in range(_WARMUP_STEPS):
            decode_step(model, cache, state, options)
            cache.reset()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            decode_step(model, cache, state, options)
        cache.reset()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has worked on."""
    return torch.cuda.Stream(device)


# What is kept must also serve calls outside of the caller's inference mode.
@torch.inference_mode(False)
@torch.no_grad()
def open_graph_run(
    model: GPTLMHeadModel,
    options: StepOptions,
    *,
    cache: CacheKind,
    page_size: int,
    room: Sequence[int],
    must: bool = False,
    capture: Callable[..., Graph] = capture,
) -> GraphRun | None:
    """A run over kept buffers, with a step captured now or before; None if another run has the buffers.

    Args:
        model, options, cache, page_size: of the request.
        room: tokens that each row must have room for.
        must: raise ValueError instead of None.
        capture: records a step.
    """
    graphs = _graphs_of(model)
    capacity = cache_capacity(model, room)
    if cache == "contiguous":
        buffers, pool = _contiguous_buffers(graphs, model, len(room), capacity), None
    else:
        pool = cache if isinstance(cache, PagePool) else _own_pool(graphs, model, room, page_size)
        buffers = None if pool is None else graphs.pools.setdefault(pool, _Buffers(pool.k, pool.v))
    if buffers is None or buffers.is_busy:
        if must:
            raise bad_argument(
                "cuda_graph",
                "True while another generation of this model is under way",
                "one at a time, since captured steps have one set of buffers",
                "finish or close() the other iterator, or leave cuda_graph out",
            )
        return None
    pages = None
    if pool is not None:
        pages = PagedKVCache(pool, room, table_columns=pool.pages_for(capacity))
    buffers.is_busy = True
    run: GraphRun | None = None
    try:
        captured = _captured_step(model, buffers, options, len(room), capacity, pages, capture)
        captured.cache.reset()
        if pages is not None and captured.cache.block_table is not None and pages.block_table is not None:
            captured.cache.block_table.copy_(pages.block_table)
        run = GraphRun(buffers, captured, options, pages)
        return run
    finally:
        if run is None:
            buffers.is_busy = False
            if pages is not None:
                pages.free()


def _graphs_of(model: GPTLMHeadModel) -> _GraphsOfModel:
    """What is kept for a model, without what no longer fits its parameters."""
    fingerprint = tuple((parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())
    found = _graphs.get(model)
    if found is None or found.fingerprint != fingerprint:
        found = _graphs[model] = _GraphsOfModel(fingerprint)
    return found


def _contiguous_buffers(
    graphs: _GraphsOfModel, model: GPTLMHeadModel, batch_size: int, capacity: int
) -> _Buffers | None:
    """Buffers of at least this size; None if those that there are must grow and are busy."""
    buffers = graphs.contiguous
    if buffers is not None:
        rows, positions = buffers.k[0].shape[:2]
        if rows >= batch_size and positions >= capacity:
            return buffers
        if buffers.is_busy:
            return None
        graphs.contiguous = buffers = None  # freed before the new ones are allocated
    cache = make_cache(model, batch_size, capacity)
    graphs.contiguous = _Buffers(cache.k, cache.v)
    return graphs.contiguous


def _own_pool(
    graphs: _GraphsOfModel, model: GPTLMHeadModel, room: Sequence[int], page_size: int
) -> PagePool | None:
    """The pool of calls that bring none; None if it must be replaced and is busy."""
    pool, count = graphs.own_pool, count_pages(room, page_size)
    if pool is not None:
        if pool.page_size == page_size and pool.n_free >= count:
            return pool
        if pool.n_free < len(pool.k[0]):
            return None
        graphs.pools.pop(pool, None)
        graphs.own_pool = pool = None
    graphs.own_pool = make_page_pool(model, count, page_size)
    return graphs.own_pool


def _captured_step(
    model: GPTLMHeadModel,
    buffers: _Buffers,
    options: StepOptions,
    batch_size: int,
    capacity: int,
    pages: PagedKVCache | None,
    capture: Callable[..., Graph],
) -> CapturedStep:
    """The step for these sizes and options, captured if there is none yet."""
    key = (batch_size, capacity, replace(options, choice=replace(options.choice, generator=None)))
    found = buffers.steps.get(key)
    if found is not None:
        buffers.steps.move_to_end(key)
        return found
    if pages is None:
        k = [buffer[:batch_size, :capacity] for buffer in buffers.k]
        v = [buffer[:batch_size, :capacity] for buffer in buffers.v]
        cache = Cache(k, v, batch_size, capacity)
    else:
        assert pages.block_table is not None
        # No pages yet: what the steps before capture write is lost.
        table = torch.full_like(pages.block_table, -1)
        cache = Cache(buffers.k, buffers.v, batch_size, capacity, table)
    device = buffers.k[0].device
    generator = torch.Generator(device) if options.choice.do_sample else None
    state = DecodingState(batch_size, model.config.vocab_size, options, device)
    own_options = replace(options, choice=replace(options.choice, generator=generator))
    graph = capture(model, cache, state, own_options, generator)
    step = CapturedStep(graph, cache, state, generator, _tables(model, cache))
    buffers.steps[key] = step
    if len(buffers.steps) > _MOST_STEPS_KEPT:
        buffers.steps.popitem(last=False)
    return step


def _tables(model: GPTLMHeadModel, cache: Cache) -> list[Tensor]:
    """Tensors that layers make when needed and may replace by larger ones, while a graph knows where these lie."""
    device = cache.k[0].device
    kept: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            kept += [
                *module.tables(cache.max_positions, device),
                *module.key_tables(cache.max_positions, device),
            ]
        if isinstance(module, CausalSelfAttention) and module.alibi is not None:
            kept.append(module.alibi.slopes(device))
    return kept
