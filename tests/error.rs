//! Property 10: every error names what it is about, what was wanted and what came; and its exit
//! code and hint are what the help says.

use std::{io, path::Path};

use warpo::Error;

#[test]
fn errors_name_what_was_wanted_and_what_came() {
    let full = || io::Error::new(io::ErrorKind::StorageFull, "the run needs 9 bytes");
    let bad = |samples: &[u64], places: &[&str]| Error::BadNumber {
        step: 3,
        what: "the score".into(),
        value: f64::INFINITY,
        samples: samples.to_vec(),
        places: places.iter().map(ToString::to_string).collect(),
    };
    let message = "has columns prompt, wanted texts to learn".to_owned();
    for (error, text, code, hint) in [
        (
            Error::shape("rms_norm", "w", &[4], &[3]),
            "rms_norm: `w` has shape [3], wanted [4]",
            1,
            None,
        ),
        (
            Error::value("prompt of sample 7", "at least one token", "none"),
            "prompt of sample 7: got none, wanted at least one token",
            1,
            None,
        ),
        (
            Error::config("gamma", "from 0 to 1", 1.5),
            "config key `gamma`: got 1.5, wanted from 0 to 1",
            2,
            None,
        ),
        (
            Error::io("write to", "runs/a")(full()),
            "cannot write to runs/a: the run needs 9 bytes",
            1,
            None,
        ),
        (
            Error::Data { path: "a.jsonl".into(), line: 12, message },
            "a.jsonl:12: has columns prompt, wanted texts to learn",
            1,
            None,
        ),
        (
            Error::file(Path::new("m/config.json"), "`hidden_size` is \"a\", wanted a number"),
            "m/config.json: `hidden_size` is \"a\", wanted a number",
            1,
            None,
        ),
        (
            Error::Memory { what: "weights", want: 100, have: 10 },
            "weights needs 100 bytes, 10 are free",
            1,
            Some("micro_batch_tokens"),
        ),
        (bad(&[], &[]), "step 3 was abandoned: the score is inf", 4, Some("learning_rate")),
        (
            bad(&[5], &[]),
            "step 3 was abandoned: the score is inf (samples [5])",
            4,
            Some("the named samples"),
        ),
        (
            bad(&[5], &["a.jsonl:6"]),
            "step 3 was abandoned: the score is inf (samples [5], from a.jsonl:6)",
            4,
            Some("last checkpoint is untouched"),
        ),
        (
            Error::Corrupt { step: 3, what: "the weight w of the policy model".into() },
            "after step 3 the weight w of the policy model changed by itself: memory or the device \
             is at fault",
            4,
            Some("run the same command again"),
        ),
        (
            Error::Locked { path: "runs/a".into(), pid: 42 },
            "runs/a is in use by process 42",
            5,
            Some("--out"),
        ),
        (
            Error::Interrupted { signal: "SIGINT", step: 8 },
            "interrupted by SIGINT; the run is saved at step 8 and resumes from there",
            130,
            Some("same command"),
        ),
        (
            Error::Interrupted { signal: "SIGTERM", step: 8 },
            "interrupted by SIGTERM; the run is saved at step 8 and resumes from there",
            143,
            Some("same command"),
        ),
        (
            Error::Device { wanted: "tpu".into(), reason: "known devices are cpu".into() },
            "device `tpu` is not available: known devices are cpu",
            3,
            None,
        ),
    ] {
        assert_eq!(error.to_string(), text);
        assert_eq!(error.exit_code(), code, "{text}");
        let said = error.hint();
        assert_eq!(said.is_some(), hint.is_some(), "{text}: {said:?}");
        assert!(said.unwrap_or_default().contains(hint.unwrap_or_default()), "{text}");
    }
}
