//! Rewards by themselves: each kind on samples of which the score is known, and each way to fail.

mod math;
mod processes;
mod verifiers;

use std::sync::Arc;

use serde_json::{Value, json};
use warpo::{
    Error, Result,
    algorithms::{ALGORITHMS, RewardEntry},
    config::Field,
    rollout::rewards::{RewardInput, RewardQueue, Rewards},
};

use crate::support::losses::build;

/// The entry that a config has.
pub fn entry(toml: &str) -> RewardEntry {
    let table: toml::Table = format!("x = {toml}").parse().unwrap();
    RewardEntry::parse(&table["x"]).unwrap()
}

pub fn rewards(toml: &str) -> Result<Rewards> {
    Rewards::new(&[entry(toml)])
}

/// A sample of five tokens with the columns of a JSON object.
pub fn sample(id: u64, completion: &str, columns: &Value) -> RewardInput {
    RewardInput {
        id,
        prompt: "Q: ".into(),
        completion: completion.into(),
        tokens: 5,
        columns: Arc::new(columns.as_object().unwrap().clone()),
    }
}

/// Scores of samples by a list of one reward.
pub fn score_all(rewards: &mut Rewards, samples: &[RewardInput]) -> Result<Vec<f64>> {
    let ((), parts) = rewards.beside((7, samples.len()), &|| false, |queue| {
        samples.iter().enumerate().try_for_each(|(at, s)| queue.put(at, s.clone()))
    })?;
    Ok(parts.into_iter().next().flatten().unwrap())
}

/// The score of one completion.
pub fn score(toml: &str, completion: &str, columns: &Value) -> Result<f64> {
    Ok(score_all(&mut rewards(toml)?, &[sample(3, completion, columns)])?[0])
}

/// The message of a list that is refused.
fn refused(toml: &str) -> String {
    match rewards(toml) {
        Ok(_) => panic!("{toml} is taken"),
        Err(e @ Error::Config { .. }) => e.to_string(),
        Err(e) => panic!("{toml}: {e:?}"),
    }
}

#[test]
fn a_wrong_reward_is_refused_by_name() {
    for (toml, want) in [
        (
            r#"{ kind = "maths" }"#,
            "`maths`: there is no kind `maths`; known are model, math, exact",
        ),
        (
            r#"{ kind = "math", colum = "a" }"#,
            "`math`: there is no key `colum`; known are kind, name",
        ),
        (
            r#"{ kind = "math", name = "m", missing = "one" }"#,
            "`m`: `missing` is \"one\", wanted one",
        ),
        (r#"{ kind = "exact", case = 1 }"#, "`exact`: `case` is 1, wanted true or false"),
        (r#"{ kind = "regex" }"#, "`regex`: wanted `pattern`, a text"),
        (r#"{ kind = "regex", pattern = "(" }"#, "`regex`: `pattern` is no regular expression"),
        (r#"{ kind = "regex", pattern = '(a)\1' }"#, "backreferences are not supported"),
        (r#"{ kind = "json_schema", file = "nowhere.json" }"#, "nowhere.json: No such file"),
        (r#"{ kind = "format", think = "<think>" }"#, "\"<think>\" is no tag"),
        (r#"{ kind = "length" }"#, "`length`: wanted `target`"),
        (r#"{ kind = "length", target = 5, max = 6 }"#, "`length`: wanted `target`"),
        (r#"{ kind = "length", max = 6, buffer = 7 }"#, "`length`: wanted `target`"),
        (r#"{ kind = "repetition", ngram = 0 }"#, "`ngram` is 0, wanted 1 or more"),
        (r#"{ kind = "repetition", max_penalty = 0.5 }"#, "`max_penalty` is 0.5, wanted"),
        (r#"{ kind = "code" }"#, "`code`: wanted `command`"),
        (r#"{ kind = "code", command = ["no-such-program"] }"#, "no program \"no-such-program\""),
        (r#"{ kind = "code", command = ["sh"], memory_mb = 0 }"#, "`memory_mb` is 0, wanted"),
        (r#"{ kind = "command", command = [] }"#, "`command` is empty"),
        (r#"{ kind = "command", command = ["cat"], timeout_s = 0 }"#, "`timeout_s` is 0, wanted"),
        (r#"{ kind = "python", file = "nowhere.py" }"#, "there is no file nowhere.py"),
        (r#"{ kind = "http", url = "ftp://a/b" }"#, "wanted http://host:port/path, or https"),
        (r#"{ kind = "http", url = "a/b" }"#, "wanted http://host:port/path"),
        (r#"{ kind = "http", url = "http:///b" }"#, "wanted http://host:port/path"),
        (r#"{ kind = "http", url = "http://a b" }"#, "wanted http://host:port/path"),
        (
            r#"{ kind = "code", command = ["sh"], extension = "sh", append = "tests" }"#,
            "`append` wants `expect` beside it",
        ),
    ] {
        let message = refused(toml);
        assert!(
            message.starts_with("config key `rewards`: ") && message.contains(want),
            "{message}"
        );
    }
}

#[test]
fn an_entry_is_a_kind_a_name_a_weight_and_keys() {
    let all = entry(r#"{ kind = "math", weight = 2, column = "a" }"#);
    assert_eq!((&*all.kind, &*all.name, all.weight), ("math", "math", 2.0));
    assert_eq!(entry(&all.show()), all);
    let named = entry(r#"{ kind = "math", name = "m" }"#);
    assert_eq!((&*named.name, entry(&named.show())), ("m", named.clone()));
    for wrong in [
        "1",
        "{ weight = 1.0 }",
        "{ kind = 1 }",
        r#"{ kind = "math", weight = "1" }"#,
        r#"{ kind = "math", weight = inf }"#,
        r#"{ kind = "math", name = 1 }"#,
    ] {
        let table: toml::Table = format!("x = {wrong}").parse().unwrap();
        assert_eq!(RewardEntry::parse(&table["x"]), None, "{wrong}");
    }
}

/// A reward takes the place of no other metric.
#[test]
fn metrics_keep_their_names() {
    let of_samples =
        ALGORITHMS.iter().filter(|e| (e.section)().keys().iter().any(|k| k.name == "rewards"));
    for (metric, _) in of_samples.flat_map(|e| e.metrics.iter().copied().flatten()) {
        let Some(name) = metric.strip_prefix("reward_") else { continue };
        let pairs = format!(r#"rewards=[{{ kind = "math", name = "{name}" }}]"#);
        let e = build("grpo", &[&pairs]).map(drop).unwrap_err().to_string();
        assert!(e.contains("another metric is called"), "{metric}: {e}");
    }
}

/// The score is the sum, each times its weight; that of the reward model is where the models left
/// it.
#[test]
fn scores_are_weighted_and_summed() {
    let list = [
        entry(r#"{ kind = "model", path = "x", weight = 0.5 }"#),
        entry(r#"{ kind = "regex", pattern = "a", weight = 3.0 }"#),
        entry(r#"{ kind = "regex", name = "b", pattern = "b", weight = -1.0 }"#),
    ];
    let mut rewards = Rewards::new(&list).unwrap();
    let samples = ["a", "b", "ab", ""].map(|text| sample(0, text, &json!({})));
    let ((), parts) = rewards
        .beside((1, 4), &|| false, |queue| {
            // Whichever ends first.
            [2, 0, 3, 1].iter().try_for_each(|at| queue.put(*at, samples[*at].clone()))
        })
        .unwrap();
    let mut scores = vec![2.0, 4.0, 6.0, 8.0];
    let parts = rewards.sum(parts, &mut scores);
    assert_eq!(scores, [4.0, 1.0, 5.0, 4.0]);
    assert_eq!(
        parts,
        [
            ("reward_model", vec![2.0, 4.0, 6.0, 8.0]),
            ("reward_regex", vec![1.0, 0.0, 1.0, 0.0]),
            ("reward_b", vec![0.0, 1.0, 1.0, 0.0]),
        ]
    );
    let mut none = Rewards::default();
    let (is_read, parts) = none.beside((1, 0), &|| false, |queue| Ok(queue.is_read())).unwrap();
    assert!(!is_read);
    assert_eq!((none.sum(parts, &mut scores), scores), (vec![], vec![4.0, 1.0, 5.0, 4.0]));
}

/// An error of what makes the samples is that of the step, unless a reward failed before.
#[test]
fn errors_of_the_work_are_its_own() {
    let mut rewards = rewards(r#"{ kind = "regex", pattern = "a" }"#).unwrap();
    let work = |_: &RewardQueue| Err::<(), _>(Error::value("a", "b", "c"));
    let failed = rewards.beside((1, 1), &|| false, work).unwrap_err();
    assert_eq!(failed.to_string(), "a: got c, wanted b");
}
