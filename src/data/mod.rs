//! Data: files to records, text to tokens, records to what an algorithm trains on.

mod examples;
mod order;
mod records;
mod tokenizer;

pub use examples::{Limits, Pair, Prompt, Stats, Text, pairs, prompts, texts};
pub use order::Order;
pub use records::{Located, Record, read};
pub use tokenizer::Tokenizer;

use sha2::{Digest, Sha256};

/// SHA-256 over the structure and tokens of examples: what a checkpoint remembers of its data.
#[must_use]
pub fn digest<'a>(sequences: impl Iterator<Item = &'a [u32]>) -> String {
    let mut hash = Sha256::new();
    for ids in sequences {
        hash.update((ids.len() as u64).to_le_bytes());
        hash.update(bytemuck::cast_slice::<u32, u8>(ids));
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
