//! Learning rates: hand-worked courses, and those of Hugging Face's schedulers.

use std::collections::BTreeSet;

use serde_json::Value;
use warpo::train::schedule::factor;
use warpo::train::settings::Schedule;

use crate::support::{assert_close, golden};

#[test]
fn hand_worked() {
    use Schedule::{Constant, Cosine, Linear};
    for (schedule, warmup, floor, want) in [
        (Constant, 0, 0.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Constant, 2, 0.5, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]), // a floor does not touch it
        (Linear, 0, 0.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Linear, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Linear, 0, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Cosine, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Cosine, 2, 0.2, [0.0, 0.5, 1.0, 0.6, 0.2, 0.2]),
        // warm-up as long as the run, or longer
        (Linear, 4, 0.0, [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]),
        (Linear, 8, 0.0, [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]),
    ] {
        let got: Vec<f64> = (0..6).map(|step| factor(schedule, step, 4, warmup, floor)).collect();
        let what = format!("{schedule:?}, warm-up {warmup}, floor {floor}");
        assert_close(&what, &got, &want, 1e-15, 1e-15);
    }
}

#[test]
fn schedules_are_those_of_hugging_face() {
    let text = std::fs::read_to_string(golden::path("pure/lr_schedules.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let mut unread: BTreeSet<&str> =
        all["schedules"].as_object().unwrap().keys().map(String::as_str).collect();
    for (name, schedule, warmup, floor) in [
        ("constant", Schedule::Constant, 0, 0.0),
        ("constant_with_warmup", Schedule::Constant, 5, 0.0),
        ("linear", Schedule::Linear, 5, 0.0),
        ("cosine", Schedule::Cosine, 5, 0.0),
        ("cosine_with_min_lr", Schedule::Cosine, 5, 0.1),
        // A polynomial of power 1 is a line; Hugging Face ends it at 1e-7.
        ("polynomial", Schedule::Linear, 5, 1e-7),
    ] {
        unread.remove(name);
        let golden = &all["schedules"][name];
        let want: Vec<f64> =
            golden["lr"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(want.len(), 42, "two steps beyond the end");
        let got: Vec<f64> = (0..42).map(|step| factor(schedule, step, 40, warmup, floor)).collect();
        assert_close(name, &got[..41], &want[..41], 1e-15, 1e-14);
        // Beyond the end, where Hugging Face's cosine rises again, the rate stays.
        assert_eq!(got[41], got[40], "{name}");
    }
    // There are no schedules of these shapes.
    assert!(unread.into_iter().eq(["cosine_with_restarts", "inverse_sqrt"]));
}
