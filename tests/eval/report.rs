//! The report: what it holds of a run, what it says of a folder without one, and that no text of a
//! model can become markup.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use warpo::eval::report;

use crate::support::{
    runs::{small, train},
    temp_dir,
};

/// The data in a page.
fn data(page: &Path) -> Value {
    let text = std::fs::read_to_string(page).unwrap();
    let (_, rest) = text.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

fn finished(name: &str) -> (PathBuf, PathBuf) {
    let dir = temp_dir(name);
    let run = dir.join("run");
    let mut pairs = small(&dir, "ppo", &run);
    pairs.extend(["steps=7".into(), "batch_size=4".into()]);
    train("ppo", &pairs).unwrap();
    (dir, run)
}

#[test]
fn holds_every_metric_and_a_spread_of_rollouts() {
    let (dir, run) = finished("report");
    let page = dir.join("page.html");
    report(&run, &page, 12).unwrap();
    let d = data(&page);
    let r = &d["runs"][0];
    let last = crate::support::runs::metrics(&run).pop().unwrap();
    for (name, value) in last.as_object().unwrap() {
        let column = r["metrics"][name].as_array().unwrap();
        assert_eq!(column.len(), 7, "{name}");
        let (got, want) = (column[6].as_f64().unwrap(), value.as_f64().unwrap());
        assert!((got - want).abs() <= 5e-5 * want.abs(), "{name}: {got} for {want}");
        assert!(name == "step" || r["meanings"][name].is_string(), "{name} is not explained");
    }
    // 12 samples of 4 a step: three steps, the first and the last among them
    let steps: Vec<u64> =
        r["rollouts"].as_array().unwrap().iter().map(|s| s["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 4, 7]);
    assert_eq!(r["rollouts_total"], 28);
    let sample = &r["rollouts"][2]["samples"][0];
    for column in ["logp", "ref_logp", "value", "reward", "advantage", "return"] {
        let n = sample["columns"][column].as_array().unwrap().len();
        assert_eq!(n, sample["ids"].as_array().unwrap().len(), "{column}");
    }
    assert!(r["unfinished"].is_null());
    assert_eq!(r["timing"]["phases"].as_object().unwrap().len(), 3);
    assert!(r["config"].as_str().unwrap().contains("kl_target = 0.5"));
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(!text.contains("http://") || text.matches("http://").count() == 1, "one SVG namespace");
    assert!(!text.contains("src=") && !text.contains("@import") && !text.contains("url("));
}

#[test]
fn text_of_a_model_never_becomes_markup() {
    let (dir, run) = finished("report_markup");
    let file = run.join("rollouts/step-7.jsonl");
    let evil = "</script><script>alert(1)</script><!--";
    let lines = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<String> = lines
        .lines()
        .map(|l| {
            let mut v: Value = serde_json::from_str(l).unwrap();
            v["text"] = json!(evil);
            v.to_string() + "\n"
        })
        .collect();
    std::fs::write(&file, lines.concat()).unwrap();
    let page = dir.join("page.html");
    report(&run, &page, 100).unwrap();
    assert!(!std::fs::read_to_string(&page).unwrap().contains("alert(1)</script>"));
    assert_eq!(data(&page)["runs"][0]["rollouts"][6]["samples"][0]["text"], evil);
}

#[test]
fn a_run_that_is_still_going_is_reported_and_a_damaged_one_is_named() {
    let (dir, run) = finished("report_torn");
    let (file, page) = (run.join("metrics.jsonl"), dir.join("page.html"));
    let whole = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    report(&run, &page, 0).unwrap();
    assert_eq!(data(&page)["runs"][0]["metrics"]["step"], json!([1, 2, 3, 4, 5, 6]));

    std::fs::write(&file, whole.replacen("\"step\"", "step", 1)).unwrap();
    let error = report(&run, &page, 0).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl:1: not JSON"), "{error}");
}

#[test]
fn several_runs_come_in_the_order_of_their_start() {
    let dir = temp_dir("report_several");
    for (name, started) in [("a", 3.0), ("b", 1.0), ("c", 2.0)] {
        let run = dir.join(name);
        std::fs::create_dir(&run).unwrap();
        std::fs::write(run.join("run.json"), json!({ "started": started }).to_string()).unwrap();
        std::fs::write(run.join("metrics.jsonl"), "{\"step\":1,\"loss\":2.5}\n").unwrap();
    }
    let page = dir.join("page.html");
    report(&dir, &page, 10).unwrap();
    let d = data(&page);
    let names: Vec<&str> =
        d["runs"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["b", "c", "a"]);
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let dir = temp_dir("report_none");
    let error = report(&dir, &dir.join("page.html"), 10).unwrap_err().to_string();
    assert!(error.contains("report_none") && error.contains("holds no run"), "{error}");
    let error = report(&dir.join("missing"), &dir.join("page.html"), 10).unwrap_err().to_string();
    assert!(error.starts_with("cannot read"), "{error}");
}

/// A FIFO would wait for ever.
#[test]
fn what_is_no_regular_file_is_refused() {
    let dir = temp_dir("report_fifo");
    let path = dir.join("metrics.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = report(&dir, &dir.join("page.html"), 10).unwrap_err().to_string();
    assert_eq!(error, format!("{}: is no regular file", path.display()));
}

/// Half a run says that it is one.
#[test]
fn a_run_that_goes_on_says_how_far_it_is() {
    let (dir, run) = finished("report_half");
    let path = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let half: String = text.lines().take(3).map(|l| format!("{l}\n")).collect();
    std::fs::write(&path, half).unwrap();
    let page = dir.join("page.html");
    report(&run, &page, 12).unwrap();
    assert_eq!(data(&page)["runs"][0]["unfinished"], "3 of 7 steps so far");
}

/// A fixed bug: runs that sample nothing took their share of the rollouts.
#[test]
fn only_runs_that_sample_share_the_rollouts() {
    let (dir, run) = finished("report_shares");
    let plain = dir.join("plain");
    std::fs::create_dir_all(&plain).unwrap();
    std::fs::copy(run.join("metrics.jsonl"), plain.join("metrics.jsonl")).unwrap();
    let page = dir.join("page.html");
    report(&dir, &page, 12).unwrap();
    let runs = data(&page)["runs"].clone();
    let steps = |r: &Value| r["rollouts"].as_array().unwrap().len();
    let all: Vec<usize> = runs.as_array().unwrap().iter().map(steps).collect();
    assert_eq!(all.iter().sum::<usize>(), 3, "{all:?}");
    assert_eq!(all.len(), 2);
}
