//! What a step trains on: the examples of a run, and how they become sequences and columns.

use std::{ops::Range, path::Path};

use super::settings::Settings;
use crate::{
    algorithms::{Columns, Inputs},
    data::{self, Limits, Order, Pair, Place, Prompt, Stats, Text, Tokenizer},
    error::Result,
};

/// A sequence of a step and the tokens that are predicted in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    /// Positions of predicted tokens, ascending.
    pub predicted: Vec<Range<usize>>,
}

impl Sequence {
    pub fn tokens(&self) -> usize {
        self.predicted.iter().map(Range::len).sum()
    }
}

/// The examples of a run.
#[derive(Debug)]
pub enum Examples {
    /// For [`Inputs::Texts`].
    Texts(Vec<Text>),
    /// For [`Inputs::Pairs`].
    Pairs(Vec<Pair>),
    /// For [`Inputs::Prompts`].
    Prompts(Vec<Prompt>),
}

impl Examples {
    /// Loads files for `inputs`.
    pub fn load(
        files: &[String],
        inputs: &Inputs,
        tokenizer: Option<&Tokenizer>,
        limits: Limits,
        settings: &Settings,
    ) -> Result<(Self, Stats)> {
        let mut records = Vec::new();
        for file in files {
            records.extend(data::read(Path::new(file))?);
        }
        let (this, stats) = match inputs {
            Inputs::Texts { completion_only } => {
                let (x, s) = data::texts(&records, tokenizer, limits, *completion_only)?;
                (Self::Texts(x), s)
            }
            Inputs::Pairs => {
                let (x, s) = data::pairs(&records, tokenizer, limits, settings.seed)?;
                (Self::Pairs(x), s)
            }
            Inputs::Prompts(_) => {
                let n = settings.prompt_tokens;
                let (x, s) = data::prompts(&records, tokenizer, limits, n)?;
                (Self::Prompts(x), s)
            }
        };
        if this.is_empty() {
            let got = format!("{} records, all dropped", records.len());
            return Err(crate::Error::value(files.join(", "), "at least one example", got));
        }
        Ok((this, stats))
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Texts(x) => x.len(),
            Self::Pairs(x) => x.len(),
            Self::Prompts(x) => x.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of the longest.
    pub fn longest(&self) -> usize {
        let longest = match self {
            Self::Texts(x) => x.iter().map(|t| t.ids.len()).max(),
            Self::Pairs(x) => x.iter().map(|p| p.chosen.len().max(p.rejected.len())).max(),
            Self::Prompts(x) => x.iter().map(|p| p.ids.len()).max(),
        };
        longest.unwrap_or(0)
    }

    /// SHA-256 of all that is learned: tokens, which of them, margins.
    pub fn digest(&self) -> String {
        match self {
            Self::Texts(x) => {
                let ranges = |r: &Range<usize>| [r.start as u32, r.end as u32];
                let learn = |t: &Text| t.learn.iter().flat_map(ranges).collect();
                data::digest(x.iter().flat_map(|t| [t.ids.clone(), learn(t)]))
            }
            Self::Pairs(x) => {
                let halves = |m: f64| [m.to_bits() as u32, (m.to_bits() >> 32) as u32];
                let margin = |p: &Pair| p.margin.into_iter().flat_map(halves).collect();
                let parts = |p: &Pair| [p.chosen.clone(), p.rejected.clone(), margin(p)];
                data::digest(x.iter().flat_map(parts))
            }
            Self::Prompts(x) => data::digest(x.iter().map(|p| p.ids.clone())),
        }
    }

    /// Where each sequence came from that [`Examples::sequences`] makes of an example; for prompts,
    /// where the prompt did.
    pub fn places(&self, example: usize) -> Vec<&Place> {
        match self {
            Self::Texts(x) => vec![&x[example].place],
            Self::Pairs(x) => x[example].places.iter().collect(),
            Self::Prompts(x) => vec![&x[example].place],
        }
    }

    /// The sequences and columns of the given examples; `None` for prompts, which must be
    /// continued first. `base` numbers the samples.
    pub fn sequences(&self, chosen: &[usize], base: u64) -> Option<(Vec<Sequence>, Columns<f32>)> {
        let mut columns = Columns { offsets: vec![0], ..Columns::default() };
        let mut sequences = Vec::new();
        match self {
            Self::Texts(all) => {
                for i in chosen {
                    let t = &all[*i];
                    let s = Sequence { ids: t.ids.clone(), predicted: t.learn.clone() };
                    columns.weights.extend(std::iter::repeat_n(1.0, s.tokens()));
                    columns.offsets.push(columns.weights.len() as u32);
                    sequences.push(s);
                }
            }
            Self::Pairs(all) => {
                for i in chosen {
                    for ids in [&all[*i].chosen, &all[*i].rejected] {
                        sequences.push(Sequence { ids: ids.clone(), predicted: Vec::new() });
                        columns.offsets.push(sequences.len() as u32);
                    }
                    columns.margins.extend(all[*i].margin.map(|m| m as f32));
                }
                // Some pairs with a margin and some without: the others have margin 0.
                if !columns.margins.is_empty() {
                    let margin = |i: &usize| all[*i].margin.unwrap_or(0.0) as f32;
                    columns.margins = chosen.iter().map(margin).collect();
                }
            }
            Self::Prompts(_) => return None,
        }
        columns.samples = (base..base + sequences.len() as u64).collect();
        Some((sequences, columns))
    }
}

/// The order of a run's examples.
pub fn order(examples: &Examples, s: &Settings) -> Order {
    Order::new(examples.len(), s.seed, s.shuffle)
}
