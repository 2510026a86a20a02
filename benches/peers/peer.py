#!/usr/bin/env python3
"""The work of Warpo's benches done by PyTorch and transformers; prints seconds of each repetition as JSON.

usage: peer.py make DIR [--size tiny]                     random models and data for both sides
       peer.py {generate,sft,ppo} --impl IMPL [--size tiny] [--reps 3]

generate: batch 32, prompt 32, 64 new tokens; impl hf (transformers generate), fast (fastgpt.py)
sft:      batch 16 x 128, AdamW, clip 1.0;    impl hf, fast, fast_compile
ppo:      policy, reference, value and reward model; batch 32, 32 + 64 tokens, 4 epochs x 4
          minibatches, GAE(1, .95), whitened advantages, clips .2, k1 penalty .05; impl fast, fast_compile"""
import argparse, json, os, time

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
import torch, torch.nn.functional as F
from fastgpt import GPT

SIZES = {
    "tiny": dict(n_layer=4, n_embd=256, n_head=4, vocab_size=5000, n_positions=256),
    "small": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=1024),
}


def hf_config(size):
    from transformers import GPT2Config
    return GPT2Config(**SIZES[size], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def make(a):
    from transformers import GPT2LMHeadModel, GPT2ForSequenceClassification
    c, v = hf_config(a.size), SIZES[a.size]["vocab_size"]
    GPT2LMHeadModel(c).save_pretrained(f"{a.dir}/model")
    c.num_labels = 1
    GPT2ForSequenceClassification(c).save_pretrained(f"{a.dir}/judge")
    for name, rows, width in [("texts", 16 * 16, 128), ("prompts", 32, 32)]:
        with open(f"{a.dir}/{name}.jsonl", "w") as f:
            for ids in torch.randint(3, v, (rows, width)).tolist():
                f.write(json.dumps({"input_ids": ids}) + "\n")


def generate(a):
    v, batch, prompt, new = SIZES[a.size]["vocab_size"], 32, 32, 64
    ids = torch.randint(3, v, (batch, prompt))
    if a.impl == "fast":
        m = GPT(SIZES[a.size]).eval()
        return lambda: m.generate(ids, new)
    from transformers import GPT2LMHeadModel, GenerationConfig
    m = GPT2LMHeadModel(hf_config(a.size)).eval()
    g = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(ids)

    @torch.no_grad()
    def run():
        assert m.generate(input_ids=ids, attention_mask=mask, generation_config=g).shape[1] == prompt + new
    return run


def sft(a):
    ids = torch.randint(3, SIZES[a.size]["vocab_size"], (16, 128))
    if a.impl == "hf":
        from transformers import GPT2LMHeadModel
        m = GPT2LMHeadModel(hf_config(a.size)).train()
        loss = lambda x: m(input_ids=x, labels=x, use_cache=False).loss
    else:
        m = GPT(SIZES[a.size])
        loss = lambda x: F.cross_entropy(m.logits(m.hidden(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten())
    if "compile" in a.impl:
        loss = torch.compile(loss)
    opt = torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def run():
        loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return run


def ppo(a):
    c, batch, prompt, new = SIZES[a.size], 32, 32, 64
    policy, reference, value, reward = GPT(c), GPT(c), GPT(c, True), GPT(c, True)
    reference.load_state_dict(policy.state_dict())
    params = [*policy.parameters(), *value.parameters()]
    opt = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    prompts = torch.randint(3, c["vocab_size"], (batch, prompt))

    def logps(m, ids):
        h = m.hidden(ids[:, :-1])[:, prompt - 1:]
        return -F.cross_entropy(m.logits(h).flatten(0, 1), ids[:, prompt:].flatten(), reduction="none").view(-1, new)

    def loss(ids, old, adv, ret, old_v):
        ratio = torch.exp(logps(policy, ids) - old)
        v = value.values(ids[:, :-1])[:, prompt - 1:]
        pg = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
        clipped = torch.clamp(v, old_v - 0.2, old_v + 0.2)
        return pg + 0.05 * torch.maximum((v - ret) ** 2, (clipped - ret) ** 2).mean()
    if "compile" in a.impl:
        loss = torch.compile(loss)

    def run():
        ids, old = (x.clone() for x in policy.generate(prompts, new))
        with torch.no_grad():
            r = -0.05 * (old - logps(reference, ids))
            r[:, -1] += reward.values(ids)[:, -1]
            old_v = value.values(ids[:, :-1])[:, prompt - 1:]
            adv, last, nxt = torch.empty_like(r), torch.zeros(batch), torch.zeros(batch)
            for t in range(new - 1, -1, -1):
                last = r[:, t] + nxt - old_v[:, t] + 0.95 * last
                nxt = old_v[:, t]
                adv[:, t] = last
            ret = adv + old_v
            adv = (adv - adv.mean()) * torch.rsqrt(adv.var() + 1e-8)
        for _ in range(4):
            for mb in torch.randperm(batch).chunk(4):
                loss(ids[mb], old[mb], adv[mb], ret[mb], old_v[mb]).backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                opt.step()
                opt.zero_grad(set_to_none=True)
    return run


p = argparse.ArgumentParser()
p.add_argument("what", choices=["make", "generate", "sft", "ppo"])
p.add_argument("dir", nargs="?")
p.add_argument("--impl", default="fast")
p.add_argument("--size", choices=list(SIZES), default="tiny")
p.add_argument("--reps", type=int, default=3)
p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
a = p.parse_args()
torch.manual_seed(0)
torch.set_num_threads(a.threads)
if a.what == "make":
    make(a)
else:
    run, seconds = {"generate": generate, "sft": sft, "ppo": ppo}[a.what](a), []
    for rep in range(a.reps + 1):
        start = time.perf_counter()
        run()
        if rep:  # the first warms up, and compiles
            seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))
