//! `warpo quickstart`: the whole job on a small real model.

use std::{path::PathBuf, time::Instant};

use half::bf16;
use serde_json::{Value, json};

use super::{DeviceArgs, progress::Progress};
use crate::{
    algorithms::algorithm,
    config::{self, Section, Value_ as Toml},
    data::{self, Limits, Tokenizer},
    device::{Device, Element},
    error::{Error, Result},
    eval::{self, Evaluation, Evaluator},
    models::{Head, Model},
    ops::sample,
    rng::{Purpose, Stream},
    rollout,
    train::{self, Settings, signals},
};

/// Train a small model from real human labels: SFT, reward model, PPO; then compare
#[derive(Debug, clap::Args)]
pub(super) struct QuickstartArgs {
    /// Model, data and settings
    #[arg(long, value_name = "DIR", default_value = "examples/quickstart")]
    from: PathBuf,
    /// Folder of the runs; the same command again goes on where it stopped
    #[arg(long, value_name = "DIR", default_value = "quickstart")]
    out: PathBuf,
    /// So many steps in each stage, whatever its settings say: a few show that all works
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// A setting of the PPO stage, for experiments; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    place: DeviceArgs,
}

/// A stage: its folder and settings file, its algorithm, its data, the model it starts from.
struct Stage {
    name: &'static str,
    algorithm: &'static str,
    data: &'static str,
    title: &'static str,
}

const STAGES: [Stage; 4] = [
    Stage {
        name: "sft",
        algorithm: "sft",
        data: "reviews.jsonl",
        title: "a story teller learns to write review sentences",
    },
    Stage {
        name: "reward",
        algorithm: "reward",
        data: "reviews.jsonl",
        title: "a reward model from human labels: pros above cons",
    },
    Stage {
        name: "judge",
        algorithm: "reward",
        data: "judge.jsonl",
        title: "a judge from sentences that no other stage sees",
    },
    Stage {
        name: "ppo",
        algorithm: "ppo",
        data: "prompts.jsonl",
        title: "PPO continues review openings to please the reward model",
    },
];

pub(super) fn run(args: &QuickstartArgs) -> Result<()> {
    signals::install()?;
    let start = Instant::now();
    let ppo = args.settings(&STAGES[3])?;
    let [before, after] = args.place.run(|dev| {
        for (i, stage) in STAGES.iter().enumerate() {
            let _phase = dev.span(stage.name);
            let (settings, section) = args.settings(stage)?;
            let mut progress = Progress::new(stage.name);
            progress.line(&format!("\n{}/{} {}: {}", i + 1, STAGES.len(), stage.name, stage.title));
            let entry = algorithm(stage.algorithm)?;
            let done = train::run_on(dev, entry, &settings, &*section, &mut progress);
            progress.finish();
            done?;
        }
        args.compare(dev, &ppo.0, &*ppo.1)
    })?;
    args.save(&before, &after)?;
    let page = args.out.join("report.html");
    eval::report(&args.out, &page, 1000)?;
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    let mut text = format!("\n{}\n{}\n", table(&before, &after), samples(&before, &after));
    text += &format!("Report: {}. Runs and models: {}.\n", page.display(), args.out.display());
    // As this command was called: `warpo` need not be installed.
    let warpo = std::env::args().next().unwrap_or_else(|| "warpo".into());
    let model = args.out.join("ppo/final");
    text += &format!("{minutes:.1} minutes. Next: echo '{{\"prompt\": \"Easy to\"}}' | {warpo} ");
    let model = model.display().to_string();
    let plain = model.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
    let model = if plain { model } else { format!("'{}'", model.replace('\'', "'\\''")) };
    text += &format!("generate --model {model}\n");
    super::print(&text)
}

impl QuickstartArgs {
    /// The settings of a stage: its file, with folders as this command was given them.
    fn settings(&self, stage: &Stage) -> Result<(Settings, Box<dyn Section>)> {
        let (mut settings, mut section) = Settings::defaults(algorithm(stage.algorithm)?)?;
        let file = self.from.join(stage.name).with_extension("toml");
        let text =
            std::fs::read_to_string(&file).map_err(Error::io("read", &file)).map_err(|e| {
                let hint = "run it in a checkout of Warpo, or say --from DIR";
                Error::Config {
                    key: "--from".into(),
                    message: e.to_string(),
                    hint: Some(hint.into()),
                }
            })?;
        let sections: &mut [&mut dyn Section] = &mut [&mut settings, &mut *section];
        config::set_all(sections, &text, &file.display().to_string())?;
        let path = |p: PathBuf| Toml::String(p.to_string_lossy().into_owned());
        let model = match stage.name {
            "sft" => self.from.join("model"),
            _ => self.out.join("sft/final"),
        };
        config::set(sections, "model", &path(model))?;
        config::set(sections, "data", &path(self.from.join(stage.data)))?;
        config::set(sections, "out", &path(self.out.join(stage.name)))?;
        config::set(sections, "device", &Toml::String(self.place.device.clone()))?;
        config::set(sections, "threads", &Toml::Integer(self.place.threads as i64))?;
        if stage.name == "ppo" {
            config::set(sections, "reward_model", &path(self.out.join("reward/final")))?;
            self.set.iter().try_for_each(|pair| config::set_pair(sections, pair))?;
            let Settings { device, threads, .. } = &settings;
            if (device, *threads) != (&self.place.device, self.place.threads) {
                let want = "the device and the threads of all stages: --device, --threads";
                return Err(Error::config("--set", want, format!("{device}, {threads} threads")));
            }
        } else {
            config::set(sections, "eval_data", &path(self.from.join("heldout.jsonl")))?;
        }
        if let Some(n) = self.steps {
            settings.steps = n;
        }
        Ok((settings, section))
    }

    /// The policy before and after PPO, on prompts that no stage has seen.
    fn compare(
        &self,
        dev: &Device,
        settings: &Settings,
        section: &dyn Section,
    ) -> Result<[Evaluation; 2]> {
        let _phase = dev.span("compare");
        match dev {
            Device::Cpu(_) => self.compare_in::<f32>(dev, settings, section),
            Device::Cuda(_) => self.compare_in::<bf16>(dev, settings, section),
        }
    }

    /// [`QuickstartArgs::compare`] with models that compute in `T`.
    fn compare_in<T: Element<Acc = f32>>(
        &self,
        dev: &Device,
        settings: &Settings,
        section: &dyn Section,
    ) -> Result<[Evaluation; 2]> {
        let load = |name: &str, head| {
            Model::<T>::load(dev, &self.out.join(name).join("final"), head, None)
        };
        let before = load("sft", Head::Lm)?;
        let after = load("ppo", Head::Lm)?;
        let scorers = [load("reward", Head::Scalar)?, load("judge", Head::Scalar)?];
        let tokenizer = Tokenizer::open(&self.out.join("sft/final"))?;
        let needs = (algorithm("ppo")?.build)(section)?.needs();
        let Some(sampling) = needs.sampling() else {
            return Err(Error::value("quickstart", "an algorithm that samples", "another"));
        };
        let room = before.spec().max_positions.saturating_sub(sampling.max_new_tokens);
        let limits =
            Limits { max_length: room, vocab: before.spec().vocab, eos: None, skip_bad: 0 };
        let records = data::read(&self.from.join("heldout_prompts.jsonl"))?;
        let prompts = data::prompts(&records, Some(&tokenizer), limits, None)?;
        let generation = rollout::GenerationConfig {
            sampling: sample::SamplingParams {
                temperature: sampling.params().temperature,
                ..sample::SamplingParams::default()
            },
            max_new_tokens: sampling.max_new_tokens,
            stop_ids: tokenizer.eos().to_vec(),
            stream: Stream { seed: settings.seed, step: 0, purpose: Purpose::Evaluate },
        };
        let evaluator = Evaluator {
            dev,
            tokenizer: Some(&tokenizer),
            prompts: &prompts.sequences,
            settings: &generation,
            reference: &before,
            scorers: &[&scorers[0], &scorers[1]],
        };
        Ok([evaluator.run(&before)?, evaluator.run(&after)?])
    }

    /// `summary.json`: the table and the samples for programs and for the report.
    fn save(&self, before: &Evaluation, after: &Evaluation) -> Result<()> {
        let both = rows(before).into_iter().zip(rows(after));
        let rows: Vec<Value> = both
            .map(|(a, b)| {
                let values = [a.value, b.value];
                json!({ "key": a.key, "title": a.title, "values": values, "digits": a.digits })
            })
            .collect();
        let pairs = before.samples.iter().zip(&after.samples);
        let samples: Vec<Value> = pairs
            .map(|(a, b)| {
                let scores = [a.scores[1], b.scores[1]];
                json!({ "prompt": a.prompt, "texts": [a.text, b.text], "scores": scores })
            })
            .collect();
        let note = format!(
            "One sample for each of {} openings that no stage has seen, before PPO (SFT) and after. \
             The judge was trained on sentences of its own and took no part in PPO.",
            samples.len()
        );
        let text = json!({
            "note": note, "columns": ["SFT", "PPO"], "rows": rows, "samples": samples,
            "score": "judge",
        });
        let path = self.out.join("summary.json");
        std::fs::write(&path, format!("{text:#}\n")).map_err(Error::io("write", path))
    }
}

/// A row of the table.
struct Row {
    key: &'static str,
    title: &'static str,
    value: f64,
    digits: usize,
}

fn rows(e: &Evaluation) -> Vec<Row> {
    let row = |key, title, value, digits| Row { key, title, value, digits };
    vec![
        row("reward", "score of the reward model", e.scores[0], 2),
        row("judge", "score of the judge, never trained on", e.scores[1], 2),
        row("kl", "KL to the SFT model, nats a text", e.kl, 2),
        row("entropy", "entropy, nats a token", e.entropy, 2),
        row("length", "length, tokens", e.tokens, 1),
        row("stopped", "ended by itself, of all texts", e.stopped, 2),
        row("distinct_1", "distinct words, of all words", e.distinct[0], 2),
        row("distinct_2", "distinct word pairs, of all pairs", e.distinct[1], 2),
    ]
}

fn table(before: &Evaluation, after: &Evaluation) -> String {
    let prompts = before.samples.len();
    let mut out = format!("{:<38}{:>10}{:>10}\n", "", "SFT", "PPO");
    for (a, b) in rows(before).iter().zip(rows(after)) {
        let (x, y, d) = (a.value, b.value, a.digits);
        out += &format!("{:<38}{x:>10.d$}{y:>10.d$}\n", a.title);
    }
    out + &format!("One sample for each of {prompts} openings that no stage has seen.\n")
}

/// Samples side by side, the judge's score before each.
fn samples(before: &Evaluation, after: &Evaluation) -> String {
    const WIDTH: usize = 44;
    const SHOWN: usize = 10;
    let mut out = format!("{:<18}{:<width$}PPO\n", "opening", "SFT", width = WIDTH + 2);
    for (a, b) in before.samples.iter().zip(&after.samples).take(SHOWN) {
        let cell = |s: &crate::eval::Sample| {
            let text: String = format!("{:>5.1} {}", s.scores[1], s.text.trim());
            let text = text.replace(['\n', '\r', '\t'], " ");
            let short: String = text.chars().take(WIDTH).collect();
            if short.len() < text.len() { format!("{short}…") } else { text }
        };
        let prompt: String = a.prompt.chars().take(17).collect();
        out += &format!("{prompt:<18}{:<width$}{}\n", cell(a), cell(b), width = WIDTH + 2);
    }
    out
}
