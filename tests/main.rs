//! All tests, in one binary. `tests/<layer>/<stem>.rs` holds the tests of `src/<layer>/<stem>.rs`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
// The C library's functions are an oracle for ours.
#![allow(clippy::disallowed_methods)]

mod cli;
mod error;
mod fuzz;
mod house;
mod seeded;
mod support;

mod algorithms {
    mod grpo;
    mod kto;
    mod ppo;
    mod preference;
    mod registry;
    mod reward;
    mod sft;
}
mod data {
    mod chat;
    mod columns;
    mod dataset;
    mod files;
    mod jinja;
    mod parquet;
    mod records;
    mod skipping;
    mod tokenizer;
    mod tokens;
}
mod device {
    mod arena;
    mod buffer;
    mod cuda;
    mod gemm;
    mod hopper;
    mod kernels;
    mod maps;
    mod math;
    mod pending;
    mod pool;
    mod profile;
    mod sass;
    mod staging;
}
mod eval {
    mod report;
}
mod hub {
    mod download;
}
mod models {
    pub mod adapter;
    mod config;
    mod device;
    mod folder;
    pub mod golden;
    mod gradients;
    mod mixture;
    mod pass;
    mod stories;
    mod text_part;
    mod trl;
    mod weights;
}
mod ops {
    mod activation;
    mod adamw;
    mod attention;
    mod bradley_terry;
    mod delta_rule;
    mod embedding;
    mod experts;
    mod gae;
    mod gate;
    mod grad_norm;
    mod kl;
    mod kto_loss;
    mod logprob;
    mod matmul;
    mod next_ids;
    mod nll;
    mod norm;
    mod policy_loss;
    mod preference_loss;
    mod residual;
    mod rope;
    mod routing;
    mod sample;
    mod scalar_head;
    mod scale;
    mod short_conv;
    mod sinks;
    mod token_loss;
    mod value_loss;
    mod whiten;
}
mod rng;
mod rollout {
    mod adapter;
    mod engine;
    mod rewards;
    mod score;
}
mod train {
    mod adapter;
    mod best;
    mod checkpoint;
    mod device;
    mod events;
    mod export;
    mod guard;
    mod lock;
    mod metrics;
    mod mixture;
    mod models;
    mod rewards;
    mod rollouts;
    mod run;
    mod schedule;
    mod signals;
    mod source;
    mod storage;
    mod trainer;
}
