//! Settings that all algorithms share.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::data_file::DataFile;
use crate::{
    algorithms::AlgorithmEntry,
    config::{self, Section},
    error::{Error, Result},
};

crate::choices! {
    /// Course of the learning rate after warm-up.
    pub enum Schedule {
        Constant = "constant",
        Linear = "linear",
        Cosine = "cosine",
        Polynomial = "polynomial",
        InverseSqrt = "inverse_sqrt",
        WarmupStableDecay = "warmup_stable_decay",
    }
}

crate::choices! {
    /// What weights are stored in.
    pub enum SaveDtype {
        Auto = "auto",
        F32 = "float32",
        Bf16 = "bfloat16",
        F16 = "float16",
    }
}

crate::settings! {
    /// Settings that all algorithms share.
    pub struct Settings {
        /// The model's folder: config.json, safetensors, tokenizer.json, as Hugging Face stores it.
        pub model: String = String::new() => "a model folder (--model DIR)" if |m| !m.is_empty(),
        /// Folder of the adapter (LoRA, as PEFT stores it) that the trained model goes on with: its
        /// base stays as it is, and the reference is that base. Other trained models get new
        /// adapters of the same kind.
        pub adapter: Option<String> = None,
        /// Rank of new adapters on all trained models, which leave the weights below them as they
        /// are (Hu et al. 2021); 0 trains all weights (PEFT: 8; TRL: 16).
        pub lora_rank: usize = 0 => "at most 16384" if |n| *n <= 16384,
        /// What adapters add is multiplied by this over the rank; "none" takes twice the rank (TRL:
        /// 32 for 16).
        pub lora_alpha: Option<f64> = None
            => "above 0" if |a| a.is_none_or(|a| a > 0.0 && a.is_finite()),
        /// Divide by the root of the rank instead (Kalajdzievski 2023; PEFT: off).
        pub lora_rslora: bool = false,
        /// The modules that have adapters, by their names or the ends of these; all-linear is all
        /// projections of the blocks (TRL: all-linear; PEFT: q_proj and v_proj of most families).
        pub lora_targets: Vec<String> = vec!["all-linear".into()]
            => "at least one name" if |all| !all.is_empty(),
        /// Data files (JSON lines or lists, CSV, TSV; each also as .gz or .zst; Parquet where it is
        /// built in), folders of these, patterns with * and ?, or names of the Hub; "-" is standard
        /// input. An epoch draws each example once; of a file with weight w round(w n) of its n
        /// examples, at least one, and none again before all others were drawn, over epochs.
        pub data: Vec<DataFile> = Vec::new()
            => "at least one file (--data FILE)" if |d| !d.is_empty(),
        /// Data files that are scored but never trained on (all but ppo).
        pub eval_data: Vec<String> = Vec::new(),
        /// Instead of eval_data, of the rows of data: below 1 each with this probability, else so
        /// many; 0 is off. A row's side follows from its content and the seed: equal rows go
        /// together (Hugging Face: train_test_split, by position).
        pub validation_split: f64 = 0.0
            => "from 0 to below 1, or a whole number" if is_split,
        /// Lines that may be left out because they cannot be read or learned, of the data, and of
        /// what is held out; one more is an error.
        pub skip_bad: usize = 0,
        /// What columns are called in the data, where that is not known here: prompt = "question".
        pub columns: BTreeMap<String, String> = BTreeMap::new(),
        /// Steps between evaluations; 0 evaluates at each end of an epoch.
        pub eval_every: u64 = 0,
        /// Keep the model with the best eval_loss, eval_perplexity or eval_accuracy in the folder
        /// `best` (Hugging Face Trainer: metric_for_best_model).
        pub keep_best: Option<String> = None,
        /// Evaluations without a better one after which the run ends (Hugging Face:
        /// early_stopping_patience).
        pub patience: Option<u64> = None => "1 or more" if |n| *n != Some(0),
        /// Folder of the run: metrics, rollouts, checkpoints, the final model.
        pub out: String = "run".into(),
        /// auto (a GPU if there is one, else the CPU), cpu, cuda, cuda:N; sim or sim:hopper, for
        /// tests.
        pub device: String = "auto".into(),
        /// Threads of the CPU device; 0 takes all cores. Changes no bit of the result.
        pub threads: usize = 0 => "at most 1024" if |n| *n <= 1024,
        /// Seed of everything that is drawn.
        pub seed: u64 = 0,
        /// Sequences of an optimizer step; pairs, where an algorithm learns from these (Hugging
        /// Face Trainer: 8 a device; InstructGPT, N+ and OpenRLHF use 32 to 512).
        pub batch_size: usize = 32 => "from 1 to 1000000" if |n| (1..=1_000_000).contains(n),
        /// Optimizer steps; 0 counts `epochs` instead.
        pub steps: u64 = 0,
        /// Passes over the data, if `steps` is 0 (Hugging Face Trainer: 3).
        pub epochs: f64 = 1.0 => "above 0" if |e| *e > 0.0 && e.is_finite(),
        /// Draw examples in a new order each epoch (as everywhere).
        pub shuffle: bool = true,
        /// Peak step size (TRL: 2e-5 for SFT, 1e-4 for reward, 3e-6 for PPO, 1e-6 for DPO
        /// and GRPO).
        pub learning_rate: f64 = 2e-5 => "0 or more" if |r| *r >= 0.0 && r.is_finite(),
        /// Its course after warm-up, as Hugging Face computes it, but that a polynomial ends at 0
        /// or the floor, not at 1e-7 (TRL: linear).
        pub schedule: Schedule = Schedule::Linear,
        /// Steps from 0 to the peak (Hugging Face Trainer: 0).
        pub warmup_steps: u64 = 0,
        /// The same as a fraction of all steps, rounded up.
        pub warmup_ratio: f64 = 0.0 => "from 0 to 1" if |r| (0.0..=1.0).contains(r),
        /// Exponent of a polynomial schedule (Hugging Face: 1).
        pub schedule_power: Option<f64> = None
            => "above 0" if |p| p.is_none_or(|p| p > 0.0 && p.is_finite()),
        /// Last steps, in which warmup_stable_decay falls to its floor; "none" takes a tenth of
        /// all.
        pub decay_steps: Option<u64> = None => "1 or more" if |n| *n != Some(0),
        /// The schedule ends at this fraction of the peak (OpenRLHF: 0.1).
        pub min_learning_rate_ratio: f64 = 0.0 => "from 0 to 1" if |r| (0.0..=1.0).contains(r),
        /// Decoupled weight decay of matrices (Hugging Face Trainer: 0).
        pub weight_decay: f64 = 0.0 => "0 or more" if |w| *w >= 0.0 && w.is_finite(),
        /// Decay norms and biases too (Hugging Face Trainer: no).
        pub decay_all: bool = false,
        /// AdamW's first decay (torch: 0.9).
        pub beta1: f64 = 0.9 => "from 0 to below 1" if |b| (0.0..1.0).contains(b),
        /// AdamW's second decay (torch: 0.999; OpenRLHF: 0.95).
        pub beta2: f64 = 0.999 => "from 0 to below 1" if |b| (0.0..1.0).contains(b),
        /// AdamW's epsilon (torch: 1e-8; N+: 1e-5).
        pub epsilon: f64 = 1e-8 => "1e-37 or more" if |e| *e >= 1e-37 && e.is_finite(),
        /// Gradients are scaled down to this norm; 0 is off (Hugging Face Trainer: 1).
        pub max_grad_norm: f64 = 1.0 => "0 or more" if |n| *n >= 0.0 && n.is_finite(),
        /// Weight of the loss that spreads a policy's tokens over the experts of its blocks, a mean
        /// over tokens and blocks (Fedus et al. 2021) in which an expert's part is that of its
        /// micro-batch; 0 is off (Hugging Face: router_aux_loss_coef 0.001 where
        /// output_router_logits is set, else off).
        pub load_balance: f64 = 0.0 => "from 0 to 100" if |w| (0.0..=100.0).contains(w),
        /// Tokens of a micro-batch: bounds memory, changes no mean (our own; enough rows to fill a
        /// CPU).
        pub micro_batch_tokens: usize = 2048
            => "from 1 to 100000000" if |n| (1..=100_000_000).contains(n),
        /// Keep only the residual stream of a micro-batch and compute each block again in the
        /// backward pass: a third more work, much less memory, the same bits (Hugging Face:
        /// gradient_checkpointing, off).
        pub recompute: bool = false,
        /// Keep the reference and the reward model in host memory; to score they come into the
        /// memory of the gradients, which are not there yet. A CUDA device then needs no room for
        /// them, but for a reward model of more than twice the policy's size, which stays
        /// (OpenRLHF: offload of reference and reward model, off).
        pub offload_frozen: bool = false,
        /// The longest sequence in tokens, prompt and sample together; 0 takes the model's limit
        /// (TRL: 1024).
        pub max_length: usize = 1024,
        /// Prompts are the first so many tokens of texts, where the data has no prompts.
        pub prompt_tokens: Option<usize> = None => "1 or more" if |n| *n != Some(0),
        /// Template of conversations: chatml, llama3, gemma, mistral, zephyr, vicuna or a file;
        /// "none" takes the model's own.
        pub chat_template: Option<String> = None,
        /// Ends a text or a sample; "none" takes the tokenizer's.
        pub eos_id: Option<u32> = None,
        /// More ids that end a sample.
        pub stop_ids: Vec<u32> = Vec::new(),
        /// Steps between checkpoints; 0 saves at the end and on a signal only.
        pub checkpoint_every: u64 = 100,
        /// Checkpoints that are kept, at least 2.
        pub keep_checkpoints: usize = 2,
        /// What the trained model is stored in; auto takes what the model that it began with was
        /// stored in (transformers: the dtype it is loaded in).
        pub save_dtype: SaveDtype = SaveDtype::Auto,
        /// Every so many steps, compute a micro-batch again, and compare all weights, moments and
        /// panels with what the step before left: a bit that changed by itself stops the run and is
        /// named; 0 is off (our own).
        pub verify_every: u64 = 0,
    }
}

fn is_split(share: &f64) -> bool {
    (0.0..1.0).contains(share) || *share >= 1.0 && share.fract() == 0.0 && *share < 1e15
}

impl SaveDtype {
    /// The dtype, if it is named.
    pub fn known(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Dtype::F32),
            Self::Bf16 => Some(Dtype::BF16),
            Self::F16 => Some(Dtype::F16),
        }
    }

    /// For a model that was stored in `own`.
    pub fn of(self, own: Dtype) -> Dtype {
        self.known().unwrap_or(own)
    }
}

impl Settings {
    /// Keys that may differ between a run and its resumption: they change no bit of a model.
    pub const FREE: &[&str] = &[
        "out",
        // Their content is compared, not their place.
        "model",
        "adapter",
        "reward_model",
        "reference_model",
        "data",
        "eval_data",
        "columns",
        "chat_template",
        "device",
        "threads",
        // On a CUDA device it is compared: sums of gradients there are by micro-batch.
        "micro_batch_tokens",
        "recompute",
        "offload_frozen",
        "checkpoint_every",
        "keep_checkpoints",
        "verify_every",
    ];

    /// Keys that may differ in a run that goes on for longer than it was to: its length, and the
    /// course of its learning rate.
    pub const OF_LENGTH: &[&str] = &[
        "steps",
        "epochs",
        "learning_rate",
        "schedule",
        "warmup_steps",
        "warmup_ratio",
        "schedule_power",
        "decay_steps",
        "min_learning_rate_ratio",
    ];

    /// The defaults of an algorithm: shared settings, and its own.
    pub fn defaults(entry: &AlgorithmEntry) -> Result<(Self, Box<dyn Section>)> {
        let (mut settings, mut section) = (Settings::default(), (entry.section)());
        for (key, value) in entry.defaults {
            config::set_pair(&mut [&mut settings, &mut *section], &format!("{key}={value}"))?;
        }
        Ok((settings, section))
    }

    /// The same after a preset of the algorithm.
    pub fn of_preset(
        entry: &AlgorithmEntry,
        name: Option<&str>,
    ) -> Result<(Self, Box<dyn Section>)> {
        let (mut settings, mut section) = Self::defaults(entry)?;
        let Some(name) = name else { return Ok((settings, section)) };
        let preset = entry.presets.iter().find(|p| p.name == name).ok_or_else(|| {
            let known: Vec<&str> = entry.presets.iter().map(|p| p.name).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            Error::Config {
                key: "--preset".into(),
                message: format!("{} has no `{name}`", entry.name),
                hint: Some(format!("known are: {known}")),
            }
        })?;
        for (key, value) in preset.values {
            config::set_pair(&mut [&mut settings, &mut *section], &format!("{key}={value}"))?;
        }
        Ok((settings, section))
    }
}
