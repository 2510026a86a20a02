//! Data: files to records, text to tokens, records to what an algorithm trains on.

mod examples;
mod order;
mod records;
mod tokenizer;

pub use examples::{Limits, Pair, Prompt, Stats, Text, pairs, prompts, scored, texts};
pub use order::Order;
pub use records::{Located, Place, Record, read};
pub use tokenizer::Tokenizer;

use sha2::{Digest, Sha256};

/// SHA-256 over the structure and numbers of examples: what a checkpoint remembers of its data.
pub fn digest(parts: impl Iterator<Item = Vec<u32>>) -> String {
    let mut hash = Sha256::new();
    for numbers in parts {
        hash.update((numbers.len() as u64).to_le_bytes());
        hash.update(bytemuck::cast_slice::<u32, u8>(&numbers));
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
