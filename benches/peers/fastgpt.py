"""GPT-2 in plain torch, written for CPU speed: what a careful user writes by hand. Fused QKV, static
KV cache, LM head on response positions only, one uniform number a row instead of `multinomial`,
log-probs taken while sampling."""
import torch, torch.nn as nn, torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def split(self, x):
        b, t, d = x.shape
        qkv = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, d // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)

    def finish(self, x, a):
        x = x + self.proj(a.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))

    def forward(self, x):
        q, k, v = self.split(x)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def cached(self, x, keys, values, at):
        """x [batch, new, d] at positions at..at+new; keys, values [batch, heads, positions, head_dim]."""
        new = x.shape[1]
        q, k, v = self.split(x)
        keys[:, :, at:at + new] = k
        values[:, :, at:at + new] = v
        k, v = keys[:, :, :at + new], values[:, :, :at + new]
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=new > 1))


class GPT(nn.Module):
    def __init__(self, c, scalar=False):
        super().__init__()
        self.c, d = c, c["n_embd"]
        self.wte, self.wpe = nn.Embedding(c["vocab_size"], d), nn.Embedding(c["n_positions"], d)
        self.blocks = nn.ModuleList(Block(d, c["n_head"]) for _ in range(c["n_layer"]))
        self.lnf = nn.LayerNorm(d)
        self.score = nn.Linear(d, 1, bias=False) if scalar else None
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids):
        x = self.wte(ids) + self.wpe.weight[:ids.shape[1]]
        for b in self.blocks:
            x = b(x)
        return self.lnf(x)

    def logits(self, h):
        return F.linear(h, self.wte.weight)

    def values(self, ids):
        return self.score(self.hidden(ids))[..., 0]

    @torch.inference_mode()
    def generate(self, ids, new, temperature=1.0):
        batch, prompt = ids.shape
        d, heads = self.c["n_embd"], self.c["n_head"]
        room = lambda: torch.empty(batch, heads, prompt + new, d // heads)
        cache = [(room(), room()) for _ in self.blocks]
        out = torch.empty(batch, prompt + new, dtype=torch.long)
        out[:, :prompt] = ids
        logps = torch.empty(batch, new)
        x, at = self.wte(ids) + self.wpe.weight[:prompt], 0
        for t in range(new):
            width = x.shape[1]
            for b, (k, v) in zip(self.blocks, cache):
                x = b.cached(x, k, v, at)
            at += width
            p = torch.softmax(self.logits(self.lnf(x[:, -1])) / temperature, -1)
            cdf = p.cumsum(-1)
            draw = torch.rand(batch, 1) * cdf[:, -1:]
            token = torch.searchsorted(cdf, draw).clamp_(max=p.shape[1] - 1)
            logps[:, t] = p.gather(-1, token)[:, 0].log_()
            out[:, prompt + t] = token[:, 0]
            if t + 1 < new:
                x = self.wte(token) + self.wpe.weight[at]
        return out, logps
