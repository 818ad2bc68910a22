"""BERT on ragged batches: training BERT-base, and embeddings with a MiniLM, against transformers.

Lengths are uniform from 1 to the longest, so that half of a padded batch is padding. All contestants have the same
weights and compute the same at real tokens, which is checked first. They get the same padded ids and mask; ``packed``
gets the ids as a data loader that knows the lengths would pack them, and so never waits for the GPU. A training step
is forward, backward from a random gradient of the hidden states (zero at padding), and giving the gradients back; an
embedding is the normalised mean of a sequence's hidden states. ``host_us`` is how long the host takes to issue a step:
where it is not much less than the step, that is what the step waits for.

    python benchmarks/bench_bert.py [--json FILE] [--quick] [--no-compile]
    python benchmarks/bench_bert.py --smoke     # tiny sizes on a CPU: shows that it runs, measures nothing
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from flash_attn_models.bert import BertConfig, BertModel, encode
from flash_attn_models.bert.hugging_face import (
    Form,
    config_to_hugging_face,
    hugging_face_layout,
    to_hugging_face,
)
from flash_attn_models.testing import Timing, interleaved_times, measure_ceilings, write_result
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[], Tensor]

BASE = BertConfig.bert("base")
MINILM = BertConfig(
    vocab_size=30522, max_seqlen=512, n_layer=6, n_head=12, d_model=384, d_inner=1536, pad_token_id=0
)
TINY = BertConfig(vocab_size=100, max_seqlen=32, n_layer=2, n_head=2, d_model=32)

# Relative difference of what two contestants computed in bfloat16, in the norm of all their results.
AGREEMENT = 5e-2


@dataclass(frozen=True)
class Case:
    """One batch to compute."""

    task: str
    batch: int
    longest: int
    dropout: float

    @property
    def trains(self) -> bool:
        return self.task == "training"


@dataclass(frozen=True)
class Batch:
    """Ids and mask (B,S), and a gradient (B,S,d_model) that is zero at padding."""

    input_ids: Tensor
    mask: Tensor
    gradient: Tensor

    @property
    def tokens(self) -> int:
        """Real ones."""
        return int(self.mask.sum())

    @property
    def cu_seqlens(self) -> Tensor:
        return F.pad(self.mask.sum(dim=1).cumsum(0), (1, 0)).int()


def make_batch(case: Case, config: BertConfig, device: str, dtype: torch.dtype) -> Batch:
    lengths = torch.randint(1, case.longest + 1, (case.batch,), device=device)
    lengths[0] = case.longest
    mask = torch.arange(case.longest, device=device) < lengths[:, None]
    shape = (case.batch, case.longest)
    input_ids = torch.randint(1, config.vocab_size, shape, device=device).masked_fill(~mask, 0)
    gradient = torch.randn(*shape, config.d_model, device=device, dtype=dtype) * mask[..., None]
    return Batch(input_ids, mask, gradient)


def make_theirs(ours: BertModel, dropout: float) -> torch.nn.Module:
    """transformers' BertModel with SDPA and the weights of ours."""
    from transformers import BertConfig as TheirConfig
    from transformers import BertModel as TheirModel

    fields = config_to_hugging_face(ours.config)
    fields |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = TheirConfig.from_dict(fields)
    config._attn_implementation = "sdpa"
    weight = ours.embeddings.word_embeddings.weight
    with torch.device(weight.device):
        theirs: torch.nn.Module = TheirModel(config, add_pooling_layer=False)
    theirs.to(weight.dtype)
    layout = hugging_face_layout(ours.config, Form.of_model(ours))
    theirs.load_state_dict(to_hugging_face(ours.state_dict(), layout))
    return theirs


def training_step(model: torch.nn.Module, hidden_of: Step, gradient: Tensor) -> Step:
    def step() -> Tensor:
        hidden = hidden_of()
        hidden.backward(gradient)
        model.zero_grad(set_to_none=True)
        return hidden

    return step


def embedding_step(hidden_of: Step, mask: Tensor) -> Step:
    @torch.inference_mode()
    def step() -> Tensor:
        hidden = hidden_of().float() * mask[..., None]
        return F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    return step


def make_contestants(
    case: Case, config: BertConfig, batch: Batch, device: str, dtype: torch.dtype, compiles: bool
) -> dict[str, Step]:
    """One step of each, by name; a peer that does not run here is left out."""
    config = BertConfig.from_dict({**config.to_dict(), "dropout": case.dropout, "attn_dropout": case.dropout})
    ours = BertModel(config, with_pooler=False, device=device, dtype=dtype).train(case.trains)
    theirs = make_theirs(ours, case.dropout).train(case.trains)
    ids, mask = batch.input_ids, batch.mask

    def our_hidden(padding_free: bool) -> Step:
        return lambda: ours(ids, mask, padding_free=padding_free).hidden

    packed: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": case.longest}
    packed_ids, packed_gradient = ids[mask], batch.gradient[mask]

    def packed_hidden(model: Callable[..., Any]) -> Step:
        return lambda: model(packed_ids, **packed).hidden

    def their_hidden(model: Callable[..., Any]) -> Step:
        return lambda: model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    if not case.trains:
        steps: dict[str, Step] = {
            "padding-free": torch.inference_mode()(lambda: encode(ours, ids, mask, padding_free=True)),
            "packed": torch.inference_mode()(lambda: encode(ours, packed_ids, **packed)),
            "padded": torch.inference_mode()(lambda: encode(ours, ids, mask, padding_free=False)),
            "transformers": embedding_step(their_hidden(theirs), mask),
        }
    else:
        steps = {
            "padding-free": training_step(ours, our_hidden(True), batch.gradient),
            "packed": training_step(ours, packed_hidden(ours), packed_gradient),
            "padded": training_step(ours, our_hidden(False), batch.gradient),
            "transformers": training_step(theirs, their_hidden(theirs), batch.gradient),
        }
    if compiles:
        torch._dynamo.reset()
        hidden_of = their_hidden(torch.compile(theirs, dynamic=False))
        compiled = {"transformers-compiled": embedding_step(hidden_of, mask)}
        if case.trains:
            hidden_of_ours = packed_hidden(torch.compile(ours, dynamic=False))
            compiled = {
                "packed-compiled": training_step(ours, hidden_of_ours, packed_gradient),
                "transformers-compiled": training_step(theirs, hidden_of, batch.gradient),
            }
        steps |= {name: step for name, step in compiled.items() if runs(step)}
    return steps


def runs(step: Step) -> bool:
    try:
        step()
    except Exception as error:
        print(f"a peer is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def check_agreement(case: Case, results: dict[str, Tensor], mask: Tensor) -> None:
    """Every contestant computes what the first one does, at real tokens and to rounding; with dropout, results of
    the same size."""
    picked = {name: (x[mask] if x.ndim == 3 else x).detach().float() for name, x in results.items()}
    expected = next(iter(picked.values()))
    for name, actual in picked.items():
        if case.dropout > 0:
            error = (actual.norm() / expected.norm() - 1).abs().item()
        else:
            error = ((actual - expected).norm() / expected.norm()).item()
        if not error < AGREEMENT:
            raise RuntimeError(f"{case}: {name}: relative difference {error:.2e}")


def wall_times(steps: dict[str, Step]) -> dict[str, Timing]:
    """Without a GPU, one step of each: no measurement."""
    times = {name: host_us(step) for name, step in steps.items()}
    return {name: Timing(value, value, value) for name, value in times.items()}


def host_us(step: Step, samples: int = 1) -> float:
    """Median time from a step's call to its return, with an idle GPU before."""
    times = []
    for _ in range(samples):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def measure(
    case: Case, config: BertConfig, smoke: bool, compiles: bool, samples: int
) -> list[dict[str, Any]]:
    device, dtype = ("cpu", torch.float32) if smoke else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    batch = make_batch(case, config, device, dtype)
    steps = make_contestants(case, config, batch, device, dtype, compiles)
    check_agreement(case, {name: step() for name, step in steps.items()}, batch.mask)
    # Several steps in a row, as in a training loop: what waits for the GPU in each of them shows.
    times = (
        wall_times(steps)
        if smoke
        else interleaved_times(steps, samples=samples, warmup=3, min_sample_us=100_000.0)
    )
    return [
        {
            **asdict(case),
            "contestant": name,
            "real_tokens": batch.tokens,
            "median_us": round(timing.median_us, 1),
            "p20_us": round(timing.p20_us, 1),
            "p80_us": round(timing.p80_us, 1),
            "host_us": round(host_us(steps[name], 1 if smoke else 10), 1),
            "real_tokens_per_s": round(batch.tokens / timing.median_us * 1e6),
            "sequences_per_s": round(case.batch / timing.median_us * 1e6, 1),
        }
        for name, timing in times.items()
    ]


def cases(smoke: bool, quick: bool) -> list[tuple[Case, BertConfig]]:
    if smoke:
        shapes = [Case("training", 3, 16, 0.0), Case("training", 3, 16, 0.1), Case("embeddings", 3, 16, 0.0)]
        return [(case, TINY) for case in shapes]
    batches = (32,) if quick else (32, 64, 128)
    training = [Case("training", batch, 512, dropout) for dropout in (0.0, 0.1) for batch in batches]
    embeddings = [Case("embeddings", batch, 128, 0.0) for batch in (64, 512)]
    return [(case, BASE) for case in training] + [(case, MINILM) for case in embeddings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", default="bert.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one batch size, fewer samples")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of transformers out")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU; no result file")
    arguments = parser.parse_args()
    ceilings = {} if arguments.smoke else measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for case, config in cases(arguments.smoke, arguments.quick):
        compiles = not (arguments.smoke or arguments.no_compile)
        measured = measure(case, config, arguments.smoke, compiles, samples=6 if arguments.quick else 9)
        rows += measured
        for row in measured:
            print("  ".join(str(value) for value in row.values()), flush=True)
        if not arguments.smoke:
            write_result(arguments.json, "bert", rows, ceilings)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
