//! Data: files to records, text to tokens, records to the sequences that steps train on.

pub mod cache;
mod chat;
mod columns;
mod dataset;
mod files;
pub mod jinja;
mod options;
mod order;
mod parallel;
mod reading;
mod records;
mod reward_columns;
mod store;
mod template;
mod tokenizer;
mod tokens;
mod unique;

pub use chat::{Chat, ChatIds, ChatText, turn_end, unasked_opening};
pub use dataset::{
    Dataset, DatasetStats, ExampleKind, Limits, Sequence, examples, judged, pairs, prompts, scored,
    texts,
};
pub use files::{DataInput, dataset_files, dataset_name};
pub use options::{FolderPart, ReadOptions};
pub use order::{DrawGroup, DrawOrder};
pub use reading::{FoundFiles, Records, find, read, read_as};
pub use records::{BadLines, DataPlace, Located, Omission, Record};
pub use reward_columns::{ColumnsRead, RowColumns};
pub use store::{About, TokenStore};
pub use template::{BUILT_IN, ChatTemplate};
pub use tokenizer::{Kept, Tokenizer};
pub use tokens::{Split, TokenJob, Tokens};
