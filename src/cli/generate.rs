//! `warpo generate`: continue prompts.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use serde_json::json;

use crate::{
    data::{self, Limits, Tokenizer},
    device::{Arena, Device},
    error::{Error, Result},
    models::{Head, Model},
    ops::sample,
    rollout::{Generator, Prompt, Scorer, Settings, last_scores},
};

/// Continue prompts (JSONL with `prompt`, `text` or `input_ids`) and write JSONL
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Prompts, `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    data: PathBuf,
    /// A reward model's folder: adds `reward`
    #[arg(long, value_name = "DIR")]
    reward_model: Option<PathBuf>,
    /// The most new tokens
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Samples a prompt
    #[arg(long, default_value_t = 1)]
    samples: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Keep the k likeliest tokens; 0 is off
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens up to this probability; 1 is off
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 is off
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// More ids that end a sample
    #[arg(long, value_name = "ID")]
    stop_id: Vec<u32>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sequences at once
    #[arg(long, default_value_t = 64)]
    slots: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let dev = Device::from_name(&args.device, args.threads)?;
    let model = Model::<f32>::load(&dev, &args.model, Head::Lm, 0)?;
    let tokenizer = tokenizer(&args.model)?;
    let room = model.spec().max_positions.checked_sub(args.max_new_tokens).filter(|n| *n > 0);
    let Some(max_length) = room else {
        let want = format!("less than the model's {} positions", model.spec().max_positions);
        return Err(Error::value("--max-new-tokens", want, args.max_new_tokens));
    };
    let limits = Limits { max_length, vocab: model.spec().vocab, eos: None };
    let records = data::read(&args.data)?;
    let (prompts, stats) = data::prompts(&records, tokenizer.as_ref(), limits, Some(usize::MAX))?;
    if stats.truncated > 0 {
        let message =
            format!("{} prompts lost their beginning: longer than {max_length}", stats.truncated);
        warn(&message);
    }
    let all: Vec<Prompt> = prompts
        .iter()
        .flat_map(|p| std::iter::repeat_n(&p.ids, args.samples))
        .zip(0..)
        .map(|(ids, sample)| Prompt { sample, ids: ids.clone() })
        .collect();
    let eos = tokenizer.iter().flat_map(|t| t.eos().to_vec());
    let settings = Settings {
        sampling: sample::Params {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
        },
        max_new_tokens: args.max_new_tokens,
        stop_ids: eos.chain(args.stop_id.iter().copied()).collect(),
        seed: args.seed,
        step: 0,
    };
    let generator = Generator::for_prompts(&all, args.max_new_tokens, args.slots.max(1), 512);
    let mut arena = Arena::new(generator.plan::<f32>(model.spec())?);
    let start = Instant::now();
    let done = generator.run(&dev, &model, &arena.scope(), &all, &settings, |_| true)?;
    let done = done.unwrap_or_default();
    let (seconds, tokens) = (start.elapsed().as_secs_f64(), done.iter().map(|c| c.ids.len()));
    let tokens: usize = tokens.sum();
    let speed = tokens as f64 / seconds;
    note(&format!("{tokens} tokens in {seconds:.3} s, {speed:.0} tokens/s on {}", dev.describe()));
    let rewards = match &args.reward_model {
        None => Vec::new(),
        Some(dir) => {
            let judge = Model::<f32>::load(&dev, dir, Head::Scalar, 0)?;
            let whole: Vec<Vec<u32>> =
                all.iter().zip(&done).map(|(p, c)| [&p.ids[..], &c.ids].concat()).collect();
            let refs: Vec<&[u32]> = whole.iter().map(Vec::as_slice).collect();
            score_all(&dev, &judge, &refs)?
        }
    };
    for (i, (p, c)) in all.iter().zip(&done).enumerate() {
        let text = tokenizer.as_ref().map(|t| t.decode_continuation(&p.ids, &c.ids)).transpose()?;
        let mut line = json!({
            "input_ids": p.ids,
            "output_ids": c.ids,
            "text": text,
            "logprobs": c.logprobs,
            "sum_logprob": c.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>(),
            "stopped": c.stopped,
        });
        if let Some(reward) = rewards.get(i) {
            line["reward"] = json!(reward);
        }
        super::print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// The tokenizer of a folder, if it has one.
pub(super) fn tokenizer(dir: &Path) -> Result<Option<Tokenizer>> {
    dir.join("tokenizer.json").exists().then(|| Tokenizer::open(dir)).transpose()
}

/// Scores of whole sequences.
pub(super) fn score_all(dev: &Device, judge: &Model<f32>, all: &[&[u32]]) -> Result<Vec<f32>> {
    let longest = all.iter().map(|s| s.len()).max().unwrap_or(1);
    let scorer = Scorer { rows: longest.max(2048), sequences: 256 };
    let mut arena = Arena::new(scorer.plan::<f32>(judge.spec())?);
    last_scores(dev, judge, &mut arena, scorer, all)
}

/// A line on standard error.
pub(super) fn warn(message: &str) {
    note(&format!("warning: {message}"));
}

fn note(line: &str) {
    let text = format!("{line}\n");
    // If stderr is gone, there is nobody to tell.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
}
