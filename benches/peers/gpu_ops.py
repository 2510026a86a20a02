"""The ops of benches/gpu.rs in torch, eager and compiled, at the same sizes, timed by events on the same GPU.

usage: gpu_ops.py RESULTS.json      adds torch's times to the file that `cargo bench --bench gpu` wrote, prints a table
       gpu_ops.py --cpu             runs each op once on the CPU at a tiny size: shows that they run, measures nothing
"""

import json
import statistics
import sys

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TINY = sys.argv[1:] == ["--cpu"]
DEV = "cpu" if TINY else "cuda"
ROWS, HIDDEN, MLP, HEADS, VOCAB, BATCH = (9, 64, 80, 4, 99, 2) if TINY else (8192, 4096, 14336, 32, 128256, 256)
WEIGHTS, TOKENS = (5000, 1000) if TINY else (500_000_000, 16_000_000)
SETS = 1 if TINY else 4  # more than one round of these is larger than any cache
BF16, F32 = torch.bfloat16, torch.float32
# A graph is kept for several backward passes: its tensors must not be reused in place.
torch._functorch.config.donated_buffer = False


def randn(*shape, dtype=BF16):
    return torch.randn(*shape, device=DEV, dtype=dtype)


class Backward:
    """The gradients of f in all its inputs; forward once, outside the timing."""

    def __init__(self, f):
        self.f = f

    def prepared(self, inputs):
        y = self.f(*[t.requires_grad_(t.is_floating_point()) for t in inputs])
        return (y, [t for t in inputs if t.requires_grad], torch.randn_like(y))

    def __call__(self, y, inputs, dy):
        torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def compiled(self):
        return Backward(compiled(self.f))


def compiled(f):
    return f.compiled() if hasattr(f, "compiled") else torch.compile(f)


def rms_norm(x, w):
    return F.rms_norm(x, (HIDDEN,), w, 1e-5)


def layer_norm(x, w, b):
    return F.layer_norm(x, (HIDDEN,), w, b, 1e-5)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def sample(z, k=None, p=None):
    if k is not None:
        z = z.masked_fill(z < z.topk(k).values[:, -1:], -torch.inf)
    if p is not None:
        s, order = z.sort(-1)
        drop = s.softmax(-1).cumsum(-1) <= 1 - p
        z = z.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(z.float().softmax(-1), 1)


def policy_loss(logp, old, adv):
    ratio = (logp - old).exp()
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    # verl and TRL read their metrics off the same columns
    with torch.no_grad():
        clipped = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
        approx_kl = (ratio - 1 - (logp - old)).mean()
    return loss.mean(), clipped, approx_kl


class Loss:
    """A loss and its gradient in the first column."""

    def __init__(self, f):
        self.f = f

    def __call__(self, *columns):
        out = self.f(*columns)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, columns[0])

    def compiled(self):
        return Loss(torch.compile(self.f))


def chosen(h, w, targets):
    """Log-probs of the chosen tokens."""
    logits = (h @ w.T).float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Chunked:
    """Log-probs with the logits of 1024 tokens at a time in memory; the backward pass makes them again."""

    def __init__(self, f=chosen):
        self.f = f

    def __call__(self, h, w, targets):
        parts = zip(h.split(1024), targets.split(1024))
        return torch.cat([checkpoint(self.f, h, w, t, use_reentrant=False) for h, t in parts])

    def compiled(self):
        return Chunked(torch.compile(self.f))


def no_grad(f):
    """The forward pass alone."""

    class Forward:
        def __call__(self, *inputs):
            with torch.no_grad():
                f(*inputs)

        def compiled(self):
            return no_grad(compiled(f))

    return Forward()


# of Qwen2.5: hidden, vocabulary
HEADS_OF = {"tiny": (64, 99)} if TINY else {"0.5b": (896, 151936), "1.5b": (1536, 151936), "7b": (3584, 152064)}
HEAD_TOKENS = (1030,) if TINY else (2048, 4096, 8192, 16384)


def head(tokens, hidden, vocab):
    # logits as small as a model's
    h, w = randn(tokens, hidden), randn(vocab, hidden) / hidden**0.5
    return h, w, torch.randint(vocab, (tokens,), device=DEV)


def heads():
    for model, sizes in HEADS_OF.items():
        for tokens in HEAD_TOKENS:
            yield f"{model}/{tokens}", lambda: head(tokens, *sizes)


def ops():
    """Name, a function that makes an input set, the op on it."""
    x = lambda: (randn(ROWS, HIDDEN), randn(HIDDEN))
    yield "norm/rms/forward", x, rms_norm
    yield "norm/rms/backward", x, Backward(rms_norm)
    xb = lambda: (randn(ROWS, HIDDEN), randn(HIDDEN), randn(HIDDEN))
    yield "norm/layer/forward", xb, layer_norm
    yield "norm/layer/backward", xb, Backward(layer_norm)
    yield "activation/swiglu", lambda: (randn(ROWS, 2 * MLP),), swiglu
    yield "activation/swiglu_backward", lambda: (randn(ROWS, 2 * MLP),), Backward(swiglu)
    gelu = lambda x: F.gelu(x, approximate="tanh")
    yield "activation/gelu", lambda: (randn(ROWS, MLP),), gelu
    yield "activation/gelu_backward", lambda: (randn(ROWS, MLP),), Backward(gelu)
    yield "residual", lambda: (randn(ROWS, HIDDEN), randn(ROWS, HIDDEN)), lambda y, x: y.add_(x)
    d = HIDDEN // HEADS
    angles = lambda: (randn(ROWS, HEADS, d), randn(ROWS, 1, d // 2), randn(ROWS, 1, d // 2))
    yield "rope", angles, rotate
    # words of a text: few ids are most of it
    ids = lambda: (torch.rand(ROWS, device=DEV) ** 4 * VOCAB).long()
    yield "embedding/forward", lambda: (ids(), randn(VOCAB, HIDDEN)), F.embedding
    # into a gradient that is there, as Warpo does; torch's own backward makes a new dense one
    into = lambda: (randn(VOCAB, HIDDEN, dtype=F32), ids(), randn(ROWS, HIDDEN))
    yield "embedding/backward", into, lambda d, i, dy: d.index_add_(0, i, dy.float())
    z = lambda: (randn(BATCH, VOCAB),)
    yield "sample/greedy", z, lambda z: z.argmax(-1)
    yield "sample/whole", z, sample
    yield "sample/top_k", z, lambda z: sample(z, k=50)
    yield "sample/top_p", z, lambda z: sample(z, p=0.9)
    places = lambda: tuple(torch.arange(BATCH, device=DEV) for _ in range(3))
    yield "next_ids", places, lambda ids, rows, tokens: ids.index_copy_(0, rows, tokens[rows])
    columns = lambda n: lambda: tuple(randn(TOKENS, dtype=F32) for _ in range(n))
    # of which the first has a gradient
    loss = lambda n: lambda: (randn(TOKENS, dtype=F32).requires_grad_(), *columns(n - 1)())
    yield "policy_loss", loss(3), Loss(policy_loss)
    clip = lambda v, old: old + (v - old).clamp(-0.2, 0.2)
    value_loss = lambda v, old, ret: torch.maximum((v - ret) ** 2, (clip(v, old) - ret) ** 2).mean() / 2
    yield "value_loss", loss(3), Loss(value_loss)
    yield "nll", loss(2), Loss(lambda logp, w: -(logp * w).mean())
    pairs = lambda: (randn(TOKENS // 2, 2, dtype=F32).requires_grad_(),)
    yield "bradley_terry", pairs, Loss(lambda s: -F.logsigmoid(s[:, 0] - s[:, 1]).mean())
    k3 = lambda d: torch.exp(-d) - 1 + d
    yield "kl", columns(2), lambda logp, ref: k3(logp - ref)
    yield "whiten", columns(1), lambda x: (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)
    yield "grad_norm", lambda: (randn(WEIGHTS, dtype=F32),), lambda g: g.norm()
    yield "first_bad", lambda: (randn(WEIGHTS, dtype=F32),), lambda g: g.isfinite().all()
    for name, inputs in heads():
        yield f"logprob/forward/{name}", inputs, no_grad(Chunked())
        yield f"logprob/backward/{name}", inputs, Backward(Chunked())


def time(f, sets):
    """Median seconds of a call, rotating among the sets."""
    for s in sets:
        f(*s)
    if TINY:
        return 0.0
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for s in sets:
            f(*s)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(sets))
    return statistics.median(times)


def timed(f, make):
    sets = [make() for _ in range(SETS)]
    return time(f, [f.prepared(s) for s in sets] if isinstance(f, Backward) else sets)


def adamw():
    p = randn(WEIGHTS, dtype=F32).requires_grad_()
    p.grad = randn(WEIGHTS, dtype=F32)
    optimizer = torch.optim.AdamW([p], lr=1e-4, fused=not TINY)
    return time(lambda: optimizer.step(), [()])


def liger(ours):
    """Liger's fused linear cross entropy, where it is installed: forward and backward in one, as it computes them."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return
    loss = LigerFusedLinearCrossEntropyLoss()

    def both(h, w, targets):
        torch.autograd.grad(loss(w, h, targets), (h, w))

    for name, inputs in heads():
        passes = [ours.get(f"logprob/{direction}/{name}") for direction in ("forward", "backward")]
        if None in passes:
            continue
        sets = [inputs() for _ in range(SETS)]
        for h, w, _ in sets:
            h.requires_grad_(), w.requires_grad_()
        seconds, warpo = time(both, sets), sum(op["microseconds"] for op in passes)
        passes[1]["liger forward + backward us"] = seconds * 1e6
        print(f"{'liger/' + name:28} {warpo:10.1f} {seconds * 1e6:10.1f} {'':>10}   {seconds * 1e6 / warpo:.2f}")
        del sets
        torch.cuda.empty_cache()


# head_dim: heads; sequences of these lengths, 16,384 tokens in all
ATTENTION = {64: 2} if TINY else {64: 32, 128: 16}
LENS = (35,) if TINY else (1024, 4096, 16384)
# heads of queries and of keys, head_dim, sequences, positions of each
DECODED = [("tiny", 4, 2, 64, 2, 70)] if TINY else [
    ("qwen-0.5b", 14, 2, 64, 512, 4096), ("llama-8b", 32, 8, 128, 64, 4096), ("llama-8b", 32, 8, 128, 512, 512)
]


def attentions():
    """Name, heads of queries and of keys, head_dim, sequences, queries and positions of each."""
    for d, heads in ATTENTION.items():
        for n in LENS:
            yield f"attention/forward/{d}/{n}", heads, heads, d, (70 if TINY else 16384) // n, n, n
    for model, q, kv, d, count, n in DECODED:
        yield f"attention/decode/{model}/{count}x{n}", q, kv, d, count, 1, n


def attention(ours):
    """torch's scaled_dot_product_attention by FlashAttention and by cuDNN, forward alone, with keys and values that lie
    side by side and not on pages. A decoding step has no mask: its one query sees all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"math": SDPBackend.MATH} if TINY else {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION
    }
    for name, q_heads, kv_heads, d, count, rows, n in attentions():
        if not TINY and name not in ours:
            continue
        # larger than any cache: one set
        q = randn(count, rows, q_heads, d).transpose(1, 2)
        k, v = (randn(count, n, kv_heads, d).transpose(1, 2) for _ in range(2))
        op, said = ours.get(name, {}), []
        warpo = op.get("microseconds", 0.0)
        for backend, kind in backends.items():
            def run(q, k, v):
                with torch.no_grad(), sdpa_kernel(kind):
                    F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=q_heads != kv_heads)

            try:
                us = time(run, [(q, k, v)]) * 1e6
            except RuntimeError as e:
                said.append(f"{backend} {str(e).splitlines()[0][:40]}")
                continue
            op[f"torch {backend} us"] = us
            said.append(f"{backend} {us:.1f} us, ratio {us / warpo if warpo else 0:.2f}")
        print(f"{name:40} {warpo:10.1f} us  {';  '.join(said)}")
        del q, k, v
        if not TINY:
            torch.cuda.empty_cache()


def product():
    """FLOP/s of an 8192^3 product in bf16, the card's ceiling for what comes to be measured beside it."""
    n = 64 if TINY else 8192
    seconds = time(torch.matmul, [(randn(n, n), randn(n, n)) for _ in range(SETS)])
    return 2 * n**3 / seconds if seconds else 0.0


def main():
    results = {"ops": []} if TINY else json.load(open(sys.argv[1]))
    ours = {op["name"]: op for op in results["ops"]}
    print(f"{'op':28} {'Warpo us':>10} {'eager':>10} {'compiled':>10}   best torch / Warpo")
    for name, make, f in ops():
        if not TINY and name not in ours:
            continue
        times = [timed(f, make)]
        if not TINY:
            times.append(timed(compiled(f), make))
        report(ours, name, *times, *[0.0] * (2 - len(times)))
        if not TINY:
            torch.cuda.empty_cache()
    report(ours, "adamw", adamw(), 0.0)
    liger(ours)
    attention(ours)
    if TINY:
        product()
    else:
        results["torch"], results["8192^3 product TFLOP/s"] = torch.__version__, product() / 1e12
        json.dump(results, open(sys.argv[1], "w"), indent=2)


def report(ours, name, eager, compiled):
    op = ours.get(name, {})
    op["torch eager us"], op["torch compiled us"] = eager * 1e6, compiled * 1e6
    times = [t * 1e6 for t in (eager, compiled) if t > 0]
    warpo = op.get("microseconds", 0.0)
    ratio = min(times) / warpo if times and warpo else 0.0
    print(f"{name:28} {warpo:10.1f} {eager * 1e6:10.1f} {compiled * 1e6:10.1f}   {ratio:.2f}")


main()
