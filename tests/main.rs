//! All tests, in one binary. `tests/<layer>/<stem>.rs` holds the tests of `src/<layer>/<stem>.rs`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod house;
mod support;

mod algorithms {
    mod ppo;
    mod registry;
    mod reward;
    mod sft;
}
mod data {
    mod examples;
    mod order;
    mod records;
    mod tokenizer;
}
mod device {
    mod gemm;
    mod math;
}
mod eval {
    mod report;
}
mod models {
    mod config;
    pub mod golden;
    mod gradients;
    mod stories;
    mod weights;
}
mod ops {
    mod rms_norm;
}
mod rng;
mod rollout {
    mod engine;
    mod score;
}
mod train {
    mod checkpoint;
    mod events;
    mod experience;
    mod feed;
    mod lock;
    mod metrics;
    mod pass;
    mod role;
    mod run;
    mod signals;
    mod trainer;
}
