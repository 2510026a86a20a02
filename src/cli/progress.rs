//! Progress on standard error: bars on a terminal, one line a step otherwise.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{algorithms::Metrics, train::Observer};

/// Shows a run.
pub(super) struct Progress {
    name: &'static str,
    bar: Option<ProgressBar>,
    /// Metrics of the last step.
    numbers: String,
    /// Time of the last printed line of a step.
    printed: Option<Instant>,
    /// When this process began, and at which step.
    begun: (Instant, u64),
    /// Bytes of data that are being read.
    reading: Option<ProgressBar>,
}

/// The style of a bar of bytes.
const BYTES: &str = "{prefix} {bar:20} {bytes}/{total_bytes} {elapsed} eta {eta}";

impl Progress {
    pub(super) fn new(name: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{prefix} {bar:20} {pos}/{len} {elapsed} eta {eta} {wide_msg}";
            let bar = ProgressBar::new(0).with_prefix(name);
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Self {
            name,
            bar,
            numbers: String::new(),
            printed: None,
            begun: (Instant::now(), 0),
            reading: None,
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    pub(super) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(super::plain(text)),
            None => super::note(text),
        }
    }
}

/// Between lines of a log.
const EVERY: Duration = Duration::from_secs(1);

/// The numbers worth a line, where a step has them.
const SHOWN: &[&str] = &[
    "loss",
    "accuracy",
    "eval_loss",
    "eval_accuracy",
    "score",
    "kl",
    "clip_fraction",
    "grad_norm",
];

/// Hours, minutes and seconds.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

impl Observer for Progress {
    fn note(&mut self, line: &str) {
        self.line(line);
    }

    fn reading(&mut self, data: &str, done: u64, total: u64) {
        if self.bar.is_some() {
            let bar = self.reading.get_or_insert_with(|| {
                let bar =
                    ProgressBar::new(total).with_prefix(format!("reads {}", super::plain(data)));
                if let Ok(style) = ProgressStyle::with_template(BYTES) {
                    bar.set_style(style);
                }
                bar
            });
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
                self.reading = None;
            }
            return;
        }
        // What takes less needs no line.
        let last = *self.printed.get_or_insert_with(Instant::now);
        if last.elapsed() >= EVERY {
            self.printed = Some(Instant::now());
            let percent = 100 * done / total.max(1);
            self.line(&format!("{}: {percent} % of {data} read", self.name));
        }
    }

    fn begin(&mut self, step: u64, steps: u64) {
        self.begun = (Instant::now(), step);
        if let Some(bar) = &self.bar {
            bar.set_length(steps);
            bar.set_position(step);
            // Steps before a resumption took none of this process's time.
            bar.reset_eta();
        }
    }

    fn phase(&mut self, name: &str, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("[{name} {done}/{total}] {}", self.numbers));
        }
    }

    fn step(&mut self, step: u64, steps: u64, metrics: &Metrics, seconds: f64) {
        let shown = |m: &&(&str, f64)| SHOWN.contains(&m.0);
        let numbers: Vec<String> =
            metrics.iter().filter(shown).map(|(name, x)| format!("{name} {x:.4}")).collect();
        let tokens = metrics.iter().find(|m| m.0 == "tokens").map_or(0.0, |m| m.1);
        let text = format!("{:.0} tokens/s, {}", tokens / seconds, numbers.join(", "));
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(text.clone());
                self.numbers = text;
            }
            // In a log, short steps share a line: the last of each second stands for it.
            None if step == steps || self.printed.is_none_or(|t| t.elapsed() >= EVERY) => {
                self.printed = Some(Instant::now());
                let (elapsed, first) = (self.begun.0.elapsed().as_secs_f64(), self.begun.1);
                let each = elapsed / (step - first).max(1) as f64;
                let times = [elapsed, each * (steps - step) as f64].map(clock);
                let percent = 100 * step / steps.max(1);
                self.line(&format!(
                    "{} {step}/{steps}: {percent} %, {} elapsed, {} left, {text}",
                    self.name, times[0], times[1]
                ));
            }
            None => {}
        }
    }
}
