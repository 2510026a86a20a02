#![doc = include_str!("../README.md")]
//!
//! # As a library
//!
//! These docs show what a program needs; modules are hidden from them and may change. Fine-tuning
//! and sampling in one process:
//!
//! ```
//! use warpo::{Device, GenerationConfig, Generator, Prompt, SamplingParams, Stream};
//! use warpo::{Settings, Silent, Tokenizer, Trainer, algorithm, set};
//!
//! # fn main() -> warpo::Result<()> {
//! let folder = "examples/quickstart/model";
//! let dev = Device::from_name("cpu", 2)?;
//!
//! // The keys are those of `warpo config sft`.
//! let sft = algorithm("sft")?;
//! let (mut settings, mut own) = Settings::defaults(sft)?;
//! for pair in ["steps=3", "batch_size=4", "completion_only=false"] {
//!     set(&mut [&mut settings, &mut *own], pair)?;
//! }
//! settings.model = folder.into();
//! settings.data = vec!["examples/quickstart/heldout.jsonl".into()];
//!
//! // Three steps in memory; `warpo::run` makes a run on disk that survives a kill.
//! let mut trainer = Trainer::<f32>::new(&dev, settings, (sft.build)(&*own)?)?;
//! for _ in 0..3 {
//!     let report = trainer.step(&mut Silent)?;
//!     let loss = report.metrics.iter().find(|(name, _)| *name == "loss");
//!     assert!(loss.is_some_and(|(_, nats)| *nats > 0.0 && *nats < 8.0));
//! }
//!
//! // Two samples of one prompt by the model as it is now.
//! let tokenizer = Tokenizer::open(folder.as_ref())?;
//! let ids = tokenizer.encode("The camera")?;
//! let prompts = [0, 1].map(|sample| Prompt { sample, ids: ids.clone() });
//! let config = GenerationConfig {
//!     sampling: SamplingParams { temperature: 0.8, ..SamplingParams::default() },
//!     max_new_tokens: 16,
//!     stop_ids: tokenizer.eos().to_vec(),
//!     stream: Stream::of_seed(0),
//! };
//! let policy = trainer.policy().expect("sft trains a policy");
//! let samples = Generator::generate(&dev, policy, &prompts, &config)?;
//! for sample in &samples {
//!     let text = tokenizer.decode_continuation(&ids, &sample.ids)?;
//!     println!("{text}: {} nats", -sample.logprobs.iter().sum::<f32>());
//! }
//! assert_eq!(samples.len(), 2);
//! # Ok(())
//! # }
//! ```

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
mod digest;
#[doc(hidden)]
pub mod error;
#[doc(hidden)]
pub mod eval;
#[doc(hidden)]
pub mod hub;
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
pub mod storage;
#[doc(hidden)]
pub mod train;

pub use algorithms::{ALGORITHMS, Algorithm, AlgorithmEntry, algorithm};
pub use config::{Section, set_pair as set};
pub use data::Tokenizer;
pub use device::Device;
pub use error::{Error, Result};
pub use models::{Head, Model};
pub use ops::sample::SamplingParams;
pub use rng::Stream;
pub use rollout::{Completion, GenerationConfig, Generator, Prompt};
pub use train::{Observer, Settings, Silent, StepReport, Trainer, run};
