//! `warpo score`: log-probs and rewards of given texts.

use std::path::PathBuf;

use serde_json::json;

use super::generate::{score_all, tokenizer, warn};
use crate::{
    data::{self, Limits},
    device::{Arena, Device},
    error::{Error, Result},
    models::{Batch, Head, Model},
    rollout::Scorer,
};

/// Log-probs, perplexity and rewards of texts (JSONL with `text`, `prompt` or `input_ids`)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The folder of a language model
    #[arg(long, value_name = "DIR", required_unless_present = "reward_model")]
    model: Option<PathBuf>,
    /// A reward model's folder: adds `reward`
    #[arg(long, value_name = "DIR")]
    reward_model: Option<PathBuf>,
    /// Texts, `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    data: PathBuf,
    /// Divides the logits
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Append the end-of-text token, as reward models are trained
    #[arg(long)]
    eos: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads; 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let dev = Device::from_name(&args.device, args.threads)?;
    let model =
        args.model.as_ref().map(|d| Model::<f32>::load(&dev, d, Head::Lm, 0)).transpose()?;
    let judge = args
        .reward_model
        .as_ref()
        .map(|d| Model::<f32>::load(&dev, d, Head::Scalar, 0))
        .transpose()?;
    let Some(dir) = args.model.as_ref().or(args.reward_model.as_ref()) else {
        return Err(Error::value("--model", "a model or a reward model", "neither"));
    };
    let tokenizer = tokenizer(dir)?;
    let spec = model.iter().chain(&judge).map(Model::spec);
    let (max_length, vocab) =
        spec.fold((usize::MAX, usize::MAX), |(l, v), s| (l.min(s.max_positions), v.min(s.vocab)));
    let limits = Limits { max_length, vocab, eos: None };
    let records = data::read(&args.data)?;
    let (mut texts, stats) = data::prompts(&records, tokenizer.as_ref(), limits, Some(usize::MAX))?;
    if stats.truncated > 0 {
        warn(&format!("{} texts lost their beginning: longer than {max_length}", stats.truncated));
    }
    let eos = tokenizer.as_ref().and_then(|t| t.eos().first().copied()).filter(|_| args.eos);
    texts.iter_mut().for_each(|t| t.ids.extend(eos));
    let all: Vec<&[u32]> = texts.iter().map(|t| &t.ids[..]).collect();
    let rewards = judge.map(|j| score_all(&dev, &j, &all)).transpose()?;
    let logprobs = model.map(|m| logprobs(&dev, &m, &all, args.temperature)).transpose()?;
    for (i, t) in texts.iter().enumerate() {
        let mut line = json!({ "input_ids": t.ids, "text": t.text });
        if let Some(all) = &logprobs {
            let sum: f64 = all[i].iter().map(|x| f64::from(*x)).sum();
            line["logprobs"] = json!(all[i]);
            line["sum_logprob"] = json!(sum);
            line["perplexity"] = json!((-sum / all[i].len().max(1) as f64).exp());
        }
        if let Some(all) = &rewards {
            line["reward"] = json!(all[i]);
        }
        super::print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// Log-probs of the tokens at positions 1.. of each sequence.
fn logprobs(dev: &Device, model: &Model<f32>, all: &[&[u32]], t: f32) -> Result<Vec<Vec<f32>>> {
    let longest = all.iter().map(|s| s.len()).max().unwrap_or(1);
    let scorer = Scorer { rows: longest.max(2048), sequences: 256 };
    let mut arena = Arena::new(scorer.plan::<f32>(model.spec())?);
    let mut batch = Batch::default();
    let mut out = Vec::with_capacity(all.len());
    for group in scorer.groups(all.iter().map(|s| s.len())) {
        batch.clear();
        all[group].iter().for_each(|s| batch.push_predicted(s, 1));
        let mut flat = Vec::new();
        scorer.logprobs(dev, model, &arena.scope(), &batch, t, &mut flat, None)?;
        let parts = batch.offsets().windows(2);
        out.extend(parts.map(|w| flat[w[0] as usize..w[1] as usize].to_vec()));
    }
    Ok(out)
}
