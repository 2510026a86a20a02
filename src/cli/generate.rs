//! `warpo generate`: continue prompts.

use std::{path::PathBuf, time::Instant};

use half::bf16;
use serde_json::json;

use super::{DeviceArgs, RowArgs, best_of::KeptSamples, finite, note, rows::OutArgs, warn};
use crate::{
    data::{self, Limits, Tokenizer},
    device::{Arena, Device, Element},
    error::{Error, Result},
    eval,
    models::{self, Head, LoadOptions, Model},
    ops::sample,
    rng::{Purpose, Stream},
    rollout::{Completion, GenerationConfig, Generator, Prompt},
    train::inputs,
};

/// How tokens are drawn.
#[derive(Debug, clap::Args)]
pub(super) struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Keep the k likeliest tokens; 0 is off
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens up to this probability; 1 is off
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 is off
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
}

/// Continue prompts (data with `prompt`, `messages`, `text`, `input_ids` or as the README says) and
/// write JSONL
#[derive(Debug, clap::Args)]
pub(super) struct GenerateArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// An adapter's folder (LoRA, as PEFT stores it), on the model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Prompts, `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    data: PathBuf,
    #[command(flatten)]
    rows: RowArgs,
    /// A reward model's folder: adds `reward`
    #[arg(long, value_name = "DIR")]
    reward_model: Option<PathBuf>,
    /// chatml, llama3, gemma, mistral, zephyr, vicuna or a file, not the model's own template
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// The most new tokens
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Samples a prompt
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Of a prompt's samples write all, the best by reward (data for SFT), or the pair of the best
    /// and the worst (data for DPO; none where all are equal)
    #[arg(long, value_enum, default_value = "all")]
    keep: KeptSamples,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// More ids that end a sample
    #[arg(long, value_name = "ID")]
    stop_id: Vec<u32>,
    /// Cuts a sample before TEXT, where its text has it; may be given again
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sequences at once; changes no token
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    slots: u32,
    #[command(flatten)]
    to: OutArgs,
    #[command(flatten)]
    place: DeviceArgs,
}

/// Samples between two writes, as a multiple of the slots: the last sequences of a part run in a
/// batch that empties.
const PART: usize = 8;

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let sampling = args.sampling.params()?;
    args.place.run(|dev| match dev {
        Device::Cpu(_) => run_in::<f32>(args, dev, sampling),
        Device::Cuda(_) => run_in::<bf16>(args, dev, sampling),
    })
}

/// [`run`] with models that compute in `T`.
fn run_in<T: Element<Acc = f32>>(
    args: &GenerateArgs,
    dev: &Device,
    sampling: sample::SamplingParams,
) -> Result<()> {
    let dir = super::model_folder(&args.model)?;
    let config = super::model_config(&dir, args.adapter.as_ref())?;
    let (_, spec) = config.spec()?;
    let texts = super::text_folder(&dir, args.adapter.as_ref())?;
    let tokenizer = Tokenizer::open_if_there(&texts, args.chat_template.as_deref())?;
    if let (None, Some(stop)) = (&tokenizer, args.stop.first()) {
        let want = format!("a tokenizer in {}", dir.display());
        return Err(Error::config("--stop", want, stop));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::config("--stop", "a text", "an empty one"));
    }
    if args.keep != KeptSamples::All && (args.reward_model.is_none() || args.samples < 2) {
        let want = "--reward-model and --samples of 2 or more";
        return Err(Error::config("--keep", want, format!("{:?}", args.keep).to_lowercase()));
    }
    let new = args.max_new_tokens as usize;
    let Some(max_length) = spec.max_positions.checked_sub(new).filter(|n| *n > 0) else {
        let want = format!("less than the model's {} positions", spec.max_positions);
        return Err(Error::config("--max-new-tokens", want, new));
    };
    let chats = tokenizer.as_ref().is_some_and(|t| t.template().is_ok());
    super::fetch::fetch_data(&args.data)?;
    let records = data::read_as(&args.data, &args.rows.options(chats)?)?;
    let (vocab, skip_bad) = (spec.vocab, records.bad.left);
    let limits = Limits { max_length, vocab, eos: None, skip_bad };
    let data = data::prompts(&records, tokenizer.as_ref(), limits, Some(usize::MAX))?;
    let (prompts, stats) = (&data.sequences, data.stats);
    if let Some(empty) = data.omissions.iter().find(|o| o.reason.starts_with("dropped")) {
        return Err(empty.first.error("has no tokens to continue, wanted at least one"));
    }
    let bad = [records.bad.note("read"), data.bad.note("continued")];
    bad.iter().flatten().for_each(|text| warn(text));
    if stats.truncated > 0 {
        let n = stats.truncated;
        warn(&format!("{n} prompts lost their beginning: longer than {max_length} tokens"));
    }
    let longest = data.longest();
    let options = LoadOptions { longest: Some(longest + new), ..LoadOptions::frozen(Head::Lm) };
    let model: Model<T> = models::load_as(dev, config, options)?;
    let spec = model.spec();
    let reward_model = match &args.reward_model {
        None => None,
        Some(dir) => {
            let (dir, longest) = (super::model_folder(dir)?, longest + new);
            let tokenizer = tokenizer.as_ref();
            Some(eval::load_reward_model::<T>(dev, &dir, spec, tokenizer, longest)?)
        }
    };
    let (each, slots) = (u64::from(args.samples), args.slots as usize);
    let total = prompts.len() as u64 * each;
    let slots = slots.min(usize::try_from(total).unwrap_or(slots));
    let generator = Generator { slots, max_len: longest + new, rows: longest.max(slots).max(512) };
    let mut arena = Arena::new(dev, generator.plan::<T>(dev, spec, &sampling)?)?;
    let is_chat = records.iter().any(|at| at.record.is_chat());
    let chats = || tokenizer.as_ref().filter(|_| is_chat);
    let turn_end = chats().and_then(data::turn_end);
    chats().and_then(data::unasked_opening).iter().for_each(|text| warn(&inputs::unasked(text)));
    let eos = tokenizer.iter().flat_map(|t| t.eos().to_vec()).chain(turn_end);
    let settings = GenerationConfig {
        sampling,
        max_new_tokens: new,
        stop_ids: eos.chain(args.stop_id.iter().copied()).collect(),
        stream: Stream { seed: args.seed, step: 0, purpose: Purpose::Sample },
    };
    let mut out = args.to.open()?;
    let bar = super::rows::bar(total, args.to.to_file());
    let done = match args.keep {
        KeptSamples::All => out.done as u64,
        // Some prompts have no row.
        _ => out.last_example()?.unwrap_or(0) * each,
    };
    let (start, mut tokens, mut next) = (Instant::now(), 0, done);
    bar.set_position(next);
    while next < total {
        let end = (next + (PART * slots) as u64).next_multiple_of(each).min(total);
        let prompt = |i: u64| prompts[(i / each) as usize].ids.clone();
        let part: Vec<Prompt> =
            (next..end).map(|sample| Prompt { sample, ids: prompt(sample) }).collect();
        let mut done = generator.run(dev, &model, &arena.scope(), &part, &settings, |_| Ok(()))?;
        let mut texts = Vec::with_capacity(done.len());
        for (p, c) in part.iter().zip(&mut done) {
            let text = |ids: &[u32]| tokenizer.as_ref().map(|t| t.decode_continuation(&p.ids, ids));
            texts.push(cut(c, &args.stop, |ids| text(ids).transpose())?);
        }
        let whole: Vec<Vec<u32>> =
            part.iter().zip(&done).map(|(p, c)| [&p.ids[..], &c.ids].concat()).collect();
        let rewards = match &reward_model {
            Some(model) => eval::rate(dev, model, &whole)?,
            None => Vec::new(),
        };
        let mut samples = Vec::new();
        for (i, (p, c)) in part.iter().zip(&done).enumerate() {
            let sample = |i| format!("the log-prob of token {i} of sample {}", p.sample);
            finite(&c.logprobs, sample)?;
            finite(rewards.get(i..=i).unwrap_or(&[]), |_| {
                format!("the reward of sample {}", p.sample)
            })?;
            let mut line = json!({
                "input_ids": p.ids,
                "output_ids": c.ids,
                "text": texts[i],
                "logprobs": c.logprobs,
                "sum_logprob": c.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>(),
                "stopped": c.stopped,
            });
            if let Some(reward) = rewards.get(i) {
                line["reward"] = json!(reward);
            }
            tokens += c.ids.len();
            samples.push(line);
            if (p.sample + 1).is_multiple_of(each) || args.keep == KeptSamples::All {
                let rows = args.keep.rows(p.sample / each, std::mem::take(&mut samples));
                rows.iter().try_for_each(|row| out.write(row))?;
            }
        }
        bar.inc(end - next);
        next = end;
    }
    bar.finish_and_clear();
    out.finish()?;
    let seconds = start.elapsed().as_secs_f64();
    let speed = tokens as f64 / seconds;
    note(&format!("{tokens} tokens in {seconds:.3} s, {speed:.0} tokens/s on {}", dev.describe()));
    Ok(())
}

impl SamplingArgs {
    /// The parameters, checked.
    pub(super) fn params(&self) -> Result<sample::SamplingParams> {
        let Self { temperature, top_k, top_p, min_p } = *self;
        // A temperature that f32 rounds to 0 is not the greedy choice that 0 stands for.
        if temperature != 0.0 && temperature.abs() < f64::from(f32::MIN_POSITIVE) {
            return Err(Error::config("--temperature", "0, or 1e-6 or more", temperature));
        }
        let temperature = temperature as f32;
        let params = sample::SamplingParams { temperature, top_k, top_p, min_p };
        params.validate().map_err(|e| match e {
            Error::Value { what, want, got } => {
                Error::config(format!("--{}", what.replace('_', "-")), want, got)
            }
            e => e,
        })?;
        Ok(params)
    }
}

/// The text of a sample, which ends before the first text that stops it; its tokens end with that
/// which completes it.
fn cut<F>(
    c: &mut Completion<F>,
    stops: &[String],
    text: impl Fn(&[u32]) -> Result<Option<String>>,
) -> Result<Option<String>> {
    let Some(whole) = text(&c.ids)? else { return Ok(None) };
    let first = |text: &str| stops.iter().filter_map(|stop| text.find(&**stop)).min();
    if first(&whole).is_none() {
        return Ok(Some(whole));
    }
    let stopped = |n: usize| Ok(first(&text(&c.ids[..n])?.unwrap_or_default()).is_some());
    // More tokens never take a text back.
    let (mut low, mut high) = (0, c.ids.len());
    while high - low > 1 {
        let middle = (low + high) / 2;
        if stopped(middle)? { high = middle } else { low = middle }
    }
    c.ids.truncate(high);
    c.logprobs.truncate(high);
    c.stopped = true;
    let mut kept = text(&c.ids)?.unwrap_or_default();
    kept.truncate(first(&kept).unwrap_or(kept.len()));
    Ok(Some(kept))
}
