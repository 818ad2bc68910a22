"""On an NVIDIA GPU: captured decoding steps give the bits of eager ones, and speculative decoding those of plain."""

from __future__ import annotations

import gc

import pytest
import torch
from flash_attn_models.generation import (
    cuda_graph,
    generate,
    generate_output,
    make_page_pool,
    release_cuda_graphs,
    stream_tokens,
)
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"vocab_size": 509, "max_seqlen": 1024, "initializer_range": 0.1}
LLAMA = {**SIZES, "n_layer": 3, "n_head": 6, "n_head_kv": 2, "d_model": 384, "d_inner": 704}
CONFIGS = {
    "gpt2": GPTConfig(**SIZES, n_layer=3, n_head=3, d_model=192),
    "llama_gqa": GPTConfig.llama(**LLAMA),
    "window": GPTConfig.llama(**LLAMA, window=33),
    "alibi": GPTConfig(**SIZES, n_layer=2, n_head=6, d_model=384, position="alibi"),
    "parallel": GPTConfig(
        **SIZES, n_layer=2, n_head=4, d_model=256, position="rotary", parallel_block=True, rotary_dim=32
    ),
    "qk_norm": GPTConfig.llama(**LLAMA, qk_norm=True),
}
LENGTHS = [60, 7, 33, 1]
DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    torch.manual_seed(0)
    return GPTLMHeadModel(request.param, device="cuda", dtype=torch.bfloat16).eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return GPTLMHeadModel(CONFIGS["llama_gqa"], device="cuda", dtype=torch.bfloat16).eval()


def prompt(model, batch=4, seqlen=60):
    return torch.randint(model.config.vocab_size, (batch, seqlen), device="cuda")


def n_captured(model):
    graphs = cuda_graph._graphs.get(model)
    if graphs is None:
        return 0
    buffers = [*graphs.pools.values(), *([] if graphs.contiguous is None else [graphs.contiguous])]
    return sum(len(each.steps) for each in buffers)


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("options", [{}, {"prompt_lengths": LENGTHS}], ids=["equal", "ragged"])
def test_graph_equals_eager_bitwise(model, cache, options):
    input_ids = prompt(model)
    options = {**options, "cache": cache, "return_logprobs": True, "eos_token_id": ()}
    eager = generate_output(model, input_ids, 300, cuda_graph=False, **options)
    for _ in range(2):  # captured, and again
        graph = generate_output(model, input_ids, 300, cuda_graph=True, **options)
        assert torch.equal(graph.sequences, eager.sequences)
        assert torch.equal(graph.logprobs, eager.logprobs)  # of bits, not only of what is chosen
    assert n_captured(model) == 1


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}], ids=["plain", "penalty"])
def test_drawing_has_the_numbers_of_eager_steps(model, options):
    input_ids = prompt(model)

    def run(seed, graph):
        generator = torch.Generator("cuda").manual_seed(seed)
        tokens = generate(model, input_ids, 60, generator=generator, cuda_graph=graph, **DRAWN, **options)
        more = generate(model, input_ids, 20, generator=generator, cuda_graph=graph, **DRAWN, **options)
        return torch.cat([tokens, more], dim=1)

    assert torch.equal(run(1, True), run(1, False))
    assert torch.equal(run(1, True), run(1, True))
    assert not torch.equal(run(1, True), run(2, True))
    results = []
    for graph in (False, True):
        torch.manual_seed(7)
        results += [generate(model, input_ids, 40, cuda_graph=graph, **DRAWN), torch.rand(5, device="cuda")]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_ends_found_a_step_later_change_nothing(llama, drawn):
    input_ids = prompt(llama)
    torch.manual_seed(3)
    free = generate(llama, input_ids, 80, eos_token_id=(), cuda_graph=False, **drawn)
    ends = free[:, 75].tolist()
    results = []
    for options in (
        {"cuda_graph": False},
        {"cuda_graph": True},
        {"cuda_graph": True, "stop_strings": "never", "tokenizer": lambda ids: ""},  # waits in each step
    ):
        torch.manual_seed(3)
        tokens = generate(llama, input_ids, 80, eos_token_id=ends, pad_token_id=1, **options, **drawn)
        results.append((tokens, torch.rand(3, device="cuda")))
    for tokens, rest in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(rest, results[0][1])


def test_repeated_use_smaller_and_larger_requests(llama):
    def check(batch, seqlen, new, captured, **options):
        input_ids = prompt(llama, batch, seqlen)
        eager = generate(llama, input_ids, new, cuda_graph=False, **options)
        assert torch.equal(generate(llama, input_ids, new, cuda_graph=True, **options), eager)
        assert n_captured(llama) == captured

    check(8, 200, 100, 1)
    check(8, 180, 90, 1)
    check(8, 20, 30, 2)
    check(3, 200, 100, 3)
    check(1, 200, 100, 4)
    check(8, 200, 100, 4)
    check(8, 300, 300, 1)  # the buffers had to grow
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    check(8, 300, 300, 1)  # weights changed in place
    # Longer tables of positions replace those that captured steps know.
    llama.transformer.layers[0].mixer.rotary.tables(5000, torch.device("cuda:0"))
    junk = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(8)]
    check(8, 300, 300, 1)
    del junk


def test_other_work_between_the_steps(llama):
    input_ids = prompt(llama)
    eager = generate(llama, input_ids, 60, cuda_graph=False)
    columns = []
    for column in stream_tokens(llama, input_ids, 60, cuda_graph=True):
        columns.append(column)
        torch.full((2**22,), float("nan"), device="cuda")  # uses memory that a careless graph would share
        llama(input_ids)
    assert torch.equal(torch.stack(columns, dim=1), eager[:, 60:])


def test_a_pool_of_the_caller(llama):
    pool = make_page_pool(llama, 200, page_size=16)
    input_ids = prompt(llama)
    eager = generate(llama, input_ids, 60, cuda_graph=False)
    for _ in range(2):
        taken = pool.take(5)
        assert torch.equal(generate(llama, input_ids, 60, cuda_graph=True, cache=pool), eager)
        pool.give_back(taken[::-1])
    assert pool.n_free == 200
    assert n_captured(llama) == 1


def test_memory_comes_back(llama):
    generate(
        llama, prompt(llama), 20, cuda_graph=True
    )  # makes what belongs to no model, as workspaces of cuBLAS
    release_cuda_graphs(llama)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    generate(llama, prompt(llama, 32, 500), 100, cuda_graph=True)
    assert torch.cuda.memory_allocated() > before + 20e6
    release_cuda_graphs(llama)
    gc.collect()
    assert torch.cuda.memory_allocated() < before + 20e6


def test_it_is_left_out_or_refused_where_it_cannot_be(llama):
    input_ids = prompt(llama)
    in_fp32 = GPTLMHeadModel(llama.config, device="cuda")
    generate(in_fp32, input_ids, 20)
    assert n_captured(in_fp32) == 0
    with pytest.raises(ValueError, match="cuda_graph: got True with attention off its kernels"):
        generate(in_fp32, input_ids, 20, cuda_graph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        generate(in_fp32, input_ids, 20)
        with pytest.raises(ValueError, match="cuda_graph: got True with autocast"):
            generate(in_fp32, input_ids, 20, cuda_graph=True)
    generate(llama, input_ids, 10)
    assert n_captured(llama) == 0  # too few tokens to pay
    generate(llama, input_ids, 20)
    assert n_captured(llama) == 1


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_speculative_decoding_equals_plain_in_fp64(cache):
    """In a precision in which passes over one token and over several agree."""
    torch.manual_seed(0)
    model = GPTLMHeadModel(CONFIGS["llama_gqa"], device="cuda", dtype=torch.float64).eval()
    draft = GPTLMHeadModel(CONFIGS["llama_gqa"], device="cuda", dtype=torch.float64).eval()
    draft.load_state_dict(
        {name: weight + 0.002 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    )
    input_ids = prompt(model)
    options = {"prompt_lengths": LENGTHS, "cache": cache}
    plain = generate(model, input_ids, 60, **options)
    for drafter in (draft, "prompt_lookup"):
        output = generate_output(model, input_ids, 60, draft=drafter, **options)
        assert torch.equal(output.sequences, plain)
    assert generate_output(model, input_ids, 60, draft=draft, **options).acceptance.accepted > 0


def test_speculative_decoding_in_bf16(llama):
    """Each token is the likeliest one up to rounding; drawn ones follow the seed."""
    input_ids = prompt(llama)
    tokens = generate(llama, input_ids, 60, draft=llama, lookahead=5)
    with torch.no_grad():
        logits = llama(tokens)[:, 59:-1].float()
    chosen = logits.gather(-1, tokens[:, 60:, None])[..., 0]
    assert (chosen >= logits.amax(-1) - 0.1 * logits.std()).all()

    def run(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return generate(llama, input_ids, 40, draft=llama, generator=generator, **DRAWN)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
