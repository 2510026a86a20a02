//! The metrics of a resumed run are those of a straight one.

use std::{fs, path::Path};

use warpo::train::metrics::MetricsLog;

use super::events::scalars;
use crate::support::temp_dir;

fn log(m: &mut MetricsLog, step: u64) {
    let x = step as f64;
    m.log(step, &[("loss", 1.0 / x), ("kl", 0.1 + 0.2 * x)]).unwrap();
}

fn lines(dir: &Path) -> String {
    fs::read_to_string(dir.join("metrics.jsonl")).unwrap()
}

fn straight(name: &str, steps: u64) -> String {
    let dir = temp_dir(name);
    let mut m = MetricsLog::open(&dir, 0).unwrap();
    (1..=steps).for_each(|s| log(&mut m, s));
    lines(&dir)
}

#[test]
fn a_resumed_file_equals_that_of_a_straight_run() {
    let want = straight("metrics_straight", 6);
    let dir = temp_dir("metrics_resumed");
    for saved in 0..=6 {
        // crash after step 5 or later, half a line written, resume from `saved`
        let mut m = MetricsLog::open(&dir, 0).unwrap();
        (1..=saved.max(5)).for_each(|s| log(&mut m, s));
        drop(m);
        let torn = format!("{}{{\"step\":1", lines(&dir));
        fs::write(dir.join("metrics.jsonl"), torn).unwrap();
        let mut m = MetricsLog::open(&dir, saved).unwrap();
        assert_eq!(m.lines.last, saved);
        (saved + 1..=6).for_each(|s| log(&mut m, s));
        m.lines.sync().unwrap();
        assert_eq!(lines(&dir), want, "resumed from {saved}");
    }
}

#[test]
fn lines_are_exact_and_bad_numbers_are_named() {
    let dir = temp_dir("metrics_lines");
    let mut m = MetricsLog::open(&dir, 0).unwrap();
    m.log(0, &[]).unwrap();
    m.log(3, &[("b", 0.1), ("a", f64::NAN), ("c\"", f64::NEG_INFINITY), ("d", 1e300)]).unwrap();
    // in the file at once, without `sync` or drop
    assert_eq!(
        lines(&dir),
        "{\"step\":0}\n{\"step\":3,\"b\":0.1,\"a\":null,\"c\\\"\":null,\"d\":1e+300,\
         \"not_finite\":{\"a\":\"NaN\",\"c\\\"\":\"-inf\"}}\n"
    );
    let events = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path());
    let events: Vec<_> = events.filter(|p| p.to_str().unwrap().contains("tfevents")).collect();
    assert_eq!(events.len(), 1);
    let read = scalars(&fs::read(&events[0]).unwrap());
    assert_eq!(read[0], (3, "b".into(), 0.1));
    assert_eq!(read.len(), 4);
}

#[test]
fn a_file_of_junk_is_cut_where_the_junk_begins() {
    let dir = temp_dir("metrics_junk");
    let path = dir.join("metrics.jsonl");
    fs::write(&path, b"{\"step\":1}\n\xff\xfe\n{\"step\":2}\n").unwrap();
    drop(MetricsLog::open(&dir, 5).unwrap());
    assert_eq!(lines(&dir), "{\"step\":1}\n");
    let error = MetricsLog::open(&dir.join("none"), 0).map(drop).unwrap_err().to_string();
    assert!(error.contains("none/metrics.jsonl"), "{error}");
}
