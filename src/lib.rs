#![doc = include_str!("../README.md")]

pub mod algorithms;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod models;
pub mod ops;
pub mod rng;
pub mod rollout;
pub mod shape;
pub mod train;

pub use error::{Error, Result};
