//! A run on disk: lock, resume, loop, checkpoints, metrics, the final model.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Observer, Settings, StepReport, Trainer,
    best::Best,
    checkpoint::{self, SavedTensor},
    export::{self, ExportPlan, ExportedFrom, ExportedRole, NewCompanions},
    lock::Lock,
    manifest::{Extension, Manifest, RunState},
    metrics::{MetricsLog, StepLines},
    models::TrainState,
    rollouts, signals,
};
use crate::{
    algorithms::{Algorithm, AlgorithmEntry},
    config::{self, Section},
    data::Tokenizer,
    device::{Device, Element, file},
    error::{Error, Result},
    models::{self, AdapterStart, Head},
    storage::{Disk, check_room, write_file},
};

/// Trains, or goes on with the run that is in `settings.out`; returns the folder of the final
/// model.
///
/// The folder holds `run.json`, `config.toml`, `metrics.jsonl`, `timing.jsonl`, TensorBoard event
/// files, `rollouts/step-N.jsonl`, `checkpoints/step-N/` and at the end `final/`.
///
/// # Errors
/// [`Error::Interrupted`] after SIGINT or SIGTERM, with the state committed, if
/// [`signals::install`] was called; [`Error::Locked`] if
/// another process trains there; [`Error::Config`] if the folder holds a run with other settings;
/// all others of the parts.
pub fn run(
    entry: &AlgorithmEntry,
    settings: &Settings,
    section: &dyn Section,
    seen: &mut dyn Observer,
) -> Result<PathBuf> {
    settings.validate()?;
    let dev = Device::from_name(&settings.device, settings.threads)?;
    run_on(&dev, entry, settings, section, seen)
}

/// [`run`] on a device that is there, whatever the settings name.
pub fn run_on(
    dev: &Device,
    entry: &AlgorithmEntry,
    settings: &Settings,
    section: &dyn Section,
    seen: &mut dyn Observer,
) -> Result<PathBuf> {
    settings.validate()?;
    let algorithm = (entry.build)(section)?;
    let all = (entry, settings, section);
    match dev {
        Device::Cpu(_) => run_in::<f32>(dev, algorithm, all, seen),
        Device::Cuda(_) => run_in::<bf16>(dev, algorithm, all, seen),
    }
}

/// [`run`] with models that compute in `T`.
fn run_in<T: Element<Acc = f32>>(
    dev: &Device,
    algorithm: Box<dyn Algorithm>,
    (entry, settings, section): (&AlgorithmEntry, &Settings, &dyn Section),
    seen: &mut dyn Observer,
) -> Result<PathBuf> {
    let out = PathBuf::from(&settings.out);
    // A folder that is there may be another trainer's, which is asked before models take memory;
    // one that is not there is made once the run is known to be possible.
    let early = out.is_dir().then(|| Lock::acquire(&out)).transpose()?;
    let loading = dev.span("load");
    let trainer = Trainer::<T>::seen_by(seen, dev, settings.clone(), algorithm)?;
    fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
    let _lock = early.map_or_else(|| Lock::acquire(&out), Ok)?;
    let hashes = trainer.models.hashes(dev)?;
    drop(loading);
    let manifest = Manifest::new(entry.name, T::NAME, &trainer.inputs, section, &hashes);
    let checkpoints = out.join("checkpoints");
    let best = Best::new(settings, trainer.inputs.held_out.is_some())?;
    let (saved, extended) = (None, Vec::new());
    let mut run = RunFolder { checkpoints, out, trainer, manifest, saved, extended, best };
    let about = run.about(entry);
    about.iter().for_each(|(name, text)| seen.note(&format!("{name}: {text}")));
    run.warnings().iter().for_each(|text| seen.note(&format!("warning: {text}")));
    run.resume(seen)?;
    run.keeps_its_models()?;
    if run.is_finished() {
        seen.note("the run is finished");
        return Ok(run.out.join("final"));
    }
    run.pre_flight()?;
    run.write_about(about)?;
    run.write_config(entry, section)?;
    seen.begin(run.trainer.step, run.trainer.inputs.steps);
    let (step, out) = (run.trainer.step, &run.out);
    let mut metrics = MetricsLog::open(out, step)?;
    let mut timing = StepLines::open(&Disk, out.join("timing.jsonl"), step)?;
    rollouts::cut(&out.join("rollouts"), step)?;
    for lines in [&metrics.lines, &timing].into_iter().filter(|lines| lines.last < step) {
        let (path, last) = (lines.path.display(), lines.last);
        seen.note(&format!("{path} ends at step {last}: what it had of later steps is lost"));
    }
    let held = signals::Hold::new();
    while !run.is_over() {
        let start = Instant::now();
        let stepped = match run.trainer.step(seen) {
            // The step is not done: what was before it is saved below.
            Err(Error::Interrupted { .. }) => None,
            done => Some(done?),
        };
        if let Some(mut report) = stepped {
            let (seconds, at) = (start.elapsed().as_secs_f64(), run.trainer.step);
            if run.evaluates() {
                let found = run.trainer.evaluate()?;
                if let Some(best) = &mut run.best
                    && best.hear(&found)?
                {
                    run.export_best()?;
                }
                report.metrics.extend(found);
            }
            if let Some(data) = &run.trainer.sampled {
                let tokenizer = run.trainer.inputs.tokenizer.as_ref();
                rollouts::write(&run.out.join("rollouts"), at, data, tokenizer)?;
            }
            metrics.log(at, &report.metrics)?;
            timing.write(at, &time(at, seconds, &report))?;
            seen.step(run.trainer.step, run.trainer.inputs.steps, &report.metrics, seconds);
        }
        let signal = signals::requested();
        let every = run.trainer.inputs.settings.checkpoint_every;
        let due = every > 0 && run.trainer.step.is_multiple_of(every);
        let last = run.is_over();
        if signal.is_some() || due || last {
            metrics.lines.sync()?;
            timing.sync()?;
            run.save(seen)?;
        }
        if let Some(signal) = signal.filter(|_| !last) {
            return Err(Error::Interrupted { signal, step: run.trainer.step });
        }
    }
    if let Some(best) = run.best.as_ref().filter(|best| best.is_over()) {
        let (step, since, what) = (run.trainer.step, best.since, best.describe());
        seen.note(&format!(
            "ended at step {step}: the last {since} evaluations had no better {what}"
        ));
    }
    // What is left is done again if it is cut off.
    drop(held);
    run.finish()
}

/// The line of a step in timing.jsonl. Wall time stands in a file of its own: metrics.jsonl is the
/// same for every machine.
fn time(step: u64, seconds: f64, report: &StepReport) -> Value {
    let tokens = report.metrics.iter().find(|m| m.0 == "tokens").map_or(0.0, |m| m.1);
    let phases: Map<String, Value> =
        report.seconds.iter().map(|(name, s)| ((*name).to_owned(), json!(s))).collect();
    json!({
        "step": step, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "phases": phases,
    })
}

struct RunFolder<T: Element> {
    out: PathBuf,
    checkpoints: PathBuf,
    trainer: Trainer<T>,
    /// Everything that a resumed run must have in common with this one.
    manifest: Manifest,
    /// Step of the newest checkpoint.
    saved: Option<u64>,
    extended: Vec<Extension>,
    best: Option<Best>,
}

impl<T: Element<Acc = f32>> RunFolder<T> {
    /// Description of the run, for people and for `run.json`.
    fn about(&self, entry: &AlgorithmEntry) -> Vec<(&'static str, String)> {
        let t = &self.trainer;
        let mib = t.memory().shared() as f64 / (1 << 20) as f64;
        let (s, skipped) = (&t.inputs.source.data.about.stats, t.inputs.source.skipped);
        let mut about = vec![("algorithm", entry.name.to_owned()), ("device", t.dev.describe())];
        for (role, m) in t.models.all() {
            let mut text = format!("{}, {} weights", m.family().model_type, models::count(m));
            if m.adapter().is_some() {
                text += &format!(", {} of an adapter", models::adapter_count(m));
            }
            // The hash of a frozen model is that of every run against it.
            if let (None, Some(hash)) = (&role.trained, self.manifest.models.get(role.name)) {
                text += &format!(", frozen, sha256 {}", &hash[..16]);
            }
            about.push((role.name, text));
        }
        let mut data = format!(
            "{} examples, {} tokens, {} truncated, {} dropped",
            s.examples, s.tokens, s.truncated, s.dropped
        );
        if skipped > 0 {
            data += &format!(", {skipped} bad lines left out");
        }
        about.push(("data", data));
        about.extend(t.inputs.source.weights.clone().map(|text| ("weights", text)));
        if let Some(held_out) = &t.inputs.held_out {
            let s = &held_out.data.about.stats;
            about.push(("held out", format!("{} examples, {} tokens", s.examples, s.tokens)));
        }
        about.push(("step", t.equation()));
        about.push(("memory", format!("{mib:.1} MiB for activations and KV cache, planned once")));
        about
    }

    /// What a user may not have meant.
    fn warnings(&self) -> Vec<String> {
        let inputs = &self.trainer.inputs;
        let mut all = inputs.warnings.clone();
        let (warmup, steps) = (inputs.course.warmup, inputs.steps);
        if warmup >= steps {
            all.push(format!("the warmup has {warmup} steps, the run has {steps} steps: the learning rate never reaches its peak"));
        }
        all
    }

    fn write_about(&self, about: Vec<(&'static str, String)>) -> Result<()> {
        let path = self.out.join("run.json");
        let before =
            file::read_text(&path, 1 << 20).ok().and_then(|t| serde_json::from_str(&t).ok());
        let before = before.unwrap_or(Value::Null);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let mut all: Map<String, Value> =
            about.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        all.insert("steps".into(), self.trainer.inputs.steps.into());
        if !self.extended.is_empty() {
            all.insert("extended".into(), json!(self.extended));
        }
        all.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        all.insert("started".into(), before["started"].as_f64().unwrap_or(now).into());
        write_file(&Disk, &path, format!("{:#}\n", Value::from(all)).as_bytes())
    }

    /// All steps are done and all models exported, with every byte as it was written.
    fn is_finished(&self) -> bool {
        let of = self.exported_from();
        self.is_over() && self.exports().all(|(_, dir)| export::is_whole(&Disk, &dir, &of))
    }

    fn exported_from(&self) -> ExportedFrom {
        let inputs = &self.trainer.inputs;
        let eos = inputs.eos.first().copied();
        ExportedFrom { step: self.trainer.step, run: self.manifest.digest(), eos }
    }

    /// Refuses to train from a model that the export would replace.
    fn keeps_its_models(&self) -> Result<()> {
        let real = |path: &Path| fs::canonicalize(path).ok();
        for m in &self.trainer.inputs.models {
            let mut reads = vec![&*m.dir, m.config.dir()];
            if let Some(AdapterStart::Folder(dir)) = m.config.adapter().map(|a| &a.start) {
                reads.push(dir);
            }
            for read in reads {
                let replaced = |dir: &PathBuf| real(dir).is_some_and(|d| real(read) == Some(d));
                if self.exports().any(|(_, dir)| replaced(&dir)) {
                    let want =
                        format!("another folder than that of {}, which it reads", read.display());
                    return Err(Error::config("out", want, self.out.display()));
                }
            }
        }
        Ok(())
    }

    /// Checks that the disk has room for the checkpoints and models that the run will leave, so
    /// that a run of days does not find out at its end.
    fn pre_flight(&self) -> Result<()> {
        let t = &self.trainer;
        let trained = t.models.trained.iter();
        let numbers: u64 = trained.map(|state| state.grads.layout().len() as u64).sum();
        // Weights and two moments; while one is written, all that are kept are still there.
        let kept = checkpoint::list(&Disk, &self.checkpoints)?.len();
        let more = t.inputs.settings.keep_checkpoints.max(2).saturating_add(1);
        // Those of the steps to come, and the last one.
        let every = t.inputs.settings.checkpoint_every;
        let coming = (t.inputs.steps - t.step).checked_div(every).unwrap_or(0) + 1;
        let more = (more.saturating_sub(kept) as u64).min(coming);
        // `checkpoints` may be a link to another disk.
        let disk = |path: &Path| fs::metadata(path).map(|about| about.dev()).ok();
        let apart = disk(&self.checkpoints).filter(|d| Some(*d) != disk(&self.out)).is_some();
        let at = if apart { &self.checkpoints } else { &self.out };
        let models = 4 * numbers * (1 + u64::from(self.best.is_some()));
        check_room(&Disk, "the run", at, 12 * more * numbers + if apart { 0 } else { models })?;
        check_room(&Disk, "the run", &self.out, models)
    }

    fn resume(&mut self, seen: &mut dyn Observer) -> Result<()> {
        for path in checkpoint::clean(&Disk, &self.checkpoints)? {
            seen.note(&format!("removed {}, which a crash left unfinished", path.display()));
        }
        let Some(loaded) = checkpoint::load_newest(&Disk, &self.checkpoints)? else {
            return Ok(());
        };
        for problem in &loaded.skipped {
            seen.note(&format!("skipped a damaged checkpoint: {problem}"));
        }
        let state: RunState = serde_json::from_value(loaded.state.clone()).map_err(|e| {
            let message = format!("is not the state of a run of this version: {e}");
            Error::file(loaded.path.join("state.json"), message)
        })?;
        let steps = self.trainer.inputs.steps;
        let longer = state.steps > 0 && steps > state.steps;
        let changed = self.manifest.check(&state.run, &self.out, longer)?;
        self.extended = state.extended;
        if longer {
            let all = changed.iter().map(|(key, [was, is])| format!("{key} {was} -> {is}"));
            let all = all.collect::<Vec<_>>().join(", ");
            seen.note(&format!(
                "the run goes on from step {} to {steps}, it was to have {}: {all}; the learning \
                 rate goes on by the course of {steps} steps",
                loaded.step, state.steps
            ));
            self.extended.push(Extension { at: loaded.step, settings: changed });
        }
        let t = &mut self.trainer;
        for (what, was, is) in [
            ("by version", &*state.version, env!("CARGO_PKG_VERSION")),
            ("with kernels for", &*state.family, t.dev.family()),
        ] {
            if was != is {
                seen.note(&format!(
                    "the run was begun {what} {was}, this is {is}: bits may differ"
                ));
            }
        }
        for state_of in &mut t.models.trained {
            let name = state_of.role.name;
            let mut numbers = vec![0.0; state_of.grads.layout().len()];
            loaded.read(&Disk, name, "weights", &mut numbers)?;
            state_of.model.set_master(&t.dev, &numbers)?;
            for (what, to) in [("m", &mut state_of.m), ("v", &mut state_of.v)] {
                loaded.read(&Disk, name, what, &mut numbers)?;
                t.dev.write(to.flat_mut(), &numbers)?;
            }
            state_of.updates = state.updates.get(name).copied().unwrap_or(0);
        }
        t.inputs.algorithm.restore(&state.algorithm)?;
        if let Some(best) = &mut self.best {
            best.recall(&self.out.join("metrics.jsonl"), loaded.step)?;
            // One that goes on for longer goes on.
            best.since = if longer { 0 } else { best.since };
        }
        t.step = loaded.step;
        t.drawn = state.drawn.unwrap_or(t.step * t.inputs.source.draws() as u64);
        self.saved = Some(loaded.step);
        let keep = t.inputs.settings.keep_checkpoints;
        if let Err(problem) = checkpoint::prune(&Disk, &self.checkpoints, loaded.step, keep) {
            seen.note(&format!("a surplus checkpoint stays: {problem}"));
        }
        seen.note(&format!("resumed at step {} from {}", loaded.step, loaded.path.display()));
        Ok(())
    }

    fn save(&mut self, seen: &mut dyn Observer) -> Result<()> {
        let t = &self.trainer;
        if self.saved == Some(t.step) {
            return Ok(());
        }
        t.verify()?;
        let _phase = t.dev.span("checkpoint");
        let mut tensors = Vec::new();
        for s in &t.models.trained {
            for (what, x) in [("weights", s.model.master()?), ("m", s.m.flat()), ("v", s.v.flat())]
            {
                let read = move || t.dev.on_host(x);
                tensors.push(SavedTensor::read(s.role.name, what, &[x.len()], x.len(), read));
            }
        }
        let updates = t.models.trained.iter().map(|s| (s.role.name.to_owned(), s.updates));
        let state = RunState {
            run: self.manifest.clone(),
            updates: updates.collect(),
            algorithm: t.inputs.algorithm.state(),
            version: env!("CARGO_PKG_VERSION").into(),
            family: t.dev.family().into(),
            export: Some(self.export_plan()),
            step: t.step,
            drawn: Some(t.drawn),
            steps: t.inputs.steps,
            extended: self.extended.clone(),
        };
        let state =
            serde_json::to_value(state).map_err(|e| Error::value("state of a run", "JSON", e))?;
        let keep = t.inputs.settings.keep_checkpoints;
        let saved = checkpoint::save(&Disk, &self.checkpoints, t.step, keep, tensors, &state)?;
        for problem in &saved.problems {
            seen.note(&format!("the checkpoint is safe, but {problem}"));
        }
        self.saved = Some(t.step);
        Ok(())
    }

    /// Whether the step just done is followed by an evaluation.
    fn evaluates(&self) -> bool {
        let (t, every) = (&self.trainer, self.trainer.inputs.settings.eval_every);
        let source = &t.inputs.source;
        let epoch = |step: u64| step * source.draws() as u64 / source.data.len() as u64;
        let due = match every {
            0 => epoch(t.step) > epoch(t.step - 1),
            n => t.step.is_multiple_of(n),
        };
        t.inputs.held_out.is_some() && (due || t.step == t.inputs.steps)
    }

    /// All steps are done, or evaluations have not become better for too long.
    fn is_over(&self) -> bool {
        let over = self.best.as_ref().is_some_and(Best::is_over);
        over || self.trainer.step == self.trainer.inputs.steps
    }

    /// Exports the model of the best evaluation so far.
    fn export_best(&self) -> Result<()> {
        let (plan, of) = (self.export_plan(), self.exported_from());
        let Some(((state, dir), role)) = self.exports().zip(&plan.roles).next() else {
            return Ok(());
        };
        let model = (&self.trainer.dev, &state.model, role.dtype);
        export::export(&Disk, model, (&plan.from, &dir.with_file_name("best")), &of, &plan.new)
    }

    fn write_config(&self, entry: &AlgorithmEntry, section: &dyn Section) -> Result<()> {
        let path = self.out.join("config.toml");
        let text = format!(
            "# warpo train {} --config {}\n\n{}",
            entry.name,
            path.display(),
            config::template(&[&self.trainer.inputs.settings, section])
        );
        write_file(&Disk, &path, text.as_bytes())
    }

    /// Exports the trained models: `final/`, and `final-value/` beside a policy.
    fn finish(self) -> Result<PathBuf> {
        self.trainer.verify()?;
        let (dev, of, plan) = (&self.trainer.dev, self.exported_from(), self.export_plan());
        let _phase = dev.span("export");
        for ((state, dir), role) in self.exports().zip(&plan.roles) {
            let model = (dev, &state.model, role.dtype);
            let from = self.trainer.inputs.settings.text_folder()?;
            export::export(&Disk, model, (&from, &dir), &of, &plan.new)?;
        }
        Ok(self.out.join("final"))
    }

    /// What the folders of its models have that other folders have not.
    fn export_plan(&self) -> ExportPlan {
        let inputs = &self.trainer.inputs;
        let (tokenizer, eos_id) = (inputs.tokenizer.as_ref(), inputs.settings.eos_id);
        let known = tokenizer.map_or(&[][..], Tokenizer::eos);
        let template = tokenizer.and_then(|t| t.template().ok()?.chosen());
        let new = NewCompanions {
            // Another order is nothing new to who reads the files.
            eos: match inputs.eos.iter().all(|id| known.contains(id)) && eos_id.is_none() {
                true => Vec::new(),
                false => inputs.eos.clone(),
            },
            eos_token: eos_id.and_then(|id| tokenizer?.token(id)),
            chat_template: template.map(str::to_owned),
        };
        let role = |(state, _): (&TrainState<T>, PathBuf)| {
            let own = state.model.stored_dtype();
            // As PEFT keeps what it trains.
            let own = state.model.adapter().map_or(own, |_| Dtype::F32);
            let dtype = inputs.settings.save_dtype.of(own);
            ExportedRole {
                name: state.role.name.into(),
                scalar: state.role.head == Head::Scalar,
                dtype,
                config: models::config_text(&state.model, dtype),
                // `new` has refused a model without a text.
                adapter: export::adapter_text(&state.model).ok().flatten(),
            }
        };
        let from = inputs.settings.text_folder();
        let from = &from.unwrap_or_else(|_| PathBuf::from(&inputs.settings.model));
        ExportPlan {
            // A checkpoint may be read from elsewhere. JSON has no other names.
            from: fs::canonicalize(from)
                .map_or(from.clone(), |path| path.to_string_lossy().into_owned().into()),
            new,
            eos: inputs.eos.first().copied(),
            roles: self.exports().map(role).collect(),
        }
    }

    /// Each trained model and the folder that it is exported to.
    fn exports(&self) -> impl Iterator<Item = (&TrainState<T>, PathBuf)> {
        let named = self.trainer.models.trained.iter();
        named.filter_map(|s| Some((s, self.out.join(s.role.trained.as_ref()?.folder))))
    }
}
