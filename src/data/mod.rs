//! Data: files to records, text to tokens, records to the sequences that steps train on.

mod chat;
mod dataset;
pub mod jinja;
mod order;
mod records;
mod template;
mod tokenizer;

pub use chat::{Chat, ChatIds, ChatText, chat_texts, turn_end, unasked_opening};
pub use dataset::{
    Dataset, DatasetStats, Limits, Omission, Sequence, judged, pairs, prompts, scored, texts,
};
pub use order::DrawOrder;
pub use records::{DataPlace, Located, Record, read};
pub use template::{BUILT_IN, ChatTemplate};
pub use tokenizer::{Kept, Tokenizer};
