//! `warpo score`: log-probs and rewards of given texts.

use std::path::PathBuf;

use half::bf16;
use serde_json::{Value, json};

use super::{DeviceArgs, RowArgs, finite, note, rows::OutArgs, warn};
use crate::{
    data::{self, Limits, Record, Sequence, Tokenizer},
    device::{Arena, Device, Element},
    error::{Error, Result},
    eval,
    models::{self, Batch, Head, LoadOptions, Model},
    rollout::{Scorer, ScoringPass},
    train,
};

/// Tokens between two writes: a few passes.
const PART: usize = 8192;

/// Log-probs, perplexity and rewards of texts, one line for each line of data: of a `text` or
/// `input_ids` all tokens but the first count, of `prompt, completion` (or `input_ids, output_ids`)
/// those of the completion, of `messages` those of the model's; `chosen` and `rejected` are scored
/// both
#[derive(Debug, clap::Args)]
pub(super) struct ScoreArgs {
    /// The folder of a language model
    #[arg(long, value_name = "DIR", required_unless_present = "reward_model")]
    model: Option<PathBuf>,
    /// An adapter's folder (LoRA, as PEFT stores it), on the model
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// A reward model's folder: adds `reward`
    #[arg(long, value_name = "DIR")]
    reward_model: Option<PathBuf>,
    /// Texts, `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    data: PathBuf,
    #[command(flatten)]
    rows: RowArgs,
    /// chatml, llama3, gemma, mistral, zephyr, vicuna or a file, not the model's own template
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// Divides the logits
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Append the end-of-text token to texts; a reward model that Warpo trained has it anyway
    #[arg(long)]
    eos: bool,
    /// Print means over all rows at the end: perplexity, rewards, chosen against rejected; to
    /// standard error, unless the rows go to a file
    #[arg(long)]
    summary: bool,
    #[command(flatten)]
    to: OutArgs,
    #[command(flatten)]
    place: DeviceArgs,
}

pub(super) fn run(args: &ScoreArgs) -> Result<()> {
    if !(args.temperature >= 1e-3 && args.temperature.is_finite()) {
        return Err(Error::config("--temperature", "0.001 or more", args.temperature));
    }
    args.place.run(|dev| match dev {
        Device::Cpu(_) => run_in::<f32>(args, dev),
        Device::Cuda(_) => run_in::<bf16>(args, dev),
    })
}

/// [`run`] with models that compute in `T`.
fn run_in<T: Element<Acc = f32>>(args: &ScoreArgs, dev: &Device) -> Result<()> {
    let folder = |dir: &Option<PathBuf>| dir.as_deref().map(super::model_folder).transpose();
    let (model_dir, reward_dir) = (folder(&args.model)?, folder(&args.reward_model)?);
    let config = |dir: &PathBuf, adapter| super::model_config(dir, adapter);
    let configs = [(&model_dir, args.adapter.as_ref()), (&reward_dir, None)];
    let [model_config, reward_config] =
        configs.map(|(dir, adapter)| dir.as_ref().map(|dir| config(dir, adapter)).transpose());
    let (model_config, reward_config) = (model_config?, reward_config?);
    let specs = [&model_config, &reward_config].into_iter().flatten();
    let specs = specs.map(|c| Ok(c.spec()?.1)).collect::<Result<Vec<_>>>()?;
    let Some(dir) = model_dir.as_ref().or(reward_dir.as_ref()) else {
        return Err(Error::config("--model", "a model or a reward model", "neither"));
    };
    let adapter = args.adapter.as_ref().filter(|_| model_dir.is_some());
    let texts = super::text_folder(dir, adapter)?;
    let tokenizer = Tokenizer::open_if_there(&texts, args.chat_template.as_deref())?;
    let (max_length, vocab) = specs
        .iter()
        .fold((usize::MAX, usize::MAX), |(l, v), s| (l.min(s.max_positions), v.min(s.vocab)));
    let eos = tokenizer.as_ref().and_then(|t| t.eos().first().copied());
    if args.eos && eos.is_none() {
        let want = format!("a tokenizer in {} that names an end of text", dir.display());
        return Err(Error::config("--eos", want, "none"));
    }
    let limits = Limits { max_length, vocab, eos: eos.filter(|_| args.eos), skip_bad: 0 };
    // Rated as the reward model was trained, whatever the language model scores.
    let trained = reward_dir.as_deref().and_then(train::appended_eos);
    let chats = tokenizer.as_ref().is_some_and(|t| t.template().is_ok());
    let options = args.rows.options(chats)?;
    super::fetch::fetch_data(&args.data)?;
    let records = data::read_as(&args.data, &options)?;
    let limits = Limits { skip_bad: records.bad.left, ..limits };
    let as_trained = Limits { eos: trained.or(limits.eos), ..limits };
    let mut rated = data::scored(&records, tokenizer.as_ref(), as_trained)?;
    let apart = model_dir.is_some() && as_trained.eos != limits.eos;
    let apart = apart.then(|| data::scored(&records, tokenizer.as_ref(), limits)).transpose()?;
    let bad = &apart.as_ref().unwrap_or(&rated).bad;
    [records.bad.note("read"), bad.note("scored")].iter().flatten().for_each(|text| warn(text));
    if let Some(apart) = &apart {
        // A text that has no token without EOS is scored by neither.
        let mut kept = apart.sequences.iter().map(|s| &s.place).peekable();
        rated.sequences.retain(|s| kept.next_if(|place| **place == s.place).is_some());
    }
    let data = apart.as_ref().unwrap_or(&rated);
    let n = data.stats.truncated;
    if n > 0 {
        warn(&format!("{n} texts lost their end: longer than {max_length} tokens"));
    }
    let longest = data.longest().max(rated.longest());
    let model = model_config.map(|config| {
        let options = LoadOptions { longest: Some(longest), ..LoadOptions::frozen(Head::Lm) };
        models::load_as::<T>(dev, config, options)
    });
    let model = model.transpose()?;
    let reward_model = reward_dir.as_ref().zip(reward_config).map(|(dir, config)| {
        let options = LoadOptions { longest: Some(longest), ..LoadOptions::frozen(Head::Scalar) };
        let loaded: Model<T> = models::load_as(dev, config, options)?;
        if let Some(model) = &model {
            eval::check_reward_model(dir, loaded.spec(), model.spec(), tokenizer.as_ref(), 0)?;
        }
        Ok(loaded)
    });
    let reward_model = reward_model.transpose()?;
    let score = Score { dev, tokenizer, model, reward_model, temperature: args.temperature };
    // All lines have the format of the first.
    let pairs = matches!(
        records[0].record,
        Record::Preference { .. } | Record::PreferenceIds { .. } | Record::ChatPreference { .. }
    );
    let unit = if pairs { 2 } else { 1 };
    let (mut out, mut summary) = (args.to.open()?, Summary::default());
    let both = |line: &Value| [line["chosen"].clone(), line["rejected"].clone()];
    args.to.earlier(out.done, |line| match unit {
        2 => summary.add(&both(line)),
        _ => summary.add(std::slice::from_ref(line)),
    })?;
    let done = (out.done * unit).min(data.sequences.len());
    let (mut rest, mut rated) = (&data.sequences[done..], &rated.sequences[done..]);
    let all = data.sequences.len() / unit;
    let bar = super::rows::bar(all as u64, args.to.to_file());
    bar.set_position((done / unit) as u64);
    while !rest.is_empty() {
        let mut tokens = 0;
        let full = |example: &[Sequence]| {
            tokens += example.iter().map(|s| s.ids.len()).sum::<usize>();
            tokens > PART
        };
        let n = rest.chunks(unit).position(full).map_or(rest.len(), |i| (i + 1) * unit);
        let (part, rated_part);
        (part, rest) = rest.split_at(n);
        (rated_part, rated) = rated.split_at(n);
        for lines in score.lines(part, rated_part)?.chunks(unit) {
            summary.add(lines);
            let line = match lines {
                [chosen, rejected] => json!({ "chosen": chosen, "rejected": rejected }),
                [line, ..] => line.clone(),
                [] => Value::Null,
            };
            out.write(&line)?;
        }
        bar.inc((n / unit) as u64);
    }
    bar.finish_and_clear();
    out.finish()?;
    match (args.summary, args.to.to_file()) {
        (true, true) => super::print(&format!("{}\n", summary.of_all())),
        (true, false) => {
            note(&summary.of_all().to_string());
            Ok(())
        }
        (false, _) => Ok(()),
    }
}

/// Sums over all rows.
#[derive(Default)]
struct Summary {
    rows: usize,
    tokens: usize,
    logprob: f64,
    rewards: Vec<f64>,
    /// Rewards of chosen texts less those of rejected ones, and the same of log-probs.
    margins: Vec<f64>,
    logprob_margins: Vec<f64>,
}

impl Summary {
    /// Adds a row: one text, or a chosen and a rejected one.
    fn add(&mut self, texts: &[Value]) {
        self.rows += 1;
        let each = |key: &str| texts.iter().filter_map(|t| t[key].as_f64()).collect::<Vec<_>>();
        for (key, margins) in
            [("reward", &mut self.margins), ("sum_logprob", &mut self.logprob_margins)]
        {
            if let [chosen, rejected] = each(key)[..] {
                margins.push(chosen - rejected);
            }
        }
        self.rewards.extend(each("reward"));
        self.logprob += each("sum_logprob").iter().sum::<f64>();
        let tokens = texts.iter().filter_map(|t| t["logprobs"].as_array());
        self.tokens += tokens.map(Vec::len).sum::<usize>();
    }

    /// What is known of them: only what was computed.
    fn of_all(&self) -> Value {
        let mut all = json!({ "rows": self.rows });
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        // Of equal numbers half are won.
        let won = |m: &f64| if *m == 0.0 { 0.5 } else { f64::from(u8::from(*m > 0.0)) };
        let accuracy = |x: &[f64]| mean(&x.iter().map(won).collect::<Vec<_>>());
        if self.tokens > 0 {
            all["tokens"] = json!(self.tokens);
            all["perplexity"] = json!(libm::exp(-self.logprob / self.tokens as f64));
        }
        if !self.rewards.is_empty() {
            let m = mean(&self.rewards);
            let square = |x: &f64| (x - m) * (x - m);
            let variance = mean(&self.rewards.iter().map(square).collect::<Vec<_>>());
            all["reward_mean"] = json!(m);
            all["reward_std"] = json!(variance.sqrt());
        }
        for (name, x) in [("reward", &self.margins), ("logprob", &self.logprob_margins)] {
            if !x.is_empty() {
                all[format!("{name}_accuracy")] = json!(accuracy(x));
                all[format!("{name}_margin")] = json!(mean(x));
            }
        }
        all
    }
}

/// What texts are scored with.
struct Score<'a, T: Element> {
    dev: &'a Device,
    tokenizer: Option<Tokenizer>,
    model: Option<Model<T>>,
    reward_model: Option<Model<T>>,
    temperature: f32,
}

impl<T: Element<Acc = f32>> Score<'_, T> {
    /// One object a text; `rated` are the same as the reward model reads them.
    fn lines(&self, texts: &[Sequence], rated: &[Sequence]) -> Result<Vec<Value>> {
        let (dev, mut lines) = (self.dev, Vec::with_capacity(texts.len()));
        let rewards = self.reward_model.as_ref().map(|m| eval::rate(dev, m, rated)).transpose()?;
        let score = |m: &Model<T>| logprobs(dev, m, texts, self.temperature);
        let logprobs = self.model.as_ref().map(score).transpose()?;
        for (i, Sequence { ids, place, .. }) in texts.iter().enumerate() {
            let text = self.tokenizer.as_ref().map(|t| t.decode(ids)).transpose()?;
            let mut line = json!({ "input_ids": ids, "text": text });
            if let Some(all) = &logprobs {
                finite(&all[i], |t| format!("{place}: the log-prob of scored token {t}"))?;
                let sum = all[i].iter().fold(0.0, |sum, x| sum + f64::from(*x));
                line["logprobs"] = json!(all[i]);
                line["sum_logprob"] = json!(sum);
                // Of nothing there is none.
                let scored = Some(all[i].len() as f64).filter(|n| *n > 0.0);
                line["perplexity"] = json!(scored.map(|n| libm::exp(-sum / n)));
            }
            if let Some(all) = &rewards {
                finite(&all[i..=i], |_| format!("{place}: the reward"))?;
                line["reward"] = json!(all[i]);
            }
            lines.push(line);
        }
        Ok(lines)
    }
}

/// Log-probs of the tokens that count in each text.
fn logprobs<T: Element<Acc = f32>>(
    dev: &Device,
    model: &Model<T>,
    texts: &[Sequence],
    t: f32,
) -> Result<Vec<Vec<f32>>> {
    let scorer = Scorer::for_lengths(texts.iter().map(|t| t.ids.len()));
    let mut arena = Arena::new(dev, scorer.plan::<T>(dev, model.spec(), model.head())?)?;
    let (mut all, batch) = (Vec::new(), &mut Batch::default());
    let push = |batch: &mut Batch, t: &Sequence| batch.push_masked(&t.ids, &t.predicted);
    ScoringPass { dev, scorer, arena: &mut arena, batch }.run(
        (model, t),
        texts,
        push,
        &mut all,
        None,
    )?;
    let mut rest = &all[..];
    Ok(texts.iter().map(|t| rest.split_off(..t.tokens()).unwrap_or_default().to_vec()).collect())
}
