//! How Hugging Face stores the models of a family.

use super::{Config, FAMILIES, ParamKind, Position, Spec};
use crate::{error::Result, ops::attention::MAX_HEAD_DIM};

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
    pub weights: &'static [StoredWeight],
    /// Endings of stored tensors that are no weights, such as mask buffers.
    pub ignored: &'static [&'static str],
    pub spec: fn(&Config) -> Result<Spec>,
}

/// Where a weight is in files.
#[derive(Clone, Copy, Debug)]
pub struct StoredWeight {
    pub kind: ParamKind,
    /// Names with `{}` for the layer. Several tensors are parts of the weight's rows, in order.
    pub names: &'static [&'static str],
    /// Stored `[in, out]`.
    pub transposed: bool,
}

/// A weight that is stored `[out, in]`, as it is computed with.
pub(super) const fn by_rows(kind: ParamKind, names: &'static [&'static str]) -> StoredWeight {
    StoredWeight { kind, names, transposed: false }
}

/// A weight that is stored `[in, out]`.
pub(super) const fn by_columns(kind: ParamKind, names: &'static [&'static str]) -> StoredWeight {
    StoredWeight { kind, names, transposed: true }
}

impl Config {
    /// The family and its spec, checked for sense.
    pub fn spec(&self) -> Result<(&'static Family, Spec)> {
        let kind = self.text("model_type")?;
        let Some(family) = FAMILIES.iter().find(|f| f.model_type == kind) else {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
            return Err(self.wrong("model_type", &format!("one of {known:?}"), &kind));
        };
        self.check_computed()?;
        let spec = (family.spec)(self)?;
        // The bounds keep the bytes of all weights inside 64 bits.
        for (key, n, most) in [
            ("vocab_size", spec.vocab, 1 << 24),
            ("hidden size", spec.hidden, 1 << 20),
            ("number of layers", spec.layers, 1 << 12),
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
        if !spec.head_dim.is_multiple_of(2) && matches!(spec.position, Position::Rope(_)) {
            return Err(self.wrong("head_dim", "an even number", &spec.head_dim));
        }
        Ok((family, spec))
    }
}
