#!/usr/bin/env python3
"""Golden values of policy-gradient losses and their advantages, computed in float64 from formulas written here.

usage: python gen_policy.py OUT            writes OUT/policy.safetensors

Nothing of any RLHF system is imported: only torch (autograd, float64) and safetensors. The functions of TRL 1.16, verl
1dda039, OpenRLHF 3c3be62, NeMo RL 7ea279a, prime-rl 559b447, SkyRL a956457 and open-instruct e6c3044 gave the same numbers on
these tensors, to 1e-7 where they round to float32 or add 1e-8 to a count, else to 1e-14. l: log-probs of the policy, o: when
sampled, r: reference, q: of another sampling engine, A: advantage, x = exp(l - o), m: mask, sg: stop gradient.
Names: s{seed}/in/*, 12 sequences in 3 groups of 4, padded to 9 tokens, pads are 0; s{seed}/adv/NAME; s{seed}/pg/NAME/{loss,d_logp}.
"""
import math, sys
import torch
from safetensors.torch import save_file
torch.set_num_threads(1); torch.set_default_dtype(torch.float64)
G, MAXLEN = 4, 12                                       # samples of a prompt; tokens that a sequence counts as


def batch(seed):
    """12 ragged sequences, 3 groups of 4.  Group 2 has equal rewards (zero spread); log-ratios reach both sides of every clip."""
    g = torch.Generator().manual_seed(1000 + seed)
    rn = lambda *s: torch.randn(*s, generator=g); ru = lambda *s: torch.rand(*s, generator=g)
    B = 12
    n = torch.cat([torch.tensor([1, 9]), torch.randint(1, 10, (B - 2,), generator=g)])[torch.randperm(B, generator=g)]
    T = int(n.max()); m = (torch.arange(T)[None] < n[:, None]).double()
    l = -(0.03 + 3.2 * ru(B, T) ** 1.5)                 # probabilities from .04 to .97
    jump = lambda p, s: (ru(B, T) < p).double() * s * rn(B, T)
    neg = lambda x: -(-x).clamp(min=0.01)               # keep log-probs negative
    o = neg(l + 0.15 * rn(B, T) + jump(0.3, 1.1)); r = neg(l + 0.3 * rn(B, T)); q = neg(o + 0.05 * rn(B, T) + jump(0.3, 1.1))
    R = torch.cat([rn(4), (torch.tensor([1., 0., 0., 1.])), torch.full((4,), 0.5)])
    R01 = torch.tensor([1., 0., 0., 1., 0., 0., 0., 0., 1., 1., 1., 0.])
    d = dict(logp=l * m, old_logp=o * m, ref_logp=r * m, rollout_logp=q * m, mask=m, lengths=n, rewards=R, rewards01=R01,
             rewards2=torch.stack([R, (ru(B) > 0.4).double()], 1), greedy_rewards=rn(3), values=rn(B, T) * m, entropy=(0.2 + 2 * ru(B, T)) * m,
             teacher_logp=neg(l + 0.5 * rn(B, T)) * m, obs_mask=(ru(B, T) < 0.3).double() * m)
    return d


grp = lambda x: x.view(-1, G)
def group_adv(R, scale="group", eps=1e-4):
    g = grp(R); a = g - g.mean(1, keepdim=True)
    if scale == "group": a = a / (g.std(1, keepdim=True) + eps)          # unbiased std
    elif scale == "batch": a = a / (R.std() + eps)
    return a.reshape(-1)
def loo(R): g = grp(R); return (g - (g.sum(1, keepdim=True) - g) / (G - 1)).reshape(-1)
mmean = lambda x, m: (x * m).sum() / m.sum()
def whiten(x, m, unbiased=True, eps_inside=True):
    mu = mmean(x, m); N = m.sum(); v = ((x - mu) ** 2 * m).sum() / N
    if unbiased: return (x - mu) / torch.sqrt(v * N / (N - 1) + 1e-8)    # verl, TRL
    return (x - mu) / torch.sqrt(v.clamp(min=1e-8))                       # OpenRLHF, NeMo RL
def to_go(rew, m, gamma=1.0):
    out, run = torch.zeros_like(rew), torch.zeros(rew.shape[0])
    for t in reversed(range(rew.shape[1])):
        run = rew[:, t] + gamma * run; out[:, t] = run * m[:, t]; run = run * m[:, t]
    return out
def terminal(R, n, T): x = torch.zeros(len(R), T); x[torch.arange(len(R)), n - 1] = R; return x

def advantages(d):
    R, R01, m, n = d["rewards"], d["rewards01"], d["mask"], d["lengths"]; T = m.shape[1]; tok = lambda a: a[:, None] * m
    g = grp(R); s1, s2 = g.sum(1, keepdim=True) - g, (g * g).sum(1, keepdim=True) - g * g
    b = s1 / (G - 1); sd = ((s2 / (G - 1) - b * b).clamp(min=0) * (G - 1) / (G - 2)).sqrt()
    o_r = d["old_logp"] - d["ref_logp"]; L = n.double(); gl = grp(L); mu = grp(R01).mean(1, keepdim=True)
    ob = (gl * grp(R)).sum(1, keepdim=True) / gl.sum(1, keepdim=True)
    pen = -((L - 5).clamp(min=0, max=4)) / 4            # soft overlong penalty, at most 9 tokens, the last 4 are too long
    base = group_adv(R, "none")
    return dict(
        trl_group=group_adv(R), trl_batch=group_adv(R, "batch"), dr_grpo=base, verl_grpo=group_adv(R, eps=1e-6), openrlhf_group_norm=group_adv(R, eps=1e-9),
        nemo_grpo=torch.where(sd > 0, (g - b) / (sd + 1e-6), g - b).reshape(-1),       # mean and std of the other samples
        rloo=loo(R), rloo_trl_kl=loo(R - 0.05 * (o_r * m).sum(1)),
        reinforce_pp_verl=whiten(to_go(terminal(R, n, T), m), m) * m,
        reinforce_pp_verl_kl=whiten(to_go(terminal(R, n, T) - 0.001 * o_r * m, m), m) * m,
        reinforce_pp_openrlhf=whiten(to_go(terminal(R.clamp(-10, 10), n, T) - 0.01 * o_r.clamp(-10, 10) * m, m), m, unbiased=False) * m,
        reinforce_pp_baseline_verl=whiten(tok(base), m) * m, reinforce_pp_baseline_openrlhf=whiten(tok(base), m, unbiased=False) * m,
        opo=(grp(R) - ob).reshape(-1), maxrl_prime=torch.where(mu > 0, (grp(R01) - mu) / mu.clamp(min=1e-300), torch.zeros_like(grp(R01))).reshape(-1),
        rloo_norm=(loo(R) - loo(R).mean()) / (loo(R).std() + 1e-4),
        reinforce_pp_nemo=whiten(tok(R) - 0.01 * kl_of(d["old_logp"], d["ref_logp"], "k3") * m, m, unbiased=False) * m,
        reinforce_pp_baseline_nemo=whiten(tok(base), m, unbiased=False) * m,
        remax_verl=to_go(terminal(R, n, T), m) - tok(d["greedy_rewards"].repeat_interleave(G)),
        gpg=len(R) / (R != 0).sum() * base, dapo=group_adv(R + pen))


def clip_loss(ratio, A, lo=0.2, hi=0.2, delta=None, dual=None):
    r1 = ratio if delta is None else ratio.clamp(max=delta)
    L = -torch.minimum(r1 * A, ratio.clamp(1 - lo, 1 + hi) * A)
    if dual is not None: L = torch.where(A < 0, torch.minimum(L, -dual * A), L)
    return L
def kl_of(l, r, kind):
    x = r - l
    return {"k1": -x, "k2": x * x / 2, "k3": torch.exp(x) - 1 - x}[kind]
def agg(x, m, mode):
    return {"token-mean": lambda: (x * m).sum() / m.sum(), "seq-mean-token-mean": lambda: ((x * m).sum(1) / m.sum(1)).mean(),
            "seq-mean-token-sum": lambda: (x * m).sum(1).mean(), "const": lambda: (x * m).sum() / (m.shape[0] * MAXLEN)}[mode]()
seqmean = lambda x, m: ((x * m).sum(1) / m.sum(1))[:, None]


def losses(d, A, put):
    """put(name, advantage, f): f(l, entropy, A) -> scalar."""
    o, r, q, m = d["old_logp"], d["ref_logp"], d["rollout_logp"], d["mask"]
    TOK, SEQ, SUM = "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"
    x = lambda l: torch.exp(l - o); s = lambda l: torch.exp(seqmean(l - o, m)); k = lambda l, kind="k3": kl_of(l, r, kind); sg = lambda t: t.detach()
    P = lambda name, adv, mode, f: put(name, adv, lambda l, e, a: agg(f(l, a), m, mode))
    # TRL
    T = "trl_group"
    P("trl/grpo", T, SEQ, lambda l, a: clip_loss(x(l), a))
    P("trl/dr_grpo", "dr_grpo", "const", lambda l, a: clip_loss(x(l), a))
    P("trl/dapo", T, TOK, lambda l, a: clip_loss(x(l), a))
    P("trl/dapo_batch", "trl_batch", TOK, lambda l, a: clip_loss(x(l), a))
    P("trl/dapo_clip_higher", T, TOK, lambda l, a: clip_loss(x(l), a, .2, .28))
    P("trl/dapo_delta", T, TOK, lambda l, a: clip_loss(x(l), a, delta=1.5))
    P("trl/dapo_beta", T, TOK, lambda l, a: clip_loss(x(l), a) + .04 * k(l) * x(l))
    P("trl/dapo_beta_biased", T, TOK, lambda l, a: clip_loss(x(l), a) + .04 * k(l))
    P("trl/gspo", T, SEQ, lambda l, a: clip_loss(s(l), a, 3e-4, 4e-4).expand_as(m))
    P("trl/gspo_wide", T, SEQ, lambda l, a: clip_loss(s(l), a).expand_as(m))
    P("trl/cispo", T, TOK, lambda l, a: -sg(x(l).clamp(max=5.0)) * a * l)
    P("trl/cispo_tight", T, TOK, lambda l, a: -sg(x(l).clamp(max=1.15)) * a * l)
    def sapo(l, a): t = torch.where(a > 0, 1.0, 1.05); return -4 / t * torch.sigmoid(t * (x(l) - 1)) * a
    P("trl/sapo", T, SEQ, sapo)
    P("trl/luspo", T, SUM, lambda l, a: clip_loss(s(l), a, 2e-3, 2.5e-3).expand_as(m))
    def vespo(l, a):
        w = ((l - o).clamp(-20, 20) * m).sum(1, keepdim=True).clamp(math.log(1e-8), 20); c = torch.where(a >= 0, 2.0, 3.0); lam = torch.where(a >= 0, 3.0, 2.0)
        return -sg(torch.exp(lam + c * w - lam * torch.exp(w))) * a * l
    P("trl/vespo", T, TOK, vespo)
    put("trl/dapo_entropy", T, lambda l, e, a: agg(clip_loss(x(l), a), m, TOK) - .01 * mmean(e, m))
    sx = lambda l: torch.exp(((l - o) * m).sum(1))
    put("trl/rloo", "rloo", lambda l, e, a: clip_loss(sx(l), a[:, 0]).mean())
    put("trl/rloo_norm", "rloo_norm", lambda l, e, a: clip_loss(sx(l), a[:, 0]).mean())
    put("trl/rloo_kl", "rloo_trl_kl", lambda l, e, a: clip_loss(sx(l), a[:, 0]).mean())
    def gmpo(l, a, e): y = torch.where(a > 0, (l - o).clamp(max=e), (l - o).clamp(min=-e)); return (-torch.exp(seqmean(y, m)) * a).mean()
    put("trl/gmpo", T, lambda l, e, a: gmpo(l, a, .4))
    # papers
    V = "verl_grpo"
    P("deepseekmath/grpo", V, SEQ, lambda l, a: clip_loss(x(l), a) + .04 * k(l))
    P("deepseek_r1/grpo", V, SEQ, lambda l, a: clip_loss(x(l), a, 10., 10.) + .001 * k(l))
    P("paper/dapo", "dapo", TOK, lambda l, a: clip_loss(x(l), a, .2, .28))
    # verl
    van = lambda l, a: clip_loss(x(l), a, dual=3.0)
    P("verl/vanilla_token-mean", V, TOK, van); P("verl/vanilla_seq-mean-token-sum", V, SUM, van)
    P("verl/vanilla_dual_1.5", V, TOK, lambda l, a: clip_loss(x(l), a, dual=1.5))
    P("verl/gspo", V, SEQ, lambda l, a: clip_loss(torch.exp(l - sg(l) + sg(seqmean(l - o, m))), a))
    P("verl/cispo", V, TOK, lambda l, a: -sg(x(l).clamp(.8, 1.2)) * a * l)
    P("verl/sapo", V, SEQ, sapo)
    def dtv(l, a, c=20., t=.2): p = sg(torch.exp(l) - torch.exp(o)); return -a * sg(x(l).clamp(max=c)) * l * torch.where(a > 0, p <= t, p >= -t).double()
    P("verl/dppo_tv", V, TOK, dtv); P("verl/dppo_tv_c3", V, TOK, lambda l, a: dtv(l, a, 3.)); P("verl/dppo_tv_tight", V, TOK, lambda l, a: dtv(l, a, 20., .05))
    def dkl(l, a, t=.02):
        p0, p = torch.exp(o), torch.exp(l); D = sg(p0 * (o - l) + (1 - p0) * torch.log((1 - p0 + 1e-8) / (1 - p + 1e-8)))
        return -a * sg(x(l).clamp(max=20.)) * l * torch.where(a > 0, (D <= t) | (p <= p0), (D <= t) | (p >= p0)).double()
    P("verl/dppo_kl", V, TOK, dkl)
    for n in ("opo", "rloo"): P("verl/" + n, n, TOK, van)
    P("verl/reinforce_pp", "reinforce_pp_verl", TOK, van); P("verl/reinforce_pp_kl", "reinforce_pp_verl_kl", TOK, van)
    P("verl/reinforce_pp_baseline", "reinforce_pp_baseline_verl", TOK, van)
    put("verl/geo_mean", V, lambda l, e, a: gmpo(l, a, .2))
    P("verl/gpg", "gpg", TOK, lambda l, a: -a * l); P("verl/remax", "remax_verl", TOK, van)
    # prime-rl and SkyRL, whose anchor is q
    def prime(l, a, t=.2, c=1e-3): p = sg(torch.exp(l) - torch.exp(q)); return -(~torch.where(a > 0, p > t, p < -t)).double() * a * torch.exp(l - q) + c * (l - q) ** 2
    P("prime/default", "dr_grpo", TOK, prime); P("prime/default_tight", "dr_grpo", TOK, lambda l, a: prime(l, a, .05)); P("prime/maxrl", "maxrl_prime", TOK, prime)
    P("skyrl/dppo_tv", V, TOK, lambda l, a: prime(l, a, .2, 0.))
    # NeMo RL
    N = "nemo_grpo"; w = lambda l: torch.exp(l - sg(l))
    P("nemo/grpo", N, TOK, lambda l, a: clip_loss(x(l), a) + .01 * w(l) * k(l))
    P("nemo/gspo", N, SEQ, lambda l, a: clip_loss(s(l), a) + .01 * w(l) * k(l))
    for n in ("k1", "k2"): P("nemo/grpo_" + n, N, TOK, lambda l, a, n=n: clip_loss(x(l), a) + .01 * w(l) * k(l, n))
    P("nemo/cispo", N, TOK, lambda l, a: -sg(x(l).clamp(.8, 1.2)) * a * l)
    P("nemo/reinforce", N, TOK, lambda l, a: -a * l)
    for n in ("reinforce_pp", "reinforce_pp_baseline"): P("nemo/" + n, n + "_nemo", TOK, lambda l, a: clip_loss(x(l), a))
    # OpenRLHF, open-instruct
    O = "openrlhf_group_norm"
    P("openrlhf/ppo_token", O, TOK, lambda l, a: clip_loss(x(l), a)); P("openrlhf/ppo_sample", O, SEQ, lambda l, a: clip_loss(x(l), a))
    P("openrlhf/ppo_dual", O, TOK, lambda l, a: clip_loss(x(l), a, dual=3.)); P("openrlhf/gspo", O, SEQ, lambda l, a: clip_loss(s(l), a).expand_as(m))
    P("openrlhf/reinforce", "reinforce_pp_openrlhf", TOK, lambda l, a: clip_loss(x(l), a))
    P("openrlhf/reinforce_baseline", "reinforce_pp_baseline_openrlhf", TOK, lambda l, a: clip_loss(x(l), a))
    P("openinstruct/cispo", O, TOK, lambda l, a: -a * sg(x(l).clamp(max=1.272)) * l)


TENS = {}
for seed in (0, 7):
    d, p = batch(seed), f"s{seed}/"
    A = advantages(d)
    for key in ("logp", "old_logp", "ref_logp", "rollout_logp", "lengths", "rewards", "rewards01", "greedy_rewards", "entropy"): TENS[p + "in/" + key] = d[key]
    for key, a in A.items(): TENS[p + "adv/" + key] = a

    def put(name, adv, f):
        l = d["logp"].clone().requires_grad_(); a = A[adv]
        L = f(l, d["entropy"], a if a.dim() == 2 else a[:, None]); L.backward()
        TENS[p + f"pg/{name}/loss"], TENS[p + f"pg/{name}/d_logp"] = L.detach(), l.grad * d["mask"]
    losses(d, A, put)
save_file({k: v.contiguous().clone() for k, v in TENS.items()}, sys.argv[1] + "/policy.safetensors")
