#![doc = include_str!("../README.md")]

pub mod device;
pub mod error;
pub mod ops;
pub mod rng;
pub mod shape;
pub mod train;

pub use error::{Error, Result};
