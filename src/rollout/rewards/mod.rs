//! What scores samples: a list of rewards, each a file of this folder. The score of a sample is the
//! sum of theirs, each times its weight.
//!
//! Rewards work on threads of their own while samples are made: a sample is scored as soon as it
//! ends, but by a reward that takes all samples of a step at once. A reward that fails stops the
//! step with its cause.
//!
//! To add one: write `rewards/<kind>.rs`, and add it to [`KINDS`] here.

mod code;
mod command;
mod exact;
mod format;
mod http;
mod json_schema;
mod length;
pub mod math;
mod options;
mod process;
mod python;
mod regex;
mod repetition;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

pub use options::{AnswerColumn, Options};

use crate::{
    algorithms::RewardEntry,
    data::{ColumnsRead, RowColumns},
    error::{Error, Result},
};

/// Makes a reward of its keys.
type Make = fn(&mut Options<'_>) -> Result<Box<dyn SampleReward>>;

/// All kinds but `model`, which is a role of the run.
pub const KINDS: &[(&str, Make)] = &[
    ("math", math::math),
    ("exact", exact::exact),
    ("regex", regex::regex),
    ("json_schema", json_schema::json_schema),
    ("format", format::format),
    ("length", length::length),
    ("repetition", repetition::repetition),
    ("code", code::code),
    ("command", command::command),
    ("python", python::python),
    ("http", http::http),
];

/// A finished sample.
#[derive(Clone, Debug)]
pub struct RewardInput {
    /// Names it in messages.
    pub id: u64,
    pub prompt: String,
    /// Its text, without the token that ends it.
    pub completion: String,
    /// Its tokens, with that one.
    pub tokens: usize,
    /// The columns of its row that rewards read.
    pub columns: Arc<RowColumns>,
}

/// Why a sample has no score.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardFailure {
    /// The sample among those that were to be scored.
    pub at: usize,
    pub cause: String,
}

/// Asks whether what scores shall end: the step failed elsewhere, or a signal came.
pub struct Stop<'a> {
    abandoned: &'a AtomicBool,
    requested: &'a (dyn Fn() -> bool + Sync),
}

impl Stop<'_> {
    /// How often somebody who waits looks.
    const EVERY: Duration = Duration::from_millis(50);

    /// # Errors
    /// If it shall end: nobody reads why.
    pub fn check(&self) -> Result<(), String> {
        let is_over = self.abandoned.load(Ordering::Relaxed) || (self.requested)();
        if is_over { Err("the step ended before it".into()) } else { Ok(()) }
    }

    /// Waits for something to be sent, unless it shall end.
    pub fn wait<T>(
        &self,
        from: &mpsc::Receiver<T>,
        time: Duration,
    ) -> Result<Result<T, mpsc::RecvTimeoutError>, String> {
        let start = Instant::now();
        loop {
            self.check()?;
            let left = time.saturating_sub(start.elapsed());
            match from.recv_timeout(left.min(Self::EVERY)) {
                Err(mpsc::RecvTimeoutError::Timeout) if left > Self::EVERY => {}
                got => return Ok(got),
            }
        }
    }

    /// Waits, unless it shall end.
    pub fn sleep(&self, time: Duration) -> Result<(), String> {
        let (_nobody, never) = mpsc::channel::<()>();
        self.wait(&never, time).map(drop)
    }
}

/// Scores samples.
pub trait SampleReward: Send {
    /// Columns of the data that it reads.
    fn columns(&self) -> ColumnsRead {
        ColumnsRead::None
    }

    /// Checks a row of the data before the first step.
    fn admit(&self, _row: &RowColumns) -> Result<(), String> {
        Ok(())
    }

    /// It takes all samples of a step at once.
    fn takes_all(&self) -> bool {
        false
    }

    /// A score of each sample. What takes long looks at `stop`.
    fn score(
        &mut self,
        samples: &[RewardInput],
        stop: &Stop<'_>,
    ) -> Result<Vec<f64>, RewardFailure>;
}

/// The scores of samples one by one.
fn each(
    samples: &[RewardInput],
    score: impl Fn(&RewardInput) -> Result<f64, String>,
) -> Result<Vec<f64>, RewardFailure> {
    let one = |(at, s)| score(s).map_err(|cause| RewardFailure { at, cause });
    samples.iter().enumerate().map(one).collect()
}

/// What stands in the last code block of a text that ends.
fn last_block(text: &str) -> Option<String> {
    let (mut open, mut last): (Option<Vec<&str>>, _) = (None, None);
    for line in text.lines() {
        match (line.trim_start().starts_with("```"), &mut open) {
            (true, Some(_)) => last = open.take(),
            (true, None) => open = Some(Vec::new()),
            (false, Some(lines)) => lines.push(line),
            (false, None) => {}
        }
    }
    last.map(|lines| lines.join("\n") + "\n")
}

/// The rewards of a run.
#[derive(Default)]
pub struct Rewards {
    all: Vec<WeightedReward>,
}

struct WeightedReward {
    name: String,
    /// The name of its metric.
    metric: &'static str,
    weight: f64,
    /// None is the reward model, whose scores the run's models give.
    by: Option<Box<dyn SampleReward>>,
}

/// Takes the samples of a step as they end.
pub struct RewardQueue {
    to: Vec<mpsc::Sender<(usize, Arc<RewardInput>)>>,
}

/// Scores of a step's samples by each reward of the list; none are by the reward model.
pub type RewardScores = Vec<Option<Vec<f64>>>;

impl Rewards {
    /// # Errors
    /// [`Error::Config`] naming the reward and its key.
    pub fn new(list: &[RewardEntry]) -> Result<Self> {
        let one = |entry: &RewardEntry| {
            let mut options = Options::new(entry);
            let by = match KINDS.iter().find(|(kind, _)| *kind == entry.kind) {
                Some((_, make)) => {
                    let made = make(&mut options)?;
                    options.done()?;
                    Some(made)
                }
                None if entry.kind == "model" => None,
                None => {
                    let kinds: Vec<&str> = KINDS.iter().map(|k| k.0).collect();
                    let known = kinds.join(", ");
                    let message =
                        format!("there is no kind `{}`; known are model, {known}", entry.kind);
                    return Err(entry.error(message));
                }
            };
            // Names of metrics live as long as the program, a few a run.
            let metric = String::leak(format!("reward_{}", entry.name));
            Ok(WeightedReward { name: entry.name.clone(), metric, weight: entry.weight, by })
        };
        Ok(Self { all: list.iter().map(one).collect::<Result<_>>()? })
    }

    /// Those that read texts.
    fn readers(&self) -> impl Iterator<Item = (&str, &dyn SampleReward)> {
        self.all.iter().filter_map(|r| Some((&*r.name, r.by.as_deref()?)))
    }

    /// Whether a reward reads the texts of samples.
    pub fn read_texts(&self) -> bool {
        self.readers().next().is_some()
    }

    /// Columns of the data that they read.
    pub fn columns(&self) -> ColumnsRead {
        let all = self.readers().map(|(_, by)| by.columns());
        all.fold(ColumnsRead::None, ColumnsRead::and)
    }

    /// Checks a row of the data.
    pub fn admit(&self, row: &RowColumns) -> Result<(), String> {
        let admit = |(name, by): (&str, &dyn SampleReward)| {
            by.admit(row).map_err(|e| format!("{e}, wanted by the reward `{name}`"))
        };
        self.readers().try_for_each(admit)
    }

    /// Scores the samples that `work` puts in its queue, `count` of them, while it makes them,
    /// until an end is `requested`.
    ///
    /// # Errors
    /// [`Error::Reward`] of the first reward in the list that fails, before one of `work`, which
    /// ends early then; [`Error::BadNumber`] if a score is none.
    pub fn beside<R>(
        &mut self,
        (step, count): (u64, usize),
        requested: &(dyn Fn() -> bool + Sync),
        work: impl FnOnce(&RewardQueue) -> Result<R>,
    ) -> Result<(R, RewardScores)> {
        let abandoned = &AtomicBool::new(false);
        thread::scope(|scope| {
            let (mut to, mut workers) = (Vec::new(), Vec::new());
            for reward in &mut self.all {
                let Some(by) = &mut reward.by else {
                    workers.push(None);
                    continue;
                };
                let (sender, from) = mpsc::channel();
                to.push(sender);
                let (name, by, scores) = (&*reward.name, &mut **by, vec![f64::NAN; count]);
                let stop = Stop { abandoned, requested };
                let worker = Worker { name, step, by, scores, from, stop };
                workers.push(Some(scope.spawn(move || worker.run())));
            }
            let queue = RewardQueue { to };
            let done = work(&queue);
            abandoned.store(done.is_err(), Ordering::Relaxed);
            drop(queue);
            let joined = workers.into_iter().map(|worker| {
                let scores = worker.map(|worker| worker.join());
                let panicked = |_| Error::value("a reward", "a score", "a panic");
                scores.map(|scores| scores.map_err(panicked)?).transpose()
            });
            let joined: Vec<Result<_>> = joined.collect();
            let failed = joined.iter().any(Result::is_err);
            match done {
                Err(e) if !failed || matches!(e, Error::Interrupted { .. }) => Err(e),
                // The work failed because a reward had.
                Err(e) => joined.into_iter().collect::<Result<RewardScores>>().and(Err(e)),
                Ok(done) => Ok((done, joined.into_iter().collect::<Result<_>>()?)),
            }
        })
    }

    /// Puts the scores of the models in their place, and the sum of all in `scores`; returns the
    /// scores of each reward under the name of its metric.
    pub fn sum(&self, parts: RewardScores, scores: &mut Vec<f32>) -> Vec<(&'static str, Vec<f64>)> {
        if self.all.is_empty() {
            return Vec::new();
        }
        let of_model: Vec<f64> = scores.iter().map(|x| f64::from(*x)).collect();
        let parts: Vec<Vec<f64>> =
            parts.into_iter().map(|part| part.unwrap_or_else(|| of_model.clone())).collect();
        let count = parts.first().map_or(0, Vec::len);
        let weights = || self.all.iter().map(|r| r.weight);
        let sum = |i: usize| weights().zip(&parts).map(|(w, part)| w * part[i]).sum::<f64>() as f32;
        *scores = (0..count).map(sum).collect();
        self.all.iter().map(|r| r.metric).zip(parts).collect()
    }
}

impl RewardQueue {
    /// Whether anything takes samples.
    pub fn is_read(&self) -> bool {
        !self.to.is_empty()
    }

    /// Hands a finished sample to all rewards, by its place in the step.
    ///
    /// # Errors
    /// If a reward has failed: what makes samples may end.
    pub fn put(&self, at: usize, sample: RewardInput) -> Result<()> {
        let sample = Arc::new(sample);
        let gone = |_| Error::value("rewards of a step", "all of them", "one that failed");
        self.to.iter().try_for_each(|to| to.send((at, sample.clone())).map_err(gone))
    }
}

/// Scores the samples that one reward is given.
struct Worker<'a> {
    name: &'a str,
    step: u64,
    by: &'a mut dyn SampleReward,
    /// NaN for samples that have not come.
    scores: Vec<f64>,
    from: mpsc::Receiver<(usize, Arc<RewardInput>)>,
    stop: Stop<'a>,
}

impl Worker<'_> {
    /// Scores samples as they come.
    fn run(mut self) -> Result<Vec<f64>> {
        while let Ok(first) = self.from.recv() {
            let mut queued = vec![first];
            match self.by.takes_all() {
                true => queued.extend(self.from.iter()),
                false => queued.extend(self.from.try_iter()),
            }
            if self.stop.check().is_err() {
                break;
            }
            // Their order is that of the step, whichever ended first.
            queued.sort_by_key(|(at, _)| *at);
            self.score(&queued)?;
        }
        Ok(self.scores)
    }

    fn score(&mut self, queued: &[(usize, Arc<RewardInput>)]) -> Result<()> {
        let samples: Vec<RewardInput> = queued.iter().map(|(_, s)| (**s).clone()).collect();
        let new = self.by.score(&samples, &self.stop).map_err(|e| Error::Reward {
            reward: self.name.into(),
            sample: samples.get(e.at).map_or(u64::MAX, |s| s.id),
            place: None,
            message: e.cause,
        })?;
        for (((at, _), sample), score) in queued.iter().zip(&samples).zip(&new) {
            if !score.is_finite() {
                let what = format!("the score of the reward `{}`", self.name);
                let (step, value, samples, places) =
                    (self.step, *score, vec![sample.id], Vec::new());
                return Err(Error::BadNumber { step, what, value, samples, places });
            }
            self.scores[*at] = *score;
        }
        Ok(())
    }
}
