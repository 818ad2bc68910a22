"""Decoding steps on fixed buffers, run ahead of the answer, captured and replayed: the same tokens as a plain loop."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from flash_attn_models.generation import (
    cuda_graph,
    generate,
    make_page_pool,
    release_cuda_graphs,
    stream_tokens,
)
from flash_attn_models.generation import decode as decode_module
from flash_attn_models.generation.caches import make_cache
from flash_attn_models.generation.choice import Choice
from flash_attn_models.generation.decode import decode
from flash_attn_models.generation.request import read_request
from flash_attn_models.generation.step import DecodingState, StepOptions, decode_step
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

DRAWN = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.9}
LENGTHS = [7, 3, 5, 1]


SIZES = {"vocab_size": 113, "max_seqlen": 40, "initializer_range": 0.3}
CONFIGS = {
    "gpt2": GPTConfig(**SIZES, n_layer=2, n_head=3, d_model=48),
    "llama": GPTConfig.llama(**SIZES, n_layer=1, n_head=6, n_head_kv=2, d_model=48, d_inner=88),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return GPTLMHeadModel(request.param).eval()


def prompt(model, batch=4, seqlen=7):
    return torch.randint(model.config.vocab_size, (batch, seqlen))


class Replayed:
    """Stands in for a CUDA graph where there is none: runs the step again on the same tensors, and does on the host
    what a replay does not."""

    def __init__(self, model, cache, state, options, generator):
        self.arguments = (model, cache, state, options)
        self.addresses = self.now()
        for _ in range(2):
            self.run()
        cache.reset()

    def now(self):
        _, cache, state, _ = self.arguments
        tensors = [*cache.k, *cache.v, cache.lengths, cache.block_table, *vars(state).values()]
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def run(self):
        decode_step(*self.arguments)
        assert self.now() == self.addresses  # nothing was replaced

    def replay(self):
        self.run()
        self.arguments[1].length -= 1


@pytest.fixture
def captures(monkeypatch):
    """Lets the CPU capture; counts how often."""
    seen = []

    def capture(*arguments):
        seen.append(arguments[0])
        return Replayed(*arguments)

    original = cuda_graph.open_graph_run
    monkeypatch.setattr(
        decode_module, "open_graph_run", lambda *a, **options: original(*a, **options, capture=capture)
    )
    return seen


def run(model, input_ids, max_new_tokens, *, graph=True, lag=0, **options):
    request = read_request(model, input_ids, max_new_tokens, **options)
    request = dataclasses.replace(request, uses_graph=graph)
    with torch.no_grad():
        return torch.cat([columns.tokens for columns in decode(model, request, lag)], dim=1)


def test_steps_equal_a_plain_loop_bit_for_bit(model):
    input_ids = prompt(model)
    options = StepOptions(Choice(repetition_penalty=1.2), eos_ids=(3,), pad_id=5)
    state = DecodingState(4, model.config.vocab_size, options, "cpu")
    cache, plain_cache = make_cache(model, 4, 30), make_cache(model, 4, 30)
    choice = options.choice
    state.start(input_ids)
    tokens = input_ids[:, -1]
    state.tokens.copy_(tokens)
    seen, finished = state.seen.clone(), torch.zeros(4, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(20):
            decode_step(model, cache, state, options)
            scores = choice.scores(model(tokens[:, None], cache=plain_cache)[:, -1], seen)
            tokens = torch.where(finished, 5, scores.argmax(-1))
            seen[torch.arange(4), tokens] = True
            finished = finished | (tokens == 3)
            assert torch.equal(state.tokens, tokens)
            assert torch.equal(state.finished, finished)
            assert torch.equal(state.seen, seen)
    for ours, plain in zip([*cache.k, *cache.v], [*plain_cache.k, *plain_cache.v], strict=True):
        assert torch.equal(ours[:, :20], plain[:, :20])


@pytest.mark.parametrize("options", [{}, DRAWN, {"repetition_penalty": 1.3}], ids=["greedy", "drawn", "seen"])
def test_running_ahead_of_the_answer_changes_nothing(model, options):
    input_ids = prompt(model)
    torch.manual_seed(5)
    free = run(model, input_ids, 25, graph=False, **options)
    ends = free[:, 8].tolist()
    results = []
    for lag in (0, 1):
        torch.manual_seed(5)
        tokens = run(model, input_ids, 25, graph=False, lag=lag, eos_token_id=ends, pad_token_id=2, **options)
        results.append((tokens, torch.get_rng_state()))
    assert results[0][0].shape[1] < 25
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # the step thrown away drew nothing


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("options", [{}, DRAWN, {"repetition_penalty": 1.3}], ids=["greedy", "drawn", "seen"])
@pytest.mark.parametrize("lag", [0, 1])
def test_captured_steps_give_the_same_tokens(model, captures, cache, options, lag):
    input_ids = prompt(model)
    options = {**options, "prompt_lengths": LENGTHS, "cache": cache}
    if cache == "paged":
        options["page_size"] = 8
    for end in (None, 3):
        given = {**options, **({} if end is None else {"eos_token_id": end})}
        torch.manual_seed(1)
        expected, state = run(model, input_ids, 20, graph=False, **given), torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(run(model, input_ids, 20, lag=lag, **given), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(captures) == 2


def test_a_generator_of_the_caller_goes_on_where_the_steps_left_it(model, captures):
    input_ids = prompt(model)
    results = []
    for graph in (False, True):
        generator = torch.Generator().manual_seed(3)
        results += [run(model, input_ids, 12, graph=graph, generator=generator, **DRAWN) for _ in range(2)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])
    assert len(captures) == 1


def test_what_was_captured_serves_later_calls(model, captures, monkeypatch):
    monkeypatch.setattr(cuda_graph, "cache_capacity", lambda model, room: -(-max(room) // 16) * 16)

    def check(batch, seqlen, new, n_captures, **options):
        input_ids = prompt(model, batch, seqlen)
        expected = run(model, input_ids, new, graph=False, **options)
        assert torch.equal(run(model, input_ids, new, **options), expected)
        assert len(captures) == n_captures

    check(4, 7, 20, 1)  # 26 positions, so 32
    check(4, 7, 20, 1)
    check(4, 9, 24, 1)  # 32 positions
    check(4, 3, 5, 2)  # 7, so 16, of the same buffers
    k = cuda_graph._graphs[model].contiguous.k[0].data_ptr()
    check(2, 7, 20, 3)  # fewer rows of the same buffers
    check(2, 7, 20, 3, pad_token_id=0)
    check(2, 7, 20, 4, repetition_penalty=1.5)
    check(4, 7, 20, 4)
    assert cuda_graph._graphs[model].contiguous.k[0].data_ptr() == k
    check(5, 7, 20, 5)  # larger buffers: everything before is gone
    check(4, 7, 20, 6)
    model.load_state_dict({name: tensor + 0.01 for name, tensor in model.state_dict().items()})
    check(4, 7, 20, 6)  # written in place
    model.transformer.layers[0].mlp.fc1.weight = torch.nn.Parameter(
        torch.randn_like(model.transformer.layers[0].mlp.fc1.weight)
    )
    check(4, 7, 20, 7)
    release_cuda_graphs(model)
    check(4, 7, 20, 8)
    model.train()
    check(4, 7, 20, 8)
    assert model.training


def test_weights_of_another_dtype_in_the_same_memory_are_captured_again(captures):
    """As after ``model.float().bfloat16()``, whose last tensors the allocator puts where the first ones were."""
    model = GPTLMHeadModel(CONFIGS["gpt2"], dtype=torch.float16).eval()
    input_ids = prompt(model)
    run(model, input_ids, 9)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    values = [parameter.to(torch.bfloat16) for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = parameter.data.view(torch.bfloat16)
        parameter.data.copy_(value)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    expected = run(model, input_ids, 9, graph=False)
    assert torch.equal(run(model, input_ids, 9), expected)
    assert len(captures) == 2


def test_inference_mode_of_one_call_is_not_that_of_the_next(model, captures):
    input_ids = prompt(model)
    expected = run(model, input_ids, 9, graph=False)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(run(model, input_ids, 9, repetition_penalty=1.0, eos_token_id=()), expected)
        assert torch.equal(run(model, input_ids, 9, repetition_penalty=1.0, eos_token_id=()), expected)
    assert len(captures) == 1


def test_only_so_many_steps_are_kept(model, captures):
    for batch in range(10, 0, -1):
        run(model, prompt(model, batch, 3), 4)
    assert len(cuda_graph._graphs[model].contiguous.steps) == cuda_graph._MOST_STEPS_KEPT == 8


def test_a_pool_of_the_caller(model, captures):
    pool = make_page_pool(model, 40, page_size=4)
    input_ids = prompt(model)
    expected = run(model, input_ids, 9, graph=False)
    taken = pool.take(3)  # so that a second run has other pages
    assert torch.equal(run(model, input_ids, 9, cache=pool), expected)
    pool.give_back(taken)
    assert torch.equal(run(model, input_ids, 9, cache=pool), expected)
    assert (len(captures), pool.n_free) == (1, 40)
    small = make_page_pool(model, 3, page_size=4)
    with pytest.raises(ValueError, match="cache: got a pool with 3 free of 3 pages"):
        run(model, input_ids, 9, cache=small)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None  # what is captured keeps no pool


def test_a_run_while_another_has_the_buffers_is_eager(model, captures):
    input_ids = prompt(model)
    expected = run(model, input_ids, 9, graph=False)
    request = dataclasses.replace(read_request(model, input_ids, 9), uses_graph=True)
    first = decode(model, request)
    columns = [next(first), next(first)]
    for kind, captured in (("contiguous", 1), ("paged", 2)):
        assert torch.equal(run(model, input_ids, 9, cache=kind), expected)
        assert len(captures) == captured
    must = dataclasses.replace(request, requires_graph=True)
    with pytest.raises(ValueError, match=r"cuda_graph: got True while another generation .*close\(\) the"):
        next(decode(model, must))
    columns += list(first)
    assert torch.equal(torch.cat([column.tokens for column in columns], dim=1), expected)
    abandoned = decode(model, request)
    next(abandoned)
    abandoned.close()
    assert torch.equal(run(model, input_ids, 9), expected)
    assert len(captures) == 2


def test_a_failed_capture_leaves_everything_free(model, monkeypatch):
    def fail(*_):
        raise RuntimeError("no capture")

    original = cuda_graph.open_graph_run
    monkeypatch.setattr(
        decode_module, "open_graph_run", lambda *a, **options: original(*a, **options, capture=fail)
    )
    pool = make_page_pool(model, 40, page_size=4)
    for cache in ("contiguous", pool):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no capture"):
                run(model, prompt(model), 9, cache=cache)
    assert pool.n_free == 40
    assert not cuda_graph._graphs[model].contiguous.is_busy


def test_graphs_go_with_their_model(captures):
    model = GPTLMHeadModel(GPTConfig(vocab_size=31, max_seqlen=40, n_layer=1, n_head=2, d_model=16)).eval()
    run(model, prompt(model), 9)
    buffer = weakref.ref(cuda_graph._graphs[model].contiguous.k[0])
    captures.clear()  # here the stand-ins of graphs know the model; a real one does not
    for step in cuda_graph._graphs[model].contiguous.steps.values():
        step.graph = None
    del model, step
    gc.collect()
    assert buffer() is None


def test_what_a_graph_knows_of_tables_is_kept():
    for changes in ({"position": "rotary"}, {"position": "alibi"}):
        config = GPTConfig(vocab_size=31, max_seqlen=40, n_layer=2, n_head=2, d_model=16, **changes)
        model = GPTLMHeadModel(config)
        assert cuda_graph._tables(model, make_cache(model, 1, 8))


def test_it_is_refused_where_it_cannot_be(model):
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(
        ValueError, match="cuda_graph: got True with a model on cpu; expected a float16 or bfloat16 model on"
    ):
        stream_tokens(model, prompt(model), 5, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: got True with speculative decoding"):
        stream_tokens(model, prompt(model), 5, cuda_graph=True, draft="prompt_lookup")


@pytest.mark.parametrize("choice", [None, False])
def test_without_a_gpu_steps_are_eager(model, captures, choice):
    generate(model, prompt(model), 20, cuda_graph=choice)
    assert not captures
