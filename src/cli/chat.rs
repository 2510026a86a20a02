//! `warpo chat`: a conversation with a model, on a terminal.

use std::{
    io::{BufRead, IsTerminal, stdin},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use half::bf16;
use serde_json::{Value, json};
use signal_hook::{consts::SIGINT, flag};

use super::{DeviceArgs, finite, generate::SamplingArgs, harmless, note, print, say, warn};
use crate::{
    data::{self, Chat, Tokenizer},
    device::{Arena, Device, Element},
    error::{Error, Result},
    models::{self, Head, LoadOptions, Model},
    ops::sample,
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, Generator, Prompt},
    train::inputs,
};

/// Talk with a model: a line is a message. Ctrl-C ends an answer, Ctrl-D the conversation
#[derive(Debug, clap::Args)]
pub(super) struct ChatArgs {
    /// The model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// An adapter's folder (LoRA, as PEFT stores it), on the model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What the model is told first
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// chatml, llama3, gemma, mistral, zephyr, vicuna or a file, not the model's own template
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// The most tokens of the conversation, or the model's positions, if these are fewer; rotary
    /// positions that depend on the longest sequence are chosen by it
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(2..))]
    max_length: u32,
    /// The most tokens of an answer
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    place: DeviceArgs,
}

pub(super) fn run(args: &ChatArgs) -> Result<()> {
    let sampling = args.sampling.params()?;
    let dir = &super::model_folder(&args.model)?;
    let mut tokenizer = Tokenizer::open(&super::text_folder(dir, args.adapter.as_ref())?)?;
    if let Some(name) = &args.chat_template {
        tokenizer.set_template(dir, Some(name))?;
    }
    tokenizer.tell_the_time();
    tokenizer.template().map_err(|e| Error::file(dir, e))?;
    data::unasked_opening(&tokenizer).iter().for_each(|text| warn(&inputs::unasked(text)));
    args.place.run(|dev| match dev {
        Device::Cpu(_) => run_in::<f32>((args, dir), dev, &tokenizer, sampling),
        Device::Cuda(_) => run_in::<bf16>((args, dir), dev, &tokenizer, sampling),
    })
}

/// [`run`] with a model that computes in `T`.
fn run_in<T: Element<Acc = f32>>(
    (args, dir): (&ChatArgs, &Path),
    dev: &Device,
    tokenizer: &Tokenizer,
    sampling: sample::SamplingParams,
) -> Result<()> {
    let longest = Some(args.max_length as usize);
    let options = LoadOptions { longest, ..LoadOptions::frozen(Head::Lm) };
    let config = super::model_config(dir, args.adapter.as_ref())?;
    let model: Model<T> = models::load_as(dev, config, options)?;
    // Asked for a message, a signal ends the process; while the model answers, the answer.
    let (waits, stop) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    flag::register_conditional_shutdown(SIGINT, 130, waits.clone())
        .and_then(|_| flag::register(SIGINT, stop.clone()))
        .map_err(Error::io("listen for signals as", "a process"))?;
    let mut talk = Conversing { dev, model: &model, tokenizer, sampling, args, turn: 0 };
    let told = args.system.iter().map(|text| message("system", text));
    let mut messages: Vec<Value> = told.collect();
    let asks = stdin().is_terminal();
    loop {
        if asks {
            say("> ");
        }
        let mut line = Vec::new();
        let n = stdin().lock().read_until(b'\n', &mut line);
        if n.map_err(Error::io("read", "<stdin>"))? == 0 {
            return if asks { print("\n") } else { Ok(()) };
        }
        let line = match str::from_utf8(&line) {
            Ok(line) => line.trim_end_matches(['\n', '\r']),
            Err(e) => {
                note(&format!(
                    "that line is not UTF-8 at byte {}: say it again",
                    e.valid_up_to() + 1
                ));
                continue;
            }
        };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(message("user", line));
        waits.store(false, Ordering::SeqCst);
        stop.store(false, Ordering::SeqCst);
        let answer = talk.answer(&messages, &stop)?;
        waits.store(true, Ordering::SeqCst);
        match answer {
            Some(answer) => messages.push(message("assistant", &answer)),
            None => drop(messages.pop()),
        }
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// What answers are made with.
struct Conversing<'a, T: Element> {
    dev: &'a Device,
    model: &'a Model<T>,
    tokenizer: &'a Tokenizer,
    sampling: sample::SamplingParams,
    args: &'a ChatArgs,
    /// Answers so far: each has random numbers of its own.
    turn: u64,
}

impl<T: Element<Acc = f32>> Conversing<'_, T> {
    /// Prints the answer to the last message as it comes, and gives it; none if there is no room
    /// for one.
    fn answer(&mut self, messages: &[Value], stop: &AtomicBool) -> Result<Option<String>> {
        let Self { dev, model, tokenizer, sampling, args, turn } = self;
        let ids = Chat::of(messages.to_vec()).prompt(tokenizer);
        let ids = ids.map_err(|e| Error::file(&args.model, e))?;
        let most = model.spec().max_positions.min(args.max_length as usize);
        let Some(room) = most.checked_sub(ids.len()).filter(|room| *room > 0) else {
            note(&format!(
                "with that the conversation has {} tokens, wanted fewer than {most} (--max-length, \
                 the model's positions): say less, or begin anew",
                ids.len()
            ));
            return Ok(None);
        };
        let new = (args.max_new_tokens as usize).min(room);
        let config = GenerationConfig {
            sampling: *sampling,
            max_new_tokens: new,
            stop_ids: tokenizer.eos().iter().copied().chain(data::turn_end(tokenizer)).collect(),
            stream: Stream { seed: args.seed, step: *turn, purpose: Purpose::Sample },
        };
        *turn += 1;
        let last = ids[ids.len() - 1..].to_vec();
        let prompts = [Prompt { sample: 0, ids }];
        let sizes = Generator::for_prompts(&prompts, new, 1, 512);
        let mut arena = Arena::new(dev, sizes.plan::<T>(dev, model.spec(), sampling)?)?;
        let (mut said, mut text) = (Vec::new(), String::new());
        let hear = |made: &[(usize, u32)]| {
            said.extend(made.iter().map(|(_, id)| *id).filter(|id| !config.stop_ids.contains(id)));
            let whole = tokenizer.decode_continuation(&last, &said)?;
            // A character may be made of several tokens.
            if !whole.ends_with('\u{fffd}') {
                print(&harmless(whole.get(text.len()..).unwrap_or_default()))?;
                text = whole;
            }
            match stop.load(Ordering::SeqCst) {
                true => Err(Error::Interrupted { signal: "SIGINT", step: 0 }),
                false => Ok(()),
            }
        };
        let done = sizes.run(dev, model, &arena.scope(), &prompts, &config, hear);
        // An answer may end within a character.
        let whole = tokenizer.decode_continuation(&last, &said)?;
        print(&harmless(whole.get(text.len()..).unwrap_or_default()))?;
        if let Ok(done) = &done {
            finite(&done[0].logprobs, |t| format!("the log-prob of token {t} of the answer"))?;
        }
        match done {
            Ok(done) if !done[0].stopped => {
                print("\n")?;
                note(&format!("the answer was cut off after {new} tokens"));
            }
            Ok(_) | Err(Error::Interrupted { .. }) => print("\n")?,
            Err(e) => return Err(e),
        }
        Ok(Some(whole))
    }
}
