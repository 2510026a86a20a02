//! The table of algorithms: the command line, the configuration and the tests follow from it.

use std::collections::BTreeSet;

use warpo::{
    Error,
    algorithms::{ALGORITHMS, Inputs, SHARED_METRICS},
    config::{self, Section},
    train::{Settings, Silent},
};

use crate::support::{
    runs::{trainer, warpo},
    temp_dir,
};

fn output(args: &[&str]) -> String {
    let out = warpo(args).output().unwrap();
    assert!(out.status.success(), "{args:?}");
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn every_algorithm_is_in_the_registry() {
    let help = output(&["train", "--help"]);
    let mut names = BTreeSet::new();
    for e in ALGORITHMS {
        assert!(names.insert(e.name), "{} is there twice", e.name);
        assert!(e.about.len() > 10 && !e.about.ends_with('.'), "{}", e.about);
        assert!(help.contains(e.name), "{help}");

        // no key of its own hides a shared one
        let shared: Vec<&str> = Settings::default().keys().iter().map(|k| k.name).collect();
        let own = (e.section)().keys();
        assert!(own.iter().all(|k| !shared.contains(&k.name) && !k.doc.trim().is_empty()));

        // what is printed is a configuration, with the algorithm's defaults in it
        let mut settings = Settings::default();
        for (key, value) in e.defaults {
            config::set_pair(&mut [&mut settings], &format!("{key}={value}")).unwrap();
        }
        let section = (e.section)();
        let text = output(&["config", e.name]);
        assert!(text.contains(e.about), "{text}");
        assert!(text.ends_with(&config::template(&[&settings, &*section])));
        let (mut read, mut read_section) = (Settings::default(), (e.section)());
        config::set_all(&mut [&mut read, &mut *read_section], &text, e.name).unwrap();
        assert_eq!(read, settings);
        assert_eq!(read_section.keys(), section.keys());

        // it is built, or says which key is missing
        match (e.build)(&*section) {
            Ok(algorithm) => {
                let needs = algorithm.needs();
                assert!(needs.policy || needs.scalar.is_some(), "{} trains nothing", e.name);
                assert!(needs.epochs > 0 && needs.minibatches > 0);
                let reads =
                    matches!(needs.inputs, Inputs::Prompts(_) | Inputs::Pairs | Inputs::Judged);
                assert!(!needs.reference || reads, "{}: who reads the reference?", e.name);
            }
            Err(Error::Config { key, .. }) => {
                assert!(own.iter().any(|k| k.name == key), "{}: {key}", e.name);
            }
            Err(error) => panic!("{}: {error}", e.name),
        }
    }
    let out = warpo(&["train", "nope"]).output().unwrap();
    let error = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(error.starts_with("error: config key `algorithm`: there is no `nope`\n"), "{error}");
    assert!(ALGORITHMS.iter().all(|e| error.contains(e.name) && error.contains(e.about)));
}

/// Every key of every algorithm, changed, comes back from the text that is printed for it.
#[test]
fn every_setting_survives_the_template() {
    for e in ALGORITHMS {
        let mut section = (e.section)();
        let mut settings = Settings::default();
        for key in settings.keys().into_iter().chain(section.keys()) {
            let texts = [
                "none",
                "k3",
                "k1",
                "loss",
                "reward",
                "cosine",
                "biased",
                "policy",
                "bfloat16",
                "hinge",
                "zero",
                "forward_kl",
                "é = # x",
                "sequence",
                "sequences",
                "tokens",
                "cispo",
                "one",
                "mean",
            ];
            let numbers = ["true", "false", "7", "0.25"].map(String::from);
            let table = ["{ prompt = \"q\" }", "[{ kind = \"math\" }]"].map(String::from);
            let candidates = [&numbers[..], &texts.map(|t| format!("{t:?}")), &table].concat();
            let change = candidates.iter().find(|v| {
                let pair = format!("{}={v}", key.name);
                **v != key.value
                    && config::set_pair(&mut [&mut settings, &mut *section], &pair).is_ok()
            });
            assert!(change.is_some(), "{}", key.name);
        }
        let text = config::template(&[&settings, &*section]);
        let (mut read, mut read_section) = (Settings::default(), (e.section)());
        config::set_all(&mut [&mut read, &mut *read_section], &text, "text").unwrap();
        assert_eq!((read, read_section.keys()), (settings, section.keys()));
    }
}

/// Whatever a step reports has an explanation, which the report shows.
#[test]
fn every_metric_is_explained() {
    for e in ALGORITHMS {
        let dir = temp_dir(&format!("metrics_{}", e.name));
        let mut run = trainer(&dir, e.name, &[]).unwrap();
        let report = run.step(&mut Silent).unwrap();
        for (name, _) in report.metrics {
            let all = e.metrics.iter().copied().chain([SHARED_METRICS]).flatten();
            let found: Vec<&str> = all.filter(|m| m.0 == name).map(|m| m.1).collect();
            assert!(matches!(found[..], [text] if text.ends_with('.')), "{}: {name}", e.name);
        }
    }
}

/// Names of other projects lead to settings that are there, each to one of an algorithm's.
#[test]
fn names_elsewhere_lead_to_settings() {
    let all = config::elsewhere::NAMES
        .iter()
        .flat_map(|(ours, theirs)| theirs.iter().map(move |theirs| (*ours, *theirs)));
    let all: Vec<(&str, &str)> = all.collect();
    assert!(all.len() >= 120, "{}", all.len());
    let mut seen = BTreeSet::new();
    for e in ALGORITHMS {
        let (settings, section) = Settings::defaults(e).unwrap();
        let keys = [settings.keys(), section.keys()].concat();
        let known = |name: &str| keys.iter().any(|k| k.name == name);
        for (ours, theirs) in all.iter().filter(|(ours, _)| known(ours)) {
            seen.insert(*ours);
            assert!(!known(theirs), "{}: `{theirs}` is a setting here", e.name);
            let longer = config::elsewhere::ours(&format!("some.{theirs}"), known);
            assert_eq!(longer, Some(*ours), "{}: {theirs}", e.name);
        }
        assert_eq!(config::elsewhere::ours("nothing_like_it", known), None);
    }
    let unknown: Vec<_> = all.iter().filter(|(ours, _)| !seen.contains(ours)).collect();
    assert!(unknown.is_empty(), "no algorithm has {unknown:?}");
}
