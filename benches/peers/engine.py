"""The work of benches/engine.rs by Hugging Face transformers and torch in bf16: generation, and an iteration of PPO with
policy, reference, value and reward model of one shape. Weights are random, no sample ends early, nothing is padded.

usage: engine.py RESULTS.json      models and sizes of the file that `cargo bench --bench engine` wrote, to which it adds
                                   torch's times; prints ratios
       engine.py --cpu             a tiny model once on the CPU: shows that all runs, measures nothing
"""

import gc
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel

TINY = sys.argv[1:] == ["--cpu"]
DEV = "cpu" if TINY else "cuda"
BF16 = torch.bfloat16
ITERATIONS = 2 if TINY else 3  # the first warms up
TINY_MODEL = dict(
    name="tiny", batch=4, prompt=6, new=3, micro_batch_tokens=18,
    hidden=64, layers=2, q_heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=99, phases=[],
)


def config(m):
    return LlamaConfig(
        vocab_size=m["vocab"], hidden_size=m["hidden"], num_hidden_layers=m["layers"], intermediate_size=m["mlp"],
        num_attention_heads=m["q_heads"], num_key_value_heads=m["kv_heads"], head_dim=m["head_dim"],
        max_position_embeddings=1024, rms_norm_eps=1e-6, tie_word_embeddings=True, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )


def made(make):
    """A model on the device in bf16, without ever being there in f32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device(DEV):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


class Scalar(nn.Module):
    """A number for each token: the reward and the value model."""

    def __init__(self, c):
        super().__init__()
        self.trunk, self.score = LlamaModel(c), nn.Linear(c.hidden_size, 1, bias=False)

    def forward(self, ids):
        return self.score(self.trunk(ids, use_cache=False).last_hidden_state).squeeze(-1).float()


class Trained:
    """AdamW on f32 copies of bf16 weights."""

    def __init__(self, model):
        self.weights = list(model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-6, weight_decay=0.0, fused=not TINY)

    def step(self):
        for p, master in zip(self.weights, self.masters):
            master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def now():
    if not TINY:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(f):
    start = now()
    out = f()
    return out, now() - start


def generate(model, m, prompts, **how):
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=m["new"], eos_token_id=None, pad_token_id=0, **how
    )
    with torch.no_grad():
        ids = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    assert ids.shape == (m["batch"], m["prompt"] + m["new"])
    return ids


def fastest(model, m, prompts):
    """Seconds of generation, and how it was: with the cache that grows, or with one of fixed size and compiled steps."""
    best = None
    for how in [{}] if TINY else [{}, {"cache_implementation": "static"}]:
        try:
            seconds = [timed(lambda: generate(model, m, prompts, **how))[1] for _ in range(ITERATIONS)][1:]
        except RuntimeError as e:
            print(f"    generate {how}: {str(e).splitlines()[0][:80]}")
            continue
        print(f"    generate {how or 'as it comes'}: {statistics.mean(seconds):.4f} s")
        if best is None or statistics.mean(seconds) < statistics.mean(best[0]):
            best = seconds, how
    return best


class Ppo:
    def __init__(self, m, policy, micro):
        self.m, self.rows, self.policy = m, micro // (m["prompt"] + m["new"]), policy
        c = policy.config
        self.reference = made(lambda: LlamaForCausalLM(c))
        self.reference.load_state_dict(policy.state_dict())
        self.reward, self.value = made(lambda: Scalar(c)), made(lambda: Scalar(c))
        self.trained = [Trained(policy), Trained(self.value)]

    def logps(self, model, ids):
        """Log-probs of the new tokens."""
        first = self.m["prompt"]
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, first - 1 :]
        logits = model.lm_head(hidden).float().flatten(0, 1)
        return -F.cross_entropy(logits, ids[:, first:].flatten(), reduction="none").view(len(ids), -1)

    def values(self, ids):
        return self.value(ids[:, :-1])[:, self.m["prompt"] - 1 :]

    @torch.no_grad()
    def score(self, ids):
        parts = [(self.logps(self.reference, x), self.values(x), self.reward(x)[:, -1]) for x in ids.split(self.rows)]
        return [torch.cat(column) for column in zip(*parts)]

    @torch.no_grad()
    def advantages(self, values, scores):
        """GAE (1, 0.95) of the scores, whitened. The KL penalty is left out: log-probs are not known before the update."""
        advantages, last, following = torch.empty_like(values), 0.0, 0.0
        for t in reversed(range(values.shape[1])):
            reward = scores if t == values.shape[1] - 1 else 0.0
            last = reward + following - values[:, t] + 0.95 * last
            following = values[:, t]
            advantages[:, t] = last
        white = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
        return white, advantages + values

    def update(self, ids, old_values, advantages, returns):
        columns = (x.split(self.rows) for x in (ids, old_values, advantages, returns))
        for ids, old_v, adv, ret in zip(*columns):
            tokens = self.m["batch"] * self.m["new"]
            logp = self.logps(self.policy, ids)
            # The only update of a step: its log-probs are the old ones, and no pass is needed for those.
            ratio = (logp - logp.detach()).exp()
            (torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).sum() / tokens).backward()
            del logp, ratio
            v = self.values(ids)
            clipped = old_v + (v - old_v).clamp(-0.2, 0.2)
            (0.05 * torch.maximum((v - ret) ** 2, (clipped - ret) ** 2).sum() / tokens).backward()
        for trained in self.trained:
            trained.step()

    def iteration(self, prompts, how):
        """Seconds by phase."""
        start = now()
        ids, sample = timed(lambda: generate(self.policy, self.m, prompts, **how))
        (reference, values, scores), score = timed(lambda: self.score(ids))
        assert reference.isfinite().all()
        _, update = timed(lambda: self.update(ids, values, *self.advantages(values, scores)))
        return {"sample": sample, "score": score, "update": update, "iteration": now() - start}


def run(m, micro):
    """Seconds of each measured call, by phase."""
    torch.manual_seed(0)
    policy = made(lambda: LlamaForCausalLM(config(m)))
    prompts = torch.randint(m["vocab"], (m["batch"], m["prompt"]), device=DEV)
    seconds, how = fastest(policy, m, prompts)
    ppo = Ppo(m, policy, micro)
    all = [ppo.iteration(prompts, how) for _ in range(ITERATIONS)][1:]
    return {"generate": seconds} | {name: [one[name] for one in all] for name in all[0]}


def largest(m):
    """The same with the largest micro-batches that fit, up to Warpo's."""
    micro = m["micro_batch_tokens"]
    while micro >= m["prompt"] + m["new"]:
        try:
            return run(m, micro), micro
        except torch.cuda.OutOfMemoryError:
            print(f"    micro-batches of {micro} tokens do not fit")
        # Here the exception holds no tensor any more.
        micro //= 2
        gc.collect()
        torch.cuda.empty_cache()
    return {}, micro


def main():
    results = {"models": [TINY_MODEL]} if TINY else json.load(open(sys.argv[1]))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for m in results["models"]:
        print(f"{m['name']}: {m['batch']} prompts of {m['prompt']} tokens, {m['new']} new ones each")
        if not TINY:
            torch.cuda.reset_peak_memory_stats()
        all, micro = largest(m)
        ours = {phase["name"]: phase for phase in m["phases"]}
        print(f"    {'phase':<10}{'Warpo s':>10}{'torch s':>10}   torch / Warpo")
        for name, seconds in all.items():
            phase, theirs = ours.get(name, {}), statistics.mean(seconds)
            phase["torch seconds"] = seconds
            warpo = statistics.mean(phase.get("seconds", [0.0]))
            print(f"    {name:<10}{warpo:>10.4f}{theirs:>10.4f}   {theirs / warpo if warpo else 0:.2f}")
        m["torch micro_batch_tokens"] = micro
        if not TINY:
            m["torch memory"] = torch.cuda.max_memory_reserved()
            taken = m.get("memory", {}).get("taken") or 0
            print(f"    memory: Warpo {taken / 2**30:.2f} GiB, torch {m['torch memory'] / 2**30:.2f} GiB")
            gc.collect()
            torch.cuda.empty_cache()
    if not TINY:
        results["torch"], results["transformers"] = torch.__version__, transformers.__version__
        json.dump(results, open(sys.argv[1], "w"), indent=2)


main()
