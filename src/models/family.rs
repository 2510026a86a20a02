//! How Hugging Face stores the models of a family.

use super::{
    AdapterConfig, AdapterSite, AdapterSpec, Config, FAMILIES, LoraOptions, ParamKind, Spec,
    StateMixer, WEIGHTS, Widths,
    config::MOST_LAYERS,
    params::Occurs,
    peft::{ALL_LINEAR, AdapterStart},
    spec::WINDOWS,
};
use crate::{
    error::Result,
    ops::{attention::MAX_HEAD_DIM, rope::Frequencies, routing::MAX_EXPERTS},
};

/// A family: its names in files, and how its `config.json` becomes a [`Spec`].
#[derive(Debug)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// `architectures` of the model with an LM head.
    pub causal_lm: &'static str,
    /// `architectures` of the model with a scalar head.
    pub sequence_classification: &'static str,
    /// Before the name of every weight but the heads'; some files leave it out.
    pub prefix: &'static str,
    /// Tables of its weights; of two that have one, the first counts.
    pub weights: &'static [&'static [StoredWeight]],
    /// Endings of stored tensors that are no weights, such as mask buffers.
    pub ignored: &'static [&'static str],
    /// Keys of `config.json` that it computes, and others must not have.
    pub computes: &'static [&'static str],
    pub spec: fn(&Config) -> Result<Spec>,
}

/// Where a weight is in files.
#[derive(Clone, Copy, Debug)]
pub struct StoredWeight {
    pub kind: ParamKind,
    /// Names with `{}` for the layer, and `{e}` for the expert where each has tensors of its own.
    /// Several tensors are parts of the weight's rows, in order.
    pub names: &'static [&'static str],
    pub order: StoredOrder,
}

/// In which order the numbers of a weight are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredOrder {
    /// `[out, in]`, as it is computed with.
    Rows,
    /// `[in, out]`
    Columns,
    /// `[out, in]` with the query, key and value of the first head, then those of the next.
    Heads,
    /// `[out, in]` with the query of each head followed by its gate.
    GatedQueries,
    /// `[out, in]` of a delta rule: the query, key, values and gates of the first key head, then
    /// those of the next; then in the same way what its value heads write and forget by.
    KeyHeads,
    /// `[channels, 1, taps]`
    Channels,
    /// `[experts, in, out]`, a bias `[experts, out]`.
    Experts,
    /// The same with gates and the rest in turn.
    ExpertPairs,
}

impl StoredOrder {
    /// Where stored row `i` is among ours: of queries, keys and values those of all heads in order,
    /// of pairs of each expert its gates before the rest.
    pub(super) fn row(self, spec: &Spec, i: usize) -> usize {
        let Widths { head_dim: d, expert_hidden: m, .. } = spec.widths();
        match self {
            Self::Heads => (i / d % 3 * spec.q_heads + i / d / 3) * d + i % d,
            Self::ExpertPairs => i / (2 * m) * 2 * m + i % 2 * m + i % (2 * m) / 2,
            Self::GatedQueries => {
                let (q, kv) = (spec.q_heads, spec.kv_heads);
                match (i / (2 * d), i % (2 * d)) {
                    (head, _) if head >= q => i - q * d,
                    (head, at) if at < d => head * d + at,
                    (head, at) => (q + 2 * kv + head) * d + at - d,
                }
            }
            Self::KeyHeads => spec.stored_delta().map_or(i, |s| {
                let (keys, values) = (s.keys(), s.values());
                let of_head = s.value_heads / s.key_heads;
                let (k, v) = (s.key_dim, of_head * s.value_dim);
                let wide = 2 * (keys + values);
                match i.checked_sub(wide) {
                    Some(i) => {
                        let (head, at) = (i / (2 * of_head), i % (2 * of_head));
                        wide + at / of_head * s.value_heads + head * of_head + at % of_head
                    }
                    None => match (i / (2 * (k + v)), i % (2 * (k + v))) {
                        (head, at) if at < 2 * k => at / k * keys + head * k + at % k,
                        (head, at) => {
                            2 * keys + (at - 2 * k) / v * values + head * v + (at - 2 * k) % v
                        }
                    },
                }
            }),
            Self::Rows | Self::Columns | Self::Experts | Self::Channels => i,
        }
    }
}

/// A weight that is stored `[out, in]`, as it is computed with.
pub(super) const fn by_rows(kind: ParamKind, names: &'static [&'static str]) -> StoredWeight {
    StoredWeight { kind, names, order: StoredOrder::Rows }
}

/// A weight that is stored `[in, out]`.
pub(super) const fn by_columns(kind: ParamKind, names: &'static [&'static str]) -> StoredWeight {
    StoredWeight { kind, names, order: StoredOrder::Columns }
}

/// A weight that is stored in an order of its own.
pub(super) const fn ordered(
    kind: ParamKind,
    names: &'static [&'static str],
    order: StoredOrder,
) -> StoredWeight {
    StoredWeight { kind, names, order }
}

/// Queries, keys and values that are stored head by head.
pub(super) const fn by_heads(kind: ParamKind, names: &'static [&'static str]) -> StoredWeight {
    StoredWeight { kind, names, order: StoredOrder::Heads }
}

impl Config {
    /// The family and its spec, checked for sense.
    pub fn spec(&self) -> Result<(&'static Family, Spec)> {
        let kind = self.text("model_type")?;
        let Some(family) = FAMILIES.iter().find(|f| f.model_type == kind) else {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
            return Err(self.wrong("model_type", &format!("one of {}", known.join(", ")), &kind));
        };
        self.check_computed(family.computes)?;
        let mut spec = (family.spec)(self)?;
        for rope in &spec.ropes {
            // Such a model goes on behind the positions of its pretraining.
            if let Frequencies::Dynamic { factor, max_position, .. } = rope.frequencies {
                let room = (factor * max_position) as usize;
                spec.max_positions = self.longest().unwrap_or(room).max(spec.max_positions);
            }
        }
        // The bounds keep the bytes of all weights inside 64 bits.
        for (key, n, most) in [
            ("vocab_size", spec.vocab, 1 << 24),
            ("hidden size", spec.hidden, 1 << 20),
            ("number of layers", spec.layers, MOST_LAYERS),
            ("number of heads", spec.q_heads, 1 << 16),
            ("number of key-value heads", spec.kv_heads, 1 << 16),
            ("head_dim", spec.head_dim, MAX_HEAD_DIM),
            ("MLP size", spec.mlp_hidden, 1 << 22),
            ("number of positions", spec.max_positions, 1 << 24),
        ] {
            if n == 0 || n > most {
                return Err(self.wrong(key, &format!("a number from 1 to {most}"), &n));
            }
        }
        if !(spec.norm_eps >= 0.0 && spec.norm_eps.is_finite()) {
            return Err(self.wrong("epsilon of the norms", "0 or more", &spec.norm_eps));
        }
        if !spec.q_heads.is_multiple_of(spec.kv_heads) {
            let want = format!("a divisor of the {} query heads", spec.q_heads);
            return Err(self.wrong("number of key-value heads", &want, &spec.kv_heads));
        }
        let odd = !spec.rotary_dim.is_multiple_of(2) || spec.rotary_dim < 2;
        if odd && !spec.ropes.is_empty() {
            return Err(self.wrong("head_dim", "an even number", &spec.head_dim));
        }
        for rope in &spec.ropes {
            let pairs = spec.rotary_dim / 2;
            match &rope.frequencies {
                Frequencies::Listed { factors } if factors.len() != pairs => {
                    let want = format!("{pairs} numbers in each list");
                    return Err(self.wrong("longrope", &want, &factors.len()));
                }
                Frequencies::Dynamic { .. } if pairs < 2 => {
                    return Err(self.wrong("head_dim", "4 or more to rotate", &spec.rotary_dim));
                }
                _ => {}
            }
        }
        let scales = spec.scales;
        for (what, x) in [
            ("factor on embeddings", Some(scales.embedding)),
            ("factor on the residual stream", Some(scales.residual)),
            ("factor on attention scores", scales.scores),
            ("soft-cap of attention scores", scales.score_cap),
            ("divisor of logits", Some(scales.logits)),
            ("soft-cap of logits", scales.logit_cap),
        ] {
            if let Some(x) = x.filter(|x| !(1e-6..=1e6).contains(x)) {
                return Err(self.wrong(what, "a number from 1e-6 to 1e6", &x));
            }
        }
        if let Some(e) = &spec.experts {
            for (key, n, most) in [
                ("number of experts", e.router.experts, MAX_EXPERTS),
                ("experts of a token", e.router.top, e.router.experts),
                ("expert size", e.hidden, 1 << 22),
            ] {
                if n == 0 || n > most {
                    return Err(self.wrong(key, &format!("a number from 1 to {most}"), &n));
                }
            }
            if spec.parallel || spec.norms_after() || scales.residual != 1.0 {
                let want = "0 beside parallel blocks, norms after them or a factor";
                return Err(self.wrong("number of experts", want, &e.router.experts));
            }
        }
        let delta = spec.delta().map(|s| {
            let heads = ("linear_num_value_heads", s.value_heads, 1 << 12);
            let keys = ("linear_num_key_heads", s.key_heads, s.value_heads);
            let dims = [("linear_key_head_dim", s.key_dim), ("linear_value_head_dim", s.value_dim)];
            let dims = dims.map(|(key, n)| (key, n, 1 << 10));
            [heads, keys, dims[0], dims[1]]
        });
        let taps = spec.state_mixer.map(|m| match m {
            StateMixer::Delta(_, taps) | StateMixer::Conv(taps) => {
                ("taps of a convolution", taps, 64)
            }
        });
        for (key, n, most) in delta.into_iter().flatten().chain(taps) {
            if n == 0 || n > most {
                return Err(self.wrong(key, &format!("a number from 1 to {most}"), &n));
            }
        }
        if let Some(s) = spec.delta().filter(|s| !s.value_heads.is_multiple_of(s.key_heads)) {
            let want = format!("a divisor of {} value heads", s.value_heads);
            return Err(self.wrong("linear_num_key_heads", &want, &s.key_heads));
        }
        if spec.attention_gate && spec.qk_norm.is_none() {
            let want = "beside norms of queries and keys";
            return Err(self.wrong("gate of attention", want, &"without"));
        }
        if spec.parallel && (spec.norms_after() || scales.residual != 1.0) {
            let want = "neither norms after them nor a factor";
            return Err(self.wrong("parallel blocks", want, &format!("{:?}", spec.block_norms)));
        }
        if scales.logits != 1.0 && scales.logit_cap.is_some() {
            return Err(self.wrong("divisor of logits", "1 beside a soft-cap", &scales.logits));
        }
        if spec.blocks.len() > 1 && spec.blocks.len() != spec.layers {
            let want = format!("one for each of {} layers", spec.layers);
            return Err(self.wrong("kinds of layers", &want, &spec.blocks.len()));
        }
        if spec.windows().len() > WINDOWS {
            let want = format!("at most {WINDOWS}");
            return Err(self.wrong("windows", &want, &spec.windows().len()));
        }
        let adapter = self.adapter().map(|adapter| adapted(adapter, family, &spec));
        spec.adapter = adapter.transpose()?;
        Ok((family, spec))
    }
}

/// What can have adapters.
const ADAPTED: [ParamKind; 4] = [ParamKind::Qkv, ParamKind::Out, ParamKind::Up, ParamKind::Down];

/// Where the names of an adapter's targets are in a model: as in PEFT, a name is that of a module
/// or the end of it.
fn adapted(adapter: &AdapterConfig, family: &Family, spec: &Spec) -> Result<AdapterSpec> {
    const KEY: &str = "target_modules";
    let LoraOptions { rank, alpha, rslora, targets } = adapter.options();
    if spec.keeps_state() {
        return Err(adapter.wrong(KEY, "none in a model with blocks without attention"));
    }
    if spec.experts.as_ref().is_some_and(|e| e.shared) {
        return Err(adapter.wrong(KEY, "none in a model with a shared expert"));
    }
    let all = targets[0] == ALL_LINEAR;
    if all && spec.experts.is_some() {
        return Err(adapter.wrong(KEY, "names in a model with experts"));
    }
    let fits = |module: &str, target: &String| {
        module.strip_suffix(&**target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let (mut sites, mut found) = (Vec::new(), vec![false; targets.len()]);
    for layer in 0..spec.layers {
        for stored in family.weights.iter().copied().flatten() {
            let facts = WEIGHTS.iter().find(|w| w.kind == stored.kind);
            let there = facts.is_some_and(|w| match w.occurs {
                Occurs::InBlock(is) => is(spec, layer),
                Occurs::Once(_) => layer == 0,
            });
            if !there {
                continue;
            }
            for (part, name) in stored.names.iter().enumerate() {
                let name = name.replace("{}", &layer.to_string());
                let module = format!("{}{}", family.prefix, name.trim_end_matches(".weight"));
                let hits: Vec<usize> =
                    (0..targets.len()).filter(|i| fits(&module, &targets[*i])).collect();
                hits.iter().for_each(|i| found[*i] = true);
                let adapts = ADAPTED.contains(&stored.kind);
                if hits.is_empty() && !(all && adapts) {
                    continue;
                }
                let split = stored.names.len() > 1 && stored.order != StoredOrder::Rows;
                if !adapts || split {
                    let want = format!("none of `{module}`, which can have no adapter");
                    return Err(adapter.wrong(KEY, &want));
                }
                let parts = stored.names.len();
                sites.push(AdapterSite { kind: stored.kind, layer, part, parts });
            }
        }
    }
    let missing = (!all).then(|| found.iter().position(|found| !found)).flatten();
    if let Some(i) = missing {
        let want = format!("names of its linear layers: there is no `{}` here", targets[i]);
        return Err(adapter.wrong(KEY, &want));
    }
    // PEFT names both, whichever a model has.
    let heads = ["score", "classifier"];
    if adapter.saves().iter().any(|name| !heads.contains(&&**name)) {
        return Err(adapter.wrong("modules_to_save", "null or a head of one score"));
    }
    let score = adapter.saves().iter().any(|name| name == "score");
    let score = score || matches!(adapter.start, AdapterStart::Seed(_));
    let root = if *rslora { (*rank as f64).sqrt() } else { *rank as f64 };
    Ok(AdapterSpec { rank: *rank, scale: alpha / root, sites, score })
}
