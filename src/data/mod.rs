//! Data: files to records, text to tokens, records to the sequences that steps train on.

mod dataset;
mod records;
mod tokenizer;

pub use dataset::{
    Dataset, DatasetStats, DrawOrder, Limits, Sequence, pairs, prompts, scored, texts,
};
pub use records::{DataPlace, Located, Record, read};
pub use tokenizer::{Kept, Tokenizer};
