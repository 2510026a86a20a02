//! Training on a CUDA device: the same runs as on the CPU, in bf16.

use std::path::Path;

use half::bf16;
use serde_json::Value;
use warpo::{
    algorithms::Metrics,
    config,
    device::{Device, Element, allocated},
    models::{Head, Model},
    train::{Settings, Silent, Trainer},
};

use crate::support::{
    assert_bits, golden, host, process, root,
    runs::{copy, entry, small, warpo},
    sim::{self, Sim, Variant},
    temp_dir,
};

/// A run in memory with these settings.
fn trainer<T: Element<Acc = f32>>(dev: &Device, algorithm: &str, pairs: &[String]) -> Trainer<T> {
    let (entry, mut settings) = (entry(algorithm), Settings::default());
    let mut section = (entry.section)();
    for pair in pairs {
        config::set_pair(&mut [&mut settings, &mut *section], pair).unwrap();
    }
    Trainer::new(dev, settings, (entry.build)(&*section).unwrap()).unwrap()
}

/// A small run of a model that a device takes.
fn on_device(dir: &Path, algorithm: &str, more: &[&str]) -> Vec<String> {
    let mut pairs = small(dir, algorithm, &dir.join("run"));
    pairs.push(format!("model={}", golden::path("llama").display()));
    if algorithm == "ppo" {
        pairs.push(format!("reward_model={}", golden::path("llama/rm").display()));
    }
    pairs.push("threads=1".into());
    if !sim::full() {
        pairs.push("batch_size=2".into());
        let ppo = ["ppo_epochs=1", "max_new_tokens=3"].map(str::to_owned);
        pairs.extend(ppo.into_iter().filter(|_| algorithm == "ppo"));
    }
    pairs.extend(more.iter().map(|p| (*p).to_owned()));
    pairs
}

fn metric(metrics: &Metrics, name: &str) -> f64 {
    metrics.iter().find(|m| m.0 == name).unwrap_or_else(|| panic!("{name}")).1
}

fn step<T: Element<Acc = f32>>(t: &mut Trainer<T>) -> Metrics {
    t.step(&mut Silent).unwrap().metrics
}

/// The quick-start's settings of a stage, with its model, at so many texts a step.
fn quickstart(stage: &str, batch: usize) -> Vec<String> {
    let dir = root().join("examples/quickstart");
    let text = std::fs::read_to_string(dir.join(format!("{stage}.toml"))).unwrap();
    let kept = |line: &&str| {
        line.contains('=') && !line.starts_with('#') && !line.starts_with("eval_data")
    };
    let mut pairs: Vec<String> =
        text.lines().filter(kept).map(|l| l.replace(" = ", "=").replace('"', "")).collect();
    pairs.push(format!("model={}", dir.join("model").display()));
    pairs.push(format!("data={}", dir.join("reviews.jsonl").display()));
    pairs.push(format!("batch_size={batch}"));
    pairs
}

/// Losses of the quick-start's first steps are those of the CPU, to what bf16 makes of weights,
/// activations and updates: each within `each`, their mean within `mean`.
fn first_steps(stage: &str, algorithm: &str, batch: usize, (each, mean): (f64, f64)) {
    let pairs = quickstart(stage, batch);
    let mut cpu = trainer::<f32>(host(), algorithm, &pairs);
    let mut devices: Vec<Trainer<bf16>> = Vec::new();
    sim::on_devices(|dev| devices.push(trainer(dev, algorithm, &pairs)));
    if devices.is_empty() {
        return;
    }
    let mut off = Vec::new();
    for n in 0..if sim::full() { 20 } else { 5 } {
        let want = metric(&step(&mut cpu), "loss");
        // The simulated Hopper takes the first steps only.
        for (i, t) in devices.iter_mut().enumerate().take(if n < 2 { 2 } else { 1 }) {
            let got = metric(&step(t), "loss");
            println!("{stage} step {n} on {i}: {got:.4} for {want:.4}");
            assert!((got - want).abs() < each, "{stage} step {n} on {i}: {got} for {want}");
            if i == 0 {
                off.push(got - want);
            }
        }
    }
    let off = off.iter().sum::<f64>() / off.len() as f64;
    assert!(off.abs() < mean, "{stage}: the mean loss is off by {off}");
}

#[test]
fn sft_takes_the_first_steps_on_a_device_as_on_the_cpu() {
    first_steps("sft", "sft", 2, (0.03, 0.005));
}

#[test]
fn reward_takes_the_first_steps_on_a_device_as_on_the_cpu() {
    // A score of one text moves far in a step of so few.
    first_steps("reward", "reward", 1, (0.3, 0.05));
}

/// Algorithms over pairs take the steps of the CPU, to what bf16 makes of weights and log-probs;
/// and those that know their gradient before the pass find the log-probs that it is of.
#[test]
fn pairs_take_the_first_steps_on_a_device_as_on_the_cpu() {
    let dir = temp_dir("device_pairs");
    let runs = [
        ("dpo", "ld_alpha=0.5"),
        ("dpo", "loss_type=aot"),
        ("dpo", "loss_type=[\"sigmoid\", \"bco_pair\"]"),
        ("simpo", "beta=2"),
        ("orpo", "beta=0.5"),
    ];
    sim::on_devices(|dev| {
        for (algorithm, own) in sim::cases(3, runs) {
            let fixed = [own, "learning_rate=0.001", "warmup_steps=0", "micro_batch_tokens=1"];
            let pairs = on_device(&dir, algorithm, &fixed);
            let mut cpu = trainer::<f32>(host(), algorithm, &pairs);
            let mut t = trainer::<bf16>(dev, algorithm, &pairs);
            for n in 0..3 {
                let (want, got) = (step(&mut cpu), step(&mut t));
                for (name, within) in
                    [("loss", 0.03), ("reward_margin", 0.05), ("chosen_logp", 0.3)]
                {
                    let (want, got) = (metric(&want, name), metric(&got, name));
                    println!("{algorithm} {own} step {n} {name}: {got} for {want}");
                    assert!(
                        (got - want).abs() < within,
                        "{algorithm} {own} {n} {name}: {got} for {want}"
                    );
                }
            }
        }
    });
}

/// PPO's first ratio is exactly 1 and its first KL exactly 0: what was sampled is what is trained,
/// bit for bit.
#[test]
fn ppo_on_a_device_keeps_the_exact_ratio() {
    let dir = temp_dir("device_ppo");
    sim::on_devices(|dev| {
        for more in [&["temperature=0.7"][..], &["top_p=0.9", "top_k=20"], &["recompute=true"]] {
            let fixed = ["learning_rate=0.001", "warmup_steps=0", "ppo_epochs=1", "minibatches=1"];
            let more = [more, &fixed].concat();
            let mut t = trainer::<bf16>(dev, "ppo", &on_device(&dir, "ppo", &more));
            let first = step(&mut t);
            let is = |name| metric(&first, name);
            assert_eq!(
                (is("kl"), is("max_log_ratio"), is("approx_kl")),
                (0.0, 0.0, 0.0),
                "{more:?}"
            );
            assert!(is("grad_norm") > 0.0 && is("value_grad_norm") > 0.0);
            let second = step(&mut t);
            assert!(metric(&second, "kl") != 0.0, "the policy went away from the reference");
            assert_eq!(metric(&second, "max_log_ratio"), 0.0);
        }
    });
}

/// Models that wait in host memory say what they say on the device, in less memory there.
#[test]
fn offloaded_models_say_the_same() {
    let dir = temp_dir("device_offload");
    sim::on_devices(|dev| {
        let run = |offload: &str| {
            let pairs = on_device(&dir, "ppo", &["max_new_tokens=3", offload]);
            let mut t = trainer::<bf16>(dev, "ppo", &pairs);
            ((0..2).map(|_| step(&mut t)).collect::<Vec<_>>(), t.memory().total())
        };
        let ((kept, all), (offloaded, less)) =
            (run("offload_frozen=false"), run("offload_frozen=true"));
        assert_eq!(kept, offloaded);
        assert!(less < all, "{less} of {all}");
    });
}

/// The value model begins with the judge's weights as they are in its file, not as the judge
/// computes with them.
#[test]
fn a_value_model_begins_unrounded() {
    let dir = temp_dir("device_value");
    sim::on_devices(|dev| {
        let t = trainer::<bf16>(dev, "ppo", &on_device(&dir, "ppo", &[]));
        let folder = golden::path("llama/rm");
        let judge = Model::<bf16>::load_trained(dev, &folder, Head::Scalar, None).unwrap();
        let numbers = |m: &Model<bf16>| dev.read(m.master().unwrap()).unwrap();
        let want = numbers(&judge);
        assert_bits("value", &numbers(t.scalar().unwrap()), &want);
        assert!(want.iter().any(|w| bf16::from_f32(*w).to_f32() != *w), "rounding would show");
    });
}

/// What the host waits for in a step: not for a micro-batch, nor inside one.
#[test]
fn a_step_waits_for_its_device_twice() {
    let dir = temp_dir("device_waits");
    sim::on_devices(|dev| {
        let Device::Cuda(cuda) = dev else { unreachable!() };
        let calls = |algorithm: &str, more: &[&str]| {
            let mut t = trainer::<bf16>(dev, algorithm, &on_device(&dir, algorithm, more));
            drop(step(&mut t));
            let before = cuda.calls();
            drop(step(&mut t));
            let after = cuda.calls();
            (after.waits - before.waits, after.launches - before.launches)
        };
        for algorithm in ["sft", "reward", "simpo"] {
            let (waits, launches) = calls(algorithm, &["batch_size=4", "micro_batch_tokens=10000"]);
            let (again, more) = calls(algorithm, &["batch_size=4", "micro_batch_tokens=1"]);
            // The gradient's norm decides whether there is an update; whether its weights are
            // numbers ends the step.
            assert_eq!((waits, again), (2, 2), "{algorithm}");
            assert!(more > 2 * launches, "{algorithm}: more micro-batches, {more} and {launches}");
        }
        // A wait for each new token, one for each model that scores, and those of the updates.
        let more = [
            "max_new_tokens=5",
            "eos_id=none",
            "rollout_slots=64",
            "ppo_epochs=2",
            "minibatches=2",
        ];
        let (waits, _) = calls("ppo", &[&more[..], &["micro_batch_tokens=10000"]].concat());
        assert_eq!(waits, 5 + 3 + 4 + 1);
    });
}

/// Bytes of the plan and bytes that are taken.
#[test]
#[ignore = "a process of the test below"]
fn plans() {
    if std::env::var_os("WARPO_TEST_DIR").is_none() {
        return;
    }
    let dir = temp_dir("device_plans");
    fn check<T: Element<Acc = f32>>(dev: &Device, dir: &Path) {
        for algorithm in ["sft", "reward", "dpo", "kto", "ppo"] {
            for more in [
                &[][..],
                &["recompute=true"],
                &["offload_frozen=true"],
                &["micro_batch_tokens=300"],
            ] {
                let pairs = on_device(dir, algorithm, more);
                let before = allocated();
                let mut t = trainer::<T>(dev, algorithm, &pairs);
                let (taken, plan) = (allocated() - before, t.memory().clone());
                assert_eq!(taken, plan.total(), "{algorithm} {more:?}: {plan:?}");
                drop(step(&mut t));
                assert_eq!(allocated() - before, taken, "{algorithm} {more:?}: a step takes none");
                assert_eq!(t.evaluate().unwrap(), Vec::new());
            }
        }
    }
    check::<f32>(host(), &dir);
    sim::on_devices(|dev| check::<bf16>(dev, &dir));
    std::fs::write(Path::new(&std::env::var_os("WARPO_TEST_DIR").unwrap()).join("done"), "")
        .unwrap();
}

/// `warpo plan` prints what a run takes: not one byte is missing or left over, on the CPU and on
/// devices.
#[test]
fn the_plan_is_what_a_run_takes() {
    let dir = temp_dir("device_plan");
    let done = process("train::device::plans", &dir).wait().unwrap();
    assert!(done.success() && dir.join("done").exists());
}

/// Killed after any step, a run on a device goes on and ends with the same bytes; on another kind
/// of device it does not go on.
#[test]
fn runs_on_a_device_resume() {
    if Sim::of_gpu().is_some() {
        return;
    }
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let dir = temp_dir("device_resume");
    let steps = if sim::full() { 3 } else { 2 };
    for (algorithm, device) in [("sft", "sim"), ("ppo", "sim:hopper")] {
        let run = |out: &Path, more: &[&str]| {
            let more = [&["checkpoint_every=1", "keep_checkpoints=5"], more].concat();
            let mut pairs = on_device(&dir, algorithm, &more);
            pairs.extend([format!("steps={steps}"), format!("out={}", out.display())]);
            let sets = pairs.iter().flat_map(|p| ["--set", p]);
            let args: Vec<&str> = ["train", algorithm].into_iter().chain(sets).collect();
            let done = warpo(&args).env("WARPO_SIM", sim.library()).output().unwrap();
            (done.status.code(), String::from_utf8(done.stderr).unwrap())
        };
        let device = format!("device={device}");
        let (whole, cut) =
            (dir.join(format!("{algorithm}_whole")), dir.join(format!("{algorithm}_cut")));
        let (code, text) = run(&whole, &[&device]);
        assert_eq!(code, Some(0), "{text}");
        copy(&whole, &cut);
        for at in (1..steps).rev() {
            // As if it had been killed after step `at`.
            for gone in at + 1..=steps {
                std::fs::remove_dir_all(cut.join(format!("checkpoints/step-{gone}"))).unwrap();
            }
            std::fs::remove_dir_all(cut.join("final")).unwrap();
            let (code, text) = run(&cut, &[&device]);
            assert_eq!(code, Some(0), "{text}");
            assert!(text.contains(&format!("resumed at step {at}")), "{text}");
            for file in ["final/model.safetensors", "metrics.jsonl"] {
                let read = |run: &Path| std::fs::read(run.join(file)).unwrap();
                assert!(read(&cut) == read(&whole), "{algorithm} from step {at}: {file}");
            }
        }
        let (code, text) = run(&cut, &["device=cpu"]);
        assert!(code == Some(2) && text.contains("computed in BF16"), "{code:?} {text}");
    }
    let config: Value = serde_json::from_str(
        &std::fs::read_to_string(dir.join("sft_whole/final/config.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(config["head_dim"], 16, "the model is saved as wide as it came");
}

/// The whole job of the quick-start, with a handful of its data: four stages, the comparison and
/// the report.
#[test]
fn the_quickstart_runs_on_a_device() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    if Sim::of_gpu().is_some() {
        return;
    }
    let from = root().join("examples/quickstart");
    let (dir, out) = (temp_dir("device_quickstart"), temp_dir("device_quickstart_out"));
    std::fs::create_dir_all(dir.join("model")).unwrap();
    for entry in std::fs::read_dir(from.join("model")).unwrap() {
        let file = entry.unwrap().path();
        std::fs::copy(&file, dir.join("model").join(file.file_name().unwrap())).unwrap();
    }
    for entry in std::fs::read_dir(&from).unwrap() {
        let file = entry.unwrap().path();
        let Some(kind) = file.extension() else { continue };
        let text = std::fs::read_to_string(&file).unwrap();
        let small: String = match kind.to_str().unwrap() {
            // Pairs are made of a text of each label.
            "jsonl" => {
                let lines: Vec<&str> = text.lines().collect();
                let few = lines.len() / 6;
                lines.iter().step_by(few.max(1)).take(6).map(|l| format!("{l}\n")).collect()
            }
            "toml" => text
                .lines()
                .map(|l| format!("{l}\n"))
                .collect::<String>()
                .replace("batch_size = 32", "batch_size = 2"),
            _ => continue,
        };
        std::fs::write(dir.join(file.file_name().unwrap()), small).unwrap();
    }
    let path = |p: &Path| p.display().to_string();
    let (from, to) = (path(&dir), path(&out));
    let args = [
        "quickstart",
        "--from",
        &from,
        "--out",
        &to,
        "--device",
        "sim",
        "--steps",
        "1",
        "--set",
        "batch_size=4",
        "--set",
        "max_new_tokens=4",
        "--set",
        "ppo_epochs=1",
    ];
    let done = warpo(&args).env("WARPO_SIM", sim.library()).output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{text}");
    assert!(text.contains("simulated cuda device"), "{text}");
    let summary = std::fs::read_to_string(out.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["rows"].as_array().unwrap().len(), 8);
    assert!(out.join("report.html").exists() && out.join("ppo/final/model.safetensors").exists());
}
