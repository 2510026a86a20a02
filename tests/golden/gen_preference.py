#!/usr/bin/env python3
"""Golden values of losses on pairs and of unpaired completions, computed in float64 from formulas written here.

usage: python gen_preference.py OUT            writes OUT/preference.safetensors

Nothing of any RLHF system is imported: only torch (autograd, float64) and safetensors. The functions of TRL 1.16,
OpenRLHF 3c3be62, open-instruct e6c3044 and HALOs 4831988 gave the same numbers on these tensors, to 1e-7 where they
round to float32, else to 1e-14. c, r: log-probs of the policy, D: log-ratios to the reference, sg: stop gradient.
Names: s{seed}/pref_in/*, 8 pairs, padded to 9 tokens, pads are 0; s{seed}/pref/NAME/{loss,d_chosen,d_rejected}.
"""
import math, sys
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
torch.set_num_threads(1); torch.set_default_dtype(torch.float64)
TENS = {}


def pairs(seed):
    g = torch.Generator().manual_seed(5000 + seed); N, T = 8, 9
    rn = lambda *s: torch.randn(*s, generator=g); ru = lambda *s: torch.rand(*s, generator=g)
    lc = torch.cat([torch.tensor([1, 9]), torch.randint(1, 10, (N - 2,), generator=g)]); lr = torch.cat([torch.tensor([9, 2]), torch.randint(1, 10, (N - 2,), generator=g)])
    mk = lambda n: (torch.arange(T)[None] < n[:, None]).double(); mc, mr = mk(lc), mk(lr)
    C, Rj = -(0.05 + 2.5 * ru(N, T)) * mc, -(0.05 + 2.5 * ru(N, T)) * mr
    rC, rR = (C + .5 * rn(N, T)).clamp(max=-.01) * mc, (Rj + .5 * rn(N, T)).clamp(max=-.01) * mr
    # log sum_v p_v^2 lies between -H and 0; any value < 0 will do
    return dict(chosen=C, rejected=Rj, ref_chosen=rC, ref_rejected=rR, chosen_mask=mc, rejected_mask=mr, chosen_len=lc, rejected_len=lr,
                lsp_chosen=-(0.1 + 1.5 * ru(N, T)) * mc, lsp_rejected=-(0.1 + 1.5 * ru(N, T)) * mr, kl_policy=(kp := -(3 + 4 * ru(N))), kl_ref=kp - (1.4 if seed == 0 else -0.9) + 0.5 * rn(N), label=(ru(N) < .6).long(), scores=rn(2 * N).round(decimals=1))


def preference(d, put):
    ls_ = F.logsigmoid; sg = torch.sigmoid
    mc, mr, lc, lr = d["chosen_mask"], d["rejected_mask"], d["chosen_len"].double(), d["rejected_len"].double()
    rc, rr = d["ref_chosen"].sum(1), d["ref_rejected"].sum(1); b = .1
    D = "TRL 1.16 trainer/dpo_trainer.py:"
    dc = lambda c: c.sum(1) - rc; dr = lambda r: r.sum(1) - rr; z = lambda c, r: b * (dc(c) - dr(r))
    P = lambda n, f, fo, src, df=None: put(n, f, fo + "; mean over pairs" if "mean" not in fo else fo, src, df)
    P("sigmoid", lambda c, r: -ls_(z(c, r)).mean(), "-log sigma(beta D), D = (c - c_ref) - (r - r_ref), sums over completion tokens", D + "1387", dict(beta=b))
    P("sigmoid_label_smoothing", lambda c, r: (-.9 * ls_(z(c, r)) - .1 * ls_(-z(c, r))).mean(), "-(1-e) log sigma(beta D) - e log sigma(-beta D) (cDPO), e = .1", "OpenRLHF loss.py:346-352; open-instruct dpo_utils.py:556; HALOs CDPO; NOT in TRL's sigmoid", dict(beta=b, label_smoothing=.1))
    P("reference_free", lambda c, r: -ls_(b * (c.sum(1) - r.sum(1))).mean(), "-log sigma(beta (c - r))", "open-instruct dpo_utils.py:551", dict(beta=b))
    P("hinge", lambda c, r: torch.relu(1 - z(c, r)).mean(), "max(0, 1 - beta D)", D + "1390")
    P("ipo_trl", lambda c, r: ((dc(c) / lc - dr(r) / lr - 1 / (2 * b)) ** 2).mean(), "(D_c/n_c - D_r/n_r - 1/(2 beta))^2", D + "1393-1404; HALOs IPO", dict(beta=b))
    P("ipo_openrlhf", lambda c, r: ((dc(c) - dr(r) - 1 / (2 * b)) ** 2).mean(), "(D - 1/(2 beta))^2, not length-normalised", "OpenRLHF loss.py:342; TRL experimental/online_dpo ipo (1252)", dict(beta=b))
    P("exo_pair", lambda c, r: (sg(z(c, r)) * (ls_(z(c, r)) - math.log1p(-1e-3)) + sg(-z(c, r)) * (ls_(-z(c, r)) - math.log(1e-3))).mean(), "KL(sigma(+-beta D) || (1-e, e)), e = 1e-3", D + "1406-1417", dict(label_smoothing=1e-3))
    P("nca_pair", lambda c, r: (-ls_(b * dc(c)) - .5 * ls_(-b * dc(c)) - .5 * ls_(-b * dr(r))).mean(), "-log sigma(bDc) - .5 log sigma(-bDc) - .5 log sigma(-bDr)", D + "1419-1426")
    P("robust", lambda c, r: ((-.9 * ls_(z(c, r)) + .1 * ls_(-z(c, r))) / .8).mean(), "(-(1-e) log sigma(z) + e log sigma(-z))/(1-2e), e = .1", D + "1428-1431", dict(label_smoothing=.1))
    P("bco_pair", lambda c, r: (-ls_(b * dc(c)) - ls_(-b * dr(r))).mean(), "-log sigma(bDc) - log sigma(-bDr) (no running delta in the DPO trainer)", D + "1433-1436")
    P("sppo_hard", lambda c, r: ((dc(c) - .5 / b) ** 2 + (dr(r) + .5 / b) ** 2).mean(), "(Dc - 1/(2b))^2 + (Dr + 1/(2b))^2", D + "1438-1445")
    so = lambda x: torch.sort(x, dim=0)[0]
    P("aot", lambda c, r: -ls_(b * (so(c.sum(1) - r.sum(1)) - so(rc - rr))).mean(), "sort the policy log-ratios c-r and the reference ones over the batch, pair by rank; -log sigma(beta delta)", D + "1447-1456 (older TRL calls this aot_pair)", dict(label_smoothing=0))
    P("aot_unpaired", lambda c, r: -ls_(b * (so(dc(c)) - so(dr(r)))).mean(), "sort Dc and Dr each over the batch, pair by rank", D + "1458-1465 (older TRL calls this aot)", dict(label_smoothing=0))
    P("apo_zero", lambda c, r: (1 - sg(b * dc(c)) + sg(b * dr(r))).mean(), "1 - sigma(bDc) + sigma(bDr)", D + "1467-1473")
    P("apo_down", lambda c, r: (sg(b * dc(c)) + 1 - sg(b * (dc(c) - dr(r)))).mean(), "sigma(bDc) + 1 - sigma(b(Dc - Dr))", D + "1475-1481")
    def disco(c, r): x = z(c, r); w = sg(x / .05); return (-ls_(x) * (1 - w) + torch.exp(-x) * w).mean()
    P("discopop", disco, "x = beta D; w = sigma(x/.05); (1-w)(-log sigma x) + w exp(-x)", D + "1483-1493", dict(discopop_tau=.05))
    P("sigmoid_norm", lambda c, r: -ls_(b * (dc(c) / lc - dr(r) / lr)).mean(), "-log sigma(beta (Dc/n_c - Dr/n_r))", D + "1504-1509")
    P("sft", lambda c, r: -(c * mc).sum() / mc.sum(), "token mean NLL of the chosen", D + "1495-1502")
    P("sigmoid_plus_sft", lambda c, r: -ls_(z(c, r)).mean() + .5 * -(c * mc).sum() / mc.sum(), "loss_type [sigmoid, sft], loss_weights [1, .5]: mean sigmoid + .5 token mean NLL (RPO)", D + "1386, 1535", dict(loss_weights=[1, .5]))
    fd = dict(forward_kl=("1 - exp(-d)", lambda x: 1 - torch.exp(-x)), js_divergence=("log 2 + log sigma(d)", lambda x: math.log(2) + ls_(x)), alpha_divergence_half=("(exp((a-1) d) - 1)/(a-1), a = .5", lambda x: (torch.exp(-.5 * x) - 1) / -.5))
    for k, (fo, f) in fd.items(): P("f_" + k, lambda c, r, f=f: -ls_(b * (f(dc(c)) - f(dr(r)))).mean(), "-log sigma(beta (s(Dc) - s(Dr))), s(d) = " + fo, D + "1353-1379", dict(beta=b))
    P("f_alpha_divergence_2", lambda c, r: -ls_(b * ((torch.exp(dc(c)) - 1) - (torch.exp(dr(r)) - 1))).mean(), "the same with a = 2", D + "1364-1379")
    cm = lambda x: x.sum(1)
    X = "TRL 1.16 experimental/cpo/cpo_trainer.py:"
    P("simpo", lambda c, r: -ls_(2. * (cm(c) / lc - cm(r) / lr - .5)).mean(), "-log sigma(beta (c/n_c - r/n_r - gamma/beta)), beta 2, gamma 1", "SimPO; open-instruct dpo_utils.py:617-643; TRL cpo loss_type simpo", dict(beta=2.0, gamma_beta_ratio=.5))
    P("simpo_label_smoothing", lambda c, r: (-.9 * ls_(2. * (cm(c) / lc - cm(r) / lr - .5)) - .1 * ls_(-2. * (cm(c) / lc - cm(r) / lr - .5))).mean(), "with label smoothing .1", "as simpo", dict(label_smoothing=.1))
    nll = lambda c: -(c * mc).sum() / mc.sum()
    P("cpo", lambda c, r: -ls_(b * (cm(c) - cm(r))).mean() + 1.0 * nll(c), "mean -log sigma(beta (c - r)) + alpha * token mean NLL of the chosen", X + "678, 890", dict(beta=b, cpo_alpha=1.0))
    P("cpo_simpo", lambda c, r: -ls_(2. * (cm(c) / lc - cm(r) / lr - .5)).mean() + 1.0 * nll(c), "CPO-SimPO: simpo term + NLL", X + "cpo_loss", dict(cpo_alpha=1.0))
    P("cpo_hinge", lambda c, r: torch.relu(1 - b * (cm(c) - cm(r))).mean() + nll(c), "mean hinge + NLL", X + "cpo_loss")
    P("cpo_ipo", lambda c, r: ((cm(c) / lc - cm(r) / lr - 1 / (2 * b)) ** 2).mean() + nll(c), "mean (c/n_c - r/n_r - 1/(2 beta))^2 + NLL (log-probs averaged for ipo and simpo)", X + "678, 850")
    al = .25; tr = lambda x: (1 - torch.exp(-al * x)) / al
    P("alphapo", lambda c, r: -ls_(2. * (tr(cm(c) / lc) - tr(cm(r) / lr) - .5)).mean() , "SimPO with r = (1 - p^-a)/a, a = .25, p = exp(mean log-prob)", X + "cpo_loss (alpha != 0, loss_type simpo, cpo_alpha 0)", dict(alpha=al, beta=2.0))
    l1 = lambda x: torch.log1p(-torch.exp(x))
    def orpo(c, r): c_, r_ = cm(c) / lc, cm(r) / lr; return nll(c) - b * ls_((c_ - r_) - (l1(c_) - l1(r_))).mean()
    P("orpo", orpo, "NLL - beta mean log sigma(log odds_c - log odds_r), odds of p = exp(mean log-prob); NLL here over completion tokens (TRL: over prompt + chosen)", "TRL 1.16 experimental/orpo/orpo_trainer.py:674-702, 848", dict(beta=b))
    P("slic", lambda c, r: torch.relu(1. - cm(c) + cm(r)).mean() , "mean max(0, delta - c + r), delta 1 (calibration part)", "HALOs trainers.py:824-848", dict(beta=1.0))
    # KTO: chosen rows with label 1 and rejected rows with label 0 form the unpaired batch
    lab = d["label"].double(); K = "TRL 1.16 trainer/kto_trainer.py:"
    kl = (d["kl_policy"] - d["kl_ref"]).mean().clamp(min=0)
    def kto(c, r, wd=1., wu=1., kl=kl):
        L = torch.where(lab > 0, wd * (1 - sg(b * (dc(c) - kl))), wu * (1 - sg(b * (kl - dr(r)))))
        return L.mean()
    kz = "row i is chosen_i if label_i = 1 else rejected_i; z0 = max(0, mean(kl_policy - kl_ref)) over mismatched pairs (completion i-1 with prompt i), no gradient; desirable: wd (1 - sigma(beta (D - z0))), undesirable: wu (1 - sigma(beta (z0 - D))); mean over rows"
    P("kto", kto, kz, K + "1370-1560, 1150", dict(beta=b, desirable_weight=1.0, undesirable_weight=1.0))
    P("kto_weighted", lambda c, r: kto(c, r, 1.33, .9), kz + "; the mean is over the count of rows, not of weights", K + "1480", dict(desirable_weight=1.33, undesirable_weight=.9))
    P("kto_zero_kl", lambda c, r: kto(c, r, kl=torch.tensor(0.)), "z0 = 0", K + "1442 (calculate_KL False)")
    P("apo_zero_unpaired", lambda c, r: torch.where(lab > 0, 1 - sg(b * dc(c)), sg(b * dr(r))).mean(), "label 1: 1 - sigma(bD); label 0: sigma(bD); mean over rows", K + "1454")
    # WPO, LD-DPO
    wc = torch.exp(((d["chosen"] - d["lsp_chosen"]) * mc).sum(1) / lc); wr = torch.exp(((d["rejected"] - d["lsp_rejected"]) * mr).sum(1) / lr)
    P("wpo_trl", lambda c, r: (-ls_(z(c, r)) * wc * wr).mean(), "w = exp(mean_t(l - log sum_v p_v^2)); mean of -log sigma(beta D) sg(w_c w_r), inputs lsp_*", D + "1518-1527 (use_weighting)", dict(beta=b))
    w0 = torch.exp((d["chosen"] * mc).sum(1) / lc + (d["rejected"] * mr).sum(1) / lr).clamp(max=1)
    P("wpo_plain", lambda c, r: (-ls_(z(c, r)) * w0).mean(), "w = min(1, exp(mean c + mean r)), sg; mean of -w log sigma(beta D): what open-instruct's docstring says", "open-instruct dpo_utils.py:566-614 (intent)", dict(beta=b))
    sh = torch.minimum(lc, lr)[:, None]; pos = torch.arange(1, mc.shape[1] + 1)[None]; alp = .5
    ld = lambda x, m_: (x * m_ * torch.where(pos <= sh, 1., alp)).sum(1)
    P("ld_dpo", lambda c, r: -ls_(b * ((ld(c, mc) - ld(d["ref_chosen"], mc)) - (ld(r, mr) - ld(d["ref_rejected"], mr)))).mean(), "tokens beyond min(n_c, n_r) count alpha = .5, for policy and reference", D + "1303-1317 (ld_alpha)", dict(ld_alpha=alp))


for seed in (0, 7):
    p, d = f"s{seed}/", pairs(seed)
    for k, v in d.items():
        if not k.startswith("lsp_") and k != "scores": TENS[p + "pref_in/" + k] = v

    def put(name, f, formula, source, defaults=None):
        if name == "wpo_trl": return                     # needs log sum p^2, which Warpo does not compute
        c, r = d["chosen"].clone().requires_grad_(), d["rejected"].clone().requires_grad_()
        L = f(c, r); L.backward(); z = torch.zeros_like(c); q = p + f"pref/{name}/"
        TENS[q + "loss"] = L.detach()
        TENS[q + "d_chosen"] = (z if c.grad is None else c.grad * d["chosen_mask"]).contiguous()
        TENS[q + "d_rejected"] = (z if r.grad is None else r.grad * d["rejected_mask"]).contiguous()
    preference(d, put)
save_file(TENS, sys.argv[1] + "/preference.safetensors")
