//! A run on disk: lock, resume, loop, checkpoints, metrics, the final model.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use half::bf16;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    Observer, Report, Settings, Trainer,
    checkpoint::{self, Tensor},
    feed::Examples,
    lock::Lock,
    metrics::Metrics as MetricsFile,
    role::Role,
    rollouts, signals,
    storage::{Disk, check_room},
};
use crate::{
    algorithms::{Algorithm, Entry},
    config::{self, Section},
    data::Tokenizer,
    device::{Device, Element},
    error::{Error, Result},
    models::{self, Model},
};

/// Files of a model folder that a trained model takes along.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
];

/// Trains, or goes on with the run that is in `settings.out`; returns the folder of the final
/// model.
///
/// The folder holds `run.json`, `config.toml`, `metrics.jsonl`, `timing.jsonl`, TensorBoard event
/// files, `rollouts/step-N.jsonl`, `checkpoints/step-N/` and at the end `final/`.
///
/// # Errors
/// [`Error::Interrupted`] after SIGINT or SIGTERM, with the state committed; [`Error::Locked`] if
/// another process trains there; [`Error::Config`] if the folder holds a run with other settings;
/// all others of the parts.
pub fn run(
    entry: &Entry,
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
    entry: &Entry,
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
    (entry, settings, section): (&Entry, &Settings, &dyn Section),
    seen: &mut dyn Observer,
) -> Result<PathBuf> {
    let out = PathBuf::from(&settings.out);
    // A folder that is there may be another trainer's, which is asked before models take memory;
    // one that is not there is made once the run is known to be possible.
    let early = out.is_dir().then(|| Lock::acquire(&out)).transpose()?;
    signals::install()?;
    let loading = dev.span("load");
    let trainer = Trainer::<T>::new(dev, settings.clone(), algorithm)?;
    fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
    let _lock = early.map_or_else(|| Lock::acquire(&out), Ok)?;
    let models = hashes(&trainer)?;
    drop(loading);
    let mut run = Run { checkpoints: out.join("checkpoints"), out, trainer, models, saved: None };
    let about = run.about(entry);
    about.iter().for_each(|(name, text)| seen.note(&format!("{name}: {text}")));
    let state = run.fixed(entry, section);
    run.resume(&state, seen)?;
    if run.is_finished() {
        seen.note("the run is finished");
        return Ok(run.out.join("final"));
    }
    run.pre_flight()?;
    run.write_about(about)?;
    run.write_config(entry, section)?;
    seen.begin(run.trainer.step, run.trainer.job.steps);
    let mut metrics = MetricsFile::open(&run.out, Some(run.trainer.step).filter(|s| *s > 0))?;
    while run.trainer.step < run.trainer.job.steps {
        let start = Instant::now();
        let stepped = match run.trainer.step(seen) {
            // The step is not done: what was before it is saved below.
            Err(Error::Interrupted { .. }) => None,
            done => Some(done?),
        };
        if let Some(mut report) = stepped {
            let (seconds, at) = (start.elapsed().as_secs_f64(), run.trainer.step);
            if run.evaluates() {
                report.metrics.extend(run.trainer.evaluate()?);
            }
            if !run.trainer.rollouts.is_empty() {
                rollouts::write(&run.out.join("rollouts"), at, &run.trainer.rollouts)?;
            }
            metrics.log(at, &report.metrics)?;
            run.time(at, seconds, &report)?;
            seen.step(run.trainer.step, run.trainer.job.steps, &report.metrics, seconds);
        }
        let signal = signals::requested();
        let every = run.trainer.job.settings.checkpoint_every;
        let due = every > 0 && run.trainer.step.is_multiple_of(every);
        let last = run.trainer.step == run.trainer.job.steps;
        if signal.is_some() || due || last {
            metrics.sync()?;
            run.save(&state, seen)?;
        }
        if let Some(signal) = signal.filter(|_| !last) {
            return Err(Error::Interrupted { signal, step: run.trainer.step });
        }
    }
    run.finish()
}

struct Run<T: Element> {
    out: PathBuf,
    checkpoints: PathBuf,
    trainer: Trainer<T>,
    /// SHA-256 of the weights that the run began with, by model.
    models: Vec<(&'static str, String)>,
    /// Step of the newest checkpoint.
    saved: Option<u64>,
}

impl<T: Element<Acc = f32>> Run<T> {
    /// What the run is, in lines for people and in `run.json`.
    fn about(&self, entry: &Entry) -> Vec<(&'static str, String)> {
        let t = &self.trainer;
        let (s, mib) = (&t.job.stats, t.memory().shared() as f64 / (1 << 20) as f64);
        let size =
            |m: &Model<T>| format!("{}, {} weights", m.family().model_type, models::count(m));
        let mut about = vec![("algorithm", entry.name.to_owned()), ("device", t.dev.describe())];
        for role in t.policy.iter().chain(&t.scalar) {
            about.push((role.name, size(&role.model)));
        }
        // Frozen models are told by their weights: the hash is that of every run against them.
        for (name, model) in [("reference", &t.reference), ("reward_model", &t.reward_model)] {
            if let Some(m) = model {
                let hash = self.models.iter().find(|m| m.0 == name).map_or("", |m| &m.1[..16]);
                about.push((name, format!("{}, frozen, sha256 {hash}", size(m))));
            }
        }
        about.push((
            "data",
            format!(
                "{} examples, {} tokens, {} truncated, {} dropped",
                s.examples, s.tokens, s.truncated, s.dropped
            ),
        ));
        about.push(("step", t.equation()));
        about.push(("memory", format!("{mib:.1} MiB for activations and KV cache, planned once")));
        about
    }

    fn write_about(&self, about: Vec<(&'static str, String)>) -> Result<()> {
        let path = self.out.join("run.json");
        let before = fs::read_to_string(&path).ok().and_then(|t| serde_json::from_str(&t).ok());
        let before = before.unwrap_or(Value::Null);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let mut all: Map<String, Value> =
            about.into_iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        all.insert("steps".into(), self.trainer.job.steps.into());
        all.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        all.insert("started".into(), before["started"].as_f64().unwrap_or(now).into());
        let text = format!("{:#}\n", Value::from(all));
        fs::write(&path, text).map_err(Error::io("write", &path))
    }

    /// What must be the same when the run is resumed.
    fn fixed(&self, entry: &Entry, section: &dyn Section) -> Value {
        let keys = Section::keys(&self.trainer.job.settings).into_iter().chain(section.keys());
        let keys = keys.filter(|k| !Settings::FREE.contains(&k.name));
        let all: Map<String, Value> =
            keys.map(|k| (k.name.to_owned(), Value::String(k.value))).collect();
        let job = &self.trainer.job;
        let tokenizer = job.tokenizer.as_ref().map(Tokenizer::digest);
        let held_out = job.held_out.as_ref().map(Examples::digest);
        let models: Map<String, Value> =
            self.models.iter().map(|(name, hash)| ((*name).to_owned(), json!(hash))).collect();
        json!({
            "algorithm": entry.name, "settings": all, "models": models, "tokenizer": tokenizer,
            "data": job.examples.digest(), "eval_data": held_out, "eos": job.eos,
            "precision": T::NAME,
        })
    }

    /// All steps are done and all models exported.
    fn is_finished(&self) -> bool {
        let t = &self.trainer;
        t.step == t.job.steps && self.exports().all(|(_, dir)| dir.is_dir())
    }

    /// Checks that the disk has room for the checkpoints and models that the run will leave, so
    /// that a run of days does not find out at its end.
    fn pre_flight(&self) -> Result<()> {
        let t = &self.trainer;
        let numbers: u64 =
            t.policy.iter().chain(&t.scalar).map(|r| r.grads.layout().len() as u64).sum();
        // Weights and two moments; while one is written, all that are kept are still there.
        let kept = checkpoint::list(&Disk, &self.checkpoints)?.len();
        let more = (t.job.settings.keep_checkpoints.max(2) + 1).saturating_sub(kept) as u64;
        check_room(&Disk, "the run", &self.out, (12 * more + 4) * numbers)
    }

    fn resume(&mut self, fixed: &Value, seen: &mut dyn Observer) -> Result<()> {
        for path in checkpoint::clean(&Disk, &self.checkpoints)? {
            seen.note(&format!("removed {}, which a crash left unfinished", path.display()));
        }
        let Some(loaded) = checkpoint::load_newest(&Disk, &self.checkpoints)? else {
            return Ok(());
        };
        for problem in &loaded.skipped {
            seen.note(&format!("skipped a damaged checkpoint: {problem}"));
        }
        same(&loaded.state["run"], fixed, &self.out)?;
        let (was, is) = (&loaded.state["version"], env!("CARGO_PKG_VERSION"));
        if was != is {
            seen.note(&format!(
                "the run was begun by version {was}, this is {is}: bits may differ"
            ));
        }
        let (was, is) = (&loaded.state["family"], self.trainer.dev.family());
        if was.as_str().is_some_and(|was| was != is) {
            seen.note(&format!(
                "the run was begun with kernels for {was}, this is {is}: bits may differ"
            ));
        }
        let t = &mut self.trainer;
        for role in t.policy.iter_mut().chain(&mut t.scalar) {
            let name = role.name;
            let mut numbers = vec![0.0; role.grads.layout().len()];
            loaded.read(&Disk, name, "weights", &mut numbers)?;
            role.model.set_master(&t.dev, &numbers)?;
            for (what, to) in [("m", &mut role.m), ("v", &mut role.v)] {
                loaded.read(&Disk, name, what, &mut numbers)?;
                t.dev.write(to.flat_mut(), &numbers)?;
            }
            role.updates = loaded.state["updates"][name].as_u64().unwrap_or(0);
        }
        t.job.algorithm.restore(&loaded.state["algorithm"])?;
        t.step = loaded.step;
        self.saved = Some(loaded.step);
        seen.note(&format!("resumed at step {} from {}", loaded.step, loaded.path.display()));
        Ok(())
    }

    fn save(&mut self, fixed: &Value, seen: &mut dyn Observer) -> Result<()> {
        let t = &self.trainer;
        if self.saved == Some(t.step) {
            return Ok(());
        }
        let _phase = t.dev.span("checkpoint");
        let (mut tensors, mut updates) = (Vec::new(), Map::new());
        for role in t.policy.iter().chain(&t.scalar) {
            let weights = role.model.master()?;
            for (what, x) in [("weights", weights), ("m", role.m.flat()), ("v", role.v.flat())] {
                let read = move || t.dev.on_host(x);
                tensors.push(Tensor::read(role.name, what, &[x.len()], x.len(), read));
            }
            updates.insert(role.name.into(), role.updates.into());
        }
        let state = json!({
            "run": fixed,
            "updates": updates,
            "algorithm": t.job.algorithm.state(),
            "version": env!("CARGO_PKG_VERSION"),
            "family": t.dev.family(),
        });
        let keep = t.job.settings.keep_checkpoints;
        let saved = checkpoint::save(&Disk, &self.checkpoints, t.step, keep, tensors, &state)?;
        for problem in &saved.problems {
            seen.note(&format!("the checkpoint is safe, but {problem}"));
        }
        self.saved = Some(t.step);
        Ok(())
    }

    /// Whether the step just done is followed by an evaluation.
    fn evaluates(&self) -> bool {
        let (t, every) = (&self.trainer, self.trainer.job.settings.eval_every);
        t.job.held_out.is_some()
            && (t.step == t.job.steps || every > 0 && t.step.is_multiple_of(every))
    }

    fn write_config(&self, entry: &Entry, section: &dyn Section) -> Result<()> {
        let path = self.out.join("config.toml");
        let text = format!(
            "# warpo train {} --config {}\n\n{}",
            entry.name,
            path.display(),
            config::template(&[&self.trainer.job.settings, section])
        );
        fs::write(&path, text).map_err(Error::io("write", &path))
    }

    /// Wall time stands in a file of its own: metrics.jsonl is the same for every machine.
    fn time(&self, step: u64, seconds: f64, report: &Report) -> Result<()> {
        let path = self.out.join("timing.jsonl");
        let open = fs::OpenOptions::new().create(true).append(true).open(&path);
        let mut file = open.map_err(Error::io("open", &path))?;
        let tokens = report.metrics.iter().find(|m| m.0 == "tokens").map_or(0.0, |m| m.1);
        let phases: Map<String, Value> =
            report.seconds.iter().map(|(name, s)| ((*name).to_owned(), json!(s))).collect();
        let line = json!({
            "step": step, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "phases": phases,
        });
        writeln!(file, "{line}").map_err(Error::io("write", &path))
    }

    /// Exports the trained models: `final/`, and `final-value/` beside a policy.
    fn finish(self) -> Result<PathBuf> {
        let from = Path::new(&self.trainer.job.settings.model);
        let dev = &self.trainer.dev;
        let _phase = dev.span("export");
        self.exports().try_for_each(|(role, dir)| export(dev, role, from, &dir))?;
        Ok(self.out.join("final"))
    }

    /// Each trained model and the folder that it is exported to.
    fn exports(&self) -> impl Iterator<Item = (&Role<T>, PathBuf)> {
        let name = |r: &Role<T>| if r.name == "value" { "final-value" } else { "final" };
        let roles = self.trainer.policy.iter().chain(&self.trainer.scalar);
        roles.map(move |role| (role, self.out.join(name(role))))
    }
}

/// SHA-256 of the weights and specs of the models that are given to a run; all others are made from
/// them.
fn hashes<T: Element<Acc = f32>>(t: &Trainer<T>) -> Result<Vec<(&'static str, String)>> {
    let roles = t.policy.iter().chain(&t.scalar).filter(|r| r.name != "value");
    let trained = roles.map(|r| (r.name, &r.model));
    let frozen = [("reference", &t.reference), ("reward_model", &t.reward_model)];
    let frozen = frozen.into_iter().filter_map(|(name, m)| Some((name, m.as_ref()?)));
    let hash = |m: &Model<T>| {
        let mut digest = Sha256::new();
        match m.master() {
            Ok(weights) => digest.update(bytemuck::cast_slice::<f32, u8>(&t.dev.on_host(weights)?)),
            Err(_) => digest.update(bytemuck::cast_slice::<T, u8>(&m.on_host(&t.dev)?)),
        }
        // Weights alone do not tell how far a rotation turns.
        digest.update(format!("{:?}", m.spec()));
        Ok(digest.finalize().iter().map(|b| format!("{b:02x}")).collect())
    };
    trained.chain(frozen).map(|(name, m)| Ok((name, hash(m)?))).collect()
}

/// Writes a model folder aside and renames it into place.
fn export<T: Element>(dev: &Device, role: &Role<T>, from: &Path, dir: &Path) -> Result<()> {
    let aside = dir.with_extension("tmp");
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(Error::io("remove", &aside))?;
    }
    fs::create_dir_all(&aside).map_err(Error::io("create", &aside))?;
    models::save(dev, &role.model, &aside)?;
    for name in COMPANIONS {
        let file = from.join(name);
        if file.exists() {
            fs::copy(&file, aside.join(name)).map_err(Error::io("copy", &file))?;
        }
    }
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(Error::io("replace", dir))?;
    }
    fs::rename(&aside, dir).map_err(Error::io("rename", &aside))
}

/// Refuses to go on with a run under other settings or on other data.
fn same(was: &Value, now: &Value, out: &Path) -> Result<()> {
    let hint = || Some("use the run's config.toml, or another --out folder".to_owned());
    let models = now["models"].as_object().into_iter().flatten();
    let models = models.map(|(name, hash)| (name.as_str(), &was["models"][name], hash));
    let others = ["algorithm", "data", "eval_data", "tokenizer", "eos"]
        .map(|key| (key, &was[key], &now[key]));
    // Runs of before there were devices are in f32.
    let precision = |state: &Value| state["precision"].as_str().unwrap_or("F32").to_owned();
    let (begun, here) = (precision(was), precision(now));
    let same = others.iter().all(|(_, before, after)| before == after);
    if same && begun != here {
        let message = format!(
            "{} holds a run that was computed in {begun}, this device computes in {here}",
            out.display()
        );
        let wanted = if begun == "F32" { "--device cpu" } else { "--device cuda" };
        let hint = format!("go on with {wanted}, or take another --out folder");
        return Err(Error::Config { key: "device".into(), message, hint: Some(hint) });
    }
    for (key, before, after) in others.into_iter().chain(models) {
        if before != after {
            let message =
                format!("{} holds a run with {before}, this one has {after}", out.display());
            return Err(Error::Config { key: key.into(), message, hint: hint() });
        }
    }
    let empty = Map::new();
    let was = was["settings"].as_object().unwrap_or(&empty);
    let now = now["settings"].as_object().unwrap_or(&empty);
    let differs = now.iter().find(|(k, v)| was.get(*k) != Some(v));
    let Some((key, value)) = differs else { return Ok(()) };
    let text = |v: Option<&Value>| v.and_then(Value::as_str).unwrap_or("nothing").to_owned();
    let message = format!(
        "{} holds a run with {}, this one has {}",
        out.display(),
        text(was.get(key)),
        text(Some(value))
    );
    Err(Error::Config { key: key.clone(), message, hint: hint() })
}
