//! All tests, in one binary. `tests/<layer>/<stem>.rs` holds the tests of `src/<layer>/<stem>.rs`.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod house;
mod support;

mod device {
    mod arena;
    mod buffer;
    mod gemm;
    mod math;
    mod pool;
}
mod models {
    mod golden;
}
mod ops {
    mod activation;
    mod adamw;
    mod attention;
    mod bradley_terry;
    mod embedding;
    mod gae;
    mod grad_norm;
    mod kl;
    mod layer_norm;
    mod logprob;
    mod matmul;
    mod nll;
    mod ppo_loss;
    mod residual;
    mod rms_norm;
    mod rope;
    mod sample;
    mod scalar_head;
    mod value_loss;
    mod whiten;
}
mod rng;
mod train {
    mod checkpoint;
    mod events;
    mod lock;
    mod metrics;
    mod run;
    mod schedule;
    mod signals;
}
