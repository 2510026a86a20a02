//! Runs that train adapters: one base for all roles, moments for the adapters alone, PEFT folders
//! in and out, resumption to the bit.

use std::path::Path;

use warpo::{
    models::{
        self, ADAPTER_CONFIG, ADAPTER_FILE, AdapterConfig, Config, Head, LoadOptions, Model,
        Residency,
    },
    train::{self, Silent},
};

use crate::support::{
    golden, host, refusal,
    runs::{assert_same, copy, outcome, small, train, trainer, warpo},
    temp_dir,
};

/// Adapters on all projections, of rank 3.
const LORA: [&str; 2] = ["lora_rank=3", "lora_alpha=12"];

fn pairs(dir: &Path, algorithm: &str, out: &Path, more: &[&str]) -> Vec<String> {
    let more = LORA.iter().chain(more).map(|pair| pair.to_string());
    small(dir, algorithm, out).into_iter().chain(more).collect()
}

/// Policy, reference and base are in memory once; value and reward model have the other base. The
/// plan says so, and counts moments of adapters alone.
#[test]
fn roles_share_their_bases() {
    let dir = temp_dir("lora_roles");
    let mut t = trainer(&dir, "ppo", &LORA).unwrap();
    let all: Vec<_> = t.models.all().collect();
    let of = |name: &str| all.iter().find(|(role, _)| role.name == name).unwrap().1;
    assert!(of("policy").shares_base(of("reference")) && of("reference").adapter().is_none());
    assert!(of("value").shares_base(of("reward_model")) && !of("value").shares_base(of("policy")));
    drop(all);
    let parts = &t.memory().parts;
    let sum = |role: &str, what: &str| -> usize {
        parts.iter().filter(|p| p.role == role && p.what == what).map(|p| p.bytes).sum()
    };
    let len = |name: &str| {
        let state = t.models.trained.iter().find(|s| s.role.name == name).unwrap();
        (state.model.trained().len(), state.model.params().layout().len())
    };
    let ((policy, base), (value, other)) = (len("policy"), len("value"));
    assert_eq!(sum("base", "weights"), 4 * (base + other), "two bases, each once");
    assert_eq!(sum("policy", "weights") + sum("reference", "weights"), 0);
    assert_eq!(sum("policy", "adapter"), 4 * policy);
    assert_eq!(sum("policy", "moments"), 8 * policy);
    assert_eq!(sum("value", "moments"), 8 * value);
    let before: Vec<f32> = t.models.frozen[0].1.params().flat().host().to_vec();
    let own = |t: &train::Trainer<f32>| {
        let all = t.models.trained.iter();
        all.map(|s| s.model.master().unwrap().host().to_vec()).collect::<Vec<_>>()
    };
    let start = own(&t);
    let report = t.step(&mut Silent).unwrap();
    t.step(&mut Silent).unwrap();
    let kl = report.metrics.iter().find(|(name, _)| *name == "kl").map(|(_, x)| *x);
    assert_eq!(kl, Some(0.0), "B is 0: policy and reference are one");
    assert!(own(&t).iter().zip(&start).all(|(a, b)| a != b), "both adapters learn");
    assert!(t.models.frozen[0].1.params().flat().host() == before, "their base does not");
}

/// A run ends with the bytes of the straight one from whatever checkpoint it goes on; its models
/// are PEFT folders, and those of its checkpoints.
#[test]
fn adapters_resume_and_end_as_peft_folders() {
    for algorithm in ["dpo", "ppo"] {
        let dir = temp_dir(&format!("lora_{algorithm}"));
        let (straight, resumed) = (dir.join("straight"), dir.join("resumed"));
        let own = ["checkpoint_every=10", "keep_checkpoints=9", "threads=1"];
        train(algorithm, &pairs(&dir, algorithm, &straight, &own)).unwrap();
        let wanted = outcome(&straight);
        for step in [10, 30] {
            let _ = std::fs::remove_dir_all(&resumed);
            let name = format!("checkpoints/step-{step}");
            copy(&straight.join(&name), &resumed.join(&name));
            std::fs::copy(straight.join("metrics.jsonl"), resumed.join("metrics.jsonl")).unwrap();
            if straight.join("rollouts").is_dir() {
                copy(&straight.join("rollouts"), &resumed.join("rollouts"));
            }
            let again = pairs(&dir, algorithm, &resumed, &["checkpoint_every=0", "threads=2"]);
            train(algorithm, &again).unwrap();
            assert_same(&format!("{algorithm} at {step}"), &wanted, &outcome(&resumed));
        }
        let last = straight.join("final");
        assert!(last.join(ADAPTER_FILE).is_file() && last.join(ADAPTER_CONFIG).is_file());
        assert!(!last.join("config.json").exists() && !last.join("model.safetensors").exists());
        let options = AdapterConfig::read(&last).unwrap();
        let options = options.options();
        assert_eq!((options.rank, options.alpha), (3, 12.0));
        let model: Model<f32> = models::load(host(), &last, LoadOptions::frozen(Head::Lm)).unwrap();
        assert!(model.adapter().unwrap().flat().host().iter().any(|x| *x != 0.0));
        // A checkpoint as a folder, written by the command.
        let out = dir.join("exported");
        let checkpoint = straight.join("checkpoints/step-40");
        let args = ["export", checkpoint.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let done = warpo(&args).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        for file in [ADAPTER_FILE, ADAPTER_CONFIG] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&out) == read(&last), "{file}");
        }
        if algorithm == "ppo" {
            let value = straight.join("final-value");
            let options = LoadOptions::frozen(Head::Scalar);
            let value: Model<f32> = models::load(host(), &value, options).unwrap();
            assert!(value.adapter().is_some());
            continue;
        }
        // The run's adapter is where another one begins.
        let adapter = format!("adapter={}", last.display());
        let more = dir.join("more");
        let mut again = small(&dir, algorithm, &more);
        again.extend([adapter.clone(), "steps=1".into(), "learning_rate=0".into()]);
        train(algorithm, &again).unwrap();
        let read = |dir: &Path| std::fs::read(dir.join(ADAPTER_FILE)).unwrap();
        assert!(read(&more.join("final")) == read(&last), "nothing is learned at rate 0");
        again.push("lora_rank=4".into());
        assert!(refusal(train(algorithm, &again)).contains("`lora_rank`: got 4, wanted 0 beside"));
        // As its own model's, merged.
        let merged = dir.join("merged");
        let base = golden::path("llama_tied");
        let base = base.to_str().unwrap();
        let (merged, last) = (merged.to_str().unwrap(), last.to_str().unwrap());
        let args = ["export", base, "--adapter", last, "--merge", "--out", merged];
        let done = warpo(&args).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && said.contains("not in bits"), "{said}");
        let (_, spec) = Config::read(merged.as_ref()).unwrap().spec().unwrap();
        assert!(spec.adapter.is_none());
        // Both say nearly the same, and an adapter is no part of the base.
        let data = dir.join("dpo.jsonl");
        let data = data.to_str().unwrap();
        let score = |args: &[&str]| {
            let done = warpo(&[&["score", "--data", data], args].concat()).output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{args:?}: {said}");
            let text = String::from_utf8(done.stdout).unwrap();
            let first: serde_json::Value =
                serde_json::from_str(text.lines().next().unwrap()).unwrap();
            first["chosen"]["sum_logprob"].as_f64().unwrap()
        };
        let ours = score(&["--model", base, "--adapter", last]);
        assert_eq!(ours, score(&["--model", last]), "a PEFT folder brings its base");
        assert!((ours - score(&["--model", merged])).abs() < 1e-3);
        assert!((ours - score(&["--model", base])).abs() > 1e-3);
    }
}

/// A PEFT folder is the model of a run: its adapter is trained, the reference is its base.
#[test]
fn what_cannot_be_trained_is_named() {
    let dir = temp_dir("lora_named");
    let run = |more: &[&str]| refusal(trainer(&dir, "dpo", more).map(|_| ()));
    assert!(run(&["lora_rank=4", "lora_targets=lm_head"]).contains("there is no `lm_head` here"));
    assert!(run(&["lora_rank=20000"]).contains("`lora_rank`: got 20000, wanted at most 16384"));
    assert!(run(&["adapter=nowhere"]).contains("nowhere/adapter_config.json"));
    let options = AdapterConfig::read(&golden::path("lora_llama_rm")).unwrap();
    let config = Config::read(&golden::path("llama")).unwrap().with_adapter(options).unwrap();
    let trained = LoadOptions { residency: Residency::Trained, ..LoadOptions::frozen(Head::Lm) };
    let said = refusal(models::load_as::<f32>(host(), config, trained));
    assert!(said.contains("`task_type`"), "{said}");
}
