//! Learning rates: hand-worked courses, and those of Hugging Face's schedulers.

use std::collections::BTreeSet;

use serde_json::Value;
use warpo::train::{
    Settings,
    schedule::Course,
    settings::Schedule::{
        self, Constant, Cosine, InverseSqrt, Linear, Polynomial, WarmupStableDecay,
    },
};

use crate::support::{assert_close, golden};

fn course(schedule: Schedule, steps: u64, warmup: u64, floor: f64) -> Course {
    Course { schedule, steps, warmup, decay: 2, power: 2.0, floor }
}

#[test]
fn hand_worked() {
    for (schedule, warmup, floor, want) in [
        (Constant, 0, 0.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Constant, 2, 0.0, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        (Linear, 0, 0.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Linear, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Linear, 0, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Cosine, 2, 0.0, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Cosine, 2, 0.2, [0.0, 0.5, 1.0, 0.6, 0.2, 0.2]),
        (Polynomial, 0, 0.0, [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]),
        (Polynomial, 2, 0.2, [0.0, 0.5, 1.0, 0.4, 0.2, 0.2]),
        (WarmupStableDecay, 0, 0.0, [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        (WarmupStableDecay, 1, 0.2, [0.0, 1.0, 1.0, 0.6, 0.2, 0.2]),
        (InverseSqrt, 1, 0.0, [0.0, 1.0, 0.5f64.sqrt(), (1.0f64 / 3.0).sqrt(), 0.5, 0.2f64.sqrt()]),
        // warm-up as long as the run, or longer
        (Linear, 4, 0.0, [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]),
        (Linear, 8, 0.0, [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]),
    ] {
        let got: Vec<f64> = (0..6).map(|t| course(schedule, 4, warmup, floor).factor(t)).collect();
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
        ("constant", Constant, 0, 0.0),
        ("constant_with_warmup", Constant, 5, 0.0),
        ("linear", Linear, 5, 0.0),
        ("cosine", Cosine, 5, 0.0),
        ("cosine_with_min_lr", Cosine, 5, 0.1),
        // Hugging Face ends it at 1e-7.
        ("polynomial", Polynomial, 5, 1e-7),
        ("inverse_sqrt", InverseSqrt, 5, 0.0),
    ] {
        unread.remove(name);
        let golden = &all["schedules"][name];
        let want: Vec<f64> =
            golden["lr"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(want.len(), 42, "two steps beyond the end");
        let course = Course { power: 1.0, ..course(schedule, 40, warmup, floor) };
        let got: Vec<f64> = (0..42).map(|step| course.factor(step)).collect();
        assert_close(name, &got[..41], &want[..41], 1e-15, 1e-14);
        // Beyond the end, where Hugging Face's cosine rises again, the rate stays.
        assert!(got[41] == got[40] || schedule == InverseSqrt, "{name}");
    }
    // There is no schedule of this shape.
    assert!(unread.into_iter().eq(["cosine_with_restarts"]));
}

#[test]
fn a_setting_that_a_schedule_does_not_read_is_refused() {
    let of = |pairs: &[&str]| {
        let mut settings = Settings::default();
        pairs.iter().for_each(|p| warpo::config::set_pair(&mut [&mut settings], p).unwrap());
        Course::new(&settings, 41).map_err(|e| e.to_string())
    };
    for (pairs, says) in [
        (&["schedule_power=2"][..], "`schedule_power`: got 2, wanted schedule = \"polynomial\""),
        (&["decay_steps=5"], "`decay_steps`: got 5, wanted schedule = \"warmup_stable_decay\""),
        (&["schedule=constant", "min_learning_rate_ratio=0.1"], "`min_learning_rate_ratio`"),
        (&["schedule=inverse_sqrt", "min_learning_rate_ratio=0.1"], "`min_learning_rate_ratio`"),
        (
            &["schedule=warmup_stable_decay", "warmup_steps=20", "decay_steps=22"],
            "`decay_steps`: got 22, wanted at most 21, the steps after warm-up",
        ),
        (&["warmup_ratio=0.1", "warmup_steps=3"], "`warmup_ratio`: got 0.1, wanted none beside"),
    ] {
        let e = of(pairs).unwrap_err();
        assert!(e.contains(says), "{e}");
    }
    let got = of(&["warmup_ratio=0.1", "schedule=warmup_stable_decay"]).unwrap();
    assert_eq!((got.warmup, got.decay, got.power), (5, 4, 1.0));
    let got = of(&["schedule=polynomial", "schedule_power=2", "warmup_steps=3"]).unwrap();
    assert_eq!((got.warmup, got.power, got.factor(22)), (3, 2.0, 0.25));
}
