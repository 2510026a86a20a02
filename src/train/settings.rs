//! Settings that all algorithms share.

crate::choices! {
    /// Course of the learning rate after warm-up.
    pub enum Schedule { Constant = "constant", Linear = "linear", Cosine = "cosine" }
}

crate::settings! {
    /// What a run is told.
    pub struct Settings {
        /// The model's folder: config.json, safetensors, tokenizer.json, as Hugging Face stores it.
        pub model: String = String::new(),
        /// Data files (JSONL); "-" is standard input.
        pub data: Vec<String> = Vec::new(),
        /// Data files that are scored but never trained on (sft, reward).
        pub eval_data: Vec<String> = Vec::new(),
        /// Steps between evaluations; 0 evaluates at the end only.
        pub eval_every: u64 = 0,
        /// Folder of the run: metrics, rollouts, checkpoints, the final model.
        pub out: String = "run".into(),
        /// auto, cpu, cuda or cuda:N.
        pub device: String = "auto".into(),
        /// Threads of the CPU device; 0 takes all cores. Changes no bit of the result.
        pub threads: usize = 0,
        /// Seed of everything that is drawn.
        pub seed: u64 = 0,
        /// Sequences (for reward: pairs) of an optimizer step.
        pub batch_size: usize = 32,
        /// Optimizer steps; 0 counts `epochs` instead.
        pub steps: u64 = 0,
        /// Passes over the data, if `steps` is 0.
        pub epochs: f64 = 1.0,
        /// Draw examples in a new order each epoch.
        pub shuffle: bool = true,
        /// Peak step size (TRL: 2e-5 for SFT, 1e-4 for reward, 3e-6 for PPO).
        pub learning_rate: f64 = 2e-5,
        /// Its course after warm-up (TRL: linear).
        pub schedule: Schedule = Schedule::Linear,
        /// Steps from 0 to the peak.
        pub warmup_steps: u64 = 0,
        /// The schedule ends at this fraction of the peak (OpenRLHF: 0.1).
        pub min_learning_rate_ratio: f64 = 0.0,
        /// Decoupled weight decay of matrices (Hugging Face Trainer: 0).
        pub weight_decay: f64 = 0.0,
        /// Decay norms and biases too.
        pub decay_all: bool = false,
        /// AdamW's first decay.
        pub beta1: f64 = 0.9,
        /// AdamW's second decay (torch: 0.999; OpenRLHF: 0.95).
        pub beta2: f64 = 0.999,
        /// AdamW's epsilon (torch: 1e-8; N+: 1e-5).
        pub epsilon: f64 = 1e-8,
        /// Gradients are scaled down to this norm; 0 is off (Hugging Face Trainer: 1).
        pub max_grad_norm: f64 = 1.0,
        /// Tokens of a micro-batch: bounds memory, changes no mean.
        pub micro_batch_tokens: usize = 2048,
        /// The longest sequence in tokens; 0 takes the model's limit.
        pub max_length: usize = 1024,
        /// Prompts are the first so many tokens of texts, where the data has no prompts.
        pub prompt_tokens: Option<usize> = None,
        /// Ends a text or a sample; "none" takes the tokenizer's.
        pub eos_id: Option<u32> = None,
        /// More ids that end a sample.
        pub stop_ids: Vec<u32> = Vec::new(),
        /// Steps between checkpoints; 0 saves at the end and on a signal only.
        pub checkpoint_every: u64 = 100,
        /// Checkpoints that are kept, at least 2.
        pub keep_checkpoints: usize = 2,
    }
}

impl Settings {
    /// Keys that may differ between a run and its resumption: they change no bit of the result.
    pub const FREE: &[&str] = &["out", "device", "threads", "checkpoint_every", "keep_checkpoints"];

    /// Checks ranges.
    ///
    /// # Errors
    /// [`crate::Error::Config`] naming the key.
    pub fn validate(&self) -> crate::Result<()> {
        for (key, ok, want) in [
            ("model", !self.model.is_empty(), "a model folder (--model DIR)"),
            ("data", !self.data.is_empty(), "at least one file (--data FILE)"),
            ("batch_size", self.batch_size > 0, "1 or more"),
            ("epochs", self.steps > 0 || self.epochs > 0.0, "above 0, or `steps`"),
            ("learning_rate", self.learning_rate >= 0.0, "0 or more"),
            (
                "min_learning_rate_ratio",
                (0.0..=1.0).contains(&self.min_learning_rate_ratio),
                "from 0 to 1",
            ),
            ("weight_decay", self.weight_decay >= 0.0, "0 or more"),
            ("beta1", (0.0..1.0).contains(&self.beta1), "from 0 to below 1"),
            ("beta2", (0.0..1.0).contains(&self.beta2), "from 0 to below 1"),
            ("epsilon", self.epsilon >= 0.0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm >= 0.0, "0 or more"),
            ("micro_batch_tokens", self.micro_batch_tokens > 0, "1 or more"),
        ] {
            if !ok {
                let message = format!("wanted {want}");
                return Err(crate::Error::Config { key: key.into(), message, hint: None });
            }
        }
        Ok(())
    }
}
