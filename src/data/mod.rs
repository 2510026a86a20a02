//! Data: files to records, text to tokens, records to the sequences that steps train on.

mod chat;
mod columns;
mod dataset;
mod files;
pub mod jinja;
mod order;
mod reading;
mod records;
mod reward_columns;
mod template;
mod tokenizer;
mod unique;

pub use chat::{Chat, ChatIds, ChatText, chat_texts, turn_end, unasked_opening};
pub use columns::ReadOptions;
pub use dataset::{Dataset, DatasetStats, Limits, Sequence, judged, pairs, prompts, scored, texts};
pub use order::DrawOrder;
pub use reading::{read, read_as};
pub use records::{DataPlace, Located, Omission, Record};
pub use reward_columns::{RewardColumns, RowColumns};
pub use template::{BUILT_IN, ChatTemplate};
pub use tokenizer::{Kept, Tokenizer};
