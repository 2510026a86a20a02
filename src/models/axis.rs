//! What the sides of a weight count, and where stored entries are among those of a device.

use super::{QkNorm, Spec, Widths};
use crate::ops::delta_rule::DeltaShape;

/// One side of a weight: what it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    One,
    Vocab,
    Positions,
    Hidden,
    Qkv,
    /// What one weight of a norm of queries is for: a head, or all of them.
    NormedQ,
    NormedK,
    Attention,
    Up,
    Mlp,
    /// Query heads.
    Heads,
    /// Of the first projection of a block without attention, of its convolution, and of the last.
    MixerIn,
    Channels,
    Taps,
    Mixed,
    /// Value heads of a delta rule, and the size of one.
    DeltaHeads,
    DeltaValue,
    Experts,
    /// Of all experts, as that of an MLP.
    ExpertsUp,
    /// A row from each expert.
    ExpertsOut,
    /// Inside one expert.
    ExpertMlp,
}

impl Axis {
    pub fn len(self, spec: &Spec) -> usize {
        match self {
            Self::One => 1,
            Self::Vocab => spec.vocab,
            Self::Positions => spec.max_positions,
            Self::Hidden => spec.hidden,
            Self::Qkv => spec.attention_input_cols(),
            Self::NormedQ => normed(spec, spec.q_heads),
            Self::NormedK => normed(spec, spec.kv_heads),
            Self::Attention => spec.attention_cols(),
            Self::Up => spec.up_cols(),
            Self::Mlp => spec.mlp_hidden,
            Self::Heads => spec.q_heads,
            Self::MixerIn => spec.state_mixer.map_or(0, |m| m.input_cols(spec.hidden)),
            Self::Channels => spec.state_mixer.map_or(0, |m| m.conv(spec.hidden).channels),
            Self::Taps => spec.state_mixer.map_or(0, |m| m.conv(spec.hidden).taps),
            Self::Mixed => spec.state_mixer.map_or(0, |m| m.output_cols(spec.hidden)),
            Self::DeltaHeads => spec.delta().map_or(0, |shape| shape.value_heads),
            Self::DeltaValue => spec.delta().map_or(0, |shape| shape.value_dim),
            Self::Experts => spec.expert_count(),
            Self::ExpertsUp => 2 * spec.expert_count() * expert_hidden(spec),
            Self::ExpertsOut => spec.expert_count() * spec.hidden,
            Self::ExpertMlp => expert_hidden(spec),
        }
    }

    /// Entries in files, which have no padding.
    pub fn stored_len(self, spec: &Spec) -> usize {
        let Widths { head_dim, mlp_hidden, expert_hidden: inner, value_dim } = spec.widths();
        match self {
            Self::Qkv | Self::NormedQ | Self::NormedK | Self::Attention => {
                self.len(spec) / spec.head_dim * head_dim
            }
            Self::Up | Self::Mlp => self.len(spec) / spec.mlp_hidden * mlp_hidden,
            Self::ExpertsUp | Self::ExpertMlp => {
                self.len(spec) / expert_hidden(spec).max(1) * inner
            }
            Self::MixerIn | Self::Channels | Self::Mixed | Self::DeltaValue => {
                let heads = |s: DeltaShape| match self {
                    Self::DeltaValue => 1,
                    Self::MixerIn => 2 * s.value_heads,
                    _ => s.value_heads,
                };
                let padding = |s: DeltaShape| heads(s) * (s.value_dim - value_dim);
                self.len(spec) - spec.delta().map_or(0, padding)
            }
            _ => self.len(spec),
        }
    }

    /// Entries of each of `n` stored tensors that hold them all.
    pub fn parts(self, spec: &Spec, n: usize) -> Vec<usize> {
        let (q, kv, d) = (spec.q_heads, spec.kv_heads, spec.widths().head_dim);
        let gated = if spec.attention_gate { 2 } else { 1 };
        match (self, n, spec.stored_delta()) {
            (Self::Qkv, 3, _) => vec![gated * q * d, kv * d, kv * d],
            (Self::MixerIn, 4, Some(s)) => {
                vec![s.qkv_cols(), s.values(), s.value_heads, s.value_heads]
            }
            (Self::MixerIn, 2, Some(s)) => vec![s.qkv_cols() + s.values(), 2 * s.value_heads],
            _ => vec![self.stored_len(spec) / n.max(1); n],
        }
    }

    /// Where each stored entry is among ours.
    pub fn places(self, spec: &Spec) -> Vec<usize> {
        let Widths { head_dim: d, mlp_hidden: m, expert_hidden: inner, value_dim } = spec.widths();
        // Pairs that rotate are half a head apart, where the kernels look for them; channels that
        // do not rotate fill what is left. Scores do not see the order of channels.
        let (half, pairs) = (spec.head_dim / 2, spec.rotary_dim / 2);
        let channel = |c: usize| match c {
            c if c < pairs => c,
            c if c < spec.rotary_dim => half + c - pairs,
            c if c - pairs < half => c - pairs,
            c => c,
        };
        let place = |i: usize| match self {
            Self::Qkv | Self::NormedQ | Self::NormedK | Self::Attention => {
                i / d * spec.head_dim + channel(i % d)
            }
            Self::Up | Self::Mlp => i / m * spec.mlp_hidden + i % m,
            Self::ExpertsUp | Self::ExpertMlp => i / inner * expert_hidden(spec) + i % inner,
            Self::MixerIn | Self::Channels | Self::Mixed => spec.delta().map_or(i, |shape| {
                // Values, and gates behind them, are padded; what stands before and behind is not.
                let before = if self == Self::Mixed { 0 } else { 2 * shape.keys() };
                let heads = shape.value_heads * if self == Self::MixerIn { 2 } else { 1 };
                match i.checked_sub(before) {
                    None => i,
                    Some(i) if i < heads * value_dim => {
                        before + i / value_dim * shape.value_dim + i % value_dim
                    }
                    Some(_) => i + heads * (shape.value_dim - value_dim),
                }
            }),
            _ => i,
        };
        (0..self.stored_len(spec)).map(place).collect()
    }
}

/// Width inside an expert, as a device pads it.
fn expert_hidden(spec: &Spec) -> usize {
    spec.experts.as_ref().map_or(0, |e| e.hidden)
}

/// Entries of a norm's weight for so many heads.
fn normed(spec: &Spec, heads: usize) -> usize {
    spec.head_dim * if spec.qk_norm == Some(QkNorm::Rows) { heads } else { 1 }
}
