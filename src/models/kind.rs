//! The weights that models have, in every family.

/// Which weight of a block or of the model it is, in every family.
/// [`WEIGHTS`](super::WEIGHTS) has the facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParamKind {
    /// The LM head too, where it is tied.
    Embedding,
    Positions,
    Norm1,
    Norm1Bias,
    /// Queries of all heads, then keys, then values.
    Qkv,
    QkvBias,
    /// Of queries, where they are normalised.
    QNorm,
    KNorm,
    /// Of each head, beside its scores.
    Sinks,
    Out,
    OutBias,
    /// The first projection of a block without attention.
    MixerIn,
    /// Taps of each channel.
    Conv,
    /// Of a delta rule, each head's rate and bias of decay, and the norm of what it gives.
    DeltaRate,
    DeltaBias,
    DeltaNorm,
    /// The last projection of a block without attention.
    MixerOut,
    /// Of what attention adds to the residual stream.
    PostNorm1,
    Norm2,
    Norm2Bias,
    /// The gate above the rest, where the MLP is gated.
    Up,
    UpBias,
    Down,
    DownBias,
    /// Rows' scores of the experts.
    Router,
    RouterBias,
    /// Of each expert in turn, gates above the rest.
    ExpertsUp,
    ExpertsUpBias,
    ExpertsDown,
    ExpertsDownBias,
    /// Of the expert that all rows have beside those that they choose: how much it counts.
    SharedGate,
    /// Of what the MLP adds to the residual stream.
    PostNorm2,
    FinalNorm,
    FinalNormBias,
    /// Where it is not tied.
    LmHead,
    /// Value or reward.
    Score,
}
