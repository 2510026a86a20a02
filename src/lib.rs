#![doc = include_str!("../README.md")]

#[doc(hidden)]
pub mod algorithms;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod data;
#[doc(hidden)]
pub mod device;
#[doc(hidden)]
pub mod error;
#[doc(hidden)]
pub mod eval;
#[doc(hidden)]
pub mod models;
#[doc(hidden)]
pub mod ops;
#[doc(hidden)]
pub mod rng;
#[doc(hidden)]
pub mod rollout;
#[doc(hidden)]
pub mod shape;
#[doc(hidden)]
pub mod train;

pub use error::{Error, Result};
